"""The web page in a browser: sliders, painting, files, wrong input, two users at once, a narrow screen.

Skipped without gradio, without Playwright, or without chromium.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served_page import served
from tiny_models import SIDES, tiny_tokenizer, tiny_transformer

import viar
from viar.app.drawing import MOST_SEED, Pair, presets
from viar.app.markup import picture_url

pytest.importorskip("gradio_client", reason="the web page needs gradio")
pytest.importorskip("playwright.sync_api", reason="pages are opened by Playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to look at pages with"),
]
WIDE, NARROW = 1280, 390
# What stands beyond the edges, unless a box around it scrolls or hides it.
BEYOND_THE_EDGE = """() => {
    const edge = document.documentElement.clientWidth;
    const scrolls = (element) => {
        for (let box = element.parentElement; box && box !== document.body; box = box.parentElement)
            if (getComputedStyle(box).overflowX !== "visible" && box.clientWidth < edge) return true;
        return false;
    };
    const beyond = [...document.querySelectorAll("main *")].filter((element) => {
        const box = element.getBoundingClientRect();
        return box.width && (box.right > edge + 1 || box.left < -1) && !scrolls(element);
    });
    const found = beyond.map((element) => `${element.tagName}: ${element.className}`);
    if (document.documentElement.scrollWidth > edge) found.push("the page");
    return found;
}"""

# Address of a panel's picture, and the cells of its table but pictures and times.
SHOWN = """(number) => [
    document.querySelectorAll(".whole")[number].src,
    [...document.querySelectorAll(".viar-panel tbody")[number].rows].map(
        (row) => [1, 2, 3, 5].map((column) => row.cells[column].textContent)),
]"""


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(tiny_transformer(), tiny_tokenizer())


@pytest.fixture(scope="module")
def address(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(pair, tmp_path_factory.mktemp("models"), ended_by=signal.SIGTERM) as found:
        yield found


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page for another user, in a window so wide; nobody's may have complained in the end."""
    complaints: list[str] = []
    contexts = []

    def look(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:", "about:")):
            complaints.append(f"asked for {request.url}")

    def open_page(width: int = WIDE) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}))
        page = contexts[-1].new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", look)
        page.goto(address)
        page.locator(".whole").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def rows(report: viar.GenerationReport) -> list[list[str]]:
    """What stands in the table, by the printed report: all but pictures and times."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in str(report).splitlines()[1:-2]]
    kilobytes = [f"{scale.cache_bytes / 1e3:.1f}" for scale in report.scales]
    return [[*line[:3], cache] for line, cache in zip(lines, kilobytes, strict=True)]


def wait_for_picture(page: Any, wanted: str, number: int = 0) -> None:
    """Until panel `number` shows the picture of that address."""
    source = "([number, wanted]) => document.querySelectorAll('.whole')[number]?.src === wanted"
    page.wait_for_function(source, arg=[number, wanted])


def wait_for_generation(page: Any, pair: Pair, label: int = 3, number: int = 0, **settings: Any) -> None:
    """Until panel `number` shows picture and numbers of these settings."""
    images, report = viar.generate(
        pair.model, pair.tokenizer, [label], **{"seed": 0, "cfg": 1.5, **settings}, return_report=True
    )
    wanted = [picture_url(images[0]), rows(report)]
    deadline = time.monotonic() + 20
    while (shown := page.evaluate(SHOWN, number)) != wanted and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert shown == wanted


def slider(page: Any, name: str) -> Any:
    return page.locator(f"input[type=range][aria-label*='{name}']")


def choose(page: Any, dropdown: str, option: str) -> None:
    page.get_by_label(dropdown, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def paint(page: Any, *places: tuple[float, float], brush: int = 40) -> None:
    """A stroke by the mouse, places being shares of the picture's side from the left and from the top."""
    page.locator("#viar-painting input[type=range]").fill(str(brush))
    board = page.locator("#viar-painting canvas")
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    at = [(box["x"] + across * box["width"], box["y"] + down * box["height"]) for across, down in places]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def painting(page: Any) -> str:
    """The address of the picture that is painted on, when it is there."""
    page.wait_for_function("document.querySelector('#viar-painting img')?.naturalWidth > 0")
    return str(page.locator("#viar-painting img").get_attribute("src"))


def made_anew(page: Any, number: int = 2) -> np.ndarray:
    """What in-painting makes, in panel `number`."""
    page.get_by_role("button", name="Make the painted part anew").click()
    page.locator(".whole").nth(number).wait_for()
    return pixels(str(page.locator(".whole").nth(number).get_attribute("src")))


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(b64decode(url.partition(",")[2]))).convert("RGB"))


def test_every_slider_and_preset_is_followed_and_the_numbers_are_those_of_the_report(
    opened: Callable[..., Any], pair: Pair
) -> None:
    page = opened()
    counts = list(pair.configured)
    wait_for_generation(page, pair)
    for scale, side in enumerate(SIDES):
        counts[scale] = 5 + scale
        slider(page, f"iterations at {side} x {side}").fill(str(counts[scale]))
        wait_for_generation(page, pair, iterations=counts)
    assert page.get_by_label("schedule of iterations").input_value() == ""
    slider(page, "guidance").fill("4")
    wait_for_generation(page, pair, iterations=counts, cfg=4.0)
    for name, schedule in presets(pair).items():
        choose(page, "schedule of iterations", name)
        wait_for_generation(page, pair, iterations=schedule, cfg=4.0)
        shown = [slider(page, f"iterations at {side} x {side}").input_value() for side in SIDES]
        assert shown == [str(count) for count in schedule]


def test_class_and_seed_are_followed_by_both_models_beside_one_another(
    opened: Callable[..., Any], pair: Pair
) -> None:
    page, var = opened(), Pair(tiny_transformer("explicit"), pair.tokenizer)
    page.get_by_role("button", name="Another seed").click()
    for number, shown in enumerate((pair, var)):
        wait_for_generation(page, shown, seed=1, number=number)
    choose(page, "class", "1")
    page.get_by_label("seed", exact=True).fill("77")
    for number, shown in enumerate((pair, var)):
        wait_for_generation(page, shown, 1, seed=77, number=number)
    left, right = (page.locator(".viar-panel").nth(number).bounding_box() for number in (0, 1))
    assert (left["y"], left["x"] + left["width"]) <= (right["y"], right["x"])


def test_what_is_painted_by_the_mouse_is_made_anew_and_nothing_else(
    opened: Callable[..., Any], pair: Pair
) -> None:
    page = opened()
    page.get_by_role("tab", name="In-paint").click()
    before = pixels(painting(page))
    assert np.array_equal(before, pixels(str(page.locator(".whole").first.get_attribute("src"))))
    page.get_by_label("seed", exact=True).fill("5")
    paint(page, (0.0, 0.95), (1.0, 0.95))
    after = made_anew(page)
    assert np.array_equal(after[:3], before[:3])
    assert not np.array_equal(after[-1], before[-1])
    # With all of it painted over, the picture is that of the settings.
    paint(page, *((across, down) for down in (0.1, 0.4, 0.7, 1.0) for across in (0.0, 1.0)))
    page.get_by_role("button", name="Make the painted part anew").click()
    wait_for_picture(page, picture_url(viar.generate(pair.model, pair.tokenizer, [3], seed=5)[0]), 2)


def test_a_file_is_in_painted_and_what_is_no_picture_or_not_painted_is_told(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    page = opened()
    page.get_by_role("tab", name="In-paint").click()
    generated = painting(page)
    colours = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((60, 60), Image.Resampling.NEAREST).save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("1", (5000, 5000)).save(tmp_path / "bomb.png")
    send = page.locator("input[type=file]").set_input_files
    for name, message in {
        "broken.png": "picture: is no picture that can be read",
        "bomb.png": "picture: expected at most 16,777,216 pixels, got 5000 x 5000",
    }.items():
        send(tmp_path / name)
        page.get_by_text(message).wait_for()
    assert painting(page) == generated
    page.get_by_role("button", name="Make the painted part anew").click()
    page.get_by_text("mask: leaves nothing to make anew").wait_for()
    send(tmp_path / "mine.png")
    page.wait_for_function("old => document.querySelector('#viar-painting img').src !== old", arg=generated)
    assert np.array_equal(pixels(painting(page)), colours)
    paint(page, (0.0, 0.05), (1.0, 0.05))
    after = made_anew(page)
    assert np.array_equal(after[3:], colours[3:])
    assert not np.array_equal(after[0], colours[0])
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Make the painted part anew").click()
    page.get_by_text("mask: leaves nothing to make anew").nth(1).wait_for()


def test_a_seed_out_of_range_is_told_and_the_page_goes_on(opened: Callable[..., Any], pair: Pair) -> None:
    page = opened()
    seed = page.get_by_label("seed", exact=True)
    seed.fill("-1")
    page.get_by_text(f"seed: expected an integer from 0 to {MOST_SEED}, got -1").first.wait_for()
    seed.fill("2")
    wait_for_generation(page, pair, seed=2)


def test_two_users_at_once_have_each_their_own_pictures(opened: Callable[..., Any], pair: Pair) -> None:
    pages = [opened(), opened()]
    for turn in range(3):
        for number, page in enumerate(pages):
            page.get_by_label("seed", exact=True).fill(str(10 * turn + number))
        for number, page in enumerate(pages):
            wait_for_generation(page, pair, seed=10 * turn + number)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_is_beyond_the_edge_and_the_picture_comes_first(
    opened: Callable[..., Any], width: int
) -> None:
    page = opened(width)
    picture, class_ = page.locator(".whole").first.bounding_box(), page.get_by_label("class").bounding_box()
    assert picture["y"] + picture["height"] < 844  # it is seen without scrolling
    assert width == WIDE or picture["y"] < class_["y"]
    for tab, wanted in {"Generate": ".whole", "In-paint": "canvas", "Figures": ".viar-figures img"}.items():
        page.get_by_role("tab", name=tab).click()
        page.locator(wanted).first.wait_for()
        assert page.evaluate(BEYOND_THE_EDGE) == [], tab
