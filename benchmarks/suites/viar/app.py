"""The web page in a browser on the same machine: how soon it is there, and how soon it follows a slider.

The page is that of `viar app` with the shipped model, served by this process, and opened in chromium by
Playwright. Times are of the browser's own clock: from the start of a navigation, with nothing cached, to the
first picture in the page; and from the event of a slider to the whole picture with the numbers of all scales.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch

from viar import load_shipped
from viar.app.drawing import Pair

from ...case import SECONDS, Bar, Case, Row, Run, Table
from ...rows import by_contender

MOST_AFTER_SLIDER = 0.3  # seconds, median
MOST_FIRST_LOAD = 2.0
CONTENDERS = {"slider to picture": MOST_AFTER_SLIDER, "first load": MOST_FIRST_LOAD}
# Before any of the page's own scripts: when the first picture came.
WATCH = """new MutationObserver(() => {
    if (!window.firstPicture && document.querySelector(".whole")) window.firstPicture = performance.now();
}).observe(document, {childList: true, subtree: true})"""
# Seconds from an event until the table has the new count and is whole: until then rows are empty.
MOVE = """([number, value]) => new Promise((done) => {
    const sliders = document.querySelectorAll("#viar-counts input[type=range]");
    const slider = sliders[number % sliders.length];
    const wanted = `${value}.0`;
    const row = () => document.querySelector(".viar-panel tbody").rows[number % sliders.length].cells;
    const start = performance.now();
    const look = () => {
        const parts = document.querySelectorAll(".viar-panel .part").length;
        if (parts === sliders.length && row()[2].textContent === wanted) {
            observer.disconnect();
            done((performance.now() - start) / 1000);
        }
    };
    const observer = new MutationObserver(look);
    observer.observe(document.querySelector(".viar-panel").parentElement.parentElement,
                     {childList: true, subtree: true, characterData: true, attributes: true});
    slider.value = value;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    slider.dispatchEvent(new Event("change", {bubbles: true}));
})"""


def build(run: Run, changes: int, loads: int) -> Iterator[Row]:
    """Seconds of each change of a slider, and of each first load.

    Args:
        run: where.
        changes: of a slider, one scale after the other, to another number each.
        loads: of the page, each in a context of its own.
    """
    chromium = shutil.which("chromium")
    try:
        import gradio  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:  # no rows: the bars say so
        return
    with _served(run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield {"contender": "first load", "seconds": [_first_load(browser, address) for _ in range(loads)]}
        yield {"contender": "slider to picture", "seconds": _changes(browser, address, changes)}
        browser.close()


@contextmanager
def _served(run: Run) -> Iterator[str]:
    from viar.app.page import build_page, serve

    model, tokenizer = load_shipped()
    page, threads = build_page(Pair(model.to(run.device), tokenizer.to(run.device))), torch.get_num_threads()
    yield serve(page, "127.0.0.1", None)
    page.close(verbose=False)
    torch.set_num_threads(threads)  # of which the page takes one less


def _first_load(browser: Any, address: str) -> float:
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script(WATCH)
    page.goto(address)
    page.wait_for_function("window.firstPicture")
    seconds = page.evaluate("window.firstPicture") / 1000
    context.close()
    return float(seconds)


def _changes(browser: Any, address: str, count: int) -> list[float]:
    page = browser.new_page()
    page.goto(address)
    page.locator(".whole").wait_for()
    page.wait_for_timeout(500)
    # From the model's own number of iterations to another, and to the next of these when all had their turn.
    seconds = [page.evaluate(MOVE, [number, 9 + number % 7]) for number in range(count)]
    page.close()
    return seconds


def bars(rows: list[Row]) -> list[Bar]:
    """The median of each against what it may be."""
    found = by_contender(rows)
    note = "" if found else "needs gradio, playwright and chromium"
    return [
        Bar(f"{name}, s, median", median(found[name]["seconds"]) if found else float("nan"), limit, note)
        for name, limit in CONTENDERS.items()
    ]


def table(rows: list[Row]) -> Table:
    """One line a measurement."""
    found = by_contender(rows)
    lines = [
        (name, str(len(found[name]["seconds"])), *(f"{1e3 * part:.0f}" for part in _spread(found[name])))
        for name in CONTENDERS
        if name in found
    ]
    return Table("the web page in a browser, ms", ("", "times", "median", "95 of 100 below"), lines)


def _spread(row: Row) -> tuple[float, float]:
    seconds = row["seconds"]
    return median(seconds), quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[
        0
    ]


CASE = Case(
    "app",
    "the web page: first load, and from a slider to the picture",
    build,
    grid=[{"changes": 20, "loads": 7}],
    quick=[{"changes": 2, "loads": 1}],
    metrics={"seconds": SECONDS},
    table=table,
    bars=bars,
)
