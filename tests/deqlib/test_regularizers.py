from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from problems import SOLVERS, TIGHT, Problem, Spy, dense_jacobian, problem, problems, solution_of
from torch import Tensor, nn

from deqlib import (
    JFB,
    Auto,
    ImplicitLayer,
    NewtonKrylov,
    NonConvergenceWarning,
    PhantomGradient,
    Picard,
    StochasticJFB,
    Stopping,
    Unroll,
)
from deqlib.nn import Dropout, one_solve
from deqlib.regularizers import correction_loss, jacobian_penalty, trajectory


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square_norm(base: Problem, z: Tensor) -> float:
    """||J||_F^2 / D, mean over the batch, from the dense Jacobian."""
    return float(dense_jacobian(base, z).square().sum()) / z.numel()


class Signs:
    """The signs that a generator would give, drawn one set after the other."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self.like, self.generator = like, seeded(seed)

    def draw(self) -> Tensor:
        return 2 * torch.empty_like(self.like).bernoulli_(0.5, generator=self.generator) - 1


# Jacobian penalty ----------------------------------------------------------------------------------------


@given(problems(dtype=torch.float64))
def test_the_penalty_estimates_the_jacobian_without_bias(base: Problem) -> None:
    z = torch.randn(base.z0.shape, dtype=base.z0.dtype, generator=seeded(1))
    n = 300
    generator = seeded(2)
    with torch.no_grad():
        draws = torch.stack(
            [jacobian_penalty(base.cell, z, *base.inputs, generator=generator) for _ in range(n)]
        )
    error = float(draws.mean()) - square_norm(base, z)
    assert abs(error) <= 5 * float(draws.std()) / n**0.5 + 1e-12


def test_the_penalty_of_a_map_that_scales_channels_is_exact_with_one_probe() -> None:
    scale = torch.tensor([0.5, -2.0, 0.0, 3.0], dtype=torch.float64)
    penalty = jacobian_penalty(lambda z: scale * z + 1, torch.randn(3, 4, dtype=torch.float64))
    torch.testing.assert_close(penalty, scale.square().mean())


@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_penalty_is_the_mean_square_of_the_products_with_its_probes(num_probes: int) -> None:
    base = problem("mlp")
    z = torch.randn_like(base.z0)
    signs = Signs(z, 5)
    dense = dense_jacobian(base, z)
    products = [signs.draw().flatten() @ dense for _ in range(num_probes)]
    expected = torch.stack(products).square().sum() / (num_probes * z.numel())
    penalty = jacobian_penalty(base.cell, z, *base.inputs, num_probes=num_probes, generator=seeded(5))
    torch.testing.assert_close(penalty, expected)


@pytest.mark.parametrize("kind", ["linear", "tanh", "mlp"])
@pytest.mark.parametrize("attached", [False, True], ids=["z constant", "z with gradient"])
def test_the_gradient_is_that_of_the_dense_expression(kind: str, attached: bool) -> None:
    base = problem(kind).requiring_grad()
    z = torch.randn(base.z0.shape, dtype=base.z0.dtype, requires_grad=attached)
    wanted = [t for t in (*base.inputs, z) if t.requires_grad]
    penalty = jacobian_penalty(base.cell, z, *base.inputs, num_probes=2, generator=seeded(5))
    found = torch.autograd.grad(penalty, wanted, allow_unused=True)

    flat = lambda v: base.f(v.view_as(z)).flatten()  # noqa: E731
    dense = torch.func.jacrev(flat)(z.flatten())
    signs = Signs(z.detach(), 5)
    rows = torch.stack([signs.draw().flatten() for _ in range(2)])
    expected = torch.autograd.grad((rows @ dense).square().sum() / rows.numel(), wanted, allow_unused=True)
    for a, b, t in zip(found, expected, wanted, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(t) if a is None else a, torch.zeros_like(t) if b is None else b
        )


def test_the_jacobian_is_with_respect_to_the_state_even_where_inputs_depend_on_it() -> None:
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    penalty = jacobian_penalty(lambda z, x: 0.5 * z + x, z, 10 * z)
    torch.testing.assert_close(penalty, torch.tensor(0.25, dtype=torch.float64))


def test_with_a_layer_the_gradient_goes_through_the_fixed_point_only_if_it_is_attached() -> None:
    base = problem("tanh").requiring_grad()
    layer = ImplicitLayer(base.cell, stopping=Stopping(rtol=TIGHT, max_steps=200))
    x, w = base.inputs
    z = layer(x, w)
    gradients = {}
    for name, at in (("constant", z.detach()), ("attached", z)):
        penalty = jacobian_penalty(layer.cell, at, x, w, generator=seeded(3))
        (gradients[name],) = torch.autograd.grad(penalty, x, retain_graph=True)
    at = z.detach().requires_grad_()
    penalty = jacobian_penalty(layer.cell, at, x.detach(), w.detach(), generator=seeded(3))
    (through_state,) = torch.autograd.grad(penalty, at)
    slope = 1 - z.detach().square()  # of tanh: how the cell moves with x
    moved = slope * dense_adjoint(base, through_state)
    expected = gradients["constant"] + moved
    torch.testing.assert_close(gradients["attached"], expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(gradients["attached"], gradients["constant"])


def dense_adjoint(base: Problem, g: Tensor) -> Tensor:
    """(I - J^T)^-1 g at the fixed point."""
    transposed = dense_jacobian(base, solution_of(base)).T
    eye = torch.eye(len(transposed), dtype=g.dtype)
    return torch.linalg.solve(eye - transposed, g.flatten()).view_as(g)


def test_under_no_grad_the_penalty_is_the_same_and_keeps_no_graph() -> None:
    base = problem("mlp").requiring_grad()
    spy = Spy(base.cell)
    z = solution_of(base)
    recorded = jacobian_penalty(spy, z, *base.inputs, num_probes=2, generator=seeded())
    with torch.no_grad():
        measured = jacobian_penalty(spy, z, *base.inputs, num_probes=2, generator=seeded())
    assert torch.equal(recorded, measured)
    assert recorded.requires_grad
    assert not measured.requires_grad
    assert spy.count == 2


def test_a_pytree_gives_what_its_flat_state_gives() -> None:
    base = problem("tanh", dim=5)

    def split(z: Tensor) -> dict[str, Any]:
        return {"a": z[:, :2].unsqueeze(2), "b": (z[:, 2:],)}

    def cell(z: dict[str, Any], x: Tensor, w: Tensor) -> dict[str, Any]:
        return split(base.cell(torch.cat([z["a"].squeeze(2), z["b"][0]], 1), x, w))

    z = torch.randn_like(base.z0)
    flat = jacobian_penalty(base.cell, z, *base.inputs, generator=seeded())
    torch.testing.assert_close(jacobian_penalty(cell, split(z), *base.inputs, generator=seeded()), flat)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_cells_are_measured_in_single_precision(autocast: bool) -> None:
    base = problem("mlp", dim=16)
    z = torch.randn_like(base.z0)
    exact = float(jacobian_penalty(base.cell, z, *base.inputs, generator=seeded()).detach())
    dtype = torch.float32 if autocast else torch.bfloat16
    tensors = [t.to(dtype).requires_grad_() for t in base.inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = jacobian_penalty(base.cell, z.to(dtype), *tensors, generator=seeded())
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(exact, rel=0.03)
    assert all(g is not None and g.isfinite().all() for g in torch.autograd.grad(found, tensors[1:]))


def test_float32_and_float64_agree() -> None:
    base = problem("mlp")
    z = torch.randn_like(base.z0)
    signs = Signs(z, 0).draw()
    for dtype in (torch.float32, torch.float64):
        tensors = [t.to(dtype) for t in base.inputs]
        found = jacobian_penalty(base.cell, z.to(dtype), *tensors, generator=seeded())
        assert found.dtype == dtype
        expected = (signs.flatten() @ dense_jacobian(base, z)).square().mean()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_a_constant_cell_has_no_jacobian() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    z = torch.randn(2, 3)
    assert jacobian_penalty(lambda z: torch.ones_like(z), z) == 0
    assert jacobian_penalty(lambda z: 2 * weight, z) == 0
    assert jacobian_penalty(lambda z: 2 * z, torch.randn(0, 3)) == 0


def test_the_penalty_can_train_a_cell_towards_a_contraction() -> None:
    cell = nn.Linear(6, 6)
    nn.init.orthogonal_(cell.weight, gain=2.0)
    z = torch.randn(8, 6)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        jacobian_penalty(cell, z, generator=None).backward()
        optimizer.step()
    assert torch.linalg.matrix_norm(cell.weight, 2) < 0.5


def test_the_penalty_refuses_what_it_cannot_use() -> None:
    z = torch.randn(2, 3)
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        jacobian_penalty(torch.tanh, z, num_probes=0)
    with pytest.raises(TypeError, match="generator must be"):
        jacobian_penalty(torch.tanh, z, generator=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have the shape of the state"):
        jacobian_penalty(lambda z: z[:, :2], z)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use no_grad"):
        jacobian_penalty(torch.tanh, z)


# Trajectories --------------------------------------------------------------------------------------------

ALL_SOLVERS = {**SOLVERS, "newton jvp": NewtonKrylov(derivative="jvp"), "auto": Auto()}


@pytest.mark.parametrize("solver", ALL_SOLVERS.values(), ids=ALL_SOLVERS)
def test_a_trajectory_holds_the_images_of_the_solvers_own_iterates(solver: Any) -> None:
    base = problem("mlp", contraction=0.9).requiring_grad()
    spy = Spy(base.cell)
    layer = ImplicitLayer(spy, solver=solver, backward=JFB(), stopping=Stopping(rtol=1e-9, max_steps=200))
    solution = layer.solve(*base.inputs)
    iterates, calls = list(spy.states), spy.count
    spy.states.clear()
    states = trajectory(layer, *base.inputs, steps=(0, 1, 4))
    assert spy.count == calls + 3
    for k, state in zip((0, 1, 4), states, strict=False):
        torch.testing.assert_close(state, base.f(iterates[k]))
        weights = torch.randn_like(state)
        torch.testing.assert_close(
            torch.autograd.grad(state, base.inputs, weights),
            torch.autograd.grad(base.f(iterates[k]), base.inputs, weights),
        )
    assert torch.equal(states[-1], solution.value)


def test_picard_states_are_powers_of_the_map() -> None:
    base = problem("tanh")
    layer = ImplicitLayer(base.cell, solver=Picard(), stopping=Stopping(rtol=TIGHT, max_steps=100))
    z, expected = base.z0, []
    for _ in range(6):
        expected.append(z := base.f(z))
    states = trajectory(layer, *base.inputs, steps=(0, 2, 5))
    torch.testing.assert_close(states[:3], [expected[k] for k in (0, 2, 5)])


MODES: dict[str, Any] = {
    "unroll": Unroll(),
    "jfb": JFB(),
    "phantom": PhantomGradient(steps=3),
    "stochastic": StochasticJFB(no_grad=(3, 3), grad=(2, 2)),
}


@pytest.mark.parametrize("backward", MODES.values(), ids=MODES)
def test_the_last_state_has_the_gradient_of_the_layers_mode(backward: Any) -> None:
    base = problem("tanh").requiring_grad()
    layer = ImplicitLayer(base.cell, solver=Picard(), backward=backward, stopping=Stopping(rtol=1e-8))
    g = torch.randn_like(base.z0)
    expected = torch.autograd.grad(layer(*base.inputs), base.inputs, g)
    states = trajectory(layer, *base.inputs, steps=(1,))
    torch.testing.assert_close(torch.autograd.grad(states[-1], base.inputs, g), expected)
    assert torch.equal(states[0].detach(), base.f(base.f(base.z0)).detach())


@pytest.mark.parametrize("backward", MODES.values(), ids=MODES)
def test_steps_that_the_solve_does_not_get_to_give_the_image_of_its_end(backward: Any) -> None:
    base = problem("tanh", contraction=0.1).requiring_grad()
    layer = ImplicitLayer(base.cell, solver=Picard(), backward=backward, stopping=Stopping(rtol=1e-6))
    taken = int(layer.solve(*base.inputs).num_steps.max())
    # The evaluations of the backward mode come after the last step, and are no iterates.
    states = trajectory(layer, *base.inputs, steps=(2, *range(taken, taken + 5)))
    assert not torch.equal(states[0], states[1])
    for state in states[1:-1]:
        assert torch.equal(state, base.f(states[-1]))


def test_a_fixed_number_of_steps_has_a_trajectory() -> None:
    base = problem("tanh")
    layer = ImplicitLayer(base.cell, solver=Picard(), stopping=Stopping.steps(4))
    states = trajectory(layer, *base.inputs, steps=(1, 3, 4))
    torch.testing.assert_close(states[1], states[3])  # the image of the third iterate is the fourth
    torch.testing.assert_close(states[2], base.f(states[3]))


def test_without_gradient_a_trajectory_has_the_same_values() -> None:
    base = problem("tanh").requiring_grad()
    layer = ImplicitLayer(base.cell)
    recorded = trajectory(layer, *base.inputs)
    with torch.no_grad():
        plain = trajectory(layer, *base.inputs)
    assert len(plain) == 3
    for a, b in zip(recorded, plain, strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad
        assert not b.requires_grad


def test_a_trajectory_takes_pytrees_modules_and_compact_layers() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            nn.init.orthogonal_(self.linear.weight, gain=0.5)

        def forward(self, z: dict[str, Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"h": torch.tanh(self.linear(z["h"]) + x["h"])}

    layer = ImplicitLayer(Cell(), compact=True)
    x = {"h": torch.randn(3, 4) * torch.tensor([[0.0], [1.0], [9.0]])}
    states = trajectory(layer, x, steps=(1, 2))
    sum(state["h"].square().sum() for state in states).backward()
    assert layer.cell.linear.weight.grad.norm() > 0
    assert {name for name, _ in layer.named_modules()} == {"", "cell", "cell.linear"}


def test_all_of_a_trajectory_sees_one_dropout_mask() -> None:
    layer = ImplicitLayer(_Masked(), stopping=Stopping(rtol=1e-5))
    x = torch.ones(2, 50)
    first, last = trajectory(layer, x, steps=(1,))
    assert torch.equal(first == 1, last == 1)
    assert not torch.equal(last, trajectory(layer, x, steps=(1,))[-1])


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = Dropout(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x + 0.2 * self.dropout(z + 1)


def test_the_penalty_sees_the_mask_of_the_solve_within_one_solve() -> None:
    layer = ImplicitLayer(_Masked())
    x = torch.ones(2, 50)
    with one_solve():
        kept = (layer(x) != 1).sum()
        penalty = jacobian_penalty(layer.cell, layer(x).detach(), x)
    torch.testing.assert_close(penalty, kept / 100 * 0.4**2)
    assert jacobian_penalty(layer.cell, x, x) > 0  # and outside of one it draws its own


def test_a_trajectory_reports_failure_as_the_layer_does() -> None:
    layer = ImplicitLayer(lambda z, x: -2 * z + x, solver=Picard(), stopping=Stopping(max_steps=5))
    with pytest.warns(NonConvergenceWarning):
        trajectory(layer, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("steps", "error", "match"),
    [
        ((2, 1), ValueError, r"increasing, got \(2, 1\)"),
        ((2, 2), ValueError, "increasing"),
        ((-1,), ValueError, r"steps\[0\] must be at least 0"),
        ((1.5,), TypeError, r"steps\[0\] must be an int"),
    ],
)
def test_steps_must_be_increasing_numbers(steps: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        trajectory(ImplicitLayer(lambda z, x: 0.5 * z + x), torch.ones(2, 3), steps=steps)


def test_a_trajectory_is_of_a_layer() -> None:
    with pytest.raises(TypeError, match=r"layer must be a deqlib\.ImplicitLayer"):
        trajectory(torch.tanh, torch.ones(2, 3))  # type: ignore[arg-type]


# Correction loss -----------------------------------------------------------------------------------------


def test_the_last_state_weighs_one_and_earlier_ones_less() -> None:
    states = [torch.tensor(v, dtype=torch.float64) for v in (100.0, 10.0, 1.0)]
    assert float(correction_loss(states, lambda z: z, decay=0.5)) == 25 + 5 + 1
    assert float(correction_loss(states, lambda z: z)) == pytest.approx(64 + 8 + 1)
    assert float(correction_loss(states[:1], lambda z: 2 * z)) == 200
    assert float(correction_loss(states, lambda z: z, decay=1)) == 111


def test_the_gradient_of_the_correction_loss_is_the_weighted_sum() -> None:
    base = problem("tanh").requiring_grad()
    layer = ImplicitLayer(base.cell, stopping=Stopping(rtol=1e-8))
    criterion: Callable[[Tensor], Tensor] = lambda z: (z - 1).square().mean()  # noqa: E731
    states = trajectory(layer, *base.inputs, steps=(0, 1))
    found = torch.autograd.grad(correction_loss(states, criterion, decay=0.7), base.inputs, retain_graph=True)
    parts = [torch.autograd.grad(criterion(z), base.inputs, retain_graph=True) for z in states]
    expected = [0.49 * a + 0.7 * b + c for a, b, c in zip(*parts, strict=True)]
    torch.testing.assert_close(list(found), expected)


def test_the_correction_loss_refuses_what_it_cannot_use() -> None:
    one = [torch.ones(2, 3)]
    with pytest.raises(ValueError, match="at least one state"):
        correction_loss([], torch.sum)
    with pytest.raises(ValueError, match="decay must be in"):
        correction_loss(one, torch.sum, decay=0)
    with pytest.raises(TypeError, match=r"scalar tensor, got one of shape \(2, 3\)"):
        correction_loss(one, lambda z: z)
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        correction_loss(one, lambda z: 1.0)  # type: ignore[arg-type,return-value]
