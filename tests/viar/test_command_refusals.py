"""What a command must not do without a word: take the place of something, or mix up models and classes."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from command_lines import make_world, write_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from test_broken_pictures import call
from test_command_checks import SHORT, SIDES

from viar import NextScaleTransformer
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
    for source, is_asked in {"nobody/nothing": True, "./nothing": False, "/no/such/path": False}.items():
        code, output, errors = call("generate", "--model", source, *pair(world)[2:])
        assert (code, output, errors.count("\n")) == (2, "", 1 + is_asked), errors
        assert (f"--model: no folder or file {source} here" in errors) == is_asked


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


# Launchers, names, files


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", ""])
def test_what_a_launcher_says_wrong_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert refusal("generate").startswith(f"viar: {name}: expected a whole number")


def test_no_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert "LOCAL_WORLD_SIZE: expected a whole number from 1 on, got '0'" in refusal("generate")


@pytest.mark.parametrize("flags", [("--num", 1), ("--num", 12)])
def test_an_edit_refuses_names_that_its_strip_or_numbers_make_too_long(
    flags: tuple[object, ...], world: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("a" * 232 + ".png")
    box = ("--image", world / "picture.png", "--label", 1, "--box", 0, 0, 0.5, 0.5)
    error = refusal("edit", *pair(world), *box, *flags, "--out", out)
    assert "--out: expected a name of at most 241 bytes, got one of 242" in error
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_no_checkpoint_and_nobody_is_told_to_run_code_in_it(world: Path, tmp_path: Path) -> None:
    error = refusal("convert", world / "picture.png", tmp_path / "out")
    assert "picture.png: not a checkpoint" in error
    assert "weights_only" not in error


def test_a_torchscript_program_is_no_checkpoint(tmp_path: Path) -> None:
    error = refusal("convert", program(tmp_path / "program.pt"), tmp_path / "out")
    assert "a program of TorchScript" in error
    assert "weights_only" not in error


def program(path: Path) -> Path:
    """What `torch.load` takes for a program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program/constants.pkl", b"\x80\x02).")
        archive.writestr("program/data.pkl", b"\x80\x02).")
        archive.writestr("program/version", b"3\n")
    return path


@pytest.mark.parametrize("name", ["runs/nope", "runs/nope@main"])
def test_the_hub_is_not_asked_for_what_a_folder_here_has_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    error = refusal("generate", "--model", name, "--tokenizer", name)
    assert f"--model: no {name[5:]} in the folder runs" in error


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_errors_of_the_parser_have_no_markup(more: tuple[str, ...]) -> None:
    code, _, errors = call("edit", "--image", "a.png", "--label", 1, "--box", 0, 0, 1, *more)
    assert code == 2
    assert "--box" in errors
    assert "bold]" not in errors
    assert more or len({len(line) for line in errors.splitlines() if line}) == 1  # the box has its edge


def test_a_box_says_which_of_its_numbers_are_smaller(world: Path, tmp_path: Path) -> None:
    flags = ("--image", world / "picture.png", "--label", 1, "--box", 1, 0, 0, 1, "--out", tmp_path / "a.png")
    assert "top < bottom and left < right, got" in refusal("edit", *pair(world), *flags)


def test_a_label_is_told_of_by_the_flag_that_gave_it(world: Path, tmp_path: Path) -> None:
    flags = ("--image", world / "picture.png", "--box", 0, 0, 0.5, 0.5, "--out", tmp_path / "a.png")
    assert "viar: --label: expected" in refusal("edit", *pair(world), *flags, "--label", 99)
    none = NextScaleTransformer.from_pretrained(world / "viar").null_class
    _, _, errors = call("edit", *pair(world), *flags, "--label", none)
    assert f"--label: {none} asks for no class in particular" in errors


def test_a_series_tells_how_many_more_images_are_there(world: Path, tmp_path: Path) -> None:
    flags = (*pair(world), "--out", tmp_path / "a", "--format", "png")
    assert "are there" not in call("generate", *flags, "--num", 5)[1]
    assert f"3 images in {tmp_path / 'a'} (5 are there)" in call("generate", *flags, "--num", 3)[1]
