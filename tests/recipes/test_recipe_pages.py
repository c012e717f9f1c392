"""Every recipe is whole: script, page that shows it, what it drew and printed, test, place in the menu."""

from __future__ import annotations

import re

import pytest
import yaml
from recipe_scripts import NAMES, RECIPES, ROOT

ASSETS = ROOT / "docs/assets/recipes"
SNIPPET = re.compile(r'^--8<-- "(.+?)(?::(\w+))?"$')
by_recipe = pytest.mark.parametrize("name", NAMES)


def blocks_of(name: str, language: str) -> list[list[str]]:
    """Lines of the fenced blocks in this language of a recipe's page."""
    text = (RECIPES / f"{name}.md").read_text()
    return [block.splitlines() for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)]


@by_recipe
def test_what_a_page_shows_of_code_is_the_script_that_is_run(name: str) -> None:
    blocks = blocks_of(name, "python")
    assert blocks
    script = (RECIPES / f"{name}.py").read_text()
    for line in [line for block in blocks for line in block if line]:
        found = SNIPPET.match(line)
        assert found, (
            f"{line!r} is written on the page and run by nothing: show the script, or a section of it"
        )
        assert found[1] == f"docs/recipes/{name}.py"
        if found[2]:
            assert f"[start:{found[2]}]" in script
            assert f"[end:{found[2]}]" in script


@by_recipe
def test_a_page_shows_what_its_script_drew_and_printed(name: str) -> None:
    page = (RECIPES / f"{name}.md").read_text()
    assert f"](../assets/recipes/{name}.png)" in page
    assert (ASSETS / f"{name}.png").stat().st_size < 200_000
    assert [f'--8<-- "docs/assets/recipes/{name}.txt"'] in blocks_of(name, "text")
    assert (ASSETS / f"{name}.txt").read_text().strip()
    assert f"python docs/recipes/{name}.py" in page


@by_recipe
def test_a_recipe_has_a_test_and_can_be_found(name: str) -> None:
    assert (ROOT / f"tests/recipes/test_{name}.py").exists()
    assert f"]({name}.md)" in (RECIPES / "index.md").read_text()
    (menu,) = re.findall(r"^nav:\n((?: .*\n)+)", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert f"recipes/{name}.md" in str(yaml.safe_load(menu))


def test_no_page_is_left_without_its_script() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.md")) == sorted([*NAMES, "index"])
