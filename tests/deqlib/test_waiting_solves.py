"""No solve of a fixed number of steps waits for the device, and no gradient of one."""

from __future__ import annotations

import pytest
import waiting_solves
from waiting_solves import CASES
from waits import Waits, waiting_on, without_numbers


@without_numbers
def test_no_number_is_needed(device: str) -> None:
    assert waiting_on(device, waiting_solves) == {}


@pytest.mark.parametrize("name", CASES)
def test_no_number_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_solves.pretend(monkeypatch)
    with Waits() as waits:
        CASES[name]("cpu")
    assert not waits.counts
