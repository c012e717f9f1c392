from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recipe_scripts import load

recipe = load("bilevel")


@pytest.mark.parametrize("seed", range(2))
def test_the_hyper_gradient_is_that_of_the_implicit_function_theorem(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, x_validation = torch.randn(2, 20, 4, dtype=torch.float64, generator=generator)
    y, y_validation = torch.randint(10, (2, 20), generator=generator)
    trust = torch.randn(20, dtype=torch.float64, generator=generator).requires_grad_()
    (found,) = torch.autograd.grad(
        F.cross_entropy(x_validation @ recipe.train(x, y, trust, rtol=1e-10)[0], y_validation), trust
    )

    def loss(weight: torch.Tensor, trust: torch.Tensor) -> torch.Tensor:  # weight: (40,)
        losses = -torch.log_softmax(x @ weight.view(4, 10), dim=1)[torch.arange(20), y]
        return (trust.sigmoid() * losses).mean() + recipe.DECAY * (weight**2).sum()

    fixed, weight = trust.detach(), torch.zeros(40, dtype=torch.float64)
    hessian = torch.func.hessian(loss)
    for _ in range(20):  # Newton's method
        weight = weight - torch.linalg.solve(hessian(weight, fixed), torch.func.grad(loss)(weight, fixed))
    mixed = torch.func.jacrev(torch.func.grad(loss), argnums=1)(weight, fixed)  # (40, 20)
    outer = torch.func.grad(lambda w: F.cross_entropy(x_validation @ w.view(4, 10), y_validation))(weight)
    expected = -torch.linalg.solve(hessian(weight, fixed), outer) @ mixed
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.norm()))


def test_it_runs_and_trusts_right_labels_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--quick", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    before, after = float(lines[0].split()[2]), float(lines[0].split()[5])
    assert after < before
    by_all, _, by_weights, _ = (float(line.split()[-1].rstrip("%")) for line in lines[2:6])
    assert by_weights > by_all
    assert (tmp_path / "bilevel.png").stat().st_size > 5_000
