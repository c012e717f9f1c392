"""The fused step of secant methods against the plain one, on a CPU, by Triton's interpreter.

Triton decides when it is imported whether its kernels are interpreted, so this file runs itself again in a
process of its own with TRITON_INTERPRET=1; there the tests of the first half are. Those of the second half
need no interpreter.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_kernels import HAS_TRITON, INTERPRETED, assert_passes_interpreted, compiled, interpreted

from deqlib import Anderson, Auto, Broyden, Solution, Solver, Stopping, fixed_point, fused
from deqlib.solvers import secant
from deqlib.solvers.secant import SecantSolver, SecantState
from deqlib.testing import mixed_difficulty

# The interpreter of older ones fails at loops with NumPy 2.4.
INTERPRETS = HAS_TRITON and tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)

# What NumPy says of numbers that are not finite, which are among those that are tested.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
# To make a failing example smaller takes the interpreter many minutes.
as_found = settings(phases=[Phase.explicit, Phase.generate])
# A step to a tolerance starts them in this order; one of a fixed number the second one first.
KERNELS = ("judge_kernel", "products_kernel", "advance_kernel")


@pytest.mark.skipif(INTERPRETED or not INTERPRETS, reason="starts the interpreter of Triton")
def test_the_fused_step_is_the_plain_one_in_tritons_interpreter() -> None:
    assert_passes_interpreted(__file__)


@pytest.fixture(autouse=True)
def _quick_and_checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks, so that small states have several; and no test passes since kernels have failed."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    from deqlib.fused import secant as steps

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called_by_a_kernel)
    monkeypatch.setattr(steps, "BLOCK", 64)
    monkeypatch.setattr(steps, "NUM_PROGRAMS", 3)
    monkeypatch.setattr(steps, "give_up", failed)
    yield


def failed(error: Exception) -> None:
    raise AssertionError("a kernel failed") from error


MADE_READY = {"deqlib.fused.secant_kernels", "deqlib.fused.small_systems"}


def called_by_a_kernel(function: Any, *args: Any, **named: Any) -> Any:
    """As the interpreter calls functions, which makes their module ready every time: half of all time."""
    from triton.runtime import interpreter

    if function.fn.__module__ not in MADE_READY:
        interpreter._patch_lang(function.fn)
        MADE_READY.add(function.fn.__module__)
    return function.rewrite()(*args, **named)


def without_kernels() -> pytest.MonkeyPatch:
    """Until it is undone, steps are plain."""
    patch = pytest.MonkeyPatch()
    patch.setattr(secant, "is_available", lambda *_: False)
    return patch


def plainly(call: Callable[[], Any]) -> Any:
    patch = without_kernels()
    try:
        return call()
    finally:
        patch.undo()


# Step by step -------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What a driver tells."""

    residual: Tensor
    before: Tensor
    difference: Tensor | None
    finished: Tensor | None
    tally: dict[str, Tensor]
    all_improved: bool = False

    def note(self, cause: str, which: Tensor) -> None:
        (counts,) = self.counts(cause)
        counts += which if self.finished is None else which & ~self.finished

    def counts(self, *causes: str) -> tuple[Tensor, ...]:
        for cause in causes:
            if cause not in self.tally:
                self.tally[cause] = torch.zeros_like(self.residual, dtype=torch.int64)
        return tuple(self.tally[cause] for cause in causes)


@dataclass
class Steps:
    """A method that is given iterates and images, whatever it proposes."""

    solver: SecantSolver
    like: Tensor
    state: SecantState = field(init=False)
    tally: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.solver.init(self.like)

    def take(self, z: Tensor, fz: Tensor, told: dict[str, Any] | None) -> Tensor:
        if told is not None:
            self.state = self.solver.observe(Told(tally=self.tally, **told), self.state)  # type: ignore[arg-type]
        z_next, self.state = self.solver.step(z, fz, self.state)
        return z_next


SOLVERS: dict[str, Callable[..., SecantSolver]] = {
    "II": lambda memory, **settings: Anderson(memory=memory, **settings),
    "I": lambda memory, **settings: Anderson(memory=memory, kind="I", **settings),
    "damped II": lambda memory, **settings: Anderson(memory=memory, damping=0.6, **settings),
    "damped I": lambda memory, **settings: Anderson(memory=memory, kind="I", damping=0.6, **settings),
    "Broyden": lambda memory, **settings: Broyden(memory=memory, **settings),
}


@dataclass(frozen=True)
class Walk:
    """Iterates and images of a few samples that have nothing to do with one another."""

    solver: SecantSolver
    points: Tensor  # (steps, 2, B, D)
    told: bool  # whether the method is told residuals, as in a solve to a tolerance
    finished: tuple[int, ...]  # at which step each sample finishes
    fuses: tuple[bool, ...]  # which steps of the second run are fused

    def facts(self, step: int, lowest: Tensor) -> dict[str, Any] | None:
        if not self.told:
            return None
        z, fz = self.points[step]
        ends = torch.tensor([step >= end for end in self.finished])
        return {
            "residual": (fz - z).norm(dim=1),
            "before": torch.where(ends, -torch.inf, lowest),
            "difference": fz - z,
            "finished": ends if bool(ends.any()) else None,
        }


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    kind, memory = draw(st.sampled_from(sorted(SOLVERS))), draw(st.integers(1, 12))
    settings: dict[str, Any] = {
        "growth": draw(st.sampled_from([1.1, 10.0])),
        "restart": draw(st.integers(1, 4)),
    }
    if draw(st.booleans()):
        settings["restart"] = None
    batch, steps = draw(st.integers(1, 2)), draw(st.integers(2, 5))
    width = draw(st.one_of(st.integers(1, 9), st.integers(10, 150)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    points = torch.randn(steps, 2, batch, width, generator=generator, dtype=dtype)
    points *= 10 ** torch.randint(-3, 3, (batch, 1), generator=generator).to(dtype)
    # Residuals fall now and then, or every step would be refused.
    points[:, 1] = torch.lerp(
        points[:, 0], points[:, 1], torch.rand(steps, 1, 1, generator=generator).to(dtype)
    )
    for sample in range(batch):
        if draw(st.integers(0, 5)) == 0:
            points[draw(st.integers(0, steps - 1)), 1, sample] = draw(st.sampled_from([torch.nan, torch.inf]))
    finished = tuple(draw(st.sampled_from([2, 3, 99, 99])) for _ in range(batch))
    fuses = tuple(draw(st.integers(0, 4)) > 0 for _ in range(steps))
    return Walk(SOLVERS[kind](memory, **settings), points, draw(st.booleans()), finished, fuses)


def mask(which: Tensor | None, batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.bool) if which is None else which


def assert_same(a: SecantState, b: SecantState, at_work: Tensor) -> Tensor:
    """Same state to rounding, of the samples at work; returns how much their systems enlarge rounding."""
    first, second = a.history, b.history
    assert (first.count, first.pending) == (second.count, second.pending)
    valid = first.own_columns()
    torch.testing.assert_close(second.own_columns()[at_work], valid[at_work])
    kept = valid.clone()
    kept[:, first.slot] = True
    for name in ("df", "left"):
        one, other = (torch.where(kept.unsqueeze(2), getattr(h, name), 0) for h in (first, second))
        torch.testing.assert_close(other[at_work], one[at_work], equal_nan=True)
    one, other = (h.system.matrix[at_work] for h in (first, second))
    size = one.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
    eps = torch.finfo(first.df.dtype).eps
    torch.testing.assert_close(other / size, one / size, rtol=0, atol=100 * eps, equal_nan=True)
    for name in ("plain", "singular"):
        one, other = (mask(getattr(s.safeguards, name), len(at_work)) for s in (a, b))
        assert torch.equal(other[at_work], one[at_work]), name
    for name in ("best", "best_before_window"):
        one, other = (getattr(s.safeguards, name)[at_work] for s in (a, b))
        torch.testing.assert_close(other, one, rtol=20 * eps, atol=0, equal_nan=True)
    return torch.linalg.cond(first.system.matrix.nan_to_num(0, 0, 0))


@interpreted
@as_found
@given(walk=walks())
def test_each_step_is_the_plain_one(walk: Walk) -> None:
    plain, mixed = (Steps(walk.solver, walk.points[0, 0]) for _ in range(2))
    lowest = torch.full_like(walk.points[0, 0, :, 0], torch.inf)
    for step, (z, fz) in enumerate(walk.points):
        facts = walk.facts(step, lowest)
        expected = plainly(lambda z=z, fz=fz, facts=facts: plain.take(z, fz, facts))
        if walk.fuses[step]:
            got = mixed.take(z, fz, facts)
        else:
            got = plainly(lambda z=z, fz=fz, facts=facts: mixed.take(z, fz, facts))
        lowest = torch.fmin(lowest, (fz - z).norm(dim=1))
        at_work = ~mask(None if facts is None else facts["finished"], len(z))
        condition = assert_same(plain.state, mixed.state, at_work)
        room = 1000 * torch.finfo(z.dtype).eps * condition
        # Beyond that coefficients are made of rounding, of either.
        sure = at_work & (room < 0.1) & expected.isfinite().all(1)
        history = plain.state.history
        size = torch.stack(
            [
                expected.abs().amax(1),
                fz.nan_to_num(0, 0, 0).abs().amax(1),
                history.df.nan_to_num(0, 0, 0).abs().amax((1, 2)),
            ]
        )
        apart = (got - expected).abs().amax(1) / size.amax(0)
        assert bool((apart[sure] <= room[sure]).all()), (step, apart, room)
        # A Picard step is one in the fused step alone where the history holds NaN: 0 times NaN is NaN.
        assert bool((got.isfinite() | ~expected.isfinite())[at_work].all())
    assert torch.equal(counted(mixed), counted(plain))


@interpreted
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", ["II", "I"])
def test_what_becomes_of_a_sample_is_that_of_the_plain_step(kind: str, told: bool) -> None:
    """The first goes on, two meet numbers that are not finite, the last finishes when the memory is full."""
    generator = torch.Generator().manual_seed(8)
    points = torch.randn(6, 2, 4, 20, generator=generator, dtype=torch.float64)
    points[0 if kind == "I" else 3, 1, 1], points[4, 1, 2] = torch.nan, torch.inf
    solver = SOLVERS[kind](2, ridge=0.3 if kind == "II" else 0.001, growth=2.0, restart=4)
    walk = Walk(solver, points, told, (99, 99, 99, 4), ())
    plain, steps = (Steps(solver, points[0, 0]) for _ in range(2))
    lowest = torch.full((4,), torch.inf, dtype=torch.float64)
    for step, (z, fz) in enumerate(points):
        facts = walk.facts(step, lowest)
        expected = plainly(lambda z=z, fz=fz, facts=facts: plain.take(z, fz, facts))
        got = steps.take(z, fz, facts)
        lowest = torch.fmin(lowest, (fz - z).norm(dim=1))
        at_work = ~mask(None if facts is None else facts["finished"], 4)
        assert_same(plain.state, steps.state, at_work)
        sure = at_work & expected.isfinite().all(1)
        torch.testing.assert_close(got[sure], expected[sure])
        assert bool(sure[0])
    ours, theirs = steps.state.history, plain.state.history
    valid = theirs.own_columns()[3:]
    assert torch.equal(ours.own_columns()[3:], valid)
    assert not told or bool(valid.any())
    assert torch.equal(ours.df[3:][valid], theirs.df[3:][valid])
    assert torch.equal(ours.left[3:][valid], theirs.left[3:][valid])
    if told:
        assert torch.equal(counted(steps), counted(plain))


def counted(steps: Steps) -> Tensor:
    zeros = torch.zeros(len(steps.like), dtype=torch.int64)
    return torch.stack([steps.tally.get(cause, zeros) for cause in ("growth", "singular", "stagnation")])


@interpreted
@pytest.mark.parametrize("kind", ["II", "Broyden"])
def test_a_sample_gets_the_same_bits_in_any_batch(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(4, 2, 2, 75, generator=generator)
    points[2, 1, 0] = torch.nan
    together, alone = (Steps(SOLVERS[kind](2), points[0, 0, rows]) for rows in (slice(0, 2), slice(1, 2)))
    for z, fz in points:
        assert torch.equal(together.take(z, fz, None)[1:], alone.take(z[1:].clone(), fz[1:].clone(), None))


@interpreted
def test_singular_systems_give_picard_steps_and_new_histories() -> None:
    """The second sample moves along a line and back: its second column is the first one times -2, exactly."""
    generator = torch.Generator().manual_seed(4)
    start, along, image = torch.randint(-9, 9, (3, 40), generator=generator).double()
    points = torch.randn(4, 2, 2, 40, generator=generator, dtype=torch.float64)
    for step, length in enumerate([1, -2, 4, 0.5]):
        points[step, :, 1] = torch.stack([start + length * along, start + length * image])
    solver = Anderson(memory=4, kind="I", ridge=0, growth=torch.inf)
    plain, steps = (Steps(solver, points[0, 0]) for _ in range(2))
    for step, (z, fz) in enumerate(points):
        expected = plainly(lambda z=z, fz=fz: plain.take(z, fz, None))
        got = steps.take(z, fz, None)
        torch.testing.assert_close(got, expected)
        singular = mask(steps.state.safeguards.singular, 2)
        assert torch.equal(singular, mask(plain.state.safeguards.singular, 2))
        assert singular.tolist() == [False, step == 2]
        assert torch.equal(got[singular], fz[singular])


# Whole solves -------------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[Solver, Stopping]] = {
    "Anderson": (Anderson(memory=4), Stopping(rtol=1e-3, max_steps=7)),
    "Broyden": (Broyden(), Stopping(rtol=1e-3, max_steps=7, check_every=3)),
    "Auto": (Auto(plain_steps=2, methods=(Anderson(memory=3), Broyden())), Stopping(rtol=1e-3, max_steps=7)),
    "fixed": (Anderson(memory=3, kind="I", damping=0.7), Stopping.steps(4, measure=True)),
}


@interpreted
@pytest.mark.parametrize("name", WHOLE)
def test_whole_solves_end_alike(name: str) -> None:
    solver, stopping = WHOLE[name]
    problem = mixed_difficulty(batch=2, width=24)

    def solve() -> Solution:
        return fixed_point(problem.f, problem.z0, solver=solver, stopping=stopping, on_failure="ignore")

    launched = Launches()
    with launched:
        got = solve()
    expected = plainly(solve)
    assert launched.names
    assert torch.equal(got.status, expected.status)
    assert torch.equal(got.num_steps, expected.num_steps)
    assert torch.equal(got.method, expected.method)
    assert got.nfe == expected.nfe
    torch.testing.assert_close(got.value, expected.value)
    zeros = torch.zeros_like(got.num_steps)
    for cause in got.rejections.keys() | expected.rejections.keys():
        assert torch.equal(got.rejections.get(cause, zeros), expected.rejections.get(cause, zeros))


# What a step starts -------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Kernels that are started, and operations of PyTorch that compute or write."""

    FREE = (
        "empty",
        "new_empty",
        "view",
        "select",
        "slice",
        "unsqueeze",
        "detach",
        "alias",
        "as_strided",
        "expand",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Launches:
        from deqlib.fused import secant_kernels as kernels

        for name in KERNELS:
            self._patch.setattr(kernels, name, self._counted(name, getattr(kernels, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _counted(self, name: str, kernel: Any) -> Any:
        class Counted:
            def __getitem__(_, grid: Any) -> Callable[..., None]:
                def start(*args: Any, **named: Any) -> None:
                    self.names.append(name)
                    # The interpreter itself computes with PyTorch what is none of the step.
                    with torch.utils._python_dispatch._disable_current_modes():
                        kernel[grid](*args, **named)

                return start

        return Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@interpreted
@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("told", [True, False])
def test_a_step_is_three_kernels_and_nothing_else(kind: str, told: bool) -> None:
    points = torch.randn(5, 2, 1, 20, generator=torch.Generator().manual_seed(5))
    walk = Walk(SOLVERS[kind](2, restart=2), points, told, (99,), ())
    steps, lowest = Steps(walk.solver, points[0, 0]), torch.full((1,), torch.inf)
    for step, (z, fz) in enumerate(points):
        facts = walk.facts(step, lowest)
        launched = Launches()
        with launched:
            steps.take(z, fz, facts)
        if step > 2:  # by then there are slots for all columns
            order = KERNELS if told else ("products_kernel", "judge_kernel", "advance_kernel")
            assert launched.names == list(order), step


# Where they do not help ---------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("broken", KERNELS)
@pytest.mark.parametrize("told", [True, False])
def test_where_a_kernel_fails_the_plain_step_goes_on_and_it_is_said_once(
    broken: str, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from deqlib.fused import secant as steps
    from deqlib.fused import secant_kernels as kernels

    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(steps, "give_up", fused.give_up)
    monkeypatch.setattr(fused, "_failures", [])
    points = torch.randn(5, 2, 2, 20, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    walk = Walk(Anderson(memory=2, growth=1.1, restart=2), points, told, (99, 4), ())
    plain, mixed = (Steps(walk.solver, points[0, 0]) for _ in range(2))
    lowest = torch.full((2,), torch.inf, dtype=torch.float64)
    for step, (z, fz) in enumerate(points):
        facts = walk.facts(step, lowest)
        if step == 3:
            monkeypatch.setattr(kernels, broken, Broken())
        expected = plainly(lambda z=z, fz=fz, facts=facts: plain.take(z, fz, facts))
        got = mixed.take(z, fz, facts)
        at_work = ~mask(None if facts is None else facts["finished"], 2)
        torch.testing.assert_close(got[at_work], expected[at_work])
        assert_same(plain.state, mixed.state, at_work)
        assert plain.state.safeguards.window == mixed.state.safeguards.window
        lowest = torch.fmin(lowest, (fz - z).norm(dim=1))
    (said,) = [record for record in caplog.records if record.name == "deqlib"]
    assert said.levelno == logging.WARNING
    assert "RuntimeError: no compiler)" in said.getMessage()


@interpreted
def test_a_history_of_too_many_columns_is_left_to_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from deqlib.fused import secant as steps

    monkeypatch.setattr(steps, "MOST_COLUMNS", 4)
    points = torch.randn(7, 2, 1, 20, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mixed, reference = (Steps(Broyden(memory=9), points[0, 0]) for _ in range(2))
    fused_steps = []
    for z, fz in points:
        launched = Launches()
        with launched:
            got = mixed.take(z, fz, None)
        torch.testing.assert_close(got, plainly(lambda z=z, fz=fz: reference.take(z, fz, None)))
        fused_steps.append("advance_kernel" in launched.names)
    assert fused_steps == [False, True, True, True, False, False, False]


def test_a_device_short_of_memory_does_not_switch_kernels_off() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fused.give_up(torch.OutOfMemoryError("out of memory"))
    assert not fused._failures


@interpreted
def test_kernels_are_not_for_what_autograd_or_a_transform_must_see() -> None:
    z = torch.zeros(2, 3)
    assert fused.is_available(z, z.double())
    assert not fused.is_available(z, z.half())
    assert not fused.is_available(z, z.T)
    assert not fused.is_available(z, z.to("meta"))
    recorded = torch.zeros(2, 3, requires_grad=True)
    assert not fused.is_available(z, recorded)
    with torch.no_grad():
        assert fused.is_available(z, recorded)
    torch.func.vmap(lambda row: row.clone() if not fused.is_available(row) else None)(z)
    asked = []
    torch.func.jvp(lambda x: (asked.append(fused.is_available(z)), x)[1], (z,), (z,))
    assert asked == [False]


@interpreted
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_kernels_are_not_for_what_is_traced() -> None:
    """A graph of operations would lack what they do, and one that fails there would not be tried any more."""
    asked = []

    def ask(z: Tensor) -> Tensor:
        asked.append(fused.is_available(z))
        return z + 1

    torch.fx.experimental.proxy_tensor.make_fx(ask)(torch.zeros(2, 3))
    torch.jit.trace(ask, torch.zeros(2, 3), check_trace=False)
    assert asked == [False, False]


@interpreted
def test_kernels_are_not_for_numbers_that_lie_in_memory_with_the_other_sign() -> None:
    number = torch.complex(torch.ones(1, 1), torch.ones(1, 1)).conj().imag
    assert number.is_contiguous()
    assert not fused.is_available(number)
    assert fused.is_available(number.clone())


@pytest.mark.skipif(INTERPRETED, reason="takes another Triton")
@pytest.mark.parametrize("stopping", ["Stopping.steps(4)", "Stopping(rtol=1e-3, norm_axes=(1,))"])
def test_where_triton_cannot_be_loaded_the_plain_step_goes_on(stopping: str, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('is broken')")
    code = f"""
import torch
from deqlib import Anderson, Stopping, fixed_point
with torch.no_grad():
    fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=Anderson(), stopping={stopping})
"""
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ImportError: is broken") == 1


# On devices that are not there -----------------------------------------------------------------------------

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i1", torch.int64: "*i64"}
ANDERSON = (Anderson(memory=5), torch.float32, 4096, True)
# Solver, type, width, whether it is told residuals; architecture; whether it takes long.
COMPILED: dict[str, tuple[tuple[SecantSolver, torch.dtype, int, bool], int, bool]] = {
    "Anderson": (ANDERSON, 90, False),
    "Anderson on an older device": (ANDERSON, 80, False),
    "one number": ((Broyden(memory=4), torch.float64, 1, False), 90, False),
    "32 columns": ((Broyden(), torch.float64, 4096, False), 90, True),
    "damped type I": ((Anderson(memory=25, kind="I", damping=0.5), torch.float32, 4096, True), 90, True),
    "type I in double precision": ((Anderson(kind="I"), torch.float64, 4096, False), 90, True),
}


def starts(
    solver: SecantSolver, like: Tensor, told: bool
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What a step would start: kernels with what they are given."""
    from deqlib.fused import secant as steps
    from deqlib.fused import secant_kernels as kernels

    found, patch = [], pytest.MonkeyPatch()

    class Noted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **named: found.append((self.kernel, args, named))

    run = Steps(solver, like)
    for _ in range(3):
        run.take(like, like + 1, None)
    try:
        for name in KERNELS:
            patch.setattr(kernels, name, Noted(getattr(kernels, name)))
        for module in (secant, steps):
            patch.setattr(module, "is_available", lambda *_: True)
        residual, finished = like[:, 0] + 1, torch.zeros(len(like), dtype=torch.bool)
        told_facts = {"residual": residual, "before": residual, "difference": like + 1, "finished": finished}
        run.take(like, like + 1, told_facts if told else None)
    finally:
        patch.undo()
    return found


def compiled_for(architecture: int, kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {name: named[name] for name in names if name in named}
    signature, known, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        is_special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_special and type(value) is int and value == 1):
            signature[parameter.name], known[(place,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, Tensor)
        signature[parameter.name] = TYPES[value.dtype] if is_tensor else "i32"
        if (is_tensor and not parameter.do_not_specialize_on_alignment) or (
            not is_tensor and is_special and value % 16 == 0
        ):
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in named.items() if name not in names}
    source = ASTSource(kernel, signature, known, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def stack_of(cubin: bytes, folder: Path) -> int:
    """Bytes of memory that a thread needs since registers do not suffice."""
    import triton

    file, tool = folder / "kernel.cubin", Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file.write_bytes(cubin)
    said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    (found,) = re.findall(r"STACK:(\d+)", said.stdout)
    return int(found)


@compiled
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * slow) for name, (*_, slow) in COMPILED.items()]
)
def test_kernels_compile_for_devices_and_fit_into_registers(case: str, tmp_path: Path) -> None:
    (solver, dtype, width, told), architecture, _ = COMPILED[case]
    started = starts(solver, torch.zeros(4, width, dtype=dtype), told)
    assert len(started) == len(KERNELS)
    for kernel, args, named in started:
        made = compiled_for(architecture, kernel, args, named)
        assert stack_of(made.asm["cubin"], tmp_path) == 0
        assert made.metadata.shared <= 48 * 1024


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_nothing_of_triton_is_loaded_where_no_kernel_can_run() -> None:
    code = """
import sys, torch, deqlib
deqlib.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=deqlib.Anderson())
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.skipif(INTERPRETED or not INTERPRETS, reason="starts the interpreter of Triton")
def test_kernels_can_be_switched_off_in_the_environment() -> None:
    code = """
import sys, torch, deqlib
deqlib.fixed_point(lambda z: 0.5 * z.cos(), torch.zeros(2, 3), solver=deqlib.Anderson())
print(sorted(name for name in sys.modules if name.startswith("deqlib.fused") and name.endswith("_kernels")))
"""
    loaded = ["deqlib.fused.record_kernels", "deqlib.fused.secant_kernels"]
    for value, expected in (("0", []), (None, loaded)):
        done = run_with(value, code)
        assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_a_switch_for_kernels_that_is_neither_on_nor_off_is_an_error_that_names_it() -> None:
    for value in ("", "off"):
        error = run_with(value, "import deqlib").stderr.splitlines()[-1]
        assert error.startswith("ValueError: DEQLIB_FUSED: expected 0 (no fused kernels) or 1"), error
        assert f"got {value!r}" in error


def run_with(switch: str | None, code: str) -> subprocess.CompletedProcess[str]:
    """A program in the interpreter of Triton, with DEQLIB_FUSED as given, or without."""
    environment = {name: value for name, value in os.environ.items() if name != "DEQLIB_FUSED"}
    environment |= {"TRITON_INTERPRET": "1"} | ({} if switch is None else {"DEQLIB_FUSED": switch})
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
