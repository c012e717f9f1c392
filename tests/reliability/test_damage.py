"""Damaged files: each is refused with its name, or made anew, or has what it had; no other result in silence.

A file in whose place another lies that is whole and fits, such as the weights of another run with the same
settings where these have no checksum, is that other file, and nothing tells.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from damage import damages
from kept import KEPT, Kept

FEW, MANY = 9, 160  # damaged files of each kind
SLOW = {"run": (4, 60)}  # of which each takes a training


def damaged(kept: Kept, whole: Path, swaps: list[Path], random: Random) -> Iterator[tuple[Path, str, bytes]]:
    """Without end: a file of the folder, by its place in it, how it is damaged, and what it holds then."""
    files = [path.relative_to(whole) for pattern in kept.files for path in whole.glob(pattern)]
    ways = {
        file: damages(
            (whole / file).read_bytes(),
            [(swap / file).read_bytes() for swap in swaps if (swap / file).is_file()],
            random,
        )
        for file in sorted(files)
        if (whole / file).is_file()
    }
    while True:
        for file, way in ways.items():
            yield file, *next(way)


def outcome(kept: Kept, folder: Path, file: Path, expected: object) -> str:
    """What came of reading: "same", "refused", "wrong", or how the error does not tell what is wrong."""
    try:
        with warnings.catch_warnings(action="ignore"):
            found = kept.read(folder)
    except (ValueError, OSError) as error:
        told = str(error)
        return "refused" if str(folder) in told or file.name in told else f"unclear: {error!r}"
    except Exception as error:
        return f"unclear: {error!r}"
    return "same" if found == expected else "wrong"


@pytest.mark.parametrize("name", KEPT)
def test_damage_is_refused_or_mended_and_never_gives_another_result(
    name: str, tmp_path: Path, times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    kept, random, whole = KEPT[name], Random(name), tmp_path / "whole"
    swaps = [tmp_path / f"swap{number}" for number in range(len(kept.others))]
    for folder, write in zip((whole, *swaps), (kept.write, *kept.others), strict=True):
        folder.mkdir()
        write(folder)
    expected = kept.read(shutil.copytree(whole, tmp_path / "read"))
    found: dict[str, str] = {}
    runs = times(*SLOW.get(name, (FEW, MANY)))
    for number, (file, how, content) in zip(range(runs), damaged(kept, whole, swaps, random), strict=False):
        folder = shutil.copytree(whole, tmp_path / f"damaged{number}")
        (folder / file).write_bytes(content)
        found[f"{number}: {file} {how}"] = outcome(kept, folder, file, expected)
        shutil.rmtree(folder)
    bad = {case: result for case, result in found.items() if result not in ("same", "refused")}
    assert not bad, bad
    tally("faults", f"damaged: {kept.what}", runs=runs, lost=0, wrong=0, unclear=0)
