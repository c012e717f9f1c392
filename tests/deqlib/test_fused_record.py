"""The fused bookkeeping of the driver against the plain one, on a CPU, by Triton's interpreter.

Triton decides when it is imported whether its kernels are interpreted, so this file runs itself again in a
process of its own with TRITON_INTERPRET=1. What is left to be seen by a device is that the compiled kernels
do what the interpreted ones do; that they compile is tested here too.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_kernels import INTERPRETED, assert_passes_interpreted, compiled, interpreted

from deqlib import (
    Anderson,
    Auto,
    Broyden,
    NewtonKrylov,
    Picard,
    Solution,
    Solver,
    Stopping,
    Unroll,
    driver,
    fixed_point,
    fused,
    progress,
)
from deqlib.driver import approach, iterate
from deqlib.fused import record
from deqlib.fused.record import FusedRecord
from deqlib.progress import Record
from deqlib.solvers import base
from deqlib.solvers.base import Seen, norms
from deqlib.testing import explosion, mixed_difficulty

# NumPy, in which the interpreter works, says so where numbers are not finite, and they are meant to be.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered")
NAN, INF = float("nan"), float("inf")


@compiled
def test_the_fused_record_is_the_plain_one_in_tritons_interpreter() -> None:
    assert_passes_interpreted(__file__)


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host does not look, and a kernel that fails fails the test."""
    if not INTERPRETED:
        yield
        return
    for module in (base, progress, record):
        monkeypatch.setattr(module, "can_look", lambda _: False)
    from triton.runtime import interpreter

    # As it is, the language is made ready anew for every kernel that is started: most of the time.
    monkeypatch.setattr(interpreter, "_patch_lang", made_ready_once(interpreter._patch_lang))
    monkeypatch.setattr(fused, "_failures", [])
    yield
    assert not fused._failures


@functools.cache
def made_ready_once(make_ready: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's function that makes a module ready for the interpreter, without the way back."""
    done: set[str] = set()

    def make_ready_for(kernel: Any) -> Any:
        if kernel.__module__ not in done:
            make_ready(kernel)
            done.add(kernel.__module__)
        return SimpleNamespace(restore=lambda: None)

    return make_ready_for


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small states have several parts, and these several blocks."""
    for name, number in {"_BLOCK": 4, "_MOST_PARTS": 3, "_TILE": 2}.items():
        monkeypatch.setattr(record, name, number)


def plainly(call: Callable[[], Any]) -> Any:
    """What a call returns where no record is fused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "is_available", lambda *_: False)
        return call()


def assert_same(one: Tensor | None, other: Tensor | None) -> None:
    """Bit for bit."""
    if one is None or other is None:
        assert one is other
    else:
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)


def assert_same_solution(one: Solution, other: Solution) -> None:
    for name in (
        "status",
        "num_steps",
        "nfe",
        "sample_nfe",
        "value",
        "residual",
        "relative_residual",
        "trace",
    ):
        assert_same(*(torch.as_tensor(getattr(solution, name)) for solution in (one, other)))


# Random evaluations --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """A map whose residual at iterate k of sample b is `table[b, k]`; an iterate has its number in front.

    No sum of squares has more than two terms that are not zero, so none depends on the order.
    """

    table: Tensor  # (B, steps + 1)
    points: list[Tensor] = field(default_factory=list)  # where it was evaluated
    guess: str | None = None
    clock: None = None
    resolution: torch.dtype = torch.float64

    def __call__(self, z: Tensor) -> Tensor:
        self.points.append(z.clone())
        image = z.clone()
        image[:, -1] += self.table.gather(1, z[:, :1].long()).squeeze(1)
        return image

    def take(self, samples: Tensor) -> Script:
        return replace(self, table=self.table[samples])


@dataclass(frozen=True, kw_only=True)
class Numbered(Solver):
    """Moves every sample to the number of the step."""

    def init(self, z0: Tensor) -> int:
        return 0

    def step(self, z: Tensor, fz: Tensor, state: int) -> tuple[Tensor, int]:
        moved = torch.zeros_like(z)
        moved[:, 0] = state + 1
        return moved, state + 1


FACTS = ("step", "steps_left", "difference", "residual", "goal", "before", "since", "best", "improved")


@dataclass(frozen=True, kw_only=True)
class Watching(Numbered):
    """Keeps what it is told, as it was then and as the tensors that it was told."""

    told: list[dict[str, Any]] = field(default_factory=list)
    asks: int = 1  # at which steps it asks for the best iterates: at all, every second one, ...

    def observe(self, seen: Seen, state: int) -> int:
        names = [name for name in FACTS if name != "best" or seen.step % self.asks == 0]
        facts = {name: getattr(seen, name) for name in names}
        none = torch.zeros_like(seen.improved)
        facts["finished"] = none if seen.finished is None else seen.finished
        facts["at work"] = seen.before > -INF
        if seen.all_improved and seen.step:
            assert bool((seen.improved | ~facts["at work"]).all())
        copies = {name: fact.clone() for name, fact in facts.items() if isinstance(fact, Tensor)}
        self.told.append({"then": {**facts, **copies}, "now": facts})
        return state


@dataclass(frozen=True)
class Case:
    table: Tensor
    width: int
    stopping: Stopping
    watches: bool
    asks: int
    compacts: bool
    fuses: tuple[bool, ...] | None  # in turn, whether a kernel may be started; None: where it can be

    def run(self) -> tuple[Solution, list[dict[str, Any]], list[Tensor]]:
        """The solution, what a solver was told, and where the map was evaluated."""
        solver = Watching(asks=self.asks) if self.watches else Numbered()
        f = Script(self.table)
        z0 = torch.zeros(len(self.table), self.width, dtype=self.table.dtype)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            if self.fuses is not None:
                turns = itertools.cycle(self.fuses)
                patch.setattr(record, "is_available", lambda *_: next(turns))
            found = approach(f, z0, solver, self.stopping, compact=f if self.compacts else None)
            settled = found.settled()
        assert not z0.any()  # the caller's own
        return settled, solver.told if isinstance(solver, Watching) else [], f.points


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, steps = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    numbers = st.one_of(
        st.integers(-3, 3).map(lambda power: 2.0**power),
        st.sampled_from([0.0, 1e-30, 1e-12, 3e18, 3e38, INF, -INF, NAN]),
    )
    row = st.lists(numbers, min_size=steps + 1, max_size=steps + 1)
    table = torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)), dtype=dtype)
    stopping = Stopping(
        rtol=draw(st.sampled_from([0.0, 0.125])),
        atol=draw(st.sampled_from([0.0, 0.25])),
        max_steps=steps,
        check_every=draw(st.integers(1, 5)),
        patience=draw(st.sampled_from([None, 1, 2, 3])),
        blowup=draw(st.sampled_from([4.0, 1e6])),
    )
    fuses = draw(st.sampled_from([(True,), (True, False), (False, True, True)]))
    return Case(
        table,
        draw(st.integers(2, 30)),
        stopping,
        watches=draw(st.booleans()),
        asks=draw(st.integers(1, 3)),
        compacts=draw(st.booleans()),
        fuses=fuses,
    )


def example_of(*rows: list[float], check_every: int, asks: int = 0, fuses: tuple[bool, ...] = (True,)) -> Any:
    stopping = Stopping(rtol=0.125, max_steps=len(rows[0]) - 1, check_every=check_every)
    return example(case=Case(torch.tensor(rows), 5, stopping, asks > 0, asks, False, fuses))


# Meets the tolerance, which grows with the image, though its residual does not improve; and is not lost by
# one evaluation alone where the solver may take it back.
MET = [4.0, 0.5, 2.0, 2.0, 0.5, 2.0, 0.5, 0.25], [4.0, 1e9, 1.0, 1e9, 1e9, 1.0, 1.0, 1.0]
FALLING, RISING = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0], [8.0, 4.0, 2.0, 3.0, 9.0, 9.0, 9.0]
LATER = [8.0, 7.0, 6.0, 5.0, 9.0, 9.0, 9.0]
ENDED = [8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@interpreted
@pytest.mark.usefixtures("small_parts")
@example_of(*MET, check_every=3, asks=2)
@example_of(*MET, check_every=3, asks=2, fuses=(True, True, False))
@example_of(FALLING, RISING, check_every=9, asks=2)  # what was told is not overwritten by what is better
@example_of(FALLING, RISING, check_every=9)  # nor is where the solve began
@example_of(FALLING, ENDED, check_every=9)  # a finished sample is held while another moves
@example_of(
    LATER, RISING, check_every=1, fuses=(False, True)
)  # the plain record writes late when all were best
@given(case=cases())
def test_all_that_is_known_of_every_sample_is_what_the_plain_record_knows(case: Case) -> None:
    (expected, told, points), (found, told_too, points_too) = plainly(case.run), case.run()
    assert_same_solution(expected, found)
    assert len(told) == len(told_too)
    for one, other in zip(points, points_too, strict=True):
        assert_same(one, other)
    for one, other in zip(told, told_too, strict=True):
        for name in one["then"]:
            assert_same(*(torch.as_tensor(facts["then"][name]) for facts in (one, other)))
        for name in other["now"]:  # what a solver was told stays as it is
            assert_same(*(torch.as_tensor(other[when][name]) for when in ("then", "now")))


@interpreted
def test_states_too_small_to_be_traced_are_at_the_same_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LARGE", 0)
    table = torch.tensor([[4.0, 2.0, 1.0, 0.1], [4.0, 8.0, 2.0, 3.0], [NAN] * 4, [4.0, 1e9, 1.0, 1.0]])
    stopping = Stopping(rtol=0.1, max_steps=3, check_every=2)
    case = Case(table, 2, stopping, watches=False, asks=1, compacts=False, fuses=(True,))
    expected, found = plainly(case.run)[0], case.run()[0]
    assert expected.trace is None is found.trace
    assert_same(expected.relative_residual, found.relative_residual)


# Norms ---------------------------------------------------------------------------------------------------


def observed(z: Tensor, fz: Tensor) -> FusedRecord:
    made = FusedRecord(z, Stopping(), None, may_recover=True)
    made.observe(z, fz, looks=False)
    return made


@interpreted
@pytest.mark.usefixtures("small_parts")
@given(
    width=st.integers(1, 40),
    batch=st.integers(1, 5),
    power=st.sampled_from([-44, -30, 0, 18, 37]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bad=st.sampled_from([None, NAN, INF]),
    seed=st.integers(0, 2**16),
)
def test_norms_are_right_at_every_scale_and_depend_on_nothing_but_the_sample(
    width: int, batch: int, power: int, dtype: torch.dtype, bad: float | None, seed: int
) -> None:
    z, fz = torch.randn(2, batch, width, generator=torch.Generator().manual_seed(seed), dtype=dtype).clamp(
        -3, 3
    )
    z, fz = z * 10.0**power, fz * 10.0**power
    if bad is not None:
        fz[0, seed % width] = bad
    known = observed(z, fz)
    assert_same(fz - z, known.difference)
    eps = torch.finfo(dtype).eps
    for norm, expected in zip((known.residual, known.scale), norms(fz - z, fz), strict=True):
        torch.testing.assert_close(norm, expected, rtol=8 * eps, atol=0, equal_nan=True)
    for sample in range(batch):
        alone = observed(z[sample : sample + 1], fz[sample : sample + 1])
        assert_same(known.residual[sample : sample + 1], alone.residual)
        assert_same(known.scale[sample : sample + 1], alone.scale)


# Whole solves --------------------------------------------------------------------------------------------

SOLVERS: dict[str, Solver] = {
    "Picard": Picard(),
    "Anderson": Anderson(memory=3),
    "Broyden": Broyden(),
    "NewtonKrylov": NewtonKrylov(),
    "Auto": Auto(),
}


PROBLEMS = {
    "mixed difficulty": lambda: mixed_difficulty(batch=4, width=8, dtype=torch.float64),
    "explosion": lambda: explosion(batch=3, dtype=torch.float64),
}


@interpreted
@pytest.mark.parametrize(
    ("difficulty", "name"),
    [
        *(("mixed difficulty", name) for name in ("Picard", "Anderson", "Auto")),
        *(("explosion", name) for name in ("Broyden", "NewtonKrylov", "Auto")),
    ],
)
def test_solves_end_alike(difficulty: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Interpreted steps are tried elsewhere, and would take most of the time.
    monkeypatch.setattr("deqlib.solvers.secant.is_available", lambda *_: False)
    problem = PROBLEMS[difficulty]()
    stopping = Stopping(rtol=1e-6, max_steps=30, check_every=3, patience=8)
    compact = difficulty == "mixed difficulty"

    def solve() -> Solution:
        with torch.no_grad():
            return fixed_point(
                *(problem.cell, problem.z0, problem.inputs),
                solver=SOLVERS[name],
                stopping=stopping,
                compact=compact,
                on_failure="ignore",
            )

    expected, found = plainly(solve), solve()
    for fact in ("status", "num_steps", "nfe", "sample_nfe", "method"):
        assert_same(*(torch.as_tensor(getattr(solution, fact)) for solution in (expected, found)))
    assert expected.rejections.keys() == found.rejections.keys()
    for cause, counts in found.rejections.items():
        assert_same(expected.rejections[cause], counts)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.trace, expected.trace, rtol=1e-3, atol=1e-9, equal_nan=True)


@interpreted
def test_what_autograd_records_is_left_to_the_plain_record() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def gradient() -> tuple[Tensor, ...]:
        z = fixed_point(lambda z, x: 0.5 * z.tanh() + x, torch.zeros_like(x), (x,), backward=Unroll()).value
        return torch.autograd.grad(z.square().sum(), x)

    torch.testing.assert_close(gradient(), plainly(gradient))


# Which record --------------------------------------------------------------------------------------------


def kind_of(z0: Tensor, **settings: Any) -> type:
    return type(driver.record_of(z0, Picard(), Stopping(), settings.get("unit_norms"), None))


@interpreted
def test_the_fused_record_is_for_states_of_numbers_that_it_holds_the_squares_of() -> None:
    assert kind_of(torch.zeros(2, 3)) is FusedRecord
    assert kind_of(torch.zeros(3, 2).T) is FusedRecord  # its iterates need not lie so
    assert kind_of(torch.zeros(2, 3), unit_norms=lambda z: z.abs()) is Record
    for other in (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(0, 3), torch.zeros(2, 0)):
        assert kind_of(other) is Record
    wide = torch.zeros(1, 1).expand(1, 2**31)  # whose last place is beyond 32 bits
    assert kind_of(wide) is Record
    assert kind_of(wide[:, 1:]) is FusedRecord


@pytest.mark.skipif(INTERPRETED, reason="is about a process without the interpreter")
def test_on_a_cpu_the_record_is_plain() -> None:
    assert kind_of(torch.zeros(2, 3)) is Record


# Kernels -------------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts kernels that are started, and operations but for views and room, by name."""

    NOTHING_TO_DO = (
        "empty",
        "empty_like",
        "new_empty",
        "detach",
        "select",
        "slice",
        "unbind",
        "unsqueeze",
        "view",
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.is_outside = True  # of a kernel and of the map

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.is_outside and name not in self.NOTHING_TO_DO:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def inside(self, call: Callable[[], Any]) -> Any:
        self.is_outside = False
        try:
            return call()
        finally:
            self.is_outside = True


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    from triton.runtime.interpreter import InterpretedFunction

    counted, run = Kernels(), InterpretedFunction.run

    def start(kernel: Any, *args: Any, **settings: Any) -> Any:
        counted.counts[kernel.fn.__name__] += 1
        return counted.inside(lambda: run(kernel, *args, **settings))

    monkeypatch.setattr(InterpretedFunction, "run", start)
    return counted


@interpreted
@pytest.mark.parametrize("solver", [Numbered(), Watching(asks=1000)], ids=["not told", "told"])
@pytest.mark.parametrize(
    ("check_every", "row", "expected"),
    [
        (1, [4.0, 3.0, 2.0, 1.0], ["measure", "judge"]),
        (1, [4.0, 3.0, 3.5, 1.0], ["measure", "judge", "where"]),
        (1, [4.0, 0.0, 0.0, 0.0], ["measure", "judge", "where"]),
        (100, [4.0, 3.0, 2.0, 1.0], ["measure", "judge", "keep"]),
        (100, [4.0, 3.0, 3.5, 1.0], ["measure", "judge", "keep"]),
    ],
    ids=["all improve", "some do not", "some have finished", "unseen, all improve", "unseen, some do not"],
)
def test_an_evaluation_starts_three_kernels_at_most(
    solver: Solver, check_every: int, row: list[float], expected: list[str], kernels: Kernels
) -> None:
    """Of two samples, the first of which always improves; at evaluation 2."""
    seen: list[Counter[str]] = []
    f = Script(torch.tensor([[8.0, 4.0, 2.0, 1.0], row]))

    def counted(z: Tensor) -> Tensor:
        seen.append(kernels.counts.copy())
        return kernels.inside(lambda: f(z))

    class Uncounted(type(solver)):  # type: ignore[misc]
        def observe(self, told: Seen, state: Any) -> Any:
            return kernels.inside(lambda: solver.observe(told, state))

        def step(self, z: Tensor, fz: Tensor, state: Any) -> Any:
            return kernels.inside(lambda: solver.step(z, fz, state))

    if not isinstance(solver, Watching):
        del Uncounted.observe
    stopping = Stopping(rtol=1e-9, max_steps=3, check_every=check_every)
    with torch.no_grad(), kernels:
        iterate(counted, torch.zeros(2, 6), Uncounted(), stopping)
    found = seen[3] - seen[2]
    del found["sum"]  # on a CPU, of what was copied from the device
    assert found == Counter(expected)


@interpreted
@pytest.mark.parametrize("name", ["Anderson", "Broyden", "Auto"])
def test_a_step_to_a_tolerance_starts_six_kernels_at_most(name: str, kernels: Kernels) -> None:
    solvers = {
        "Anderson": Anderson(memory=3),
        "Broyden": Broyden(memory=3),
        "Auto": Auto(plain_steps=0, methods=(Anderson(memory=3),)),
    }
    seen: list[Counter[str]] = []

    def cell(z: Tensor) -> Tensor:
        seen.append(kernels.counts.copy())
        return kernels.inside(lambda: torch.tanh(0.9 * z.flip(1) + 0.3))

    stopping = Stopping(rtol=1e-30, max_steps=5, check_every=100)
    with torch.no_grad(), kernels:
        fixed_point(cell, torch.zeros(2, 8), solver=solvers[name], stopping=stopping, on_failure="ignore")
    found = seen[5] - seen[4]
    assert found.total() <= 6, found
    assert {"measure", "judge", "keep"} < found.keys()


@interpreted
@pytest.mark.parametrize("kernel", ["measure", "judge", "keep"])
def test_where_a_kernel_fails_the_plain_record_goes_on_and_it_is_said_once(
    kernel: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from deqlib.fused import record_kernels

    class Failing:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("no compiler\nand more")

    table = torch.tensor([[8.0, 4.0, 4.0, 2.0, 1.0, 0.1], [8.0, 0.2, 0.2, 0.2, 0.2, 0.2]])
    stopping = Stopping(rtol=0.0, atol=0.5, max_steps=5, check_every=9)
    case = Case(table, 3, stopping, watches=True, asks=2, compacts=False, fuses=(True,))
    expected = plainly(case.run)[0]
    monkeypatch.setattr(record_kernels, kernel, Failing())
    with caplog.at_level(logging.WARNING, "deqlib"):
        found = replace(case, fuses=None).run()[0]
        fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    assert_same_solution(expected, found)
    (said,) = (entry.getMessage() for entry in caplog.records)
    assert "RuntimeError: no compiler)" in said
    fused._failures.clear()


@compiled
@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "fp32"), (90, "fp64")])
def test_kernels_compile_for_devices_and_keep_their_numbers_in_registers(
    capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deqlib.fused import record_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    numbers = {"PART": record._BLOCK, "BLOCK": record._BLOCK}
    variants: list[tuple[str, dict[str, Any], int]] = [
        ("measure", {"HAS_DIFFERENCE": True, **numbers}, 4),
        ("judge", {"MAY_RECOVER": True, "NUM_TILES": 1, "TILE": record._TILE}, 1),
        ("keep", {"IN_PLACE": False, **numbers}, 4),
    ]
    types = dict.fromkeys(("width", "num_parts", "step", "oldest"), "i32") | {"sums": "*fp64"}
    types |= dict.fromkeys(("begun", "best_step", "status", "num_steps"), "*i64")
    types |= dict.fromkeys(("flags", "broken", "improved", "active"), "*i1")
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for name, constants, num_warps in variants:
        kernel = getattr(record_kernels, name)
        signature = {
            arg: "constexpr" if arg in constants else types.get(arg, f"*{dtype}") for arg in kernel.arg_names
        }
        made = triton.compile(
            ASTSource(kernel, signature, {(kernel.arg_names.index(arg),): x for arg, x in constants.items()}),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps},
        )
        text = tmp_path / "kernel.ptx"
        text.write_text(made.asm["ptx"])
        model = f"--gpu-name=sm_{capability}" + "a" * (capability >= 90)
        command = [assembler, "-v", model, text, "-o", tmp_path / "kernel.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert " 0 bytes spill stores" in told, (name, told)
        assert int(re.search(r"Used (\d+) registers", told)[1]) <= 96, (name, told)
