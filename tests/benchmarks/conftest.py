from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests judge no times."""
    monkeypatch.setattr("benchmarks.measure.timing.PAUSE", 0)
