"""The site as a reader has it: built once, looked at in a browser, from a server and from files.

Skipped without what builds the pages (`pip install '.[docs]'`), without Playwright, or without chromium.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("material", reason="the site is built by mkdocs-material: pip install '.[docs]'")
pytest.importorskip("playwright.sync_api", reason="pages are opened by Playwright")

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium")
FORMULAS, TABLES, CODE, WORDS, PICTURES = "concepts", "benchmarks", "quickstart", "glossary", "diagnostics"
NAMES = "api/solvers"
PAGES = (FORMULAS, TABLES, CODE, WORDS, PICTURES, NAMES)
MOST_BYTES_OF_A_PAGE = 300_000  # a page of 1.2 MB took several seconds
MOST_BYTES_AT_FIRST = 2_500_000  # with all that it loads: search and formulas alone are 1.4 MB

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to look at pages with"),
]

# What stands beyond the right edge, unless a box around it scrolls.
BEYOND_THE_EDGE = """() => {
    const edge = document.documentElement.clientWidth;
    const scrolls = (element) => {
        for (let box = element.parentElement; box !== document.body; box = box.parentElement)
            if (getComputedStyle(box).overflowX !== "visible") return true;
        return false;
    };
    const beyond = [...document.querySelectorAll(".md-content *")]
        .filter((element) => element.getBoundingClientRect().right > edge + 1 && !scrolls(element))
        .map((element) => `${element.tagName}: ${element.textContent.slice(0, 60)}`);
    if (document.documentElement.scrollWidth > edge) beyond.push("the page");
    return beyond;
}"""

# Text of the page without code, and without what was drawn of formulas.
PROSE = """() => {
    const article = document.querySelector("article").cloneNode(true);
    article.querySelectorAll("pre, code, .katex").forEach((element) => element.remove());
    return article.textContent;
}"""

CUT_OFF_CODE = """() => [...document.querySelectorAll("pre > code")]
    .filter((code) => code.scrollWidth > code.clientWidth + 1)
    .map((code) => code.textContent.slice(0, 80))"""


class Loaded(HTMLParser):
    """Addresses that a browser fetches to show a page, soon or later: no links that a reader may follow."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.at_first: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        fetches = tag == "link" and (found.get("rel") or "") not in ("canonical", "next", "prev")
        address = found.get("href") if fetches else found.get("src")
        if address:
            self.addresses.append(address)
            self.at_first |= {address} if found.get("loading") != "lazy" else set()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Tests say what they found themselves."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if built := os.environ.get("DEQLIB_SITE"):  # by `make docs`, which takes as long as all tests here
        return Path(built)
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert "WARNING" not in build.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def complaints_of(page: Any, allowed: str) -> list[str]:
    """Errors on the console, and all that is asked for elsewhere than below `allowed`.

    A picture may be on its way when the page is left: that is not one.
    """
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))

    def fail(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":
            found.append(f"failed: {request.url}")

    page.on("requestfailed", fail)

    def look(request: Any) -> None:
        if not request.url.startswith((allowed, "data:", "blob:", "about:")):
            found.append(f"asked for {request.url}")

    page.on("request", look)
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_show_formulas_and_nothing_beyond_the_edge(browser: Any, address: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints = complaints_of(page, address)
    for name in PAGES:
        page.goto(f"{address}/{name}.html")
        page.wait_for_function("document.querySelectorAll('.arithmatex:not(:has(.katex))').length === 0")
        assert page.locator(".katex-error").count() == 0, name
        assert not re.search(r"\\[(\[a-z]", page.evaluate(PROSE)), name
        assert page.evaluate(BEYOND_THE_EDGE) == [], name
        if width == 1280:
            assert page.evaluate(CUT_OFF_CODE) == [], name
    page.goto(f"{address}/{FORMULAS}.html")
    assert page.locator(".katex").count() > 50
    page.close()
    assert complaints == []


def test_formulas_are_drawn_from_files_too(browser: Any, site: Path) -> None:
    page = browser.new_page()
    complaints = complaints_of(page, site.as_uri())
    page.goto(f"{site.as_uri()}/{WORDS}.html")
    assert page.locator(".arithmatex").count() > 10
    assert page.locator(".arithmatex:not(:has(.katex))").count() == 0
    page.close()
    assert complaints == []


@pytest.mark.parametrize("where", ["server", "files"])
def test_search_finds_pages_that_open(browser: Any, address: str, site: Path, where: str) -> None:
    root = address if where == "server" else site.as_uri()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints = complaints_of(page, root)
    page.goto(f"{root}/recipes/bilevel.html")
    page.locator(".md-search__input").fill("tokenizer")
    page.locator(".md-search-result__link").first.click()
    page.wait_for_function("!location.pathname.includes('bilevel')")
    assert "tokenizer" in page.locator("article").text_content().lower()
    page.close()
    assert complaints == []


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    wanted = {page: Loaded(page).addresses for page in site.rglob("*.html")}
    for sheet in site.rglob("*.css"):
        wanted[sheet] = re.findall(r"""(?:url\(|@import\s+)["']?([^"')]+)""", sheet.read_text())
    far = re.compile(r"(?:https?:)?//")
    assert len(wanted) > 30
    assert {
        file.name: bad for file, all_ in wanted.items() if (bad := [a for a in all_ if far.match(a)])
    } == {}
    near = {
        file.parent / re.split("[?#]", a)[0]
        for file, all_ in wanted.items()
        for a in all_
        if not re.match("data:|#|/", a)  # the page for what is not found has addresses of a server's root
    }
    assert [str(file) for file in sorted(near) if not file.exists()] == []


def test_pages_keep_the_addresses_that_they_had_as_folders(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}/recipes/sudoku/#what-it-reaches")
    page.wait_for_url(f"{address}/recipes/sudoku.html#what-it-reaches")
    page.close()


@pytest.mark.parametrize(
    ("name", "page"),
    [("deqlib.Anderson", "solvers"), ("deqlib.Solution.counts", "layer"), ("deqlib.nn.MonotoneCell", "nn")],
)
def test_names_are_found_at_their_address_of_when_the_reference_was_one_page(
    browser: Any, address: str, name: str, page: str
) -> None:
    shown = browser.new_page()
    shown.goto(f"{address}/api.html#{name}")
    shown.wait_for_url(f"{address}/api/{page}.html#{name}")
    assert shown.locator(f"[id='{name}']").count() == 1
    shown.close()


def test_no_page_is_heavy(site: Path) -> None:
    search = (site / "search/search_index.json").stat().st_size
    for page in site.rglob("*.html"):
        weight = page.stat().st_size
        assert weight <= MOST_BYTES_OF_A_PAGE, page.name
        asked = [address for address in Loaded(page).at_first if not address.startswith("data:")]
        near = {page.parent / re.split("[?#]", address)[0] for address in asked}
        weight += search + sum(file.stat().st_size for file in near if file.is_file())
        assert weight <= MOST_BYTES_AT_FIRST, page.name


def test_pictures_keep_their_place_until_they_are_loaded(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/{TABLES}.html")
    last = page.locator("article img").last
    assert not last.evaluate("picture => picture.complete")
    shape = "picture => [picture.width, picture.height]"
    before = last.evaluate(shape)
    last.scroll_into_view_if_needed()
    page.wait_for_function("picture => picture.naturalWidth > 0", arg=last.element_handle())
    assert last.evaluate(shape) == before
    page.close()


def test_the_search_tells_formulas_in_words(site: Path) -> None:
    index = (site / "search/search_index.json").read_text()
    parts = json.loads(index)["docs"]
    code = re.compile(r"<(code|pre)>.*?</\1>", re.S)
    told = {part["location"]: code.sub("", part["title"] + part["text"]) for part in parts}
    assert [location for location, text in told.items() if re.search(r"\\[(\[a-z]", text)] == []
    assert "z = f(z, x)" in told["index.html"]
    assert "solution of u = Jᵀu + g" in told["glossary.html"]


def test_signatures_of_the_reference_are_formatted(site: Path) -> None:
    text = "".join(page.read_text() for page in sorted(site.glob("api/*.html")))
    signatures = re.findall(r'<div class="doc-signature.*?</div>', text, re.S)
    assert len(signatures) > 100
    lines = [re.sub("<[^>]+>", "", signature).strip("\n").splitlines() for signature in signatures]
    assert max(len(line) for part in lines for line in part) <= 120  # entities count as more than they are
    assert sum(len(part) > 1 for part in lines) > 50
