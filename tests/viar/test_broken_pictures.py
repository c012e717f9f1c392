"""A hundred broken folders and pictures through the command line: none is silent, no traceback."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import viar.commands.cli
import viar.commands.evaluate
import viar.commands.train
from viar import NextScaleTransformer, Tokenizer
from viar.data import all_batches
from viar.evaluation import JUDGE
from viar.training import TOKENIZERS, TRANSFORMERS

SIDE = 8


def call(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, output, errors."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["viar", *map(str, arguments)])
        code = 0
        try:
            viar.commands.cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained `tokenizer`, `viar` and, of one class, `viar-of-one` for pictures of 8 x 8."""
    folder = tmp_path_factory.mktemp("models")
    Tokenizer(TOKENIZERS["digits"].model).save_pretrained(folder / "tokenizer")
    NextScaleTransformer(TRANSFORMERS["digits-viar"].model).save_pretrained(folder / "viar")
    one_class = replace(TRANSFORMERS["digits-viar"].model, num_classes=1)
    NextScaleTransformer(one_class).save_pretrained(folder / "viar-of-one")
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(SIDE, SIDE, 3)).save(folder / "picture.png")
    return folder


def whole(kind: str = "png", side: int = SIDE, **settings: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def cut(kind: str, share: float) -> bytes:
    data = whole(kind, 32)
    return data[: int(share * len(data))]


def numbers(kind: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.linspace(-5, 1e6, SIDE**2).reshape(SIDE, SIDE).astype(kind)).save(file, "tiff")
    return file.getvalue()


FRAMES: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE), "red")]}

# Files that cannot be edited, and are no masks.
FILES: dict[str, bytes] = {
    **{
        f"cut-{share}.{kind}": cut(kind, share)
        for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff")
        for share in (0.1, 0.6)
    },
    **{f"frames.{kind}": whole(kind, **FRAMES) for kind in ("gif", "png", "webp", "tiff")},
    "empty.png": b"",
    "text.jpg": b"<html>not found</html>",
    "other.ico": whole("ico", 16),
    "float.tiff": numbers(np.float32),
    "signed.tiff": numbers(np.int32),
    "signature.png": whole()[:8],
    "wrong-crc.png": whole()[:45] + b"\0\0" + whole()[47:],
    "huge.pgm": b"P5 99999 99999 255\n" + bytes(10),
    "nothing wide.pgm": b"P5 0 5 255\n",
    "word.pgm": b"P5 a b 255\n",
}

PLACES: dict[str, Callable[[Path], None]] = {
    "gone.png": lambda path: None,
    "folder.png": lambda path: path.mkdir(),
    "link.png": lambda path: path.symlink_to("nowhere.png"),
    "circle.png": lambda path: path.symlink_to(path),
    "brackets [red].png": lambda path: path.touch(),
}


def is_one_line_that_names(path: Path, result: tuple[int, str, str]) -> None:
    code, output, errors = result
    assert code == 2, (code, output, errors)
    assert "Traceback" not in output + errors
    assert errors.startswith("viar: ")
    assert errors.count("\n") == 1
    assert path.name in errors


@pytest.mark.parametrize("role", ["--image", "--mask"])
@pytest.mark.parametrize("name", [*FILES, *PLACES])
def test_a_broken_file_to_edit_ends_in_one_line(name: str, role: str, models: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in FILES:
        path.write_bytes(FILES[name])
    else:
        PLACES[name](path)
    given = {"--image": models / "picture.png", "--mask": models / "picture.png", role: path}
    flags = [part for flag, value in given.items() for part in (flag, value)]
    pair = ("--model", models / "viar", "--tokenizer", models / "tokenizer", "--label", 3)
    is_one_line_that_names(path, call("edit", *pair, *flags, "--out", tmp_path / "out.png"))
    assert not (tmp_path / "out.png").exists()


def test_what_a_mask_means_is_said_where_it_is_not_plain(models: Path, tmp_path: Path) -> None:
    alpha = np.zeros((SIDE, SIDE, 4), np.uint8)
    alpha[:4, :, 3] = 255
    Image.fromarray(alpha).save(tmp_path / "mask.png")
    pair = ("--model", models / "viar", "--tokenizer", models / "tokenizer", "--label", 3, "--iterations", 1)
    files = (
        "--image",
        models / "picture.png",
        "--mask",
        tmp_path / "mask.png",
        "--out",
        tmp_path / "out.png",
    )
    code, output, errors = call("edit", *pair, *files)
    assert (code, errors) == (0, "")
    assert "mask.png is of one colour; what is opaque in its alpha channel is kept" in " ".join(
        output.split()
    )


def tree(**contents: bytes) -> Callable[[Path], None]:
    """Writes files whose names have "__" for "/" and end in PNG, JPEG or so after the last "_"."""

    def write(root: Path) -> None:
        for name, data in contents.items():
            stem, _, ending = name.replace("__", "/").rpartition("_")
            path = root / f"{stem}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return write


PNG = whole()

# Folders that no command can learn from.
REFUSED: dict[str, Callable[[Path], None]] = {
    "gone": lambda root: root.rmdir(),
    "file": lambda root: (root.rmdir(), root.write_bytes(PNG), None)[-1],
    "empty": lambda root: None,
    "flat": tree(a_png=PNG, b_png=PNG),
    "empty classes": lambda root: [(root / name).mkdir() for name in "ab"].clear(),
    "foreign": tree(a__x_jxl=PNG, b__x_svg=b"<svg/>"),
    "hidden": tree(**{".a__x_png": PNG}),
    "all broken": tree(a__x_png=b"", b__x_jpg=b"no", c__x_tif=b"II*\0"),
    "flat train": tree(train__a_png=PNG, val__a_png=PNG),
    "flat val": tree(train__a__a_png=PNG, val__a_png=PNG),
    "strange class": tree(train__a__a_png=PNG, val__b__a_png=PNG),
    "no train": tree(val__b__a_png=PNG),
    "beside": tree(train__a__a_png=PNG, val__a__a_png=PNG, new__a_png=PNG),
    "links": lambda root: (root / "a").symlink_to(root),
}

# Folders that are learnt from, and what must be said of them; a cut picture ends the command when drawn.
SAID: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty class": (
        lambda root: (tree(a__x_png=PNG, a__y_png=PNG)(root), (root / "b").mkdir(), None)[-1],
        "so no class: b",
    ),
    "zero bytes": (tree(a__x_png=PNG, a__y_png=PNG, a__z_png=b""), "an empty file is no picture"),
    "text": (tree(a__x_png=PNG, a__y_png=PNG, a__z_png=b"no"), "is no picture that can be read"),
    "float": (tree(a__x_png=PNG, a__y_png=PNG, a__z_tif=numbers(np.float32)), "32 bit numbers"),
    "foreign": (
        tree(a__x_png=PNG, a__y_png=PNG, a__z_jxl=PNG),
        "with the ending .jxl, which is not read: a/z.jxl",
    ),
    "stray": (tree(a__x_png=PNG, a__y_png=PNG, z_png=PNG), "in no class folder: z.png"),
    "hidden": (
        tree(**{"a__x_png": PNG, "a__y_png": PNG, ".b__z_png": PNG}),
        "hidden or left behind by a program: .b",
    ),
    "frames": (
        tree(a__x_png=PNG, a__y_png=PNG, a__z_gif=whole("gif", **FRAMES)),
        "1 with several frames or pages",
    ),
    "val": (tree(train__a__x_png=PNG, val__a__x_png=PNG), "val/ is held out"),
    "cut": (tree(a__x_jpg=cut("jpeg", 0.8), a__y_jpg=cut("jpeg", 0.8)), ".jpg: is broken"),
    "cut PNG": (tree(a__x_png=cut("png", 0.8), a__y_png=cut("png", 0.8)), ".png: is broken"),
    "one a class": (tree(a__x_png=PNG, b__x_png=PNG), "nothing is held out"),
}


def judge_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `viar evaluate` trains is hardly trained."""
    whole, short = viar.commands.evaluate.judge_of, replace(JUDGE, steps=2, width=4)
    monkeypatch.setattr(viar.commands.evaluate, "judge_of", lambda *a, **k: whole(*a, **k, recipe=short))


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that look at every picture once, and do nothing else."""

    def look(*arguments: Any, **_: Any) -> dict[str, float]:
        data = next(part for part in arguments if hasattr(part, "__getitems__"))
        return {"pictures": float(sum(len(labels) for _, labels in all_batches(data, 4)))}

    monkeypatch.setattr(viar.commands.train, "train_tokenizer", look)
    monkeypatch.setattr(viar.commands.train, "train_transformer", look)
    monkeypatch.setattr(
        viar.commands.evaluate, "generate_batches", lambda *_: iter([torch.zeros(1, 3, SIDE, SIDE)])
    )
    judge_of_two_steps(monkeypatch)


def learn(command: str, data: Path, models: Path, out: Path) -> tuple[int, str, str]:
    pair = ("--model", models / "viar-of-one", "--tokenizer", models / "tokenizer")
    settings = {
        "train-tokenizer": ("digits", "--out", out, "--augment", 0),
        "train": ("digits-viar", "--out", out, "--tokenizer", models / "tokenizer"),
        "evaluate": (*pair, "--per-class", 1),
    }
    return call(command, *settings[command], "--data", data)


@pytest.mark.parametrize("command", ["train-tokenizer", "train", "evaluate"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_without_classes_of_pictures_ends_in_one_line(
    name: str, command: str, models: Path, tmp_path: Path
) -> None:
    root = tmp_path / "pictures [all]"
    root.mkdir()
    REFUSED[name](root)
    is_one_line_that_names(root, learn(command, root, models, tmp_path / "out"))


@pytest.mark.parametrize("command", ["train-tokenizer", "train", "evaluate"])
@pytest.mark.parametrize("name", SAID)
@pytest.mark.usefixtures("short_training")
def test_what_is_left_out_of_a_folder_is_said_before_training(
    name: str, command: str, models: Path, tmp_path: Path
) -> None:
    write, words = SAID[name]
    root = tmp_path / "pictures"
    root.mkdir()
    write(root)
    code, output, errors = result = learn(command, root, models, tmp_path / "out")
    assert words in " ".join((output + errors).split())
    if name.startswith("cut") or (command, name) == ("evaluate", "one a class"):
        is_one_line_that_names(root, result)
    else:
        assert (code, errors) == (0, "")
        assert output.index(words.split()[0]) < output.index("{")  # before what training gives
        assert max(map(len, output[: output.index("{")].splitlines())) <= 100


def test_a_batch_that_is_larger_than_the_folder_is_said(
    models: Path, tmp_path: Path, short_training: None
) -> None:
    tree(a__x_png=PNG, a__y_png=PNG, a__z_png=PNG)(tmp_path / "pictures")
    _, output, _ = learn("train", tmp_path / "pictures", models, tmp_path / "out")
    assert "note: a batch of 64 holds some of the 2 pictures several times" in output


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_while_training_ends_in_one_line(
    workers: int, models: Path, tmp_path: Path
) -> None:
    tree(a__x_png=PNG, a__y_png=PNG, a__z_jpg=cut("jpeg", 0.8), b__z_jpg=cut("jpeg", 0.8))(
        tmp_path / "pictures"
    )
    short = ("--train.steps", 1, "--train.batch-size", 4, "--train.workers", workers, "--augment", 0)
    result = call(
        "train-tokenizer", "digits", "--data", tmp_path / "pictures", "--out", tmp_path / "out", *short
    )
    is_one_line_that_names(tmp_path / "pictures", result)
    assert "z.jpg: is broken (image file is truncated" in result[2]
