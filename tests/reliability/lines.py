"""Command lines as nobody should type them, made from the flags that the parser of the commands knows."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import tyro
from command_lines import NO_MODELS, draw_line
from forks import Hung, Outcome, limit

import benchmarks.command
from viar.commands.cli import main
from viar.commands.table import COMMANDS, load

SECONDS = 40  # of a processor: what a line of this world asks for takes less

# No device and nothing outside of a test's folder: a fault must not cost the machine.
TEXTS = [
    "",
    " ",
    "-",
    "--",
    "x",
    "é",
    "日本",
    "\udcff",
    "[red]a[/red]",
    "a\nb",
    "%s",
    "{0}",
    "\\",
    "~",
    "None",
    "a" * 4000,
]
NUMBERS = [
    "0",
    "-1",
    "2.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 25,
    "0x10",
    "1_000",
    "True",
    "٣",
    "1,2",
    "1e3",
]
PATHS = [
    ".",
    "..",
    "note.txt",
    "note.txt/inside",
    "viar",
    "empty",
    "nowhere/at/all",
    "pipe",
    "link",
    "a[b]",
    "in\nline",
]
PATHS += ["\udcff.png", "cut.pth", "broken.png", "series", "a" * 300, "a b", "-dash", "tokens/shards.json"]
UNKNOWN = [
    "--no-such-flag",
    "--modle",
    "--out.",
    "--",
    "-z",
    "---",
    "--é",
    "--\udcff",
    "--train.no.such",
    "--=1",
]


@dataclass(frozen=True)
class Line:
    """A command line, the folder that it runs in, the world around that, and what runs it."""

    arguments: tuple[str, ...]
    folder: Path
    world: Path
    main: Callable[[], object]


@cache
def flags_of(command: str) -> tuple[tuple[str, ...], ...]:
    """Flags of a command, those of its recipes too, each with the values that it offers, if any."""
    found: dict[str, tuple[str, ...]] = {}

    def look(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    look(inner)
            for name in action.option_strings:
                if name.startswith("--") and name != "--help":
                    found[name] = tuple(map(str, action.choices or ()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there is no other way to ask for the flags
        look(tyro.extras.get_parser(load(command)))
    return tuple((name, *choices) for name, choices in found.items()) or (("--help",),)


def drawn(world: Path, number: int) -> Line:
    """The command line of a number, the same for the same number."""
    random = Random(f"line {number}")
    folder = world / "at" / str(number)
    command = random.choice(list(COMMANDS))
    whole = (draw_line(world, random.randrange(10**6)).arguments for _ in range(60))
    arguments = next((list(words) for words in whole if words[0] == command != "app"), [])
    if not arguments:  # not drawn so, or app: a whole line of that would serve for ever
        arguments = [command, "--model", str(world / random.choice([name for name in NO_MODELS if name]))]
    for _ in range(random.choice([1, 1, 2, 3])):
        arguments = _spoilt(arguments, command, world, random)
    return Line(tuple(arguments), folder, world, main)


def drawn_of_benchmarks(world: Path, number: int) -> Line:
    """The same of `python -m benchmarks`: none that would measure."""
    random = Random(f"benchmarks {number}")
    begin = random.choice(
        [["compare", "note.txt", "note.txt"], ["plot", "note.txt"], ["docs"], ["nothing"], []]
    )
    words = [str(world / word) if word == "note.txt" else word for word in begin]
    for _ in range(random.choice([1, 2, 3])):
        flags = ["--out", "--threshold", "--quick", "--device", "--no-such-flag", "--only"]
        words += [random.choice(flags), _value(world, random)]
    if words[:1] == ["docs"]:
        words += ["--no-such-flag"]  # else it would write the documentation
    return Line(tuple(words), world / "at" / f"benchmarks{number}", world, benchmarks.command.main)


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
    offered = bool(choices) and random.random() < 0.5
    flag = [name, random.choice(choices) if offered else _value(world, random)]
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


def written_astray(line: Line, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Files of the world that a line changed, or made where it did not say so."""
    words = [word.partition("=")[2] or word for word in line.arguments]
    told = [os.path.realpath(os.path.join(line.folder, word)) for word in words if "\0" not in word]
    near = [os.path.realpath(line.folder), *told]
    changed = [path for path in before if after.get(path) != before[path]]
    made = [path for path in after if path not in before]
    out = [path for path in made if not any(_is_at(path, place) for place in near)]
    return f"wrote {[*changed, *out][:3]}" if changed or out else ""


def _is_at(path: str, place: str) -> bool:
    """Whether a file is at a place, in it, or beside it by a longer name."""
    path, stem = os.path.realpath(path), os.path.splitext(place)[0]
    return path.startswith((place + os.sep, stem)) or path == place


def watched(line: Line) -> Outcome:
    """What comes of a line, with its files and what it says; for a forked process."""
    line.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(line.folder)
    before = files_in(line.world)
    sys.argv = ["viar", *line.arguments]
    shown = " ".join(word[:80] for word in line.arguments)
    # As Python's own streams write what is no text: a name that is not in UTF-8.
    utf8 = partial(tempfile.TemporaryFile, "w+", encoding="utf-8")
    with utf8(errors="backslashreplace") as said, utf8() as printed:
        limit(SECONDS)
        try:
            with redirect_stderr(said), redirect_stdout(printed):
                line.main()
            code: object = 0
        except Hung:
            return Outcome("hung", line.arguments[0], "", shown)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code, _ = 1, said.write(traceback.format_exc())
        finally:
            limit(0)
        said.seek(0)
        text = said.read() + (code if isinstance(code, str) else "")
    wrong = what_is_wrong(code, text) or written_astray(line, before, files_in(line.world))
    kind = "undocumented" if wrong else "taken" if code in (0, None) else "refused"
    return Outcome(kind, line.arguments[0], f"{wrong} {' '.join(text.split())[:400]}" if wrong else "", shown)


def what_is_wrong(code: object, text: str) -> str:
    """What is wrong with how a line ended; nothing where it was done, or refused in a line.

    The parser's own errors are in a box of several lines, and those of the benchmarks are text in place of a
    code, which Python prints.
    """
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if code in (0, None):
        return ""
    if isinstance(code, str):
        return "" if len(code) > 12 else "says nothing"
    if code != 2:
        return f"code {code}"
    lines = [line for line in text.splitlines() if line.strip() and "Warning" not in line]
    is_box = "For full helptext" in text or any(line.startswith(("╭", "usage:")) for line in lines)
    errors = [line for line in lines if line.startswith("viar: ")] or lines
    # Notes may come first: that the hub is asked, say.
    if is_box or (len(errors) == 1 and len(lines[-1]) > 20 and lines[-1] == errors[0]):
        return ""
    return f"{len(errors)} lines"
