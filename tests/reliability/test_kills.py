"""Commands that are killed at random instants, and started again, end with what they write undisturbed."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import lives
import pytest
from killed_works import (
    SETTINGS,
    WEIGHTS,
    Work,
    converted,
    edited,
    in_full,
    picture,
    series,
    tokens,
    training,
)
from PIL import Image

Times = Callable[[int, int], int]
Tally = Callable[..., None]


def killed(work: Work, folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Figures of so many kills, each at an instant of the span in which the work writes."""
    draw, told = random.Random(seed), folder / "told.txt"
    whole, parts = folder / "whole", folder / "parts"
    for place in (whole, parts):
        place.mkdir()
    took = _life(work, whole, told, None)
    assert took is not None
    expected, runs, lost, wrong, unclear = work.result(whole), 0, 0, 0, 0
    while runs < kills:
        before = work.standing(parts)
        ended = _life(work, parts, told, draw.uniform(0, took))
        runs += ended is None
        now = work.standing(parts)
        lost += any(name not in now for name in before)
        wrong += any(now[name] != expected[name] for name in now)
        if ended is not None or work.is_done(parts):
            wrong += work.result(parts) != expected
            shutil.rmtree(parts)
            parts.mkdir()
    _life(work, parts, told, None)
    wrong += work.result(parts) != expected
    unclear += "Traceback" in told.read_text()
    return {"runs": runs, "lost": lost, "wrong": wrong, "unclear": unclear}


def _life(work: Work, folder: Path, told: Path, seconds: float | None) -> float | None:
    """How long the work took from its first change of the folder on; `None`: killed after `seconds`."""
    before = work.mark(folder)
    life = lives.begin(lives.viar, *work.arguments(folder), told=told)
    life.until(lambda: work.mark(folder) != before)
    start = time.monotonic()
    if seconds is not None:
        life.process.join(seconds)
        if not life.is_over:
            life.process.kill()
            life.process.join()
            return None
    assert life.ended() == 0, life.said()[-2000:]
    return time.monotonic() - start


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return lives.save_pair(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("command", ["train", pytest.param("train-tokenizer", marks=in_full)])
def test_training_that_is_killed_goes_on_to_the_same_weights(
    command: str, pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    work = training(pair, command, steps=times(5, 16))
    figures = killed(work, tmp_path, times(1, 20))
    for left in ("state", "state.new", "state.old", "best", ".saving", ".lock"):
        assert not (tmp_path / "parts" / "out" / left).exists(), left
    tally("faults", f"kill -9: {work.what}", **figures)


def test_a_series_that_is_killed_goes_on_to_the_same_files(
    pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    work = series(pair, num=30)
    tally("faults", f"kill -9: {work.what}", **killed(work, tmp_path, times(1, 40)))


def test_tokenizing_that_is_killed_goes_on_to_the_same_files(
    pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    work = tokens(pair)
    tally("faults", f"kill -9: {work.what}", **killed(work, tmp_path, times(1, 40)))


def test_a_picture_that_is_being_written_is_whole_or_not_there(
    pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), (9, 99, 199)).save(image)
    for work in (picture(pair), edited(pair, image)):
        folder = tmp_path / work.what.split("`")[1]
        folder.mkdir()
        tally("faults", f"kill -9: {work.what}", **killed(work, folder, times(1, 30)))


def test_a_conversion_that_is_killed_leaves_a_whole_checkpoint_or_none(
    pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    published = tmp_path / "published.safetensors"
    model = wide(tmp_path / "wide")
    assert lives.begin(lives.viar, "convert", str(model), str(published), told=tmp_path / "told").ended() == 0
    cases = {
        "a checkpoint": (model, "out.pth"),
        "a .safetensors": (model, "out.safetensors"),
        "a folder": (published, "out"),
    }
    for what, (source, name) in cases.items():
        work, folder = converted(what, source, name), tmp_path / what
        folder.mkdir()
        tally("faults", f"kill -9: {work.what}", **killed(work, folder, times(1, 25)))


def wide(folder: Path) -> Path:
    """A model of some megabytes, which take a while to write."""
    from tiny_models import tiny_transformer

    tiny_transformer(width=256, num_heads=4).save_pretrained(folder)
    return folder


def save(folder: str, names: tuple[str, ...], begun: str = "") -> None:
    """Write these models into a folder again and again; from the first time on `begun` is there."""
    from viar import NextScaleTransformer

    models = [NextScaleTransformer.from_pretrained(name) for name in names]
    end = time.monotonic() + lives.LIMIT  # where nobody kills it
    while time.monotonic() < end:
        for model in models:
            model.save_pretrained(folder)
        if begun:
            Path(begun).touch()


def two_models(folder: Path) -> tuple[str, str]:
    """Folders of two models whose weights fit the settings of the other."""
    from tiny_models import tiny_transformer

    for name, seed, drop in (("a", 1, 0.0), ("b", 2, 0.25)):
        tiny_transformer(seed=seed, width=64, drop_path=drop).save_pretrained(folder / name)
    return str(folder / "a"), str(folder / "b")


def of_one(out: Path, names: tuple[str, ...]) -> bool:
    """Whether a folder has one of these models, or none that is read; not a mixture."""
    found = lives.contents(out)
    if SETTINGS not in found or WEIGHTS not in found:
        return True
    whole = [lives.contents(Path(name)) for name in names]
    return any(all(found[name] == one[name] for name in (SETTINGS, WEIGHTS)) for one in whole)


def test_a_model_that_is_written_over_another_is_never_a_mixture(
    tmp_path: Path, times: Times, tally: Tally
) -> None:
    names, out, kills = two_models(tmp_path), tmp_path / "out", times(3, 60)
    draw, wrong = random.Random(0), 0
    for _ in range(kills):
        life = lives.begin(save, str(out), names, told=tmp_path / "told")
        assert life.until(lambda: (out / ".saving").exists())
        time.sleep(draw.uniform(0, 0.1))
        life.process.kill()
        life.process.join()
        wrong += not of_one(out, names)
    what = "kill -9: `save_pretrained` over another model"
    tally("faults", what, runs=kills, lost=0, wrong=wrong, unclear="Traceback" in life.said())
    from viar import NextScaleTransformer

    NextScaleTransformer.from_pretrained(names[0]).save_pretrained(out)
    assert {path.name for path in out.iterdir()} == {SETTINGS, WEIGHTS, "README.md"}


def test_two_processes_that_save_into_one_folder_come_one_after_the_other(
    tmp_path: Path, times: Times, tally: Tally
) -> None:
    names, out, runs = two_models(tmp_path), tmp_path / "out", times(1, 20)
    wrong, unclear = 0, 0
    for run in range(runs):
        begun = {turn: tmp_path / f"{run}{turn}" for turn in (1, -1)}
        both = [
            lives.begin(save, str(out), names[::turn], str(path), told=tmp_path / "told")
            for turn, path in begun.items()
        ]
        for life, path in zip(both, begun.values(), strict=True):
            assert life.until(path.exists)
        time.sleep(0.2)
        unclear += sum(life.is_over for life in both)
        both[0].process.kill()
        both[0].process.join()
        both[1].process.kill()
        both[1].process.join()
        wrong += not of_one(out, names)
    what = "kill -9: two processes that `save_pretrained` into one folder"
    tally("faults", what, runs=runs, lost=0, wrong=wrong, unclear=unclear)
    assert "Traceback" not in (tmp_path / "told").read_text()
