"""No solve of a fixed number of steps waits for the device, and no gradient of one."""

from __future__ import annotations

import pytest
import torch
import waiting_solves
from waiting_solves import CASES
from waits import Waits, waiting_on, without_numbers

from deqlib import ImplicitLayer, Reversible, ReversiblePicard, Stopping


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
