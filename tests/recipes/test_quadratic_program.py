from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_scripts import load
from torch import Tensor

recipe = load("quadratic_program")


def programs(seed: int, n: int = 6, m: int = 2, batch: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quadratic, cost, matrix and target, such that z = 1 / n meets the equations."""
    generator = torch.Generator().manual_seed(seed)
    root, matrix, cost = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((n, n), (m, n), (batch, n))
    )
    target = matrix.sum(1).expand(batch, m) / n
    return root @ root.T / n + 0.1 * torch.eye(n), cost, matrix, target


@pytest.mark.parametrize("seed", range(3))
def test_with_equations_alone_value_and_gradient_are_those_of_the_linear_system(seed: int) -> None:
    given = [tensor.requires_grad_() for tensor in programs(seed)]
    quadratic, cost, matrix, target = given
    n, m = cost.shape[1], len(matrix)
    system = torch.zeros(n + m, n + m, dtype=torch.float64)
    system[:n, :n], system[:n, n:], system[n:, :n] = quadratic, matrix.T, matrix
    expected = torch.linalg.solve(system, torch.cat([-cost, target], dim=1).T).T[:, :n]
    found = recipe.solve_program(quadratic, cost, matrix, target, bounded=False, rtol=1e-11)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad((z * weight).sum(), given) for z in (found, expected)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_with_bounds_the_decision_meets_the_conditions_of_optimality(seed: int) -> None:
    quadratic, cost, matrix, target = programs(seed)
    z = recipe.solve_program(quadratic, 3 * cost, matrix, target)
    assert (z >= 0).all()
    assert (z == 0).any()
    torch.testing.assert_close(z @ matrix.T, target, rtol=0, atol=1e-3)
    # Q z + c = A' y + w, w >= 0 and only where z = 0: y from what is not at its bound, w is the rest.
    for row, gradient in zip(z, z @ quadratic + 3 * cost, strict=True):
        free = row > 0
        y = torch.linalg.lstsq(matrix[:, free].T, gradient[free, None]).solution[:, 0]
        rest = gradient - matrix.T @ y
        assert rest[free].abs().max() < 1e-2
        assert (rest[~free] > -1e-2).all()


def test_gradients_with_bounds_are_those_of_finite_differences() -> None:
    quadratic, cost, matrix, target = programs(1)
    cost = (3 * cost).requires_grad_()
    weight = torch.randn_like(cost)

    def value(cost: Tensor) -> Tensor:
        return (recipe.solve_program(quadratic, cost, matrix, target) * weight).sum()

    (found,) = torch.autograd.grad(value(cost), cost)
    direction, step = torch.randn_like(cost), 1e-2
    with torch.no_grad():
        expected = (value(cost + step * direction) - value(cost - step * direction)) / (2 * step)
    assert (found * direction).sum().item() == pytest.approx(expected.item(), rel=1e-2)


def test_it_runs_and_training_by_decisions_makes_them_cheaper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main(["--quick", "--out", str(tmp_path)])
    _, fitted, trained = capsys.readouterr().out.splitlines()
    assert float(trained.split()[-1]) < 0.9 * float(fitted.split()[-1])
    assert (tmp_path / "quadratic_program.png").stat().st_size > 5_000
