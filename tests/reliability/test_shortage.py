"""Memory that truly does not suffice: images are made in smaller parts, and are the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from pathlib import Path

import lives
import numpy as np
import pytest
from killed_works import in_full
from PIL import Image

Times = Callable[[int, int], int]
Tally = Callable[..., None]
NUM = 512  # images at a time, of which there is room for some
MEGABYTES = 96  # that there are, when the models are loaded; threads of Python alone take half of it

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")


def short_of_memory(module: str, name: str, megabytes: int, *arguments: str) -> None:
    """The command `viar`, with so much more memory from when a function of its module is done."""
    import resource

    commands = import_module(module)
    function = getattr(commands, name)

    def limited(*given: object, **named: object) -> object:
        result = function(*given, **named)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        return result

    setattr(commands, name, limited)
    lives.viar(*arguments)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Models whose images take a megabyte each while they are made."""
    return lives.save_pair(tmp_path_factory.mktemp("models"), width=192, num_heads=4)


def begin(command: str, arguments: list[str], told: Path, megabytes: int) -> lives.Life:
    where = (f"viar.commands.{command}", "load_pair", megabytes)
    return lives.begin(short_of_memory, *where, command, *arguments, told=told)


def cases(pair: tuple[str, ...], image: Path) -> dict[str, list[str]]:
    box = ("--box", "0", "0", "0.5", "0.5")
    return {
        "series": ["generate", *pair, "--num", str(NUM), "--batch-size", str(NUM), "--out"],
        "grid": [
            "generate",
            *pair,
            "--labels",
            "3",
            "--per-class",
            str(NUM),
            "--batch-size",
            str(NUM),
            "--out",
        ],
        "edit": [
            *("edit", *pair, "--image", str(image), "--label", "1", *box),
            *("--num", str(NUM), "--batch-size", str(NUM), "--out"),
        ],
    }


def are_close(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Whether pictures are the same but for what rounding decides, which is otherwise in a smaller batch."""
    if found.keys() != expected.keys():
        return False
    pairs = (
        [np.asarray(Image.open(BytesIO(png))) for png in (found[name], expected[name])] for name in expected
    )
    return all(one.shape == other.shape and np.mean(one != other) < 0.02 for one, other in pairs)


@pytest.mark.parametrize("name", [pytest.param(name, marks=in_full) for name in ("series", "grid", "edit")])
def test_generation_goes_on_in_halves_with_the_same_images(
    name: str, pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), (9, 99, 199)).save(image)
    command, *arguments = cases(pair, image)[name]
    ending = "" if name == "series" else "/a.png"
    whole = [*arguments, str(tmp_path / "whole") + ending]
    assert lives.begin(lives.viar, command, *whole, told=tmp_path / "told").ended() == 0
    expected, wrong, unclear = lives.contents(tmp_path / "whole"), 0, 0
    for run in range(runs := times(1, 5)):
        out, told = tmp_path / str(run), tmp_path / f"{run}.txt"
        life = begin(command, [*arguments, str(out) + ending], told, MEGABYTES + 12 * run)
        unclear += life.ended() != 0 or "memory did not suffice: from here on" not in life.said()
        found = lives.contents(out)
        wrong += found != expected if name == "series" else not are_close(found, expected)
    what = {"series": "`viar generate --num`", "grid": "`viar generate`", "edit": "`viar edit`"}[name]
    row = f"memory does not suffice for the batch: {what}"
    tally("faults", row, runs=runs, lost=0, wrong=wrong, unclear=unclear)
