"""From the command line to what is to be done: flags are read off the signatures of the commands."""

from __future__ import annotations

import inspect
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from tyro.extras import SubcommandApp

from ..determinism import deterministic, holds_for
from .flags import given_flags, optional
from .loading import say
from .output import results_as_json
from .table import COMMANDS, load

# How messages of settings begin: "TrainConfig: lr must be positive, got 0".
OF_SETTINGS = re.compile(r"[A-Z]\w+: |viar \w+: ")
# What the parser leaves in some of its errors.
MARKUP = re.compile(r"\[/?(?:bold|dim|italic|red|green|yellow|blue|magenta|cyan)\]")
LINE_OF_BOX = re.compile(r"^(│.*)(│)$", re.MULTILINE)
Json = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(
        help="Print the result as one JSON object on standard output, and all else on standard error."
    ),
]
Deterministic = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(
        help="Have the same bits in every run, on any number of threads, on this kind of machine. Slower: a "
        "CPU computes on one thread. Series of --num and tokens on disk are the same without."
    ),
]
Work = Callable[[], None]
BOX = ("", "│", "╭", "╰")  # what lines begin with that are left as they are


class _Held(io.StringIO):
    """What the parser writes, held back.

    The parser looks at its standard output to know whether colours are seen, also in what it writes to
    standard error, and whether boxes can be drawn; it does not look at NO_COLOR.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self._in_colour = sys.stdout.isatty() and sys.stderr.isatty() and not os.environ.get("NO_COLOR")

    def isatty(self) -> bool:
        return self._in_colour


def parsed(name: str, arguments: list[str]) -> Work:
    """What a command is to do by its settings, not done yet.

    Args:
        name: of the command.
        arguments: behind it.

    Raises:
        ValueError: settings that their own check refuses, which the parser would show in a box of several
            lines, by names of its own; with `--json` all that the parser refuses.
        SystemExit: what else the parser ends with, such as help, or a flag that is not there.
    """
    output, errors = _Held(), _Held()
    settings: dict[str, Any] = {"prog": f"viar {name}", "config": (tyro.conf.CascadeSubcommandArgs,)}
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            work: Work = tyro.cli(_later(name), args=arguments, **settings)
    except SystemExit as ended:
        told = LINE_OF_BOX.sub(_as_wide, errors.getvalue())
        if text := _refused(ended) or ("" if "--json" not in arguments else _unboxed(told)):
            raise ValueError(text) from ended
        sys.stderr.write(told)
        sys.stdout.write(_filled(output.getvalue()) + ("" if ended.code else examples(name)))
        raise
    sys.stderr.write(errors.getvalue())
    return work


def examples(name: str) -> str:
    """What stands below the help of a command: command lines, each with what it is for.

    Args:
        name: of the command.
    """
    told = COMMANDS[name].examples
    return "examples:\n" + "".join(f"  # {purpose}\n  {line}\n" for purpose, line in told)


def _as_wide(line: re.Match[str]) -> str:
    """A line of a box without markup, and as wide as before."""
    return MARKUP.sub("", line[1]).ljust(len(line[1])) + line[2]


def _unboxed(text: str) -> str:
    """An error of the parser on one line."""
    return " ".join(re.sub("[╭╮╰╯│─]", " ", text).split())


def _filled(text: str) -> str:
    """A help whose sentences above the boxes fit the screen, as the boxes do."""
    width = shutil.get_terminal_size().columns
    lines = [
        line if line[:1] in BOX else textwrap.fill(line, width, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return "".join(f"{line}\n" for line in lines)


def completion_script(shell: str) -> str:
    """A script that completes `viar` in a shell.

    Args:
        shell: "bash", "zsh", "fish" or "tcsh".
    """
    app = SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name, help=command.summary)(_later(name))
    written = io.StringIO()
    try:
        with redirect_stdout(written):
            app.cli(
                prog="viar",
                args=["--tyro-print-completion", shell],
                config=(tyro.conf.CascadeSubcommandArgs,),
            )
    except SystemExit as ended:
        if ended.code:
            raise
    return written.getvalue()


def by_flags(text: str) -> str:
    """What settings refuse, behind the flags on the command line that it is about, if it is about some."""
    name, _, rest = text.partition(": ")
    if name in {flag.rpartition(".")[2] for flag in given_flags()}:
        return f"--{name.replace('_', '-')}: {rest}"
    if not OF_SETTINGS.match(text):
        return text
    words = set(re.findall(r"\w+", text))
    flags = sorted(flag.replace("_", "-") for flag in given_flags() if flag.rpartition(".")[2] in words)
    return f"{', '.join(f'--{flag}' for flag in flags)}: {OF_SETTINGS.sub('', text)}" if flags else text


def _refused(ended: SystemExit) -> str | None:
    """What the own check of settings said, if that is why the parser ended."""
    error: BaseException | None = ended
    while error is not None:
        if isinstance(error, ValueError) and OF_SETTINGS.match(str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _later(name: str) -> Callable[..., Work]:
    """A command by its signature and help, but the work is returned: parsing and work are two things then.

    Every command with a result takes `--json` too, and `--deterministic` where its bits may hang on threads.
    """
    command = load(name)

    def take(*values: Any, **settings: Any) -> Work:
        is_json, is_deterministic = (settings.pop(name, False) for name in ("json", "deterministic"))

        def work() -> None:
            with ExitStack() as stack:
                if is_json:
                    stack.enter_context(results_as_json())
                if is_deterministic:
                    stack.enter_context(deterministic())
                    say(holds_for())
                command(*values, **settings)

        return work

    # The parser keeps line ends within the text of a flag, and before a line that begins with no letter.
    take.__doc__ = re.sub(r"\n(?: {8}(?=\S)|(?=--))", " ", inspect.cleandoc(command.__doc__ or ""))
    parameters = list(inspect.signature(command).parameters.values())
    hints = get_type_hints(command, include_extras=True)
    for flag, kind, is_there in (
        ("deterministic", Deterministic, COMMANDS[name].computes),
        ("json", Json, COMMANDS[name].reports),
    ):
        if is_there:
            parameters.append(inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=False))
            hints[flag] = kind
    for parameter in parameters:
        if parameter.default is None or parameter.default == ():  # what it says itself says more
            hints[parameter.name] = _optional(hints[parameter.name])
    take.__annotations__ = hints
    signature = inspect.Signature([p.replace(annotation=hints[p.name]) for p in parameters])
    take.__signature__ = signature  # type: ignore[attr-defined]  # what `inspect` looks at first
    take.__name__, take.__module__ = command.__name__, command.__module__
    return take


def _optional(hint: Any) -> Any:
    """The type of a flag whose help says that it is optional, unless it says itself what it stands for."""
    kind, *told = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return Annotated[kind, optional, *told]
