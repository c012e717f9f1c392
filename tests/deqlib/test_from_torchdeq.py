"""What docs/from_torchdeq.md says is the same, is."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Spy, problem, solution_of
from torch import Tensor, nn

from deqlib import (
    JFB,
    Anderson,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    PhantomGradient,
    Picard,
    Solver,
    Stopping,
    fixed_point,
)
from deqlib.nn import Dropout, one_solve, spectral_norm
from deqlib.regularizers import correction_loss, jacobian_penalty, trajectory

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # invalid escapes in its docstrings, when Python compiles them
    torchdeq = pytest.importorskip("torchdeq")
    importlib.import_module("torchdeq.loss")

TIGHT = Stopping(rtol=1e-11, max_steps=300)
ABSOLUTE = Stopping(rtol=0.0, atol=1e-9, max_steps=300)
THEIRS_TIGHT = {
    "f_tol": 1e-11,
    "b_tol": 1e-11,
    "f_stop_mode": "rel",
    "b_stop_mode": "rel",
    "f_max_iter": 301,
    "b_max_iter": 301,
}


def implicit(solver: Solver, stopping: Stopping = TIGHT) -> Backward:
    return ImplicitDifferentiation(solver=solver, stopping=stopping)


class Cell(nn.Module):
    """z -> tanh(W z + x), ||W|| = 0.7 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.mul_(0.7 / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Theirs(nn.Module):
    def __init__(self, cell: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.cell, self.deq = cell, torchdeq.get_deq(**settings)

    def forward(self, x: Tensor) -> Tensor:
        values, _ = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))
        return values[-1]


def losses(middle: Callable[[nn.Module], nn.Module], steps: int = 20) -> list[float]:
    """Of a small model trained with this layer in its middle: same start, same data."""
    torch.manual_seed(0)
    x = torch.rand(16, 3, dtype=torch.float64) * 4 - 2
    y = torch.sin(x[:, :1]) * x[:, 1:2]
    first, last = nn.Linear(3, 8, dtype=torch.float64), nn.Linear(8, 1, dtype=torch.float64)
    model = nn.Sequential(first, middle(Cell(8)), last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


# theirs -> solver, backward, stopping
SETTINGS: dict[str, tuple[dict[str, Any], Solver, Backward, Stopping]] = {
    "implicit": ({"ift": True}, Picard(), implicit(Picard()), TIGHT),
    "implicit, hook": ({"hook_ift": True}, Picard(), implicit(Picard()), TIGHT),
    "implicit, broyden": (
        {"ift": True, "f_solver": "broyden", "b_solver": "broyden"},
        Broyden(),
        implicit(Broyden()),
        TIGHT,
    ),
    "implicit, anderson, absolute": (
        {
            "ift": True,
            "f_solver": "anderson",
            "b_solver": "anderson",
            "f_tol": 1e-9,
            "b_tol": 1e-9,
            "f_stop_mode": "abs",
            "b_stop_mode": "abs",
        },
        Anderson(memory=5),
        implicit(Anderson(memory=5), ABSOLUTE),
        ABSOLUTE,
    ),
    "implicit, indexing": ({"ift": True, "core": "indexing"}, Picard(), implicit(Picard()), TIGHT),
    "one step": ({}, Picard(), JFB(), TIGHT),
    "phantom": ({"grad": 4, "tau": 0.6}, Picard(), PhantomGradient(steps=4, damping=0.6), TIGHT),
    "phantom, undamped": ({"grad": 3}, Picard(), PhantomGradient(steps=3, damping=1.0), TIGHT),
    "phantom, neumann": (
        {"grad": 4, "tau": 0.6},
        Picard(),
        PhantomGradient(steps=4, damping=0.6, form="neumann"),
        TIGHT,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_gives_the_same_losses(name: str) -> None:
    theirs, solver, backward, stopping = SETTINGS[name]
    expected = losses(lambda cell: Theirs(cell, **{**THEIRS_TIGHT, **theirs}))
    found = losses(
        lambda cell: ImplicitLayer(
            cell, solver=solver, backward=backward, stopping=stopping, on_failure="raise"
        )
    )
    assert found == pytest.approx(expected, rel=1e-7, abs=0)
    assert found[-1] < 0.8 * found[0]


def test_the_modes_train_differently_so_that_the_comparison_means_something() -> None:
    found = [
        losses(lambda cell, mode=mode: ImplicitLayer(cell, solver=Picard(), backward=mode, stopping=TIGHT), 5)
        for mode in (JFB(), PhantomGradient(steps=4, damping=0.6), implicit(Picard()))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(found[one][-1] - found[other][-1]) > 1e-5


# Options ------------------------------------------------------------------------------------------------


@pytest.fixture
def base() -> Any:
    return problem("tanh", batch=3, dim=6, contraction=0.8)


@pytest.mark.parametrize(
    ("name", "solver", "fewer"),
    [("fixed_point_iter", Picard(), 1), ("anderson", Anderson(memory=5), 1), ("broyden", Broyden(), 0)],
)
def test_a_budget_is_translated_to_the_same_number_of_evaluations(
    base: Any, name: str, solver: Solver, fewer: int
) -> None:
    theirs, ours = Spy(base.cell), Spy(base.cell)
    deq = torchdeq.get_deq(f_solver=name, f_max_iter=9, f_tol=1e-14).eval()
    deq(lambda z: theirs(z, *base.inputs), base.z0)
    rule = Stopping(rtol=1e-14, max_steps=9 - fewer)
    with torch.no_grad():
        fixed_point(ours, base.z0, base.inputs, solver=solver, stopping=rule, on_failure="ignore")
    assert ours.count == theirs.count


@pytest.mark.parametrize(
    ("mode", "tolerance"), [("abs", {"rtol": 0.0, "atol": 1e-4}), ("rel", {"rtol": 1e-4})]
)
def test_a_tolerance_is_met_at_the_same_evaluation(base: Any, mode: str, tolerance: dict[str, float]) -> None:
    theirs, ours = Spy(base.cell), Spy(base.cell)
    deq = torchdeq.get_deq(f_tol=1e-4, f_stop_mode=mode, f_max_iter=99).eval()
    deq(lambda z: theirs(z, *base.inputs), base.z0)
    with torch.no_grad():
        fixed_point(ours, base.z0, base.inputs, solver=Picard(), stopping=Stopping(max_steps=98, **tolerance))
    assert ours.count == theirs.count < 60


def test_damping_of_their_picard_is_an_option_of_the_call(base: Any) -> None:
    deq = torchdeq.get_deq(f_max_iter=5, f_tol=0.0).eval()
    (theirs,), _ = deq(base.f, base.z0, solver_kwargs={"tau": 0.4})
    with torch.no_grad():
        ours = fixed_point(base.f, base.z0, solver=Picard(damping=0.4), stopping=Stopping.steps(5)).value
    torch.testing.assert_close(ours, theirs)


def test_a_history_of_m_iterates_is_a_memory_of_m_less_one_differences(base: Any) -> None:
    deq = torchdeq.get_deq(f_solver="anderson", f_max_iter=7, f_tol=0.0).eval()
    (theirs,), _ = deq(base.f, base.z0, solver_kwargs={"m": 3, "lam": 0.0, "return_final": True})
    solver = Anderson(memory=2, ridge=0.0)
    with torch.no_grad():
        ours = fixed_point(base.f, base.z0, solver=solver, stopping=Stopping.steps(6)).value
        torch.testing.assert_close(base.f(ours), theirs)  # theirs is the image of the last iterate


def test_states_of_several_tensors_are_lists_in_one_and_trees_in_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    w = 0.2 * torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def pair(a: Tensor, b: Tensor) -> list[Tensor]:
        return [torch.tanh(b @ w + x), torch.tanh(a @ w - x)]

    deq = torchdeq.get_deq(**THEIRS_TIGHT)
    (theirs,), _ = deq(pair, [torch.zeros_like(x), torch.zeros_like(x)])
    z0 = [torch.zeros_like(x), torch.zeros_like(x)]
    ours = fixed_point(lambda z: pair(*z), z0, solver=Picard(), stopping=TIGHT).value
    torch.testing.assert_close(ours, theirs)


def test_sampled_states_are_those_of_the_trajectory(base: Any) -> None:
    target = torch.ones_like(base.z0)

    def criterion(state: Tensor) -> Tensor:
        return (state - target).square().mean()

    ours, theirs = base.requiring_grad(), base.requiring_grad()
    deq = torchdeq.get_deq(core="indexing", indexing=[2, 5], f_max_iter=120, f_tol=0.0)
    sampled, _ = deq(theirs.f, theirs.z0)
    their_loss = torchdeq.loss.fp_correction(criterion, (sampled,), gamma=0.7)
    layer = ImplicitLayer(ours.cell, solver=Picard(), backward=JFB(), stopping=Stopping.steps(120))
    states = trajectory(layer, *ours.inputs, steps=(2, 5), z0=ours.z0)
    torch.testing.assert_close(states, sampled)
    our_loss = correction_loss(states, criterion, decay=0.7)
    torch.testing.assert_close(our_loss, their_loss)
    for one, other in zip(
        torch.autograd.grad(our_loss, ours.inputs),
        torch.autograd.grad(their_loss, theirs.inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_jacobian_penalties_estimate_the_same_number(base: Any) -> None:
    z = solution_of(base).requires_grad_()
    theirs = torchdeq.loss.jac_reg(base.f(z), z, vecs=400, create_graph=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ours = jacobian_penalty(base.cell, z.detach(), *base.inputs, num_probes=400, generator=generator)
    assert float(ours) == pytest.approx(float(theirs), rel=0.1)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_spectral_normalisation_is_the_same_once_the_power_iteration_has_converged(
    clip: bool, size: float
) -> None:
    ours = nn.Linear(5, 5, bias=False, dtype=torch.float64)
    nn.init.orthogonal_(ours.weight, size)
    theirs = copy.deepcopy(ours)
    torchdeq.apply_norm(
        theirs, "spectral_norm", args={"norm_no_scale": True, "norm_target_norm": 0.8, "norm_clip": clip}
    )
    spectral_norm(ours, 0.8, at_most=clip)
    torchdeq.reset_norm(theirs)
    x = torch.randn(2, 5, dtype=torch.float64)
    with one_solve():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "settings", "shape", "shared_axes"),
    [
        ("VariationalDropout", {}, (2, 3, 4), ()),
        ("VariationalDropout1d", {}, (2, 3, 4), (1,)),
        ("VariationalDropout1d", {"token_first": False}, (2, 3, 4), (2,)),
        ("VariationalDropout2d", {}, (2, 3, 4, 5), (1, 2)),
        ("VariationalDropout2d", {"token_first": False}, (2, 3, 4, 5), (2, 3)),
        ("VariationalDropToken1d", {}, (2, 3, 4), (2,)),
        ("VariationalDropToken2d", {}, (2, 3, 4, 5), (3,)),
        ("VariationalDropToken2d", {"token_first": False}, (2, 3, 4, 5), (1,)),
    ],
)
def test_dropout_shares_its_mask_along_the_same_axes(
    name: str, settings: dict[str, Any], shape: tuple[int, ...], shared_axes: tuple[int, ...]
) -> None:
    theirs, ours = getattr(torchdeq, name)(0.5, **settings), Dropout(0.5, shared_axes=shared_axes)

    def axes_of(mask: Tensor) -> set[int]:
        """Along which a mask is constant."""
        constant = {a for a in range(mask.dim()) if bool((mask == mask.narrow(a, 0, 1)).all())}
        return constant

    for _ in range(20):  # until no mask is constant by chance
        theirs.mask = None
        with one_solve():
            found = axes_of(theirs(torch.ones(shape))), axes_of(ours(torch.ones(shape)))
        if found == (set(shared_axes), set(shared_axes)):
            break
    assert found == (set(shared_axes), set(shared_axes))


# What differs -------------------------------------------------------------------------------------------


def test_they_ignore_misspelt_options_and_we_do_not(base: Any) -> None:
    deq = torchdeq.get_deq(f_slover="anderson", f_tolerance=1e-9)
    assert deq.f_tol == 1e-3
    with pytest.raises(TypeError, match="tolerance"):
        Stopping(tolerance=1e-9)  # type: ignore[call-arg]


def test_their_picard_and_anderson_return_the_image_of_what_they_report_on(base: Any) -> None:
    for name, returns_image in (("fixed_point_iter", True), ("anderson", True), ("broyden", False)):
        deq = torchdeq.get_deq(f_solver=name, f_tol=1e-4, f_stop_mode="rel", f_max_iter=60).eval()
        (value,), info = deq(base.f, base.z0)
        image = base.f(value)
        at_value = ((image - value).norm(dim=1) / image.norm(dim=1)).max()
        assert (float(info["rel_lowest"].max()) == pytest.approx(float(at_value))) is not returns_image


def test_in_eval_they_give_no_gradient(base: Any) -> None:
    base = base.requiring_grad()
    (value,), _ = torchdeq.get_deq(ift=True).eval()(base.f, base.z0)
    assert not value.requires_grad
    layer = ImplicitLayer(base.cell, solver=Picard()).eval()
    assert layer(*base.inputs).requires_grad


def test_their_double_backward_is_silently_wrong_and_ours_right(base: Any) -> None:
    def second(solve: Callable[[Any], Tensor]) -> Tensor:
        tensors = base.requiring_grad()
        (first,) = torch.autograd.grad(solve(tensors).square().sum(), tensors.inputs[1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensors.inputs[1])[0]

    def unrolled(tensors: Any) -> Tensor:
        z = tensors.z0
        for _ in range(250):
            z = tensors.f(z)
        return z

    exact = second(unrolled)
    theirs = second(lambda p: torchdeq.get_deq(ift=True, **THEIRS_TIGHT)(p.f, p.z0)[0][-1])
    ours = second(
        lambda p: (
            fixed_point(
                p.cell, p.z0, p.inputs, solver=Picard(), backward=implicit(Picard()), stopping=TIGHT
            ).value
        )
    )
    assert float((theirs - exact).norm() / exact.norm()) > 0.1
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10)


def test_a_sample_that_is_not_finite_keeps_their_solve_going_and_not_ours(base: Any) -> None:
    x = base.inputs[0].clone()
    x[0] = torch.nan
    theirs, ours = Spy(base.cell), Spy(base.cell)
    torchdeq.get_deq(f_max_iter=60).eval()(lambda z: theirs(z, x, *base.inputs[1:]), base.z0)
    rule = Stopping(atol=1e-3, rtol=0.0, max_steps=59)
    with torch.no_grad():
        solution = fixed_point(
            ours, base.z0, (x, *base.inputs[1:]), solver=Picard(), stopping=rule, on_failure="ignore"
        )
    assert theirs.count == 60
    assert ours.count < 40
    assert solution.converged.tolist() == [False, True, True]
