"""Commands that write, as they are killed, ended and started again; no tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lives
import pytest

TRAINING = ("--train.batch-size", "4", "--train.seconds", "None", "--train.save-every", "1e-6")
# What another test shows in part, or a case of the same kind, within the time of every change.
in_full = pytest.mark.skipif(os.environ.get("DEQLIB_THOROUGH") != "1", reason="make reliability does it")
WEIGHTS, SETTINGS = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Work:
    """What is killed.

    Attributes:
        what: in words, for the page.
        arguments: of the command that does it in a folder.
        kept: names of the files that have to be the same; default all of the folder, and no others.
        goes_on: names, as patterns, of files that are whole once they are there, and stay.
        begins_with: the name whose change begins the span of time in which it is killed; default any.
        ends_once: whether the same command is refused where all is done.
    """

    what: str
    arguments: Callable[[Path], list[str]]
    kept: tuple[str, ...] = ()
    goes_on: tuple[str, ...] = ()
    begins_with: str = ""
    ends_once: bool = False

    def mark(self, folder: Path) -> object:
        """Another value after the work has written something."""
        places = [folder / self.begins_with] if self.begins_with else lives.below(folder)
        marks = []
        for place in places:
            try:
                marks.append((place, place.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return sorted(marks)

    def result(self, folder: Path) -> dict[str, bytes]:
        """What has to be the same in the end."""
        found = lives.contents(folder)
        return {name: found[name] for name in self.kept} if self.kept else found

    def is_done(self, folder: Path) -> bool:
        """Whether a kill came after all was done."""
        out = folder / "out"
        return self.ends_once and (out / WEIGHTS).exists() and not (out / "state").exists()

    def standing(self, folder: Path) -> dict[str, bytes]:
        """What is there for good."""
        names = {str(path.relative_to(folder)) for pattern in self.goes_on for path in folder.glob(pattern)}
        return {name: text for name, text in lives.contents(folder).items() if name in names}


def series(pair: tuple[str, ...], num: int) -> Work:
    return Work(
        "`viar generate --num`",
        lambda folder: [
            "generate",
            *pair,
            "--num",
            str(num),
            "--batch-size",
            "4",
            "--out",
            str(folder / "out"),
        ],
        goes_on=("out/*.png", "out/*.npz"),
    )


def tokens(pair: tuple[str, ...]) -> Work:
    flags = ["--data", "digits", "--shard-size", "100", "--batch-size", "16", *pair[2:]]
    return Work(
        "`viar tokenize`",
        lambda folder: ["tokenize", *flags, "--out", str(folder / "out")],
        goes_on=("out/*.npy", "out/*.sha256", "out/shards.json"),
    )


def training(pair: tuple[str, ...], command: str, steps: int) -> Work:
    names = ("digits",) if command == "train-tokenizer" else ("digits-viar", *pair[2:])
    return Work(
        f"`viar {command}`, a state saved after every step",
        lambda folder: [
            command,
            *names,
            *TRAINING,
            "--train.steps",
            str(steps),
            "--out",
            str(folder / "out"),
        ],
        kept=tuple(f"out/{name}" for name in (WEIGHTS, SETTINGS, "metrics.jsonl")),
        begins_with="out/state",
        ends_once=True,
    )


def picture(pair: tuple[str, ...]) -> Work:
    return Work(
        "`viar generate`",
        lambda folder: ["generate", *pair, "--per-class", "2", "--out", str(folder / "grid.png")],
        goes_on=("grid.png",),
    )


def edited(pair: tuple[str, ...], image: Path) -> Work:
    flags = [*pair, "--image", str(image), "--label", "1", "--box", "0", "0", "0.5", "0.5", "--num", "3"]
    return Work(
        "`viar edit`",
        lambda folder: ["edit", *flags, "--out", str(folder / "edited.png")],
        goes_on=("edited-*.png",),
    )


def converted(what: str, source: Path, name: str) -> Work:
    return Work(
        f"`viar convert` into {what}",
        lambda folder: ["convert", str(source), str(folder / name), "--overwrite"],
        goes_on=("out.pth", "out.safetensors", "out/[!.]*"),  # a lock of one that was killed is none
    )
