"""The clipped step of the adjoint that JFB may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deqlib import JFB, PhantomGradient, Picard, Stopping, fixed_point


def adjoint(matrix: Tensor, g: Tensor, backward: JFB | PhantomGradient) -> Tensor:
    """What arrives at x of the gradient g of the value: for z = z A + x that is the adjoint."""
    x = torch.ones_like(g, requires_grad=True)
    settings: dict[str, Any] = {"solver": Picard(), "stopping": Stopping.steps(3)}
    value = fixed_point(lambda z: z @ matrix + x, torch.zeros_like(g), backward=backward, **settings).value
    return torch.autograd.grad(value, x, g)[0]


@given(seed=st.integers(0, 1000), size=st.floats(0, 3), clip=st.floats(0.1, 4))
def test_the_adjoint_is_one_step_no_longer_than_the_clip_allows(seed: int, size: float, clip: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = size * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    u = g + g @ matrix.T
    for row, stepped, gradient in zip(adjoint(matrix, g, JFB(adjoint_clip=clip)), u, g, strict=True):
        share = min(1.0, clip * float(gradient.norm()) / float(stepped.norm()))
        torch.testing.assert_close(row, share * stepped)


def test_unclipped_it_is_two_terms_of_the_series() -> None:
    matrix = 0.2 * torch.eye(3, dtype=torch.float64)
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    series = PhantomGradient(steps=2, damping=1.0, form="neumann")
    torch.testing.assert_close(adjoint(matrix, g, JFB(adjoint_clip=2)), adjoint(matrix, g, series))


def test_a_sample_without_a_gradient_has_none_and_one_that_is_lost_spoils_no_other() -> None:
    g = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [float("nan"), 0.0, 0.0]])
    found = adjoint(torch.eye(3), g, JFB(adjoint_clip=1))
    assert found[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(found[1], g[1])


def test_without_a_clip_no_step_is_taken() -> None:
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(adjoint(torch.eye(3), g, JFB()), g)


def test_it_cannot_be_differentiated_twice() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    value = fixed_point(lambda z: torch.tanh(0.5 * z + x), x.detach(), backward=JFB(adjoint_clip=1)).value
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(value.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("clip", "error", "words"),
    [
        (0, ValueError, r"JFB: adjoint_clip must be in \(0"),
        (float("nan"), ValueError, "JFB: adjoint_clip"),
        (True, TypeError, "JFB: adjoint_clip must be a number, got True"),
    ],
)
def test_a_clip_out_of_range_is_refused(clip: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        JFB(adjoint_clip=clip)
