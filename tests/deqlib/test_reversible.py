from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import KINDS, Cell, Problem, Spy, as_pytree, dense_gradients, made, problem, problems
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deqlib import Anderson, ImplicitLayer, Solution, Status, Stopping, Unroll, fixed_point
from deqlib.backward.reversible import ReconstructionError, ReconstructionWarning, Reversible
from deqlib.diagnostics import saved_bytes
from deqlib.solvers.reversible import ReversiblePicard
from deqlib.testing import SolverConformance

SILENT = Reversible(on_drift="ignore")
STRICT = Reversible(on_drift="raise")


class TestReversiblePicard(SolverConformance):
    solver = ReversiblePicard()


def reversible(f: Callable[..., Any], z0: Any, damping: float = 0.5, **settings: Any) -> Solution:
    settings = {"backward": STRICT, "on_failure": "ignore", **settings}
    return fixed_point(f, z0, solver=ReversiblePicard(damping=damping), **settings)


def points(f: Callable[[Tensor], Tensor], z0: Tensor, damping: float, steps: int) -> list[Tensor]:
    """w_0 ... w_steps of the iteration as the paper has it, on the tape: two states in turn."""
    y = z = z0
    found = [z]
    for step in range(steps):
        if step % 2 == 0:
            y = (1 - damping) * y + damping * f(z)
            found.append(y)
        else:
            z = (1 - damping) * z + damping * f(y)
            found.append(z)
    return found


def explicit(f: Callable[[Tensor], Tensor], z0: Tensor, damping: float, counts: list[int]) -> Tensor:
    """Sample i after counts[i] steps."""
    found = points(f, z0, damping, max(counts))
    return torch.stack([found[count][i] for i, count in enumerate(counts)])


def best_steps(f: Callable[[Tensor], Tensor], z0: Tensor, damping: float, steps: int) -> list[int]:
    """Where each sample's residual is smallest."""
    with torch.no_grad():
        norms = torch.stack([(f(w) - w).norm(dim=1) for w in points(f, z0, damping, steps)])
    return norms.argmin(0).tolist()


def with_first_steps(value: Tensor, f: Callable[[Tensor], Tensor], z0: Tensor, counts: list[int]) -> Tensor:
    """`value` where samples that stayed at the start have the gradient of one step from there."""
    image, stayed = f(z0), (torch.tensor(counts) == 0).unsqueeze(1)
    return torch.where(stayed, z0.detach() + (image - image.detach()), value)


def assert_same_gradients(
    ours: Tensor, theirs: Tensor, tensors: tuple[Tensor, ...], tol: float = 1e-10
) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(v, tensors, g, allow_unused=True) for v in (ours, theirs))
    for a, b, tensor in zip(found, expected, tensors, strict=True):
        a, b = (torch.zeros_like(tensor) if t is None else t for t in (a, b))
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def random_start(base: Problem) -> Tensor:
    return torch.randn_like(base.z0).requires_grad_()


# Against an explicit loop -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damping", "steps"),
    [(0.3, 0), (0.5, 1), (0.8, 2), (0.5, 3), (0.8, 12), (0.5, 17), (0.3, 40), (0.5, 40)],
)
@given(base=problems(dtype=torch.float64, max_contraction=0.7))
def test_gradients_are_those_of_an_explicit_loop(damping: float, steps: int, base: Problem) -> None:
    base = base.requiring_grad()
    z0 = random_start(base)
    solution = reversible(base.f, z0, damping, stopping=Stopping.steps(steps))
    expected = explicit(base.f, z0, damping, [steps] * len(z0))
    assert_same_gradients(solution.value, expected, (z0, *base.inputs))


class Attention(nn.Module):
    """Tokens (B, L, C) that look at one another."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(z + x)).chunk(3, -1)
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        return 0.4 * torch.tanh(self.out(mixed)) + x


def test_gradients_of_an_attention_cell_reach_inputs_parameters_and_the_start() -> None:
    cell = Attention().double()
    x, z0 = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    layer = ImplicitLayer(
        cell, solver=ReversiblePicard(damping=0.5), backward=STRICT, stopping=Stopping.steps(30)
    )
    ours = layer.solve(x, z0=z0).value
    theirs = explicit(lambda z: cell(z, x), z0, 0.5, [30, 30])
    assert_same_gradients(ours, theirs, (x, z0, *cell.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_passes(kind: str) -> None:
    base = problem(kind, batch=2, dim=3, contraction=0.5).requiring_grad()

    def value(z0: Tensor, *tensors: Tensor) -> Tensor:
        return reversible(lambda z: base.cell(z, *tensors), z0, stopping=Stopping.steps(9)).value

    assert torch.autograd.gradcheck(value, (random_start(base), *base.inputs))


@pytest.mark.parametrize("damping", [0.3, 0.5, 0.8])
def test_the_gradient_tends_to_the_implicit_one_as_the_solve_converges(damping: float) -> None:
    base = problem("mlp", contraction=0.4).requiring_grad()
    g = torch.randn_like(base.z0)
    exact = torch.cat([t.flatten() for t in dense_gradients(base, g)])
    errors = []
    for rtol in (1e-1, 1e-3, 1e-5):
        value = reversible(base.f, base.z0, damping, stopping=Stopping(rtol=rtol, max_steps=200)).value
        found = torch.cat([t.flatten() for t in torch.autograd.grad(value, base.inputs, g)])
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_gradients_are_those_of_unrolling(dtype: torch.dtype) -> None:
    base = problem("mlp", contraction=0.7, dtype=dtype).requiring_grad()
    z0 = random_start(base)
    g = torch.randn_like(z0)
    found = []
    for mode in (STRICT, Unroll()):
        value = reversible(base.f, z0, backward=mode, stopping=Stopping.steps(30)).value
        assert value.dtype == dtype
        found.append(torch.autograd.grad(value, (z0, *base.inputs), g))
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()


# A count for each sample --------------------------------------------------------------------------------


def mixed(batch: int = 4, dim: int = 5) -> Problem:
    """Samples of very different difficulty; the first starts at its fixed point, 0."""
    base = problem("linear", batch=batch, dim=dim, contraction=0.8)
    x = base.inputs[0].clone()
    x[0] = 0
    rates = torch.linspace(0.1, 1, batch, dtype=torch.float64).unsqueeze(1)
    return made(lambda z, x, w: torch.tanh(rates * (z @ w) + x), x, *base.inputs[1:])


@pytest.mark.parametrize("check_every", [1, 3, 50])
@pytest.mark.parametrize("damping", [0.5, 0.8])
@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
def test_each_sample_is_differentiated_from_its_own_step_on(
    check_every: int, damping: float, rtol: float
) -> None:
    base = mixed().requiring_grad()
    z0 = torch.zeros_like(base.z0, requires_grad=True)
    stopping = Stopping(rtol=rtol, max_steps=150, check_every=check_every)
    solution = reversible(base.f, z0, damping, backward=SILENT, stopping=stopping)
    assert solution.converged.all()
    counts = solution.num_steps.tolist()
    assert counts[0] == 0
    assert len(set(counts)) > 2
    expected = with_first_steps(explicit(base.f, z0, damping, counts), base.f, z0, counts)
    assert_same_gradients(solution.value, expected, (z0, *base.inputs), 1e-7)


def test_samples_that_left_the_batch_are_differentiated_from_their_own_step_on() -> None:
    base = problem("tanh", batch=6, contraction=0.8)
    x = base.inputs[0].clone()
    x[:3] *= 1e-2
    rates = torch.linspace(0.1, 1, 6, dtype=torch.float64).unsqueeze(1)
    base = made(lambda z, x, w, r: torch.tanh(r * (z @ w) + x), x, base.inputs[1], rates)
    base = base.requiring_grad()
    seen = Spy(base.cell)
    stopping = Stopping(rtol=1e-5, max_steps=100)
    solution = reversible(
        seen, base.z0, args=base.inputs, stopping=stopping, compact=(0, None, 0), damping=0.5
    )
    assert min(len(z) for z in seen.states) < 4
    expected = explicit(base.f, base.z0, 0.5, solution.num_steps.tolist())
    assert_same_gradients(solution.value, expected, base.inputs, 1e-8)


def rotation(batch: int, angle: float, scale: float, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Turns every pair of numbers: residuals of the two-step iteration go up and down."""
    turn = torch.tensor(angle, dtype=torch.float64)
    matrix = scale * torch.stack(
        [torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])]
    )
    return lambda z: z @ matrix + x


@pytest.mark.parametrize("check_every", [1, 4])
@given(
    angle=st.floats(0.3, 3.1),
    scale=st.floats(0.9, 1.6),
    steps=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_out_of_steps_the_best_iterate_is_differentiated(
    check_every: int, angle: float, scale: float, steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, z0 = (torch.randn(3, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    f = rotation(3, angle, scale, x)
    stopping = Stopping(rtol=0, max_steps=steps, patience=None, blowup=1e30, check_every=check_every)
    solution = reversible(f, z0, stopping=stopping)
    counts = best_steps(f, z0, 0.5, steps)
    assert solution.counts() == {Status.MAX_STEPS: 3}
    expected = with_first_steps(explicit(f, z0, 0.5, counts), f, z0, counts)
    assert_same_gradients(solution.value, expected, (x, z0))


@pytest.mark.parametrize("check_every", [1, 3])
def test_samples_that_stalled_or_blew_up_are_differentiated_at_their_best_iterate(check_every: int) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    z0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([[0.1], [1.4], [20.0]], dtype=torch.float64)
    turn = rotation(3, 2.5, 1.0, torch.zeros(2, dtype=torch.float64))
    f = lambda z: sizes * turn(z) + x  # noqa: E731
    stopping = Stopping(rtol=1e-4, max_steps=60, patience=9, blowup=1e3, check_every=check_every)
    solution = reversible(f, z0, backward=SILENT, stopping=stopping)
    assert solution.status.tolist() == [Status.CONVERGED, Status.STALLED, Status.DIVERGED]
    steps = solution.num_steps.tolist()
    counts = [steps[0], *best_steps(f, z0, 0.5, 60)[1:]]
    expected = with_first_steps(explicit(f, z0, 0.5, counts), f, z0, counts)
    assert_same_gradients(solution.value, expected, (x, z0), 1e-7)


def test_a_fixed_number_of_steps_differentiates_the_last_iterate_even_where_an_earlier_one_was_better() -> (
    None
):
    x, z0 = (torch.randn(3, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    f = rotation(3, 2.5, 1.4, x)
    for measure in (True, False):
        solution = reversible(f, z0, stopping=Stopping.steps(9, measure=measure))
        assert_same_gradients(solution.value, explicit(f, z0, 0.5, [9] * 3), (x, z0))


# Who receives gradient ----------------------------------------------------------------------------------


def test_arguments_closures_and_parameters_receive_the_same_gradient() -> None:
    cell = Cell(5).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    wanted = (x, *cell.parameters())
    written = lambda z, x, w, b: torch.tanh(z @ w.T + b + x)  # noqa: E731
    z0, settings = torch.zeros_like(x), {"stopping": Stopping(rtol=1e-6)}
    values = [
        reversible(cell, z0, args=(x,), **settings).value,
        reversible(lambda z: cell(z, x), z0, **settings).value,
        reversible(written, z0, args=(x, cell.inner.weight, cell.inner.bias), **settings).value,
    ]
    found = [torch.autograd.grad(value.square().sum(), wanted) for value in values]
    for tensors in zip(*found, strict=True):
        assert tensors[0].norm() > 0
        for other in tensors[1:]:
            torch.testing.assert_close(other, tensors[0], rtol=1e-10, atol=1e-12)


def test_backward_accumulates_into_leaves_and_grad_leaves_them_alone() -> None:
    cell = Cell(5)
    x = torch.randn(2, 5, requires_grad=True)
    value = reversible(cell, torch.zeros(2, 5), args=(x,)).value
    wanted = (x, *cell.parameters())
    found = torch.autograd.grad(value.sum(), wanted, retain_graph=True)
    assert all(tensor.grad is None for tensor in wanted)
    value.sum().backward()
    assert all(torch.equal(tensor.grad, gradient) for tensor, gradient in zip(wanted, found, strict=True))


def test_a_tensor_and_what_was_made_from_it_may_both_be_used() -> None:
    base = problem("tanh")
    u = base.inputs[0].clone().requires_grad_()
    weight = base.inputs[1]

    def value(solve: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        x = u.exp().sin()  # keeps tensors for its own backward pass
        (slope,) = torch.autograd.grad(
            (solve(lambda z: torch.tanh(z @ weight + x * u)) * torch.arange(5.0)).sum(), u
        )
        return slope

    ours = value(lambda f: reversible(f, base.z0, stopping=Stopping.steps(12)).value)
    theirs = value(lambda f: explicit(f, base.z0, 0.5, [12] * 3))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        return 0.5 * z * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        z, weight = ctx.saved_tensors
        return 0.5 * g * weight, 0.5 * (g * z).sum(0)


@pytest.mark.parametrize("elsewhere", [True, False], ids=["also elsewhere", "only there"])
def test_parameters_given_to_a_custom_function_receive_gradient(elsewhere: bool) -> None:
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    f = lambda z: Scale.apply(z, weight) + (0 * weight if elsewhere else 0) + x  # noqa: E731
    ours = reversible(f, torch.zeros_like(x), stopping=Stopping.steps(9)).value
    theirs = explicit(f, torch.zeros_like(x), 0.5, [9, 9])
    assert_same_gradients(ours, theirs, (x, weight))


def test_a_tensor_with_a_history_given_to_a_custom_function_is_refused() -> None:
    weight = torch.rand(4, requires_grad=True)
    made = 1 * weight
    box = SimpleNamespace(made=made)  # where nobody looks
    value = reversible(lambda z: Scale.apply(z, box.made) + 0 * made, torch.ones(2, 4)).value
    with pytest.raises(RuntimeError, match=r"custom autograd function .*pass x.clone\(\) instead"):
        value.sum().backward()
    value = reversible(lambda z: Scale.apply(z, box.made.clone()), torch.ones(2, 4)).value
    value.sum().backward()
    assert weight.grad.norm() > 0


def test_a_pytree_state_has_the_gradients_of_the_same_numbers_in_one_tensor() -> None:
    base = problem("mlp", dim=7).requiring_grad()

    cell, start = as_pytree(base)
    tree = reversible(cell, start, stopping=Stopping(rtol=1e-6)).value
    flat = reversible(base.f, base.z0, stopping=Stopping(rtol=1e-6)).value
    ours = torch.autograd.grad(tree["h"].sin().sum(), base.inputs)
    theirs = torch.autograd.grad(flat[:, :3].sin().sum(), base.inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_cell_that_ignores_its_state_or_all_else_is_no_obstacle() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(
        reversible(lambda z: 3 * x, torch.zeros(2, 3), stopping=Stopping.steps(3)).value.sum(), x
    )
    torch.testing.assert_close(slope, torch.full((2, 3), 3 * (0.5 + 0.25)))
    z0 = torch.ones(2, 3, requires_grad=True)
    constant = torch.ones(2, 3)
    (slope,) = torch.autograd.grad(
        reversible(lambda z: constant, z0, stopping=Stopping.steps(3)).value.sum(), z0
    )
    torch.testing.assert_close(slope, torch.full((2, 3), 0.25))
    value = reversible(lambda z: 0.5 * z + constant, torch.zeros(2, 3)).value
    assert not value.requires_grad


# Rounding -----------------------------------------------------------------------------------------------


def stiff(dtype: torch.dtype = torch.float64) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A slow linear problem: many steps, whose undoing amplifies rounding errors fast."""
    x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    rates = torch.tensor([-0.95, 0.3, 0.9, 0.95], dtype=dtype)
    return lambda z: torch.tanh(z * rates + 0.1 * x), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drift_is_reported_as_asked(dtype: torch.dtype) -> None:
    f, x = stiff(dtype)

    def backward(mode: Reversible, steps: int) -> Tensor:
        value = reversible(f, torch.zeros_like(x), 0.8, backward=mode, stopping=Stopping.steps(steps)).value
        return torch.autograd.grad(value.sum(), x)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(Reversible(), 12)
        backward(SILENT, 100)
    message = r"in [123] of 3 samples the rebuilt iteration misses .*error of the gradient .*rtol=1.0e-03"
    with pytest.warns(ReconstructionWarning, match=message) as caught:
        backward(Reversible(), 100)
    assert caught[0].filename == __file__
    with pytest.raises(ReconstructionError, match=message):
        backward(STRICT, 100)
    backward(Reversible(rtol=1.0), 100)
    with pytest.warns(ReconstructionWarning, match="3 of 3"):
        backward(Reversible(rtol=0), 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [20, 30, 60, 300])
def test_the_reported_error_is_about_that_of_the_gradient(
    steps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Tensor] = []
    monkeypatch.setattr(Reversible, "report", lambda self, error: reports.append(error))
    f, x = stiff(dtype)
    found = []
    for mode in (Reversible(), Unroll()):
        value = reversible(f, torch.zeros_like(x), 0.8, backward=mode, stopping=Stopping.steps(steps)).value
        found.append(torch.autograd.grad(value.sum(), x)[0])
    true = (found[0] - found[1]).norm(dim=1) / found[1].norm(dim=1)
    (reported,) = reports
    assert (true <= 3 * reported + 10 * torch.finfo(dtype).eps).all()
    assert (reported < 1).all()


def test_a_gradient_that_fades_before_the_rounding_errors_grow_is_right_after_any_number_of_steps() -> None:
    base = problem("tanh", dim=16, contraction=0.6).requiring_grad()
    g = torch.randn_like(base.z0)
    value = reversible(base.f, base.z0, 0.8, stopping=Stopping.steps(300)).value
    exact = dense_gradients(base, g)
    for ours, theirs in zip(torch.autograd.grad(value, base.inputs, g), exact, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_a_sample_whose_points_cannot_be_rebuilt_spoils_no_gradient_but_its_own() -> None:
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    rates = torch.tensor([[0.3], [0.97]], dtype=torch.float64)
    x = torch.ones(2, 2, dtype=torch.float64)

    # Not finite beyond the range of the forward pass, where points rebuilt wrongly soon are.
    def f(z: Tensor) -> Tensor:
        return weight * rates * torch.sqrt(z + 1) * torch.sqrt(9 - z) / 3 + 0.1 * x

    settings = {"backward": SILENT, "stopping": Stopping.steps(150)}
    value = reversible(f, torch.zeros_like(x), 0.8, **settings).value
    (slope,) = torch.autograd.grad(value.sum(), weight, retain_graph=True)
    assert slope.isfinite()
    (alone,) = torch.autograd.grad(value[0].sum(), weight)
    expected = explicit(f, torch.zeros_like(x), 0.8, [150, 150])[0]
    torch.testing.assert_close(alone, torch.autograd.grad(expected.sum(), weight)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("stopping", [Stopping(rtol=1e-4), Stopping.steps(9)], ids=["tolerance", "steps"])
def test_a_sample_that_is_not_finite_leaves_its_batch_mates_gradients_alone(stopping: Stopping) -> None:
    base = problem(batch=4)
    results = []
    for bad in (0.0, float("nan"), float("inf")):
        x = base.inputs[0].clone()
        x[1] += bad
        x.requires_grad_()
        f = lambda z, x=x: z @ (base.inputs[1] * 0.5) + x  # noqa: E731
        solution = reversible(f, base.z0, backward=SILENT, stopping=stopping)
        g = torch.ones_like(solution.value)
        results.append(torch.autograd.grad(solution.value, x, g)[0][[0, 2, 3]])
    assert results[0].norm() > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=0)


def test_a_sample_that_exploded_in_a_fixed_number_of_steps_is_reported_and_has_no_gradient() -> None:
    x = torch.tensor([[0.1], [9.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    f = lambda z: scale * z.pow(3) + x  # noqa: E731
    value = reversible(f, torch.zeros_like(x), backward=Reversible(), stopping=Stopping.steps(30)).value
    assert not value[1].isfinite().any()
    with pytest.warns(ReconstructionWarning, match="1 of 2"):
        slopes = torch.autograd.grad(value, (x, scale), torch.ones_like(value))
    assert slopes[0][1] == 0
    expected = explicit(lambda z: scale * z.pow(3) + x[:1], torch.zeros_like(x[:1]), 0.5, [30])
    torch.testing.assert_close(slopes[1], torch.autograd.grad(expected.sum(), scale)[0])


def test_a_cell_that_is_not_a_function_is_found_out() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    f = lambda z: nn.functional.dropout(torch.tanh(0.7 * z + x), 0.5)  # noqa: E731
    value = reversible(f, torch.zeros_like(x), stopping=Stopping.steps(10)).value
    with pytest.raises(ReconstructionError, match="without randomness"):
        value.sum().backward()


def test_tensors_changed_before_the_backward_pass_are_found_out() -> None:
    cell = Cell(5)
    x = torch.randn(2, 5)
    value = reversible(cell, torch.zeros(2, 5), args=(x,)).value
    with torch.no_grad():
        cell.inner.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# Values, counts and memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("stopping", [Stopping(rtol=1e-4), Stopping.steps(7)], ids=["tolerance", "steps"])
def test_the_value_is_that_without_gradient_and_every_evaluation_is_counted(stopping: Stopping) -> None:
    base = problem("mlp")
    with torch.no_grad():
        plain = reversible(base.f, base.z0, stopping=stopping)
    f = Spy(base.requiring_grad().f)
    solution = reversible(f, base.z0, stopping=stopping)
    assert torch.equal(solution.value, plain.value)
    assert torch.equal(solution.num_steps, plain.num_steps)
    assert f.outputs_on_tape == [False] * plain.nfe + [True]  # the last finds what the cell uses
    assert solution.nfe == plain.nfe + 1 == f.count
    solution.value.sum().backward()
    assert f.count == solution.nfe + int(solution.num_steps.max())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_autograd_is_off(mode: Any) -> None:
    base = problem().requiring_grad()
    f = Spy(base.f)
    with mode():
        solution = reversible(f, base.z0)
    assert not solution.value.requires_grad
    assert not any(f.outputs_on_tape)
    assert solution.nfe == f.count


class Box:
    """Holds a tensor that autograd saved; dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(dtype: torch.dtype, steps: int) -> int:
    """What the tape of a solve holds once it is over, parameters excepted."""
    base = problem("mlp", batch=4, dim=32, dtype=dtype).requiring_grad()
    boxes: list[weakref.ref] = []
    known = {tensor.data_ptr() for tensor in base.inputs}

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor.detach())
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        value = reversible(base.f, base.z0, stopping=Stopping.steps(steps)).value
    kept = [box().tensor for box in boxes if box() is not None]
    assert value.requires_grad
    return sum({t.data_ptr(): t.nbytes for t in kept if t.data_ptr() not in known}.values())


@pytest.mark.parametrize(("dtype", "start"), [(torch.float32, 4), (torch.float64, 8)])
def test_memory_does_not_grow_with_the_number_of_steps(dtype: torch.dtype, start: int) -> None:
    base = problem("mlp", batch=4, dim=32, dtype=dtype).requiring_grad()

    def measure(mode: Any, steps: int) -> int:
        settings = {"backward": mode, "stopping": Stopping.steps(steps)}
        return saved_bytes(lambda: reversible(base.f, base.z0, **settings).value, exclude=base.inputs)

    assert measure(SILENT, 10) == measure(SILENT, 1000)
    assert measure(Unroll(), 1000) > 50 * measure(Unroll(), 10)
    # Two points in float64 and the start; three numbers a sample, one of them a norm.
    assert kept_bytes(dtype, 10) == kept_bytes(dtype, 1000) == 4 * 32 * (2 * 8 + start) + 4 * 3 * 8


@pytest.mark.parametrize("differentiate", [True, False], ids=["after backward", "without backward"])
def test_all_a_solve_saved_is_freed_without_the_garbage_collector(differentiate: bool) -> None:
    base = problem("mlp").requiring_grad()
    boxes: list[weakref.ref] = []

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor.detach())
        boxes.append(weakref.ref(box))
        return box

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            solution = reversible(base.f, base.z0)
        assert any(box() is not None for box in boxes)
        f = weakref.ref(solution.value)
        if differentiate:
            solution.value.sum().backward()
        del solution
        assert [box for box in boxes if box() is not None] == []
        assert f() is None
    finally:
        gc.enable()


# With the rest of PyTorch -------------------------------------------------------------------------------


def test_two_forwards_before_one_backward_are_independent() -> None:
    layer = ImplicitLayer(Cell(5), solver=ReversiblePicard(), backward=STRICT)
    xs = [torch.randn(2, 5, requires_grad=True) for _ in range(2)]
    apart = [torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters())) for x in xs]
    first, second = layer(xs[0]), layer(xs[1])
    found = torch.autograd.grad(first.square().sum() + second.square().sum(), (*xs, *layer.parameters()))
    torch.testing.assert_close(found[:2], (apart[0][0], apart[1][0]))
    for ours, a, b in zip(found[2:], apart[0][1:], apart[1][1:], strict=True):
        torch.testing.assert_close(ours, a + b)


def test_a_second_backward_needs_retain_graph_and_then_repeats_the_first() -> None:
    base = problem().requiring_grad()
    value = reversible(base.f, base.z0).value
    first = torch.autograd.grad(value.sum(), base.inputs, retain_graph=True)
    second = torch.autograd.grad(value.sum(), base.inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value.sum(), base.inputs)


def test_differentiating_twice_is_refused() -> None:
    base = problem().requiring_grad()
    value = reversible(base.f, base.z0).value
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*backward=Unroll\(\)"):
        torch.autograd.grad(value.sum(), base.inputs, create_graph=True)


def test_batched_gradients_are_refused() -> None:
    base = problem().requiring_grad()
    value = reversible(base.f, base.z0).value
    with pytest.raises(RuntimeError, match="cannot be batched"):
        torch.autograd.grad(value, base.inputs, torch.ones(2, *value.shape), is_grads_batched=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_a_checkpoint(reentrant: bool) -> None:
    layer = ImplicitLayer(Cell(5), solver=ReversiblePicard(), backward=STRICT)
    x = torch.randn(2, 5, requires_grad=True)
    wanted = (x, *layer.parameters())
    layer(x.sin()).square().sum().backward()
    expected = [t.grad for t in wanted]
    for t in wanted:
        t.grad = None
    block = lambda x: layer(x.sin())  # noqa: E731
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    for t, e in zip(wanted, expected, strict=True):
        torch.testing.assert_close(t.grad, e)


def test_gradients_pass_checkpoints_inside_the_cell() -> None:
    cell = Cell(5).double()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    made = x.sin()
    inside = lambda z: checkpoint(cell, z, made, use_reentrant=False)  # noqa: E731
    found = [
        torch.autograd.grad(
            reversible(f, torch.zeros_like(x)).value.sum(), (x, *cell.parameters()), retain_graph=True
        )
        for f in (inside, lambda z: cell(z, made))
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_gradients_pass_tensors_saved_elsewhere() -> None:
    base = problem("mlp").requiring_grad()
    z0 = random_start(base)
    expected = torch.autograd.grad(reversible(base.f, z0).value.sum(), (z0, *base.inputs))
    with torch.autograd.graph.save_on_cpu():
        found = torch.autograd.grad(reversible(base.f, z0).value.sum(), (z0, *base.inputs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=["float32 state", "bfloat16 state"])
def test_the_backward_pass_evaluates_the_cell_under_the_autocast_of_the_forward_pass(
    start: torch.dtype,
) -> None:
    cell = Cell(8)
    x = torch.randn(4, 8, dtype=start, requires_grad=True)
    for cache in (True, False):
        found = []
        for mode in (STRICT, Unroll()):
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
                value = reversible(
                    cell, torch.zeros_like(x), args=(x,), backward=mode, stopping=Stopping.steps(20)
                ).value
            assert value.dtype == start
            found.append(torch.autograd.grad(value.float().sum(), (x, *cell.parameters())))
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_warm_start_begins_a_new_iteration() -> None:
    base = problem().requiring_grad()
    first = reversible(base.f, base.z0, stopping=Stopping(rtol=1e-3))
    start = first.value.detach().requires_grad_()
    second = reversible(base.f, start, state=first.state, stopping=Stopping.steps(6))
    assert_same_gradients(second.value, explicit(base.f, start, 0.5, [6] * 3), (start, *base.inputs))


# Settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: ReversiblePicard(damping=1.0),
            ValueError,
            r"damping must be in \(0, 1\), got 1.*Picard\(\)",
        ),
        (lambda: ReversiblePicard(damping=0), ValueError, "ReversiblePicard: damping"),
        (lambda: ReversiblePicard(damping=1.5), ValueError, "ReversiblePicard: damping"),
        (lambda: ReversiblePicard(damping="half"), TypeError, "ReversiblePicard: damping must be a number"),
        (lambda: ReversiblePicard(0.5), TypeError, "positional"),
        (lambda: Reversible(rtol=-1.0), ValueError, "Reversible: rtol"),
        (lambda: Reversible(rtol=None), TypeError, "Reversible: rtol must be a number"),
        (lambda: Reversible(on_drift="print"), ValueError, "on_drift must be one of .*got 'print'"),
        (lambda: Reversible(0.5), TypeError, "positional"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_solvers_whose_steps_cannot_be_undone_are_refused() -> None:
    words = r"needs a solver whose steps can be undone, got solver=A.*solver=ReversiblePicard\(\)"
    with pytest.raises(ValueError, match=words):
        ImplicitLayer(Cell(5), backward=Reversible())
    with pytest.raises(ValueError, match=words):
        fixed_point(lambda z: z, torch.zeros(1, 1), solver=Anderson(), backward=Reversible())
    layer = ImplicitLayer(Cell(5), solver=ReversiblePicard(), backward=Reversible())
    with pytest.raises(ValueError, match=words):
        layer.solve(torch.zeros(1, 5), solver=Anderson())


def test_norms_that_only_the_driver_knows_are_refused_where_they_choose_the_value() -> None:
    with pytest.raises(ValueError, match=r"one residual norm a sample, got norm_axes=\(-1,\)"):
        reversible(lambda z: z, torch.zeros(1, 2, 3), stopping=Stopping(norm_axes=(-1,)))
    stopping = Stopping(rtol=None, max_steps=2, norm_axes=(-1,))
    assert reversible(lambda z: 0.5 * z, torch.zeros(1, 2, 3), stopping=stopping).nfe == 4
