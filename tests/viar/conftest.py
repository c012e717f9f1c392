"""Settings of the tests of viar: no network, and little garbage to collect."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import huggingface_hub
import pytest


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """Training collects garbage at its end, most of the time of a tiny run; what is there before is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
