"""The problems of the suite by name."""

from __future__ import annotations

from functools import cache

import torch

from deqlib.testing import Problem, suite

NAMES = (
    "linear 0.9",
    "linear 0.99",
    "linear, non-normal",
    "nearly singular",
    "expanding",
    "tanh RNN",
    "monotone operator",
    "MLP 32x64x256",
    "MLP 8x256x512",
    "mixer",
    "transformer",
    "transformer, hard",
    "convolution",
)
QUICK = ("linear 0.9", "expanding", "mixer", "transformer, hard")
MAX_EVALUATIONS = 301


@cache
def by_name() -> dict[str, Problem]:
    """Those of `deqlib.testing.suite()`; drawing them takes a second."""
    return {problem.name: problem for problem in suite()}


def named(name: str, device: torch.device) -> Problem:
    """The problem of this name, its tensors on the device."""
    return by_name()[name].to(device=device)
