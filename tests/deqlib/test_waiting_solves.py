"""No solve of a fixed number of steps waits for the device, and no gradient of one."""

from __future__ import annotations

import pytest
import torch
import waiting_solves
from waiting_solves import CASES
from waits import Waits, waiting_on, without_numbers

from deqlib import ImplicitLayer, PredictionKL, Reversible, ReversiblePicard, Stopping, fixed_point


@without_numbers
def test_no_number_is_needed(device: str) -> None:
    assert waiting_on(device, waiting_solves) == {}


@pytest.mark.parametrize("name", CASES)
def test_no_number_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_solves.pretend(monkeypatch)
    with Waits() as waits:
        CASES[name]("cpu")
    assert not waits.counts


def test_steps_taken_back_wait_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_solves.pretend(monkeypatch)
    layer = ImplicitLayer(
        lambda z, x: 0.5 * z + x,
        solver=ReversiblePicard(),
        stopping=Stopping.steps(6),
        backward=Reversible(on_drift="ignore"),
    )
    x = torch.ones(2, 3, requires_grad=True)
    with Waits() as waits:
        z = layer(x)
        assert not waits.counts
        z.sum().backward()
    assert waits.counts.total() == 1 + 6  # how many there are, and at each whether a sample is lost


def test_readouts_and_places_wait_no_more_often_than_a_residual_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting_solves.pretend(monkeypatch)
    counts, readout = [], PredictionKL(head=lambda z: z, threshold=1e-9, num_in_a_row=2)
    for more in ({}, {"readout": readout, "min_steps": 3, "hold_places": True}):
        rule = Stopping(rtol=1e-14, max_steps=9, check_every=4, norm_axes=(-1,), **more)
        with torch.no_grad(), Waits() as waits:
            fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3, 4), stopping=rule, on_failure="ignore")
        counts.append(waits.counts.total())
    assert 0 < counts[1] <= counts[0]
