"""Nothing waits for the device: no generation by fixed counts, no forward pass, no step of training."""

from __future__ import annotations

import pytest
import waiting_images
from waiting_images import CASES
from waits import Waits, waiting_on, without_numbers


@without_numbers
def test_no_number_is_needed(device: str) -> None:
    assert waiting_on(device, waiting_images) == {}


@pytest.mark.parametrize("name", CASES)
def test_no_number_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_images.pretend(monkeypatch)
    with Waits() as waits:
        CASES[name]("cpu")
    assert not waits.counts
