"""`diagnose` sees that samples depend on one another, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Cell
from torch import Tensor, nn

from deqlib import JFB, ImplicitLayer, Picard, Stopping
from deqlib.diagnostics import Diagnosis, diagnose
from deqlib.nn import Dropout

NORM = nn.BatchNorm1d(4, affine=False)
MIX = 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))

COUPLED: dict[str, Callable[..., Tensor]] = {
    "statistics of the batch": lambda z, x: torch.tanh(0.5 * NORM(z) + x),
    "nodes as samples": lambda z, x: torch.tanh(MIX @ z + x),
    "each follows the one before": lambda z, x: torch.tanh(0.5 * z.roll(1, 0) + x),
    "attention over the batch": lambda z, x: 0.5 * torch.softmax(0.1 * z @ z.mT, 1) @ z + x,
    "a mean": lambda z, x: 0.1 * z.mean() + x,
    "not finite": lambda z, x: torch.tanh(MIX @ z + x) / (torch.arange(6) > 0).unsqueeze(1),
}


def found_of(cell: Callable[..., Any], x: Any) -> Diagnosis:
    layer = ImplicitLayer(
        cell, solver=Picard(), backward=JFB(), stopping=Stopping(max_steps=12), on_failure="ignore"
    )
    return diagnose(layer, x, solvers=[Picard()], modes=[JFB()], num_starts=0, num_products=2)


def says_so(diagnosis: Diagnosis) -> bool:
    return any(line.startswith("Samples depend on one another") for line in diagnosis.suggestions)


@pytest.mark.parametrize("kind", COUPLED)
def test_samples_that_depend_on_one_another_are_seen(kind: str) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    diagnosis = found_of(COUPLED[kind], x)
    assert says_so(diagnosis)
    assert diagnosis.coupling is not None
    assert diagnosis.coupling.num_coupled >= 3
    assert "moved by other samples" in str(diagnosis)


def test_a_vector_without_a_batch_axis_is_seen() -> None:
    assert says_so(found_of(lambda z, x: torch.tanh(MIX @ z + x), torch.ones(6)))


class Independent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.norm = Cell(4).inner, nn.BatchNorm1d(4)
        self.kind, self.ours, self.theirs = kind, Dropout(0.5), nn.Dropout(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        if self.kind == "our dropout":
            z = self.ours(z)
        elif self.kind == "dropout that draws anew":
            z = self.theirs(z)
        elif self.kind == "statistics that are fixed":
            self.norm.eval()
            z = 0.3 * self.norm(z)
        elif self.kind == "a sample that is not finite":
            x = x / (torch.arange(len(x)) > 0).unsqueeze(1)
        return torch.tanh(self.inner(z) + x)


KINDS = ["plain", "our dropout", "dropout that draws anew", "statistics that are fixed"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*KINDS, "a sample that is not finite"])
def test_samples_that_do_not_are_not_accused(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert not says_so(found_of(Independent(kind).to(dtype), x))


@given(seed=st.integers(0, 2**31), batch=st.integers(2, 12), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_no_independent_cell_of_any_scale_is_accused(seed: int, batch: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = 0.4 * torch.linalg.qr(torch.randn(5, 5, generator=draw))[0]
    x = scale * torch.randn(batch, 5, generator=draw)
    assert not says_so(found_of(lambda z, x: scale * torch.tanh(z / scale @ weight) + x, x))


def test_one_sample_has_nobody_to_depend_on() -> None:
    diagnosis = found_of(lambda z, x: 0.1 * z.mean() + x, torch.ones(1, 4))
    assert diagnosis.coupling is None
    assert not says_so(diagnosis)
