"""Tokens on disk: what is in the files, that they are the same whatever happens, and training from them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_cli import call
from test_train import Interrupted, assert_same, fresh_transformer, pictures, settings
from tiny_models import tiny_config, tiny_tokenizer, tiny_transformer, uniform

import viar.commands.cli
import viar.data.shard_writer
from viar import NextScaleTransformer, Tokenizer
from viar.data import (
    Batch,
    ImageData,
    TokenizedImages,
    TokenShards,
    from_rows,
    is_shards,
    load_data,
    tokenize,
    write_shards,
)
from viar.training import train_transformer

PATIENCE = 120.0  # seconds after which a process is taken to hang


class Cropped:
    """Images cut at random by PyTorch's own generator, as those of a folder are."""

    def __init__(self, count: int) -> None:
        self.images, self.labels = uniform(count, 3, 9, 9) * 2 - 1, torch.arange(count) % 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Any) -> Batch:
        cut = []
        for index in indices:
            top, left = (int(torch.randint(4, ())) for _ in range(2))
            cut.append(self.images[index, :, top : top + 6, left : left + 6])
        return torch.stack(cut), self.labels[torch.as_tensor(indices)]


def data(count: int = 23, held: int = 5) -> ImageData:
    return ImageData(Cropped(count), pictures(held), 3)


def write(folder: Path, images: ImageData | None = None, **changes: Any) -> Any:
    given = {"origin": {"data": "here"}, "shard_size": 10, "batch_size": 4, **changes}
    return write_shards(tiny_tokenizer(), data() if images is None else images, folder, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is in a folder


def test_rows_are_the_tokens_of_seeded_crops_in_order(tmp_path: Path) -> None:
    report = write(tmp_path, crops=2, seed=3)
    assert (report.rows, report.made, report.found) == ((46, 5), 6, 0)
    names = [*(f"train-{i:05d}" for i in range(5)), "validation-00000"]
    assert set(files(tmp_path)) == {"shards.json", *(f"{n}.{e}" for n in names for e in ("npy", "sha256"))}
    rows, images, tokenizer = TokenShards(tmp_path), Cropped(23), tiny_tokenizer()
    assert len(rows) == 46
    tokens, labels = rows.__getitems__(range(46))
    assert (tokens.shape, tokens.dtype, labels.dtype) == ((46, 14), torch.int64, torch.int64)
    for row in range(46):
        torch.manual_seed(3 * 1_000_003 + row)
        image, label = images.__getitems__([row % 23])
        assert tokens[row].equal(torch.cat(tokenizer.encode(image), 1)[0])
        assert labels[row] == label
    assert not tokens[:23].equal(tokens[23:])  # other crops
    held, _ = TokenShards(tmp_path, "validation").__getitems__(range(5))
    assert held.equal(torch.cat(tokenizer.encode(pictures(5).images), 1))


@given(st.lists(st.integers(0, 22), min_size=1, max_size=30))
def test_any_rows_come_in_the_order_asked_for(indices: list[int]) -> None:
    rows = test_any_rows_come_in_the_order_asked_for.rows
    everything, labels = rows.__getitems__(range(23))
    some, own = rows.__getitems__(indices)
    assert some.equal(everything[indices])
    assert own.equal(labels[indices])


@pytest.fixture(autouse=True, scope="module")
def _rows(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rows")
    write(folder)
    test_any_rows_come_in_the_order_asked_for.rows = TokenShards(folder)


@pytest.mark.parametrize(("codes", "dtype"), [(16, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_a_token_takes_no_more_bytes_than_it_needs(codes: int, dtype: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(codebook_size=codes)
    with torch.no_grad():  # the last code is one of those that are chosen
        tokenizer.quantizer.codebook.weight[: codes - 8] += 100
    images = ImageData(pictures(6), pictures(2), 3)
    write_shards(tokenizer, images, tmp_path, origin={})
    table = np.load(tmp_path / "train-00000.npy")
    assert table.dtype["tokens"].base == dtype
    tokens, _ = TokenShards(tmp_path).__getitems__(range(6))
    assert tokens.equal(torch.cat(tokenizer.encode(pictures(6).images), 1))
    assert int(tokens.max()) >= codes - 8


def test_writing_neither_reads_nor_moves_the_global_generator(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        write_shards(tokenizer, data(), tmp_path / name, origin={})
        assert torch.get_rng_state().equal(before)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_pickle_of_rows_holds_names_and_not_numbers(tmp_path: Path) -> None:
    write(tmp_path, shard_size=1000)
    rows = TokenShards(tmp_path)
    size = len(pickle.dumps(rows))
    expected = rows.__getitems__([3, 1])
    assert len(pickle.dumps(rows)) == size
    twin = pickle.loads(pickle.dumps(rows))
    assert all(a.equal(b) for a, b in zip(twin.__getitems__([3, 1]), expected, strict=True))


# Going on


@pytest.mark.parametrize("calls", [1, 2, 5, 9, 13])
def test_an_interrupted_folder_goes_on_to_the_same_bytes(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole", crops=2)
    replacing, begun = viar.data.shard_writer.replacing, []

    def interrupting(path: Path, **settings: Any) -> Any:
        begun.append(path)
        if len(begun) == calls:
            raise Interrupted
        return replacing(path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(viar.data.shard_writer, "replacing", interrupting)
        with pytest.raises(Interrupted):
            write(tmp_path / "parts", crops=2)
    if calls > 1:
        with pytest.raises(ValueError, match=r"files of the (train|validation) split are missing or damaged"):
            TokenShards(tmp_path / "parts"), TokenShards(tmp_path / "parts", "validation")
    report = write(tmp_path / "parts", crops=2)
    assert report.made + report.found == 6
    assert report.found == max(0, (calls - 2) // 2)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_damaged_file_is_named_and_made_again(tmp_path: Path) -> None:
    write(tmp_path)
    whole = files(tmp_path)
    for spoil in (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".sha256").unlink(),
        lambda path: path.with_suffix(".sha256").write_text("0" * 64),
    ):
        spoil(tmp_path / "train-00001.npy")
        with pytest.raises(ValueError, match=r"1 of the 3 files .* the first of them train-00001.npy"):
            TokenShards(tmp_path).verify()
        assert write(tmp_path).made == 1
        assert files(tmp_path) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"crops": 2}, "crops: 1 there, 2 now"),
        ({"shard_size": 11}, "shard_size: 10 there, 11 now"),
        ({"batch_size": 5}, "batch_size: 4 there, 5 now"),
        ({"origin": {"data": "there"}}, "origin: {'data': 'here'} there, {'data': 'there'} now"),
        ({"images": data(22)}, "images: .23, 5. there, .22, 5. now"),
    ],
)
def test_a_folder_of_other_settings_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **changes)
    assert files(tmp_path) == before


def test_a_folder_of_another_tokenizer_or_of_something_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"made with other settings.*tokenizer: "):
        write_shards(
            tiny_tokenizer(1),
            data(),
            tmp_path / "tokens",
            origin={"data": "here"},
            shard_size=10,
            batch_size=4,
        )
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder for the tokens, found a file"):
        write(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(ValueError, match="holds something else than tokens"):
        write(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "sides": 3}'])
def test_settings_that_cannot_be_read_are_named(text: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "shards.json").write_text(text)
    for work in (lambda: TokenShards(tmp_path), lambda: write(tmp_path)):
        with pytest.raises(ValueError, match=r"shards.json: unreadable"):
            work()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops": 0}, "crops must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        (
            {"crops": 2, "images": ImageData(pictures(), pictures(), 3)},
            "crops: expected 1 for images that are",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


# Training


def test_training_from_rows_is_training_from_the_images_bit_for_bit(tmp_path: Path) -> None:
    tokenizer, images = tiny_tokenizer(), pictures()
    write(tmp_path / "tokens", ImageData(images, pictures(3), 3))
    rows = TokenShards(tmp_path / "tokens")
    models = []
    for name, source in (("images", images), ("rows", rows)):
        model = fresh_transformer()
        train_transformer(model, tokenizer, source, tmp_path / name, settings(workers=int(name == "rows")))
        models.append(model)
    assert_same(*models)


def test_a_batch_of_rows_is_the_batch_of_its_images(tmp_path: Path) -> None:
    tokenizer, images = tiny_tokenizer(), pictures()
    write(tmp_path, ImageData(images, pictures(3), 3))
    made = from_rows(tokenizer, *TokenShards(tmp_path).__getitems__([4, 2]))
    for a, b in zip(made, TokenizedImages(tokenizer, images).__getitems__([4, 2]), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"codes in \[0, 16\)"):
        from_rows(tokenizer, torch.full((1, 14), 16), torch.zeros(1))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"seed": 1}, "its fingerprint is [0-9a-f]{32}, theirs [0-9a-f]{32}"),
        ({"codebook_size": 32}, "its codebook_size is 32, theirs 16"),
        ({"sides": (1, 3)}, r"its sides is \(1, 3\), theirs \(1, 2, 3\)"),
    ],
)
def test_tokens_of_another_tokenizer_are_refused_before_training(
    tokenizer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "tokens")
    own = tiny_tokenizer(**tokenizer)
    sizes = {name: value for name, value in tokenizer.items() if name != "seed"}
    model = NextScaleTransformer(tiny_config(**sizes))
    with pytest.raises(ValueError, match=f"tokens of another tokenizer .{message}"):
        train_transformer(model, own, TokenShards(tmp_path / "tokens"), tmp_path / "run", settings())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_tokens_of_another_number_of_classes_are_refused(num_classes: int, tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    model = tiny_transformer(num_classes=num_classes)
    with pytest.raises(ValueError, match=f"tokens of 3 classes, the model has {num_classes}"):
        train_transformer(
            model, tiny_tokenizer(), TokenShards(tmp_path / "tokens"), tmp_path / "run", settings()
        )


# The command


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a `tokenizer`, hardly trained, and `pictures` of three classes."""
    folder = tmp_path_factory.mktemp("saved")
    short = ("--train.steps", 2, "--train.batch-size", 16, "--augment", 0)
    code, _, errors = call("train-tokenizer", "digits", "--out", folder / "tokenizer", *short)
    assert code == 0, errors
    for index, pixels in enumerate((uniform(36, 12, 14, 3) * 255).byte().numpy()):
        path = folder / "pictures" / "abc"[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def test_the_command_writes_what_the_command_train_reads(saved: Path, tmp_path: Path) -> None:
    command = ("tokenize", "--tokenizer", saved / "tokenizer", "--data", "digits", "--out", tmp_path / "t")
    code, output, errors = call(*command)
    assert (code, errors) == (0, "")
    assert "1612 rows of tokens to train on and 185 held out" in " ".join(output.split())
    assert "2 files made now, 0 were there" in " ".join(output.split())
    assert "0 files made now, 2 were there" in " ".join(call(*command)[1].split())
    assert is_shards(tmp_path / "t")
    small = ("--train.steps", 2, "--train.batch-size", 16, "--model.width", 16, "--model.num-heads", 2)
    train = ("train", "digits-viar", "--tokenizer", saved / "tokenizer", *small, "--model.depth", 3)
    for name, source in (("tokens", tmp_path / "t"), ("images", "digits")):
        code, output, errors = call(*train, "--data", source, "--out", tmp_path / name)
        assert code == 0, errors
    one, two = (NextScaleTransformer.from_pretrained(tmp_path / name) for name in ("tokens", "images"))
    assert_same(one, two)
    for flags, message in (
        (("--augment", 2), "--augment: "),
        (("--model.num-classes", 9), "has 10 classes, got 9; leave the flag"),
        (("--model.num-classes", 11), "has 10 classes, got 11; leave the flag"),
    ):
        code, _, errors = call(*train, "--data", tmp_path / "t", "--out", tmp_path / "x", *flags)
        assert (code, errors.count("viar:")) == (2, 1)
        assert message in errors
        assert not (tmp_path / "x").exists()


def test_the_command_takes_crops_of_a_folder_and_says_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    command = ("tokenize", "--tokenizer", saved / "tokenizer", "--data", saved / "pictures")
    code, output, errors = call(*command, "--out", tmp_path / "t", "--crops", 3, "--shard-size", 50)
    assert (code, errors) == (0, "")
    source = load_data(str(saved / "pictures"), 8)
    assert len(TokenShards(tmp_path / "t")) == 3 * len(source.train)
    tokens, labels = TokenShards(tmp_path / "t", "validation").__getitems__(range(len(source.validation)))
    codec = Tokenizer.from_pretrained(saved / "tokenizer").eval()
    for row, image in enumerate(range(len(source.validation))):
        one, label = source.validation.__getitems__([image])
        assert tokens[row].equal(tokenize(codec, one, label)[1][0])
        assert labels[row] == label
    for flags, message in (
        (("--crops", 2, "--shard-size", 50), "crops: 3 there, 2 now"),
        (("--crops", 0), "crops must be at least 1, got 0"),
        (("--augment", 1), "augment"),
        (("--device", "tpu"), "--device"),
        (("--tokenizer", tmp_path / "nowhere"), "nowhere"),
        (("--data", tmp_path / "nowhere"), "nowhere"),
    ):
        code, output, errors = call(*command, "--out", tmp_path / "t", *flags)
        assert code == 2
        assert message in errors + output
        assert "Traceback" not in errors
    with pytest.raises(ValueError, match="source: "):  # tokens are not pictures
        load_data(str(tmp_path / "t"), 8)


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        flags = {"--tokenizer": saved / "tokenizer", "--data": "digits", "--out": out, "--augment": 3}
        flags |= {"--shard-size": 300, "--batch-size": 20}
        return [sys.executable, "-m", "viar", "tokenize", *(str(x) for pair in flags.items() for x in pair)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(
        command(tmp_path / "parts"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("parts/*.sha256")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    found = len(list(tmp_path.glob("parts/*.sha256")))
    assert found > 0
    for name in ("parts", "whole"):
        done = subprocess.run(command(tmp_path / name), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "shards.json").read_text())["images"] == [1612 * 4, 185]
