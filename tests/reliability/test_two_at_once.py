"""Two processes that want one folder: the second is refused, the first is undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lives
import pytest
from killed_works import TRAINING, in_full

Times = Callable[[int, int], int]
Tally = Callable[..., None]
REFUSED = "another process is at work in this folder; wait for it to end, or give another folder"


def hold(folder: str) -> None:
    """Work in a folder until the end."""
    import time

    from viar.files import held

    with held(Path(folder)):
        (Path(folder) / "begun").touch()
        time.sleep(lives.LIMIT)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return lives.save_pair(tmp_path_factory.mktemp("models"))


def commands(pair: tuple[str, ...], steps: int, num: int) -> dict[str, tuple[list[str], str]]:
    """Commands without their folder, and the file in it that tells that they are at work."""
    train = [*TRAINING, "--train.steps", str(steps)]
    return {
        "train": (["train", "digits-viar", *pair[2:], *train], "state"),
        "train-tokenizer": (["train-tokenizer", "digits", *train], "state"),
        "generate": (["generate", *pair, "--num", str(num), "--batch-size", "2"], "000003.png"),
    }


def is_refused(life: lives.Life) -> bool:
    """Whether it ended with one line that tells why, and exit code 2."""
    code, said = life.ended(), life.said()
    return code == 2 and REFUSED in said and "Traceback" not in said and said.count("viar:") == 1


KEPT = ("model.safetensors", "metrics.jsonl", "samples_90x8x8x3.npz", "000089.png")


@pytest.mark.parametrize("command", ["train", pytest.param("train-tokenizer", marks=in_full), "generate"])
def test_the_second_of_two_is_refused_and_the_first_ends_as_if_alone(
    command: str, pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    arguments, begun = commands(pair, steps=8, num=90)[command]
    alone = lives.begin(lives.viar, *arguments, "--out", str(tmp_path / "alone"), told=tmp_path / "alone.txt")
    assert alone.ended() == 0
    expected, runs, wrong, unclear = lives.contents(tmp_path / "alone"), times(1, 5), 0, 0
    for run in range(runs):
        out = tmp_path / str(run)
        flags = [*arguments, "--out", str(out)]
        first = lives.begin(lives.viar, *flags, told=tmp_path / f"{run} first.txt")
        assert first.until((out / begun).exists)
        second = lives.begin(lives.viar, *flags, told=tmp_path / f"{run} second.txt")
        unclear += not is_refused(second)
        wrong += first.ended() != 0
        found = lives.contents(out)
        wrong += any(found.get(name) != expected.get(name) for name in KEPT) or ".lock" in found
    tally(
        "faults",
        f"a second process in the folder: `viar {command}`",
        runs=runs,
        lost=0,
        wrong=wrong,
        unclear=unclear,
    )


@pytest.mark.parametrize("command", ["demo", "reproduce"])
def test_a_folder_that_another_process_holds_is_refused_and_free_after_a_kill(
    command: str, tmp_path: Path, tally: Tally
) -> None:
    holder = lives.begin(hold, str(tmp_path / "out"), told=tmp_path / "holder.txt")
    assert holder.until(lambda: (tmp_path / "out" / "begun").exists())
    flags = ["--dry-run"] if command == "reproduce" else []
    arguments = [command, *flags, "--out", str(tmp_path / "out")]
    second = lives.begin(lives.viar, *arguments, told=tmp_path / "second.txt")
    refused = is_refused(second)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    holder.process.kill()
    holder.process.join()
    (tmp_path / "out" / "begun").unlink()
    third = lives.begin(hold, str(tmp_path / "out"), told=tmp_path / "third.txt")
    free = third.until(lambda: (tmp_path / "out" / "begun").exists())
    third.process.kill()
    third.process.join()
    what = f"a second process in the folder, the first killed: `viar {command}`"
    tally("faults", what, runs=2, lost=0, wrong=left != {"begun", ".lock"}, unclear=2 - refused - free)


def test_two_that_write_the_same_tokens_at_once_write_the_same_files(
    pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    arguments = ["tokenize", *pair[2:], "--data", "digits", "--shard-size", "200"]
    alone = lives.begin(lives.viar, *arguments, "--out", str(tmp_path / "alone"), told=tmp_path / "told")
    assert alone.ended() == 0
    runs, wrong = times(1, 5), 0
    for run in range(runs):
        flags = [*arguments, "--out", str(tmp_path / str(run))]
        both = [lives.begin(lives.viar, *flags, told=tmp_path / "told") for _ in range(2)]
        wrong += any(life.ended() for life in both)
        wrong += lives.contents(tmp_path / str(run)) != lives.contents(tmp_path / "alone")
    unclear = "Traceback" in (tmp_path / "told").read_text()
    tally(
        "faults",
        "a second process in the folder: `viar tokenize`, which shares the work",
        runs=runs,
        lost=0,
        wrong=wrong,
        unclear=unclear,
    )
