"""CONVERGED is a fact of the batch as it is returned, whether or not its samples depend on one another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import SOLVERS, problem
from torch import Tensor

from deqlib import (
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
    NonConvergenceError,
    NonConvergenceWarning,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    Solution,
    Solver,
    Status,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.counting import CountedCell
from deqlib.testing import mixed_difficulty

Cell = Callable[..., Tensor]

METHODS: dict[str, Solver] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.6),
    "anderson": Anderson(memory=4),
    "broyden": Broyden(memory=6),
    "newton": NewtonKrylov(memory=5),
    "newton jvp": NewtonKrylov(memory=5, derivative="jvp"),
    "auto": Auto(),
    "auto of several": Auto(methods=(Picard(), Anderson(), Broyden()), patience=3, plain_steps=4),
}
MODES: dict[str, Backward] = {
    "implicit": ImplicitDifferentiation(),
    "jfb": JFB(),
    "phantom": PhantomGradient(steps=2),
    "phantom undamped": PhantomGradient(steps=2, damping=1.0),
    "neumann": PhantomGradient(steps=2, form="neumann"),
    "unroll": Unroll(),
    "unroll checkpoint": Unroll(checkpoint=True),
}


def vector(draw: torch.Generator, size: int, rate: float) -> tuple[Cell, Tensor, tuple[Tensor, ...]]:
    """One system whose state has no batch axis, so that every unknown is taken for a sample."""
    matrix = torch.randn(size, size, generator=draw, dtype=torch.float64)
    matrix *= rate / torch.linalg.matrix_norm(matrix, 2)
    x = torch.randn(size, generator=draw, dtype=torch.float64)
    return lambda z, x: torch.tanh(matrix @ z + x), torch.zeros(size), (x,)


def graph(draw: torch.Generator, size: int, rate: float) -> tuple[Cell, Tensor, tuple[Tensor, ...]]:
    """Nodes as samples."""
    edges = torch.rand(size, size, generator=draw, dtype=torch.float64) * (
        torch.rand(size, size, generator=draw) < 0.5
    )
    edges = edges / edges.sum(1, keepdim=True).clamp_min(1e-3)
    weight = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    weight *= rate / torch.linalg.matrix_norm(weight, 2)
    x = 3 * torch.randn(size, 3, generator=draw, dtype=torch.float64)
    return lambda z, x: torch.tanh(edges.to(z.dtype) @ z @ weight.to(z.dtype) + x), torch.zeros(size, 3), (x,)


def batch_norm(draw: torch.Generator, size: int, rate: float) -> tuple[Cell, Tensor, tuple[Tensor, ...]]:
    """Statistics over the batch."""
    x = torch.randn(size, 4, generator=draw, dtype=torch.float64)
    gain = rate * torch.rand(size, 1, generator=draw, dtype=torch.float64)
    mix = torch.randn(4, 4, generator=draw, dtype=torch.float64)

    def cell(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        h = z @ mix.to(z.dtype)
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-1).sqrt()
        return torch.tanh(gain * h + x)

    return cell, torch.zeros(size, 4), (x, gain)


def attention(draw: torch.Generator, size: int, rate: float) -> tuple[Cell, Tensor, tuple[Tensor, ...]]:
    """Every sample looks at all others."""
    x = 2 * torch.randn(size, 4, generator=draw, dtype=torch.float64)
    gain = rate * torch.rand(size, 1, generator=draw, dtype=torch.float64)
    return (
        lambda z, x, gain: gain * (torch.softmax(z @ z.mT, 1) @ z) + x,
        torch.zeros(size, 4),
        (x, gain),
    )


def chain(draw: torch.Generator, size: int, rate: float) -> tuple[Cell, Tensor, tuple[Tensor, ...]]:
    """Every sample follows the one before it, so that what was found first moves last."""
    x = torch.randn(size, 2, generator=draw, dtype=torch.float64) * 10 ** torch.randint(
        -3, 2, (size, 1), generator=draw
    )
    return lambda z, x: rate * z.roll(1, 0) + x, torch.zeros(size, 2), (x,)


COUPLED = {"vector": vector, "graph": graph, "norm": batch_norm, "attention": attention, "chain": chain}


def excess(cell: Cell, value: Tensor, inputs: Any, stopping: Stopping) -> Tensor:
    """Residuals over tolerances, by an evaluation of the cell that shares nothing with the solve, (B,)."""
    with torch.no_grad():
        image = cell(value.detach(), *inputs)
    image, value = (t.detach().double().reshape(len(value), -1) for t in (image, value))
    size = (image - value).norm(dim=1)
    return size / (stopping.atol + stopping.rtol * image.norm(dim=1)).clamp_min(1e-300)


def _solution_or_refusal(cell: Cell, z0: Tensor, inputs: Any, settings: Any) -> Solution | None:
    """`None` where a guess of compact was refused."""
    try:
        return fixed_point(cell, z0, inputs, on_failure="ignore", **settings)
    except ValueError as error:
        if settings["compact"] and "compact" in str(error):
            return None
        raise


def check(kind: str, seed: int, **settings: Any) -> tuple[dict[str, int], bool]:
    """Solve one coupled map; statuses, and whether a guess was refused."""
    draw = torch.Generator().manual_seed(seed)
    size, rate = (
        int(torch.randint(1, 9, (), generator=draw)),
        0.3 + 1.2 * float(torch.rand((), generator=draw)),
    )
    cell, z0, inputs = COUPLED[kind](draw, size, rate)
    dtype, grad = settings.pop("dtype"), settings.pop("grad")
    z0, inputs = z0.to(dtype), tuple(x.to(dtype) for x in inputs)
    if kind == "vector":
        whole = cell
        cell = lambda z, x: whole(z.double(), x.double()).to(z.dtype)  # noqa: E731
    given_inputs = tuple(x.clone().requires_grad_(grad) for x in inputs)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _solution_or_refusal(cell, z0, given_inputs, settings)
    if found is None:
        return {}, True
    share = excess(cell, found.value, inputs, settings["stopping"])
    assert not bool((found.converged & ~(share <= 1.5)).any()), (found, share)
    return {status.name: n for status, n in found.counts().items()}, False


@pytest.mark.parametrize("kind", COUPLED)
@given(
    seed=st.integers(0, 2**31),
    solver=st.sampled_from(sorted(METHODS)),
    mode=st.sampled_from(sorted(MODES)),
    compact=st.booleans(),
    grad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rtol=st.sampled_from([1e-1, 1e-2, 1e-4]),
    atol=st.sampled_from([0.0, 1e-2]),
    check_every=st.sampled_from([1, 3]),
    max_steps=st.sampled_from([3, 12, 60]),
)
def test_no_sample_is_converged_that_the_returned_batch_shows_not_to_be(
    kind: str,
    seed: int,
    solver: str,
    mode: str,
    compact: bool,
    grad: bool,
    dtype: torch.dtype,
    rtol: float,
    atol: float,
    check_every: int,
    max_steps: int,
) -> None:
    stopping = Stopping(rtol=rtol, atol=atol, check_every=check_every, max_steps=max_steps)
    settings = {"solver": METHODS[solver], "backward": MODES[mode], "stopping": stopping, "compact": compact}
    check(kind, seed, dtype=dtype, grad=grad, **settings)


def test_coupled_samples_are_found_often_enough_for_the_law_to_say_something() -> None:
    settings = {"backward": JFB(), "stopping": Stopping(rtol=1e-2), "compact": False, "grad": False}
    names = [
        set(check(kind, seed, solver=Picard(), dtype=torch.float64, **settings)[0])
        for kind in COUPLED
        for seed in range(20)
    ]
    assert sum("COUPLED" in found for found in names) > 10
    assert sum("CONVERGED" in found for found in names) > 30


@pytest.mark.parametrize("compact", [False, (0,)], ids=["whole", "compact"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", ["shared", "reversible", *MODES])
def test_every_mode_tells_that_samples_depend_on_one_another(mode: str, grad: bool, compact: Any) -> None:
    solver, backward = {
        "shared": (Broyden(), SharedInverse()),
        "reversible": (ReversiblePicard(), Reversible()),
    }.get(mode, (Picard(), MODES.get(mode)))
    x = torch.tensor([[1.0], [0.0], [0.0]]).requires_grad_(grad)
    # The others stand still until the one before them has moved, so that they are done at once.
    f = lambda z, x: 0.5 * torch.cat([z[:1], z[:-1]])[: len(z)] + x  # noqa: E731
    call = {"solver": solver, "backward": backward, "compact": compact}
    with torch.set_grad_enabled(grad), pytest.raises(NonConvergenceError, match="COUPLED") as caught:
        fixed_point(f, torch.zeros(3, 1), (x,), on_failure="raise", **call)
    found, share = caught.value.solution, excess(f, caught.value.solution.value, (x,), Stopping())
    assert Status.COUPLED in found.counts()
    assert "depend on one another" in str(caught.value)
    assert "z0[None]" in str(caught.value)
    assert (share[found.status == Status.COUPLED] > 1).all()
    assert (share[found.converged] <= 1.5).all()
    with torch.set_grad_enabled(grad), pytest.warns(NonConvergenceWarning, match="COUPLED"):
        fixed_point(f, torch.zeros(3, 1), (x,), **call)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_residual_relative_residual_and_trace_are_those_of_the_returned_batch(solver: Solver) -> None:
    draw = torch.Generator().manual_seed(3)
    for kind in COUPLED:
        cell, z0, inputs = COUPLED[kind](draw, 5, 0.8)
        with torch.no_grad():
            found = fixed_point(cell, z0.double(), inputs, solver=solver, on_failure="ignore")
            image = cell(found.value, *inputs)
        if not found.converged.any():
            continue  # nobody asked the whole batch
        size = (image - found.value).reshape(5, -1).norm(dim=1)
        relative = size / image.reshape(5, -1).norm(dim=1).clamp_min(1e-300)
        torch.testing.assert_close(found.residual, size, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(found.relative_residual, relative, rtol=1e-9, atol=1e-14)
        over = torch.arange(len(found.trace)).unsqueeze(1) > found.num_steps
        torch.testing.assert_close(found.trace[over], relative.expand_as(found.trace)[over])


@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(sorted(METHODS)),
    compact=st.booleans(),
    rates=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.99, float("nan")]), min_size=1, max_size=6),
    max_steps=st.sampled_from([2, 10, 60]),
)
def test_asking_the_whole_batch_costs_one_evaluation_at_most_and_none_where_autograd_records(
    seed: int, name: str, compact: bool, rates: list[float], max_steps: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(len(rates), 4, generator=draw, dtype=torch.float64)
    gain = torch.tensor(rates, dtype=torch.float64).unsqueeze(1)
    spent = {}
    for mode in ("none", "implicit", "jfb", "phantom", "neumann", "unroll"):
        cell = CountedCell(lambda z, x, gain: torch.tanh(gain * z.roll(1, 1) + x))
        with torch.set_grad_enabled(mode != "none"):
            found = fixed_point(
                cell,
                torch.zeros_like(x),
                (x.clone().requires_grad_(), gain),
                solver=METHODS[name],
                stopping=Stopping(rtol=1e-6, max_steps=max_steps),
                backward=MODES.get(mode),
                compact=(0, 0) if compact else False,  # no guess: that is looked at where a sample fails
                on_failure="ignore",
            )
        assert cell.evaluations == found.nfe
        spent[mode] = found.nfe - len(found.trace)
        assert Status.COUPLED not in found.counts()
        whole, together = found.converged.all(), len(set(found.num_steps.tolist())) == 1
    # Held samples are measured with the last one.
    assert 0 <= spent["none"] <= (0 if whole and (together or not compact) else 1)
    # The gradient of a sample that stays at the start is that of a step from there.
    assert spent["unroll"] - spent["none"] == bool((found.value == 0).all(1).any())
    assert (spent["implicit"], spent["jfb"], spent["phantom"], spent["neumann"]) == (1, 1, 2, 1)


def test_a_sample_that_is_not_finite_changes_nothing_that_the_others_are_asked() -> None:
    base = mixed_difficulty(batch=6, width=5)
    others, spoilt = [0, 1, 3, 4, 5], torch.ones(6, 1)
    spoilt[2] = float("nan")
    for compact in (False, (0, *(0 if len(x) == 6 else None for x in base.inputs))):
        found, healthy = (
            fixed_point(
                lambda z, gain, *inputs: base.cell(z, *inputs) * gain,
                base.z0,
                (gain, *base.inputs),
                solver=Anderson(),
                stopping=Stopping(rtol=1e-5, max_steps=200),
                compact=compact,
                on_failure="ignore",
            )
            for gain in (spoilt, torch.ones(6, 1))
        )
        for field in ("status", "num_steps"):
            assert torch.equal(getattr(found, field)[others], getattr(healthy, field)[others])
        torch.testing.assert_close(found.value[others], healthy.value[others])
        assert found.status[2] == Status.DIVERGED


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("compact", [False, (0,)], ids=["whole", "compact"])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
def test_places_that_converge_by_themselves_are_asked_by_themselves(
    batch: int, compact: Any, rtol: float
) -> None:
    base = problem("tanh", batch=batch, dim=6)
    offsets = base.inputs[0] * torch.tensor([1, 1, 9, 9, 0.1, 0.1], dtype=torch.float64)
    gain = torch.linspace(0.1, 0.9, batch, dtype=torch.float64).view(-1, 1, 1)
    alone = lambda z, x: torch.tanh(gain[: len(z)] * z + x.unflatten(1, (3, 2)))  # noqa: E731
    mixed = lambda z, x: torch.tanh(0.7 * z.roll(1, 0) + x.unflatten(1, (3, 2)))  # noqa: E731
    for cell in (alone, mixed):
        with torch.no_grad():
            found = fixed_point(
                cell,
                torch.zeros(batch, 3, 2, dtype=torch.float64),
                (offsets,),
                solver=Picard(),
                stopping=Stopping(rtol=rtol, norm_axes=(-1,), max_steps=300),
                compact=compact if cell is mixed else False,
                on_failure="ignore",
            )
            image = cell(found.value, offsets)
        worst = ((image - found.value).norm(dim=2) / image.norm(dim=2)).amax(1)
        torch.testing.assert_close(found.relative_residual, worst, rtol=1e-6, atol=0)
        assert (worst[found.converged] <= 1.5 * rtol).all()
        assert (worst[found.status == Status.COUPLED] > rtol).all()
        assert cell is mixed or found.converged.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compact", [False, (0, 0)], ids=["whole", "compact"])
def test_rounding_makes_no_failure(dtype: torch.dtype, compact: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0].to(dtype)
    for _ in range(20):
        x = torch.randn(9, 16, generator=draw).to(dtype)
        gain = torch.rand(9, 1, generator=draw).to(dtype)
        found = fixed_point(
            lambda z, x, gain: torch.tanh(gain * (z @ weight) + x),
            torch.zeros_like(x),
            (x, gain),
            stopping=Stopping(rtol=2e-2 if dtype == torch.bfloat16 else 3e-3),
            compact=compact,
            on_failure="ignore",
        )
        assert Status.COUPLED not in found.counts()


def test_a_layer_on_a_vector_says_what_is_missing_and_with_a_batch_axis_it_is_solved() -> None:
    cell, _, (x,) = COUPLED["vector"](torch.Generator().manual_seed(1), 6, 0.9)
    settings = {"solver": Picard(), "on_failure": "raise", "stopping": Stopping(max_steps=200)}
    with pytest.raises(NonConvergenceError, match="a state without a batch axis"):
        ImplicitLayer(cell, **settings)(x)
    as_one = lambda z, x: cell(z[0], x[0])[None]  # noqa: E731
    value = ImplicitLayer(as_one, **settings)(x[None])
    assert (excess(as_one, value, (x[None],), settings["stopping"]) <= 1.01).all()


@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(sorted(METHODS)),
    compact=st.sampled_from([False, True, (0, 0)]),
    check_every=st.sampled_from([1, 3]),
    axes=st.sampled_from([None, (1,), (-1,)]),
    rates=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.5]), min_size=2, max_size=6),
)
def test_a_sample_is_solved_as_by_itself_also_where_its_residual_is_exactly_zero(
    seed: int, name: str, compact: Any, check_every: int, axes: Any, rates: list[float]
) -> None:
    draw = torch.Generator().manual_seed(seed)
    # Quarters: residuals come to nothing by rounding. At rate 0 they do at once.
    x = torch.randint(-8, 8, (len(rates), 4), generator=draw).double() / 4
    gain = torch.tensor(rates, dtype=torch.float64).unsqueeze(1)
    rule = Stopping(rtol=1e-7, max_steps=60, check_every=check_every, norm_axes=axes)

    def solved(x: Tensor, gain: Tensor) -> Solution:
        return fixed_point(
            lambda z, x, gain: torch.relu(gain * z + x),
            torch.zeros_like(x),
            (x, gain),
            solver=METHODS[name],
            stopping=rule,
            compact=compact,
            on_failure="ignore",
        )

    whole = solved(x, gain)
    for i in range(len(rates)):
        alone = solved(x[i : i + 1], gain[i : i + 1])
        assert whole.num_steps[i] == alone.num_steps[0]
        assert whole.status[i] == alone.status[0]
        torch.testing.assert_close(whole.value[i], alone.value[0])
