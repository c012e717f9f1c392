"""Shared by all tests: one thread, a fixed seed, derandomised examples, little to collect, and a device.

`pytest -m gpu` runs the tests that are worth a GPU's time, on one if there is one. They need no compiler of
C++, and none of the packages that the benchmarks and the command line alone want.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=12)
settings.register_profile("thorough", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, no file without such tests: the machine may lack packages that others import."""
    if config.option.markexpr != "gpu" or not collection_path.name.startswith("test_"):
        return None
    return True if "pytest.mark.gpu" not in collection_path.read_text() else None


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """What `DEQLIB_TEST_DEVICE` names, else a GPU if there is one; float32 is float32 there."""
    name = os.environ.get("DEQLIB_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(name)
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium by Playwright, for modules that are skipped without; not longer, as it holds an event loop."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        launched = running.chromium.launch(executable_path=shutil.which("chromium"))
        yield launched
        launched.close()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more threads, and results then do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> None:
    """What lives before a module's tests is left out of all later collections of garbage.

    Looking through everything that was imported takes longer than most tests, and training and benchmarks
    collect garbage often.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
