"""Every Python block of the README and of the documentation runs.

The blocks of a page run in order in one namespace, in an empty folder, warnings as errors. Where a block
holds lines that start with `# > `, they are what it prints; "..." there stands for anything. A block whose
fence reads `python no-run` is left out.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import linecache
import re
import runpy
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(?P<indent> *)```python\b(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
PRINTED = re.compile(r"^ *# > ?(.*)$", re.M)
MUST_RUN = ("docs/quickstart.md", "docs/concepts.md", "docs/stability.md", "docs/diagnostics.md")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int  # of its first line of code, 1-based
    code: str
    runs: bool


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            line=text.count("\n", 0, match.start("code")) + 1,
            code=textwrap.dedent(match["code"]),
            runs="no-run" not in match["info"].split(),
        )
        for match in FENCE.finditer(text)
    ]


def run(block: Block, page: Path, namespace: dict[str, object]) -> None:
    """Raises `AssertionError` with page and line where the block fails."""
    name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name
    printed = io.StringIO()
    try:
        # Leading line breaks make the line numbers of tracebacks those of the page.
        source = "\n" * (block.line - 1) + block.code
        code = compile(source, str(page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    except SyntaxError as error:
        raise AssertionError(f"{name}:{error.lineno or block.line}: {error!r}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == str(page)][-1]
        text = linecache.getline(str(page), line).strip()
        raise AssertionError(f"{name}:{line}: {error!r}\n    {text}") from error
    shown = PRINTED.findall(block.code)
    if shown:
        expected = "".join(f"{line}\n" for line in shown)
        got = printed.getvalue()
        if not doctest.OutputChecker().check_output(expected, got, doctest.ELLIPSIS):
            raise AssertionError(f"{name}:{block.line}: the block shows\n{expected}but prints\n{got}")


PAGES = {
    str(page.relative_to(ROOT)): page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if blocks_of(page)
}


@pytest.mark.parametrize("name", PAGES)
def test_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("page")  # dataclasses and pickle look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(PAGES[name]):
        if block.runs:
            run(block, PAGES[name], module.__dict__)


@pytest.mark.parametrize("name", MUST_RUN)
def test_no_block_of_the_main_pages_opts_out(name: str) -> None:
    blocks = blocks_of(ROOT / name)
    assert blocks
    assert all(block.runs for block in blocks)


@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("x = 1\nassert x == 2", r"page\.md:4: AssertionError\(\)\n    assert x == 2"),
        ("x = 1\nx = = 2", r"page\.md:4: SyntaxError"),
        ("import warnings\nwarnings.warn('careful')", r"page\.md:4: UserWarning\('careful'\)"),
        ("print(1)\n# > 2", r"page\.md:3: the block shows\n2\nbut prints\n1\n"),
    ],
)
def test_a_failing_block_is_reported_with_page_and_line(code: str, report: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Some text.\n```python\n{code}\n```\n")
    (block,) = blocks_of(page)
    with pytest.raises(AssertionError, match=report):
        run(block, page, {})


def test_the_picture_of_the_readme_is_drawn_by_its_script(tmp_path: Path) -> None:
    script = ROOT / "docs/assets/iterations.py"
    runpy.run_path(str(script))["main"](tmp_path / "digits.png")
    with Image.open(tmp_path / "digits.png") as drawn, Image.open(script.with_suffix(".png")) as shown:
        assert drawn.size == shown.size  # on another processor a digit may be another
    assert script.with_suffix(".png").stat().st_size < 100_000
