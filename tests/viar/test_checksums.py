"""Files that are held against a checksum: what was changed is refused, what has none is taken as it is."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer, tiny_transformer

from viar import NextScaleTransformer, Tokenizer, export_official, load_official
from viar.checkpoints.convert import convert_checkpoint
from viar.checksums import load_tensors, read_json, save_tensors, to_json
from viar.data.decoding import decode_bytes
from viar.evaluation.features import FeatureNetwork, Features
from viar.evaluation.references import read_reference


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_transformer().save_pretrained(tmp_path)
    return tmp_path


def test_tensors_and_settings_come_back_whatever_their_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tensors, tmp_path / "t.safetensors", "settings")
    found = load_tensors(tmp_path / "t.safetensors", "settings")
    assert all(found[name].equal(tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="or what is kept beside it is damaged or was changed"):
        load_tensors(tmp_path / "t.safetensors", "others")
    (tmp_path / "a.json").write_bytes(to_json({"b": [1, 0.1], "a": None}))
    assert read_json(tmp_path / "a.json") == {"b": [1, 0.1], "a": None}


def test_a_weight_of_another_bit_is_refused(folder: Path) -> None:
    flip(folder / "model.safetensors", -1)
    with pytest.raises(ValueError, match=r"model.safetensors or what is kept beside it is damaged"):
        NextScaleTransformer.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"model.safetensors or what is kept beside it is damaged"):
        convert_checkpoint(folder, folder / "out.pth")


def test_a_setting_of_another_number_is_refused_and_another_order_is_not(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    NextScaleTransformer.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "drop_path": 0.5}))
    with pytest.raises(ValueError, match=f"{folder}: .*damaged or was changed .* fetch or make it again"):
        NextScaleTransformer.from_pretrained(folder)


def test_a_model_that_was_saved_without_a_checksum_is_taken_as_it_is(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    assert NextScaleTransformer.from_pretrained(folder).pos_start.equal(tiny_transformer().pos_start + 1)


def test_a_published_file_with_a_weight_of_another_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "var.pth"
    torch.save(export_official(tiny_transformer("explicit")), path)
    load_official(path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flip(path, largest.header_offset + 500)
    with pytest.raises(ValueError, match=r"var.pth: .*data/\d+ in it is damaged.* fetch or make it again"):
        load_official(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (to_json({"fid": 1.5}).decode().replace("1.5", "1.4"), "not what was written"),
        ("3", "expected settings by name, found int"),
        ("[" * 100_000, "too deep"),
    ],
)
def test_json_that_was_changed_or_is_something_else_is_refused(text: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=error):
        read_json(tmp_path / "a.json")


def test_json_without_a_checksum_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"fid": 1.4}')
    assert read_json(tmp_path / "a.json") == {"fid": 1.4}


def test_a_png_whose_pixels_are_not_what_its_checksum_says_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "png", compress_level=0)
    content = bytearray(file.getvalue())
    content[content.index(b"IDAT") + 40] ^= 1
    with pytest.raises(ValueError, match=r"a.png: is broken \(its pixels are not what their checksum says\)"):
        decode_bytes(bytes(content), "a.png")


def test_an_array_that_is_longer_than_its_header_says_is_refused(tmp_path: Path) -> None:
    network = FeatureNetwork("mean", lambda images: Features(images.mean((2, 3)), None))
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=np.zeros((12, 16, 16, 3), np.uint8))
    read_reference(str(path), network, 16)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(12, 16", b"(11, 16"))
    with pytest.raises(ValueError, match=r"a\.npz .* take 8,448 bytes, and there are 9,216"):
        read_reference(str(path), network, 16)


def test_a_tokenizer_is_saved_with_its_settings_too(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"num_groups": 2', '"num_groups": 1'))
    with pytest.raises(ValueError, match="damaged or was changed"):
        Tokenizer.from_pretrained(tmp_path)
