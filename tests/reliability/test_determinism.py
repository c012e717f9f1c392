"""The same bits again: `--deterministic` over runs and threads, and what solves promise by themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from repeated import SOLVERS, inputs, solved

WORKER = Path(__file__).with_name("repeated.py")
DEADLOCK = 1200.0  # seconds after which a process is taken to wait for ever


def made_with(threads: int, folder: Path, steps: int) -> dict[str, str]:
    """Digests of what a process of so many threads made, by what it is."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", WORKER, folder, str(steps)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=DEADLOCK,
    )
    assert done.returncode == 0, done.stderr
    digests: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return digests


def test_a_command_that_is_deterministic_writes_the_same_bytes_in_every_run_on_any_number_of_threads(
    tmp_path: Path, times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    steps, runs = times(3, 20), [1, 2, 4, 1, 2, 4][: times(2, 6)]
    made = [made_with(threads, tmp_path / str(run), steps) for run, threads in enumerate(runs)]
    for what in made[0]:
        same = sum(digests[what] == made[0][what] for digests in made)
        told = f"{what}, {steps} steps" if "train" in what else what
        flag = "" if what.startswith("solve") else " --deterministic"
        tally("same", f"{told}{flag}", runs=len(runs), same=same, different=len(runs) - same)
        # Of a solve it is counted alone: on another kind of CPU products may be split otherwise.
        assert same == len(runs) or what.startswith("solve"), what


def check_close(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    """Whether two solves gave the same bits; values and gradients must be close in any case."""
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)  # the tolerance is 1e-4
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_a_sample_is_the_same_at_every_place_of_a_batch_but_for_rounding(
    times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    runs = same = 0
    for make in SOLVERS.values():
        for x in inputs():
            value, gradient = solved(x, make())
            for seed in range(times(1, 20)):
                order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
                same += check_close((value[order], gradient[order]), solved(x[order], make()))
                runs += 1
    tally("same", "solve of a batch in another order", runs=runs, same=same, different=runs - same)


def test_a_sample_in_a_batch_of_another_size_is_the_same_but_for_rounding(
    times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    runs = same = 0
    for make in SOLVERS.values():
        for x in inputs():
            value, gradient = solved(x, make())
            for size in range(1, times(2, 8)):
                same += check_close((value[:size], gradient[:size]), solved(x[:size], make()))
                runs += 1
    tally("same", "solve in a batch of another size", runs=runs, same=same, different=runs - same)
