"""docs/recipes/deblurring.py: the fixed point is the minimum that it says it is, and can always be found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipe_scripts import load
from torch import Tensor

from deqlib import Stopping

deblurring = load("deblurring")


def blur_matrix(side: int) -> Tensor:
    """Rows and columns are blurred one after the other, by weights that fall with the distance squared."""
    distance = torch.arange(side)[:, None] - torch.arange(side)
    weights = torch.exp(-(distance.double() ** 2) / 2) * (distance.abs() <= 4)
    row = weights / torch.exp(-(torch.arange(-4, 5).double() ** 2) / 2).sum()
    return torch.kron(row, row)


def test_with_a_quadratic_penalty_the_fixed_point_is_that_of_linear_algebra() -> None:
    torch.manual_seed(0)
    side, weight, small = 6, 0.05, 1e-4
    layer = deblurring.equilibrium().double()
    cell = deblurring.ProximalStep(num_filters=1).double()
    with torch.no_grad():  # gain log cosh(small z) is weight z^2 / 2 where small z is small
        cell.filters.zero_()[0, 0, 3, 3] = small
        cell.log_gain.fill_(weight / small**2).log_()
    layer.cell = cell
    y = 0.4 + 0.02 * torch.rand(2, 1, side, side, dtype=torch.float64)
    matrix = blur_matrix(side)
    normal = matrix.T @ matrix + weight * torch.eye(side * side, dtype=torch.float64)
    expected = torch.linalg.solve(normal, matrix.T @ y.flatten(1).T).T.view_as(y)
    assert 0 < expected.min() < expected.max() < 1
    found = layer.solve(y, stopping=Stopping(rtol=1e-10, max_steps=500)).value
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def objective(cell: torch.nn.Module, z: Tensor, y: Tensor) -> Tensor:
    """What a step is to lower, for one picture of 6 x 6, filters written out place by place."""
    data = (blur_matrix(6) @ z.flatten() - y.flatten()).square().sum() / 2
    padded = torch.nn.functional.pad(z[0, 0], (3, 3, 3, 3))
    windows = padded.unfold(0, 7, 1).unfold(1, 7, 1)
    seen = torch.einsum("hwij,cij->chw", windows, cell.filters[:, 0]) + cell.offset[:, None, None]
    return data + (cell.log_gain.exp()[:, None, None] * seen.cosh().log()).sum()


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.01, 0.1, 1.0]))
def test_whatever_the_weights_a_step_goes_down_the_gradient_and_moves_no_two_pictures_apart(
    seed: int, scale: float
) -> None:
    torch.manual_seed(seed)
    cell = deblurring.ProximalStep(num_filters=2).double()
    torch.nn.init.normal_(cell.filters, std=scale)
    torch.nn.init.normal_(cell.offset)
    torch.nn.init.normal_(cell.log_gain)
    z, other, y = torch.rand(3, 1, 1, 6, 6, dtype=torch.float64)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(cell, z, y), z)
    with torch.no_grad():
        moved = cell(z, y)
        inside = (moved > 0) & (moved < 1)
        step, down = (z - moved)[inside], gradient[inside]
        torch.testing.assert_close(step / step.norm(), down / down.norm())
        assert objective(cell, moved, y) <= objective(cell, z, y)
        assert (moved - cell(other, y)).norm() <= (z - other).norm()


def test_the_recipe_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deblurring.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "4 of 4 converged" in printed
    quality = {line[:24].strip(): float(line[24:]) for line in printed.splitlines()[4:8]}
    assert quality["equilibrium"] > quality["Tikhonov"] > quality["measured"]
    assert (tmp_path / "deblurring.png").stat().st_size > 0
