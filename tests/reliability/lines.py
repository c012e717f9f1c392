"""Command lines as nobody should type them, made from the flags that the parser of the commands knows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import tyro
from command_lines import NO_MODELS, draw_line

from viar.commands.cli import COMMANDS

# No device and nothing outside of a test's folder: a fault must not cost the machine.
TEXTS = ["", " ", "-", "--", "x", "é", "日本", "\udcff", "[red]a[/red]", "a\nb", "%s", "{0}", "\\", "~", "None", "a" * 4000]
NUMBERS = ["0", "-1", "2.5", "nan", "inf", "-inf", "1e400", "9" * 25, "0x10", "1_000", "True", "٣", "1,2", "1e3"]
PATHS = [".", "..", "note.txt", "note.txt/inside", "viar", "empty", "nowhere/at/all", "pipe", "link", "a[b]", "in\nline"]
PATHS += ["\udcff.png", "cut.pth", "broken.png", "series", "a" * 300, "a b", "-dash", "tokens/shards.json"]
UNKNOWN = ["--no-such-flag", "--modle", "--out.", "--", "-z", "---", "--é", "--\udcff", "--train.no.such", "--=1"]


@dataclass(frozen=True)
class Line:
    """A command line, and the folder that it runs in."""

    arguments: tuple[str, ...]
    folder: Path


@cache
def flags_of(command: str) -> tuple[tuple[str, ...], ...]:
    """Flags of a command, those of its recipes too, each with the values that it offers, if it has a choice."""
    found: dict[str, tuple[str, ...]] = {}

    def look(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    look(inner)
            for name in action.option_strings:
                if name.startswith("--") and name != "--help":
                    found[name] = tuple(map(str, action.choices or ()))

    look(tyro.extras.get_parser(COMMANDS[command]))
    return tuple((name, *choices) for name, choices in found.items())


def drawn(world: Path, number: int) -> Line:
    """The command line of a number, the same for the same number."""
    random = Random(f"line {number}")
    folder = world / "at" / str(number)
    command = random.choice(list(COMMANDS))
    try:
        known = next(line for line in (draw_line(world, random.randrange(10**6)) for _ in range(60)) if line.arguments[0] == command)
        arguments = list(known.arguments)
    except StopIteration:  # a command that is not drawn so: never a whole one, as some serve for ever
        arguments = [command, "--model", str(world / random.choice([name for name in NO_MODELS if name]))]
    for _ in range(random.choice([1, 1, 2, 3])):
        arguments = _spoilt(arguments, command, world, random)
    return Line(tuple(arguments), folder)


def _value(world: Path, random: Random) -> str:
    kind = random.random()
    if kind < 0.3:
        return random.choice(NUMBERS)
    if kind < 0.6:
        return random.choice(TEXTS)
    path = random.choice(PATHS)
    return str(world / path) if random.random() < 0.7 and path not in (".", "..") else path


def _spoilt(arguments: list[str], command: str, world: Path, random: Random) -> list[str]:
    """A line with one thing wrong with it that may or may not have been wrong before."""
    name, *choices = random.choice(flags_of(command))
    flag = [name, *([random.choice(choices)] if choices and random.random() < 0.5 else [_value(world, random)])]
    places = range(1, len(arguments))
    at = random.choice(places) if places else 1
    changes: list[Callable[[], Sequence[str]]] = [
        lambda: [*arguments, *flag],
        lambda: [*arguments, *flag, *flag],
        lambda: [*arguments, name],
        lambda: [*arguments, f"{name}={_value(world, random)}"],
        lambda: [*arguments, random.choice(UNKNOWN), *random.choice([[], ["1"]])],
        lambda: [*arguments[:at], _value(world, random), *arguments[at + 1 :]],
        lambda: [*arguments[:at], _value(world, random), *arguments[at + 1 :]],
        lambda: [*arguments[:at], *arguments[at + 1 :]],
        lambda: [*arguments[:at], _value(world, random), *arguments[at:]],
        lambda: [random.choice([*TEXTS, "no-such-command", command.upper()]), *arguments[1:]],
    ]
    return list(random.choice(changes)())


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, by its path."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(root, name))
            found[os.path.join(root, name)] = (status.st_size, status.st_mtime_ns)
    return found


def written_astray(line: Line, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Files that a line changed, or made where it did not say so."""
    told = [os.path.realpath(os.path.join(line.folder, word.partition("=")[2] or word)) for word in line.arguments if "\0" not in word]
    near = [os.path.realpath(line.folder), *told]
    changed = [path for path in before if after.get(path) != before[path]]
    made = [path for path in after if path not in before]
    out = [path for path in made if not any(_is_at(path, place) for place in near)]
    return changed + out


def _is_at(path: str, place: str) -> bool:
    """Whether a file is at a place, in it, or beside it by a longer name."""
    path, stem = os.path.realpath(path), os.path.splitext(place)[0]
    return path.startswith((place + os.sep, stem)) or path == place
