"""Work that writes files, by the command line and by what it calls, for tests that fail the disk under it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from kept import (
    CODEC,
    MODEL,
    SIDE,
    half_a_run,
    pictures,
    quiet,
    stage,
    train,
    write_reference,
    write_results,
)
from matplotlib.figure import Figure
from tiny_models import uniform

from deqlib.diagnostics.plots import _saved
from viar.commands.cli import main
from viar.commands.demo import _publish
from viar.data import ImageData, save_picture
from viar.evaluation.judging import JudgeRecipe, judge


class Refused(Exception):
    """A command ended with 2 and one line, which this holds."""


@dataclass(frozen=True)
class Work:
    """Something that writes into a folder, from the beginning or from where it was.

    Attributes:
        what: it writes, in words.
        do: write it; what the folder is given of inputs is in the folder `inputs`.
        before: what is there already; default nothing.
        kept: patterns of what is the same to the last bit whenever it is done; default all.
        growing: patterns of files of which others than the first and the last are whole.
    """

    what: str
    do: Callable[[Path, Path], object]
    before: Callable[[Path, Path], object] = lambda folder, inputs: None
    kept: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()


def make_inputs(folder: Path) -> None:
    """Models and pictures."""
    MODEL.save_pretrained(folder / "viar")
    CODEC.save_pretrained(folder / "tokenizer")
    command("convert", folder / "viar", folder / "viar.pth")
    for label in range(2):
        (folder / "data" / str(label)).mkdir(parents=True)
        for index, image in enumerate(uniform(4, 3, 8, 8, seed=label)):
            save_picture(image, folder / "data" / str(label) / f"{index}.png")
    save_picture(uniform(3, SIDE, SIDE), folder / "picture.png")


def command(*arguments: object) -> None:
    """A command line in this process.

    Raises:
        Refused: it ended with 2, and said why in one line.
    """
    output, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["viar", *map(str, arguments)]
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            main()
    except SystemExit as ended:
        lines = errors.getvalue().strip().splitlines()
        told = [line for line in lines if line.startswith("viar: ")]
        if ended.code != 2 or len(told) != 1 or "Traceback" in errors.getvalue():
            raise AssertionError(f"exit code {ended.code}: {errors.getvalue()}") from ended
        raise Refused(told[0]) from ended
    finally:
        sys.argv = before


def _pair(inputs: Path) -> tuple[object, ...]:
    return ("--model", inputs / "viar", "--tokenizer", inputs / "tokenizer")


def _generate(folder: Path, inputs: Path) -> None:
    command("generate", *_pair(inputs), "--per-class", 1, "--out", folder / "samples.png")


def _other_picture(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, inputs: save_picture(uniform(3, 9, 9), folder / name)


def _series(folder: Path, inputs: Path, num: int = 5) -> None:
    command("generate", *_pair(inputs), "--num", num, "--out", folder)


def _edit(folder: Path, inputs: Path) -> None:
    _edit_to(folder / "edited.png", inputs)


def _edit_to(out: Path, inputs: Path) -> None:
    part = ("--label", 1, "--box", 0.2, 0.2, 0.8, 0.8, "--num", 2)
    command("edit", *_pair(inputs), "--image", inputs / "picture.png", *part, "--out", out)


def _train_command(out: Path, inputs: Path) -> None:
    sizes = ("--model.depth", 3, "--model.width", 16, "--model.num-heads", 2, "--train.steps", 1)
    data = ("--data", inputs / "data", "--tokenizer", inputs / "tokenizer")
    command("train", "digits-viar", *data, *sizes, "--train.batch-size", 2, "--out", out)


def _tokenize(folder: Path, inputs: Path) -> None:
    sizes = ("--shard-size", 2, "--batch-size", 2)
    codec, data = inputs / "tokenizer", inputs / "data"
    command("tokenize", "--tokenizer", codec, "--data", data, *sizes, "--out", folder)


def _convert(source: str, name: str) -> Callable[[Path, Path], None]:
    return lambda folder, inputs: command("convert", inputs / source, folder / name, "--overwrite")


def _judge(folder: Path, inputs: Path) -> None:
    images = pictures()
    small = JudgeRecipe(width=2, steps=1, batch_size=4)
    padded = torch.nn.functional.pad(images.images, (1, 1, 1, 1))
    data = ImageData(type(images)(padded, images.labels), type(images)(padded, images.labels), 3)
    judge(data, cache=folder, console=quiet(), recipe=small)


def _publish_pictures(folder: Path, inputs: Path) -> None:
    _publish(folder, "stage", ("samples.png",), quiet())


def _stage_picture(folder: Path, inputs: Path) -> None:
    (folder / "stage").mkdir()
    save_picture(uniform(3, 40, 40), folder / "stage" / "samples.png")
    save_picture(uniform(3, 9, 9), folder / "samples.png")


def _figure(folder: Path, inputs: Path) -> None:
    figure = Figure()
    figure.subplots().plot([1, 3, 2])
    _saved(figure, folder / "diagnosis.png")


def _train_drawing(folder: Path, inputs: Path) -> None:
    train(folder, sample_every=1)


RUN = ("model.safetensors", "config.json", "metrics.jsonl", "curve.png", "samples/*")
GROWING = ("metrics.jsonl", "curve.png", "run.json", "README.md", "state/*", "state.old/*", "best/*/*")
WORKS = {
    "generate": Work("a picture of samples", _generate, _other_picture("samples.png")),
    "edit": Work("an edited picture", _edit, _other_picture("edited.png")),
    "series": Work("a series and its archive", _series, lambda f, i: _series(f, i, 2)),
    "tokenize": Work("tokens of a data set", _tokenize),
    "convert": Work("a published .pth", _convert("viar", "a.pth"), _convert("viar", "a.pth")),
    "safetensors": Work("published .safetensors", _convert("viar", "a.safetensors")),
    "folder": Work("a folder of a published file", _convert("viar.pth", "a"), _convert("viar.pth", "a")),
    "train": Work("a run from its start", _train_drawing, kept=RUN, growing=GROWING),
    "go on": Work(
        "a run that goes on",
        _train_drawing,
        lambda folder, inputs: half_a_run(folder, sample_every=1),
        RUN,
        GROWING,
    ),
    "reference": Work("statistics of a reference", lambda f, i: write_reference(f)),
    "judge": Work("a judge", _judge),
    "stage": Work("done.json of a stage", lambda f, i: stage(f)),
    "publish": Work("pictures of the demo", _publish_pictures, _stage_picture),
    "results": Work("figures of benchmarks", lambda f, i: write_results(f)),
    "diagnosis": Work("a picture of a diagnosis", _figure, _other_picture("diagnosis.png")),
}
# Commands by name, each with the place that it is to write to.
COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "generate": lambda out, inputs: command("generate", *_pair(inputs), "--per-class", 1, "--out", out),
    "generate --num": _series,
    "tokenize": _tokenize,
    "edit": _edit_to,
    "convert": lambda out, inputs: command("convert", inputs / "viar.pth", out),
    "train": _train_command,
}
