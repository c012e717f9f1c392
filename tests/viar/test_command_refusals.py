"""What a command must not do without a word: take the place of something, or mix up models and classes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from command_lines import make_world, write_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from test_broken_pictures import call
from test_command_checks import SHORT, SIDES

from viar.data import load_data
from viar.files import check_writable, replacing, replacing_path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def pair(world: Path) -> tuple[object, ...]:
    return "--model", world / "viar", "--tokenizer", world / "tokenizer"


def refusal(*arguments: object) -> str:
    """The one line that a command ends with."""
    code, output, errors = call(*arguments)
    assert code == 2, output
    assert (errors[:6], errors.count("\n")) == ("viar: ", 1), errors
    assert "Traceback" not in output + errors
    return errors


# Places


def test_a_pipe_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    """Nor is a device: /dev/null would be gone for the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(ValueError, match=r"--out: expected a file or folder.* is a device or a pipe"):
            check_writable(path, "--out", folder=False)
        for write in (replacing, replacing_path):
            with pytest.raises(ValueError, match="is a device or a pipe"), write(path):
                raise AssertionError("nothing was to be written")
    assert pipe.is_fifo()
    assert link.is_symlink()


@pytest.mark.parametrize("command", ["generate", "edit", "convert"])
def test_a_command_does_not_write_to_a_pipe(command: str, world: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    own: dict[str, tuple[object, ...]] = {
        "generate": (*pair(world), "--per-class", 1, "--out", pipe),
        "edit": (
            *(*pair(world), "--image", world / "picture.png", "--label", 1, "--out", pipe),
            *("--box", 0, 0, 0.5, 0.5),
        ),
        "convert": (world / "viar.pth", pipe),
    }
    assert "a device or a pipe" in refusal(command, *own[command])
    assert pipe.is_fifo()


@pytest.mark.parametrize(("num", "name"), [(1, "a"), (2, "a-1"), (1, "a-strip")])
def test_an_edit_does_not_take_the_place_of_what_it_reads(
    num: int, name: str, world: Path, tmp_path: Path
) -> None:
    picture = tmp_path / f"{name}.png"
    shutil.copy(world / "picture.png", picture)
    before = picture.read_bytes()
    flags = ("--image", picture, "--label", 1, "--box", 0, 0, 0.5, 0.5, "--num", num)
    error = refusal("edit", *pair(world), *flags, "--out", tmp_path / "a.png")
    assert "would take the place of --image" in error
    assert picture.read_bytes() == before


@pytest.mark.parametrize("name", ["viar", "tokens", "classifier"])
def test_a_series_is_not_written_into_other_work(name: str, world: Path) -> None:
    before = sorted(os.listdir(world / name))
    assert f"{world / name} holds " in refusal("generate", *pair(world), "--num", 1, "--out", world / name)
    assert sorted(os.listdir(world / name)) == before


@pytest.mark.parametrize("name", ["[/b].png", "[red]a[/red].png", "x[/c]/[b]y.png"])
def test_paths_are_no_markup(name: str, world: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    code, output, errors = call("generate", *pair(world), "--per-class", 1, "--out", out)
    assert (code, errors) == (0, ""), errors
    assert out.is_file()
    assert f"images in {out}" in output


# Models


@pytest.mark.parametrize("flag", ["--model", "--tokenizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_generate_nothing(
    flag: str, value: float, world: Path, tmp_path: Path
) -> None:
    source = {"--model": "viar", "--tokenizer": "tokenizer"}[flag]
    shutil.copytree(world / source, tmp_path / "spoilt")
    weights = load_file(tmp_path / "spoilt" / "model.safetensors")
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / "spoilt" / "model.safetensors", {"format": "pt"})
    given = dict(zip(pair(world)[::2], pair(world)[1::2], strict=True)) | {flag: tmp_path / "spoilt"}
    flags = [part for item in given.items() for part in item]
    error = refusal("generate", *flags, "--out", tmp_path / "a.png")
    assert f"{flag}: {tmp_path / 'spoilt'} has weights that are not finite" in error
    assert name in error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_model_names_its_folder(name: str, world: Path) -> None:
    error = refusal("generate", "--model", world / "viar" / name, *pair(world)[2:])
    assert f"give its folder, {world / 'viar'}" in error


def test_it_is_said_that_the_hub_is_asked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for source, is_asked in {"runs/nothing": True, "./nothing": False, "/no/such/path": False}.items():
        code, output, errors = call("generate", "--model", source, *pair(world)[2:])
        assert (code, errors.count("\n")) == (2, 1), errors
        assert (f"--model: no folder or file {source} here" in output) == is_asked


# Settings and data


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--model.width", 15), "--model.width: num_heads=4 must divide width=15"),
        (("--train.lr=nan",), "--train.lr: lr must be positive, got nan"),
        (("--model.trunk.grad", 2, 1), "--model.trunk.grad: grad must be"),
        (
            ("--train.steps", "None", "--train.seconds", "None"),
            "--train.seconds, --train.steps: give steps or",
        ),
    ],
)
def test_what_settings_refuse_is_one_line_that_names_the_flag(
    flags: tuple[object, ...], expected: str, world: Path, tmp_path: Path
) -> None:
    error = refusal("train", "digits-viar", *pair(world)[2:], "--out", tmp_path / "run", *flags)
    assert error.startswith(f"viar: {expected}"), error


def test_help_and_unknown_flags_are_the_parsers_own(world: Path) -> None:
    code, output, _ = call("generate", "--help")
    assert code == 0
    assert "--per-class" in output
    code, _, errors = call("generate", *pair(world), "--lables", 1)
    assert code == 2
    assert "--lables" in errors


@pytest.mark.parametrize("command", ["train-tokenizer", "train", "tokenize"])
def test_nothing_is_written_among_the_pictures_themselves(command: str, world: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "own"
    write_pictures(pictures, classes=2)
    before = sorted(pictures.rglob("*"))
    recipe = {"train-tokenizer": ["digits"], "train": ["digits-viar"], "tokenize": []}[command]
    codec = [] if command == "train-tokenizer" else ["--tokenizer", world / "tokenizer"]
    said = refusal(command, *recipe, "--data", pictures, *codec, "--out", tmp_path / "own" / ".")
    assert "is the folder of the data" in said
    assert sorted(pictures.rglob("*")) == before


def test_a_recipes_augment_is_not_for_a_folder(world: Path, tmp_path: Path) -> None:
    sizes = ("--model.base-channels", 4, "--model.num-groups", 2, "--model.sides", *SIDES)
    start = ("train-tokenizer", "digits", "--data", world / "data3", *sizes, *SHORT, 1)
    code, _, errors = call(*start, "--out", tmp_path / "run")
    assert code == 0, errors
    assert "viar: --augment: expected 0" in refusal(*start, "--out", tmp_path / "other", "--augment", 1)


def test_data_that_cannot_be_served_names_the_flag(world: Path, tmp_path: Path) -> None:
    for command in (("evaluate", *pair(world)), ("tokenize", *pair(world)[2:], "--out", tmp_path / "t")):
        for data in ("svhn", world / "note.txt", world / "empty"):
            assert refusal(*command, "--data", data).startswith("viar: --data: expected one of")
    # mnist has 32 pixels, and this tokenizer fewer
    told = refusal("evaluate", *pair(world), "--data", "mnist")
    assert told.startswith("viar: --data: 'mnist' has 32 x 32 images")


def test_classes_that_move_are_named_where_training_starts_from_a_checkpoint(
    world: Path, tmp_path: Path
) -> None:
    """A class whose name comes first pushes all others to other numbers, and to others' weights."""
    write_pictures(tmp_path / "data", 3)
    shutil.copytree(tmp_path / "data" / "class0", tmp_path / "data" / "[a]nt")
    code, output, errors = call(
        *("train", "digits-viar", "--from", world / "viar", *pair(world)[2:], "--data", tmp_path / "data"),
        *("--out", tmp_path / "run", *SHORT, 1),
    )
    assert code == 0, errors
    assert (
        "classes are matched by number, not by name; 0 [a]nt, 1 class0, 2 class1: go on with the "
        "checkpoint's classes of the same numbers; 3 class2: new" in output
    )


@pytest.mark.parametrize("parts", [("mine",), ("train", "mine")])
def test_one_class_with_folders_in_it_is_remarked(parts: tuple[str, ...], tmp_path: Path) -> None:
    """As where an archive was unpacked into a folder of its own."""
    write_pictures(tmp_path.joinpath(*parts), 2)
    report = load_data(str(tmp_path), 8).report
    assert report is not None
    assert report.class_names == ("mine",)
    (note,) = report.notes
    assert f"give {tmp_path.joinpath(*parts)} if these are the classes" in note
    assert load_data(str(tmp_path.joinpath(*parts)), 8).report.notes == ()  # type: ignore[union-attr]
    pixels = np.zeros((8, 8, 3), np.uint8)
    (tmp_path.joinpath(*parts).parent / "other").mkdir()
    Image.fromarray(pixels).save(tmp_path.joinpath(*parts).parent / "other" / "a.png")
    again = load_data(str(tmp_path), 8).report
    assert again is not None
    assert again.notes == ()
