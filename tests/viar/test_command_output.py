"""What the command line says: help, examples, results for programs, exit codes; nothing moves in pipes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import write_pictures
from rich.console import Console
from test_broken_pictures import call, judge_of_two_steps
from tiny_models import tiny_tokenizer, tiny_transformer

import deqlib
import viar.commands.demo
import viar.commands.output
from viar import export_official
from viar.commands.cli import EXIT_CODES, main
from viar.commands.output import report
from viar.commands.parsing import examples, parsed
from viar.commands.reproduce import as_published
from viar.commands.table import COMMANDS
from viar.generation.settings import Sampling
from viar.screen import tracked

SIDES = (1, 2, 4)
PAGE = (Path(__file__).parents[2] / "docs" / "viar.md").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a `viar` and its `tokenizer`, a published file of the former, and pictures of 8 x 8."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_transformer(sides=SIDES)
    model.save_pretrained(folder / "viar")
    torch.save(export_official(model), folder / "viar.pth")
    tiny_tokenizer(sides=SIDES).save_pretrained(folder / "tokenizer")
    write_pictures(folder / "data", 3)
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


PAIR = ("--model", "viar", "--tokenizer", "tokenizer")
BOX = ("--image", "data/class0/0.png", "--label", 1, "--box", 0, 0, 0.5, 0.5)
TINY = ("--model.width", 16, "--model.num-heads", 2, "--model.depth", 3)
SHORT = ("--train.steps", 1, "--train.batch-size", 2, "--data", "data")


# Help


def help_of(name: str, columns: int, *more: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        code, output, errors = call(name, *more, "--help")
    assert (code, errors) == (0, "")
    return output


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_fits_a_screen_says_what_happens_without_a_flag_and_ends_with_examples(name: str) -> None:
    text = help_of(name, 80)
    told = examples(name)
    assert text.endswith(told)
    assert max(map(len, text.removesuffix(told).splitlines())) <= 80
    flat = " ".join(text.replace("│", " ").split())
    assert "(default: None)" not in flat.replace("None keeps all (default: None)", "")
    assert "(default: )" not in flat
    assert ("--json" in flat) == COMMANDS[name].reports


@pytest.mark.parametrize("name", list(COMMANDS))
def test_examples_are_command_lines_that_the_parser_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, line in COMMANDS[name].examples:
        arguments = shlex.split(line.partition(" > ")[0])
        assert arguments[:2] == ["viar", name]
        monkeypatch.setattr(sys, "argv", arguments)
        assert callable(parsed(name, arguments[2:]))


def test_the_help_of_viar_has_a_line_a_command_and_the_exit_codes() -> None:
    code, output, errors = call("--help")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    for name, command in COMMANDS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(command.summary)
        assert len(line) <= 80
        assert f"`{name}`" in PAGE
    assert EXIT_CODES in output
    for exit_code in re.findall(r"^  (\d+)", EXIT_CODES, re.MULTILINE):
        assert f"\n| {exit_code} |" in PAGE


def test_viar_tells_its_version() -> None:
    assert call("--version")[1] == f"viar {deqlib.__version__}, PyTorch {torch.__version__}\n"


def test_a_command_that_is_misspelt_is_told_the_right_one() -> None:
    code, output, errors = call("generte")
    assert (code, output) == (2, "")
    assert errors.endswith("got 'generte'; is generate meant?\n")


def test_help_of_the_published_evaluation_shows_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(help_of("reproduce", 200).replace("│", " ").split())
    monkeypatch.setattr(sys, "argv", ["viar", "reproduce"])
    used = as_published(Sampling(), tiny_transformer(sides=SIDES))
    assert f"or one a scale (default: {used.iterations}; a VAR has none)" in text
    assert f"(default: {used.cache}; of a VAR equilibrium)" in text
    for name in ("evaluate", "reproduce"):
        assert "more-smooth" not in help_of(name, 80)


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_plain", [False, True])
def test_help_is_coloured_on_a_terminal_unless_no_color_is_set(
    is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1") if is_plain else monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["viar", "convert", "--help"])
    output, errors = _Terminal(), _Terminal()
    with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit):
        main()
    assert ("\x1b[" in output.getvalue()) != is_plain


# Results


def documented(name: str) -> set[str]:
    """Keys in the row of the page's table that begins so."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} | `")]
    return set(re.findall(r"`(\w+)`", row.split("|")[2]))


def told(name: str, *arguments: object) -> dict[str, Any]:
    """What a command prints for programs: one line, whose keys the page lists; nothing moves on the way."""
    code, output, errors = call(*arguments, "--json")
    assert code == 0, errors
    assert output.count("\n") == 1, output
    assert not set("\x1b\r") & set(output + errors)
    values: dict[str, Any] = json.loads(output)
    assert set(values) <= documented(name), set(values) - documented(name)
    return values


def test_pictures_are_told_with_what_their_scales_took(here: Path) -> None:
    values = told("`generate`", "generate", *PAIR, "--per-class", 1, "--batch-size", 2, "--report")
    assert (values["out"], values["num_images"]) == ("samples.png", 3)
    assert [batch["first_image"] for batch in values["batches"]] == [0, 2]
    scales = values["batches"][0]["scales"]
    assert [scale["side"] for scale in scales] == list(SIDES)
    assert values["batches"][0]["cache_bytes"] == scales[-1]["cache_bytes"] > 0
    assert "batches" not in told("`generate`", "generate", *PAIR, "--per-class", 1)


def test_a_series_is_told(here: Path) -> None:
    line = ("generate", *PAIR, "--num", 2, "--out", "series")
    values = told("`generate` with `--num`", *line)
    assert set(values) == documented("`generate` with `--num`") - {"generate"}
    assert (values["num_images"], values["made"], told("`generate` with `--num`", *line)["made"]) == (2, 2, 0)
    assert Path(values["archive"]).is_file()


def test_edits_are_told(here: Path) -> None:
    values = told("`edit`", "edit", *PAIR, *BOX, "--num", 2)
    assert values == {"images": ["edited-0.png", "edited-1.png"], "strip": "edited-strip.png"}
    assert all(Path(name).is_file() for name in (*values["images"], values["strip"]))


def test_tokens_are_told(here: Path) -> None:
    values = told("`tokenize`", "tokenize", "--tokenizer", "tokenizer", "--data", "data", "--out", "tokens")
    assert sum(values["rows"].values()) == 12
    assert (values["out"], values["files_made"], values["files_found"]) == ("tokens", 2, 0)


def test_conversions_are_told(here: Path) -> None:
    code, output, errors = call("convert", "viar.pth", "folder", "--json")
    assert (code, errors) == (0, "")
    values = json.loads(output)
    assert values["out"] == "folder"
    assert "kind" in values


def test_figures_are_told_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_of_two_steps(monkeypatch)
    line = ("evaluate", *PAIR, "--data", "data", "--per-class", 1, "--iterations", 2)
    values = told("`evaluate`", *line, "--out", "figures.json")
    assert values == json.loads(Path("figures.json").read_text())
    assert set(values) == documented("`evaluate`") - {"images"}
    _, _, notes = call(*line, "--json")
    assert '"generated"' not in notes  # what stands on standard output already
    assert "FID" in notes


def test_trainings_are_told_before_and_after(here: Path) -> None:
    line = ("train", "digits-viar", *TINY, *SHORT, "--model.sides", *SIDES, "--model.num-classes", 3)
    values = told("either with `--dry-run`", *line, "--dry-run")
    assert set(values) == documented("either with `--dry-run`")
    assert sum(values["parameters"].values()) > 0
    assert values["measured"] > 0
    code, output, errors = call(*line, "--tokenizer", "tokenizer", "--out", "run", "--json")
    assert code == 0, errors
    values = json.loads(output)
    assert (values["out"], values["steps"]) == ("run", 1)
    assert {"steps", "seconds"} <= set(values)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--labels", 7), "labels"),
        (("--lables", 1), "Unrecognized options: --lables, 1 Perhaps you meant: --labels"),
        (("--num", "many"), "many"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_an_error_is_one_line_where_programs_read(
    flags: tuple[object, ...], message: str, here: Path
) -> None:
    code, output, errors = call("generate", *PAIR, *flags, "--json")
    assert (code, output) == (2, "")
    assert (errors[:6], errors.count("\n")) == ("viar: ", 1)
    assert message in errors


def test_the_demo_and_the_page_report_what_they_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(viar.commands.demo, "run_demo", lambda *_: {"knob": [float("nan")]})
    _, output, _ = call("demo", "--out", tmp_path / "demo", "--json")
    assert json.loads(output) == {"out": str(tmp_path / "demo"), "knob": [None]}
    source = Path(viar.commands.output.__file__).with_name("app.py").read_text()
    assert 'report({"address": address})' in source


def test_nothing_is_reported_where_no_program_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert not report({"a": 1})
    assert capsys.readouterr().out == ""


# Progress


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_for_terminals(is_terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=80)
    assert list(tracked(range(3), "work", console=console)) == [0, 1, 2]
    assert bool(screen.getvalue()) == is_terminal


# How it ends


def a_command_that_raises(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise error

    monkeypatch.setattr(viar.commands.demo, "run_demo", run)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "viar: interrupted\n"),
        (ValueError("expected this"), 2, "viar: expected this\n"),
        (FileNotFoundError(2, "not there", "a"), 2, "viar: [Errno 2] not there: 'a'\n"),
        (FloatingPointError("no loss"), 2, "viar: no loss\n"),
        (BrokenExecutor("gone"), 2, "viar: another process of this command was ended from outside"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_user_can_mend_ends_with_a_line_and_a_code(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_command_that_raises(error, monkeypatch)
    ended, _, errors = call("demo", "--out", tmp_path / "demo")
    assert (ended, errors[: len(said)]) == (code, said)


def test_a_fault_of_the_package_is_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_command_that_raises(RuntimeError("no such thing"), monkeypatch)
    with pytest.raises(RuntimeError, match="no such thing"):
        call("demo", "--out", tmp_path / "demo")


@pytest.mark.parametrize("line", [("--help",), ("convert", "viar.pth", "another")], ids=" ".join)
def test_a_reader_that_has_enough_ends_a_command_quietly(
    line: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as head. Text is noticed where it is flushed, tables by what draws them."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["viar", *line])
    errors = io.StringIO()
    with (
        os.fdopen(writing, "w") as output,
        redirect_stdout(output),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert (ended.value.code, errors.getvalue()) == (141, "")


# Completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_recipes_and_flags(tmp_path: Path) -> None:
    code, script, errors = call("completion", "bash")
    assert (code, errors) == (0, "")
    file = tmp_path / "viar.bash"
    file.write_text(script)

    def completed(*words: str) -> set[str]:
        line = (
            f"source {file}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _tyro_viar; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        return set(ended.stdout.split())

    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    assert set(COMMANDS) <= completed("viar", "")
    assert completed("viar", "gen") == {"generate"}
    assert completed("viar", "generate", "--rep") == {"--report"}
    assert "imagenet256-viar" in completed("viar", "train", "imagenet256-")
    assert "--train.steps" in completed("viar", "train", "digits-viar", "--train.st")
