"""The promises of SECURITY.md that need no web page: what strangers' files and names cannot do."""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from rich.console import Console
from test_cli import call
from test_train import fresh_transformer, pictures, settings
from tiny_models import tiny_tokenizer, tiny_transformer

import viar.pretrained
from viar import NextScaleTransformer, Tokenizer
from viar.app.drawing import MOST_BYTES, read_sent
from viar.checkpoints.convert import convert_checkpoint, export_official, load_official
from viar.commands.app import LOOPBACK, app_command
from viar.data import ImageData, load_data, read_mask, read_picture, write_shards
from viar.data.decoding import KINDS, decode_bytes, decode_picture
from viar.data.hub import split_hub
from viar.data.shards import TokenShards
from viar.evaluation import FeatureNetwork, Features, find_pictures, read_reference
from viar.files import held, replacing, replacing_path
from viar.generation.series.series import generate_series
from viar.training import train_transformer
from viar.training.checkpoint import DIGEST, FILE, _read

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*ROOT.glob("deqlib/**/*.py"), *ROOT.glob("models/viar/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
MOST_GROWTH = 60 * 2**10  # kilobytes that a refusal may take
MOST_SECONDS = 20.0  # on a busy machine


# No code


@pytest.mark.promise("No code from files")
def test_no_module_reads_what_could_be_code() -> None:
    forbidden = {"pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "os.system", "yaml.load"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
            assert name not in forbidden, where
            if name == "torch.load":
                assert options.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", where
            if name.startswith("subprocess.") or name.endswith("_subprocess"):
                assert "benchmarks" in path.parts, where
            assert options.get("trust_remote_code", "False") == "False", where


class Loud:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.promise("No code from files")
@pytest.mark.parametrize(
    "kind", ["checkpoint", "old checkpoint", "pickle", "state", "state of old", "numbers"]
)
def test_code_in_a_file_is_not_run(kind: str, tmp_path: Path) -> None:
    heard, path = tmp_path / "heard", tmp_path / "a.pth"
    held = {"model": {"a": torch.ones(1)}, "more": Loud(heard)}
    if kind in ("checkpoint", "old checkpoint"):
        torch.save(held, path, _use_new_zipfile_serialization=kind == "checkpoint")
        read: Callable[[], object] = lambda: load_official(path)  # noqa: E731
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(held))
        read = lambda: load_official(path)  # noqa: E731
    elif kind == "numbers":
        np.savez(tmp_path / "a.npz", mu=np.array([held], dtype=object), sigma=np.eye(1))
        read = lambda: read_reference(str(tmp_path / "a.npz"), NETWORK, 6)  # noqa: E731
    else:
        name = FILE if kind == "state" else "optimizer.bin"
        torch.save(held, tmp_path / name)
        (tmp_path / DIGEST).write_text(viar.files.file_digest(tmp_path / name))
        read = lambda: _read(tmp_path)  # noqa: E731
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        read()
    assert not heard.exists()


def see(images: torch.Tensor) -> Features:
    return Features(images.mean((2, 3)), None)


NETWORK = FeatureNetwork("inception 1", see)


# No more memory than the file


def saved_model(folder: Path, kind: str, **changes: Any) -> Callable[[], object]:
    model: Any = tiny_tokenizer() if kind == "tokenizer" else tiny_transformer()
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return lambda: type(model).from_pretrained(folder)


def header_of(length: int, text: bytes = b"{}") -> Callable[[Path], Callable[[], object]]:
    def spoil(folder: Path) -> Callable[[], object]:
        read = saved_model(folder, "transformer")
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text)
        return read

    return spoil


def numbers_of(
    shape: tuple[int, ...], name: str = "mu", packed: int = 0
) -> Callable[[Path], Callable[[], object]]:
    """An archive whose header tells of that shape, with so many zeros behind it, packed."""

    def spoil(folder: Path) -> Callable[[], object]:
        kind = np.uint8 if name == "arr_0" else np.float64
        header = io.BytesIO()
        told = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, told)
        with (
            zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(f"{name}.npy", "w") as member,
        ):
            member.write(header.getvalue())
            for _ in range(packed // 2**20):
                member.write(bytes(2**20))
        if name == "arr_0":
            return lambda: find_pictures(folder / "a.npz")
        return lambda: read_reference(str(folder / "a.npz"), NETWORK, 6)

    return spoil


def long_header(folder: Path) -> Callable[[], object]:
    """An archive of an array whose header is of 200 megabytes, of spaces, packed."""
    with (
        zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        member.write(b"\x93NUMPY\x02\0" + struct.pack("<I", 200 * 2**20))
        for _ in range(200):
            member.write(b" " * 2**20)
    return lambda: find_pictures(folder / "a.npz")


def checkpoint_of(
    value: Any, *, packed: bool = False, old: bool = False
) -> Callable[[Path], Callable[[], object]]:
    def spoil(folder: Path) -> Callable[[], object]:
        path = folder / "a.pth"
        torch.save(value, path, _use_new_zipfile_serialization=not old)
        if packed:
            with zipfile.ZipFile(path) as archive:
                entries = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in entries.items():
                    archive.writestr(name, data)
        return lambda: load_official(path)

    return spoil


def of_many_classes() -> dict[str, torch.Tensor]:
    """A VAR that takes 640 MB, in a file that has none of it."""
    held = export_official(tiny_transformer("explicit"))
    (name,) = [
        name for name, tensor in held.items() if len(tensor) == 4 and tensor.ndim == 2 and "emb" in name
    ]
    return {**held, name: torch.zeros(1).expand(10**7, held[name].shape[1])}


class Zeros:
    """Whose pickle is a few bytes, and becomes as many as it says."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (10**11,)


def shards_of(**changes: Any) -> Callable[[Path], Callable[[], object]]:
    def spoil(folder: Path) -> Callable[[], object]:
        write_shards(tiny_tokenizer(), ImageData(pictures(4), pictures(2), 3), folder, origin={})
        path = folder / "shards.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return lambda: TokenShards(folder)

    return spoil


def png(
    *chunks: tuple[bytes, bytes], width: int = 8, height: int = 8
) -> Callable[[Path], Callable[[], object]]:
    def spoil(folder: Path) -> Callable[[], object]:
        head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        body = (b"IDAT", zlib.compress(b"".join(b"\0" + bytes(24) for _ in range(8))))
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in (head, *chunks, body, (b"IEND", b""))
        )
        (folder / "a.png").write_bytes(content)
        return lambda: read_picture(folder / "a.png", 8)

    return spoil


def large_picture(kind: str) -> Callable[[Path], Callable[[], object]]:
    """A small file of a large picture: its size where the kind has it."""

    def spoil(folder: Path) -> Callable[[], object]:
        path = folder / f"a.{kind}"
        Image.new("L", (8, 8)).save(path)
        content = bytearray(path.read_bytes())
        if kind == "gif":
            content[6:10] = struct.pack("<HH", 65535, 65535)
        elif kind == "bmp":
            content[18:26] = struct.pack("<ii", 100_000, 100_000)
        else:
            content = bytearray(b"P5 100000 100000 255\n" + bytes(64))
        path.write_bytes(content)
        return lambda: decode_picture(path)

    return spoil


PACKED = zlib.compress(bytes(20 * 2**20))
HUGE = b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,0]}}'
ABSURD: dict[str, Callable[[Path], Callable[[], object]]] = {
    "header of 2**60 bytes": header_of(2**60),
    "header of more than the file": header_of(10**6),
    "tensor of 2**60 numbers": header_of(len(HUGE), HUGE),
    "wide model": lambda folder: saved_model(folder, "transformer", width=2**20, num_heads=1),
    "deep model": lambda folder: saved_model(folder, "transformer", depth=10**12),
    "large pictures": lambda folder: saved_model(folder, "transformer", sides=[1, 2, 10**5]),
    "many channels": lambda folder: saved_model(folder, "tokenizer", base_channels=2**30),
    "many convolutions": lambda folder: saved_model(folder, "tokenizer", num_phi=10**9),
    "statistics of 10**12": numbers_of((10**12,)),
    "packed statistics": numbers_of((9 * 2**20,), packed=72 * 2**20),
    "pictures of 10**6 a side": numbers_of((1, 10**6, 10**6, 3), "arr_0"),
    "packed header": long_header,
    "packed pictures": numbers_of((1, 5120, 5120, 3), "arr_0", packed=75 * 2**20),
    "packed checkpoint": checkpoint_of({"a": torch.zeros(2**20)}, packed=True),
    "bytes of any number": checkpoint_of({"a": Zeros()}),
    "bytes of any number, old": checkpoint_of({"a": Zeros()}, old=True),
    "expanded tensor": lambda folder: checkpoint_of(of_many_classes())(folder),
    "tokens of 10**15 images": shards_of(images=[10**15, 1]),
    "tokens of 10**9 a side": shards_of(sides=[1, 10**9]),
    "picture of 100,000 x 100,000": png(width=100_000, height=100_000),
    "picture of 100 million pixels in 100 bytes": png(width=8, height=12 * 10**6),
    "packed text": png((b"zTXt", b"a\0\0" + PACKED)),
    "packed profile": png((b"iCCP", b"a\0\0" + PACKED)),
    "GIF": large_picture("gif"),
    "BMP": large_picture("bmp"),
    "PGM": large_picture("pgm"),
}


@pytest.mark.promise("No more memory than the file")
@pytest.mark.parametrize("kind", ABSURD)
def test_what_tells_of_more_than_it_has_is_refused_before_memory_is_taken(kind: str, tmp_path: Path) -> None:
    read = ABSURD[kind](tmp_path)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=str(tmp_path)):
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH
    assert time.perf_counter() - start < MOST_SECONDS


@pytest.mark.promise("No more memory than the file")
def test_a_mask_of_another_size_than_the_picture_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (90, 90)).save(tmp_path / "mask.png")
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"mask: .*mask.png has 90 x 90 pixels, the picture 8 x 8"):
        read_mask(tmp_path / "mask.png", 8, (8, 8))


# Pictures of kinds that are read


@pytest.mark.promise("No reader but those of ten kinds")
@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA"])
def test_no_other_reader_sees_a_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of EPS would start Ghostscript, a whole programming language."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", kind)
    Image.init()
    for other in set(Image.OPEN) - set(KINDS):
        accept = Image.OPEN[other][1]
        opened = lambda *_: pytest.fail("another reader was asked")  # noqa: E731
        monkeypatch.setitem(Image.OPEN, other, (opened, accept))
    for read in (
        lambda: decode_picture(tmp_path / "a.png"),
        lambda: decode_bytes((tmp_path / "a.png").read_bytes(), "a.png"),
    ):
        with pytest.raises(ValueError, match=r"a.png: (is no picture|\w+ files are not read)"):
            read()


# Nothing outside of the folder


def trained(folder: Path) -> None:
    train_transformer(
        fresh_transformer(), tiny_tokenizer(), pictures(), folder, settings(steps=2), console=quiet()
    )


def quiet() -> Console:
    return Console(file=io.StringIO())


WRITERS: dict[str, Callable[[Path], object]] = {
    "model": lambda folder: tiny_transformer().save_pretrained(folder),
    "series": lambda folder: generate_series(
        tiny_transformer(), tiny_tokenizer(), folder, 3, console=quiet()
    ),
    "tokens": lambda folder: write_shards(
        tiny_tokenizer(), ImageData(pictures(4), pictures(2), 3), folder, origin={}
    ),
    "run": trained,
}


@pytest.mark.promise("Nothing outside of the folder")
@pytest.mark.parametrize("ending", ["", ".partial"])
@pytest.mark.parametrize("kind", WRITERS)
def test_links_in_a_folder_lead_nothing_out_of_it(kind: str, ending: str, tmp_path: Path) -> None:
    plain, trap, outside = (tmp_path / name for name in ("plain", "trap", "outside"))
    WRITERS[kind](plain)
    outside.mkdir()
    names = [path.relative_to(plain) for path in plain.rglob("*") if path.is_file()]
    for name in names:
        (trap / name).parent.mkdir(parents=True, exist_ok=True)
        if name.name in ("series.json", "shards.json"):  # without which the folder is none of this kind
            shutil.copy(plain / name, trap / name)
        elif name.parts[0] != "model.safetensors" or kind != "run":  # a run that has it is at its end
            (outside / name.name).write_text("mine")
            (trap / f"{name}{ending}").symlink_to(outside / name.name)
    WRITERS[kind](trap)
    assert {path.read_text() for path in outside.iterdir()} == {"mine"}
    kept = {name.name for name in names if (trap / name).is_symlink()}
    assert kept <= {"README.md"}  # which a user may have written, so it is left as it is


@pytest.mark.promise("Nothing outside of the folder")
def test_a_folder_to_save_in_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "model" / ".saving").symlink_to(tmp_path / "outside")
    tiny_transformer().save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "outside").iterdir())
    assert sorted(path.name for path in (tmp_path / "model").iterdir())[0] == "README.md"


@pytest.mark.promise("Nothing outside of the folder")
def test_a_link_is_replaced_itself_and_one_that_a_user_names_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "there", tmp_path / "a.pth"
    for write in (replacing, replacing_path):
        target.write_text("before")
        link.symlink_to(target)
        with write(link) as fresh:
            fresh.write_bytes(b"after") if isinstance(fresh, Path) else fresh.write(b"after")
        assert (link.is_symlink(), link.read_text(), target.read_text()) == (False, "after", "before")
        link.unlink()
    link.symlink_to(target)
    tiny_transformer("explicit").save_pretrained(tmp_path / "model")
    convert_checkpoint(tmp_path / "model", link, overwrite=True)
    assert link.is_symlink()
    assert load_official(target).config.depth == 3


@pytest.mark.promise("Nothing outside of the folder")
@pytest.mark.parametrize("make", [os.link, lambda target, partial: os.mkfifo(partial)], ids=["link", "pipe"])
def test_what_has_the_name_of_a_file_that_is_begun_is_not_written_to(
    make: Callable[[Path, Path], object], tmp_path: Path
) -> None:
    target, path = tmp_path / "there", tmp_path / "a.png"
    target.write_text("before")
    make(target, tmp_path / "a.png.partial")
    with replacing(path) as file:
        file.write(b"after")
    assert (path.read_text(), target.read_text()) == ("after", "before")
    assert {place.name for place in tmp_path.iterdir()} == {"there", "a.png"}


@pytest.mark.promise("Nothing outside of the folder")
def test_a_lock_that_is_a_link_empties_no_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with suppress(OSError), held(tmp_path / "run"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.promise("Nothing outside of the folder")
def test_names_in_archives_and_settings_are_no_places(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for name in ("../out.npy", "/tmp/out.npy", "mu.npy"):
            content = io.BytesIO()
            np.save(content, np.zeros(3))
            archive.writestr(name, content.getvalue())
    with pytest.raises(ValueError, match=r"a.npz"):
        read_reference(str(folder / "a.npz"), NETWORK, 6)
    classes = ImageData(pictures(4), pictures(2), 3, ("../../out", "/out", "\x1b[31m"))
    write_shards(tiny_tokenizer(), classes, folder / "tokens", origin={"data": "../../out"})
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """What the hub is asked for: a name, a file and a revision. It has the tiny transformer."""
    asked: list[tuple[str, str, str | None]] = []
    tiny_transformer().save_pretrained(tmp_path / "model")

    def download(repo_id: str, filename: str, revision: str | None = None, **options: Any) -> str:
        asked.append((repo_id, filename, revision))
        path = tmp_path / "model" / filename
        if not path.exists():
            raise missing()
        return str(path)

    for module in (huggingface_hub.hub_mixin, viar.pretrained):
        monkeypatch.setattr(module, "hf_hub_download", download)
    return asked


def missing() -> EntryNotFoundError:
    error = EntryNotFoundError.__new__(EntryNotFoundError)
    error.args = ("404",)
    return error


@pytest.mark.promise("Nothing from a network unasked")
@pytest.mark.parametrize("how", ["@", "argument", "none"])
def test_a_model_of_the_hub_is_of_the_revision_that_was_asked_for(how: str, hub: list[Any]) -> None:
    revision = None if how == "none" else "0123abc"
    if how == "argument":
        NextScaleTransformer.from_pretrained("some/model", revision=revision)
    else:
        NextScaleTransformer.from_pretrained("some/model" if revision is None else f"some/model@{revision}")
    assert hub == [("some/model", name, revision) for name in ("config.json", "model.safetensors")]


@pytest.mark.promise("Nothing from a network unasked")
def test_no_pickle_of_the_hub_is_asked_for(hub: list[Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"some/model: has no model.safetensors; pickles are not read"):
        NextScaleTransformer.from_pretrained("some/model")
    assert [name for _, name, _ in hub] == ["config.json", "model.safetensors"]


@pytest.mark.promise("Nothing from a network unasked")
def test_a_folder_whose_name_has_an_at_is_that_folder(tmp_path: Path, hub: list[Any]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "a@b")
    assert Tokenizer.from_pretrained(tmp_path / "a@b").config == tiny_tokenizer().config
    assert hub == []


@pytest.mark.promise("Nothing from a network unasked")
def test_a_data_set_is_of_the_revision_that_was_asked_for_and_no_code_of_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        raise OSError("no network")

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", load)
        for name in ("some/set", "some/set@0123abc", "some/set:small@v1"):
            with pytest.raises(ValueError, match=f"hub:{name}: cannot be had"):
                load_data(f"hub:{name}", 8)
    wanted = [("some/set", None, None), ("some/set", None, "0123abc"), ("some/set", "small", "v1")]
    assert asked == [((path, config), {"revision": revision}) for path, config, revision in wanted]
    script = tmp_path / "own" / "own.py"
    script.parent.mkdir()
    script.write_text(f"open({str(tmp_path / 'heard')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"hub:.*own: cannot be had"):
        split_hub(str(script.parent))
    assert not (tmp_path / "heard").exists()


# What is shown


@pytest.mark.promise("Nothing but text on the screen")
@pytest.mark.parametrize("letter", ["\x1b[31m", "\x9b31m", "\r", "\x07", "\u202e"])
def test_names_and_settings_put_no_control_characters_on_the_screen(letter: str, tmp_path: Path) -> None:
    model = tmp_path / f"mo{letter}del"
    tiny_transformer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"trunk": {"kind": letter}}))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    picture = tmp_path / f"{letter}.png"
    picture.write_bytes(b"no picture")
    out = ("--out", tmp_path / "out.png")
    pair = ("--tokenizer", tmp_path / "tokenizer", *out)
    for command in (
        ("generate", "--model", model, *pair),
        ("generate", "--model", tmp_path / f"gone{letter}", *pair),
        ("edit", "--image", picture, "--label", 1, "--box", 0, 0, 0.5, 0.5, *out),
        ("tokenize", "--data", tmp_path / letter, "--tokenizer", tmp_path / "tokenizer", *out),
        ("convert", picture, tmp_path / "out"),
    ):
        code, output, errors = call(*command)
        assert code == 2, (command, output, errors)
        assert letter not in output + errors
        assert all(one.isprintable() for one in (output + errors).replace("\n", ""))


# The page


@pytest.mark.promise("The page is for this machine")
def test_the_page_is_reached_from_this_machine_alone_unless_another_address_is_given() -> None:
    assert inspect.signature(app_command).parameters["host"].default == LOOPBACK == "127.0.0.1"


@pytest.mark.promise("The page is for this machine")
def test_a_picture_that_is_sent_has_a_size_that_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match=f"picture: expected at most {MOST_BYTES:,} bytes"):
        read_sent(bytes(MOST_BYTES + 1), "picture")


def test_what_is_saved_is_read_again_by_what_looks_so_closely(tmp_path: Path) -> None:
    model = tiny_transformer("explicit")
    for name in ("a.pth", "a.safetensors"):
        model.save_pretrained(tmp_path / "model")
        convert_checkpoint(tmp_path / "model", tmp_path / name)
        again = export_official(load_official(tmp_path / name, num_heads=None))
        assert all(torch.equal(again[key], value) for key, value in export_official(model).items())
