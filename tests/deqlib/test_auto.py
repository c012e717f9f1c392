"""The plain iteration first, then methods in turn: who works on which sample, and when."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from waits import Waits

from deqlib import (
    GMRES,
    Anderson,
    Auto,
    Broyden,
    NewtonKrylov,
    Picard,
    ReversiblePicard,
    Solution,
    Solver,
    Status,
    Stopping,
    fixed_point,
)
from deqlib.driver import approach, iterate
from deqlib.solvers.base import Seen
from deqlib.testing import (
    Problem,
    expanding,
    linear,
    mixed_difficulty,
    monotone,
    nearly_singular,
    tanh_rnn,
)

FIRST = Auto().methods[0]


def solve(base: Problem, solver: Solver, **settings: Any) -> Solution:
    arguments = {key: settings.pop(key) for key in ("state", "compact") if key in settings}
    stopping = Stopping(**{"rtol": 1e-6, "max_steps": 300, **settings})
    with torch.no_grad():
        return fixed_point(
            base.cell,
            base.z0,
            base.inputs,
            solver=solver,
            stopping=stopping,
            on_failure="ignore",
            **arguments,
        )


def sample(base: Problem, index: int) -> Problem:
    """One sample of a problem alone."""
    batch, own = len(base.z0), slice(index, index + 1)
    inputs = tuple(x[own] if len(x) == batch else x for x in base.inputs)
    return Problem(base.name, base.cell, base.z0[own], inputs, None)


def statuses(solution: Solution) -> list[str]:
    return [Status(code).name for code in solution.status.tolist()]


def tensors(state: Any) -> Iterator[Tensor]:
    """All that a state holds."""
    if isinstance(state, Tensor):
        yield state
    elif dataclasses.is_dataclass(state) and not isinstance(state, type):
        for field in dataclasses.fields(state):
            yield from tensors(getattr(state, field.name))
    elif isinstance(state, tuple | list):
        for item in state:
            yield from tensors(item)


# Scripts: methods that do what a test needs -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Script(Solver):
    """Takes `share` of the way to f(z), then, after so many steps, none; or goes to `leap` at its n-th."""

    share: float = 0.0
    steps: int | None = None
    leap: float | None = None

    def init(self, z0: Tensor) -> int:
        return 0

    def step(self, z: Tensor, fz: Tensor, state: int) -> tuple[Tensor, int]:
        if self.steps is not None and state >= self.steps:
            return (z if self.leap is None else torch.full_like(z, self.leap)), state + 1
        return z + self.share * (fz - z), state + 1


def mirror(*gains: float) -> Callable[[Tensor], Tensor]:
    """f(z) = z + gain (1 - z), a gain for each sample: a share s of a step leaves 1 - gain s of the error.

    With gain 2 the plain iteration goes to and fro between 0 and 2 for ever.
    """
    gain = torch.tensor(gains, dtype=torch.float64).unsqueeze(1)
    return lambda z: z + gain * (1 - z)


def watched(auto: Auto, log: list[list[int]]) -> Auto:
    """The same solver, which notes after every evaluation who works on each sample."""

    class Watched(Auto):
        def observe(self, seen: Seen, state: Any) -> Any:
            state = super().observe(seen, state)
            log.append(state.method.tolist())
            return state

    return Watched(**{field.name: getattr(auto, field.name) for field in dataclasses.fields(auto)})


def walk(
    f: Callable[[Tensor], Tensor], auto: Auto, batch: int = 1, start: float = 0.0, **stopping: Any
) -> tuple[Solution, list[list[int]]]:
    """A solve on states of one number, and who worked on each sample after each evaluation."""
    log: list[list[int]] = []
    rule = Stopping(**{"rtol": 0, "atol": 1e-6, "max_steps": 200, "patience": None, **stopping})
    z0 = torch.full((batch, 1), start, dtype=torch.float64)
    return iterate(f, z0, watched(auto, log), rule), log


def turns(log: list[list[int]], index: int = 0) -> list[int]:
    """The methods that a sample was given to, in order."""
    return [method for method, _ in groupby(row[index] for row in log)]


STUCK = Script()
HALVES = Script(share=0.25)  # of gain 2


# The plain iteration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_a_fast_contraction_is_picards_to_the_bit(rate: float) -> None:
    base = tanh_rnn(batch=4, width=24, rate=rate, dtype=torch.float64)
    picard, auto = (solve(base, solver, rtol=1e-5) for solver in (Picard(), Auto()))
    for name in ("value", "residual", "num_steps", "status", "trace"):
        assert torch.equal(getattr(picard, name), getattr(auto, name)), name
    assert picard.nfe == auto.nfe
    assert auto.method_counts() == {"Picard": 4}
    assert auto.methods == ("Picard", *(type(method).__name__ for method in Auto().methods))
    assert auto.rejections == {}


def test_the_plain_iteration_keeps_no_history() -> None:
    # An image is the next iterate, but for the samples that are finished: those are held at their best.
    # The start is kept too: a method that a sample is handed to may begin there.
    for batch, most in ((1, 5), (4, 7)):
        base = tanh_rnn(batch=batch, width=24, rate=0.5, dtype=torch.float64)
        auto = solve(base, Auto(), rtol=1e-5)
        assert auto.nfe > 10
        assert auto.method_counts() == {"Picard": batch}
        states = {t.data_ptr() for t in tensors(auto.state) if t.numel() >= base.z0.numel()}
        assert len(states) <= most
    slow = solve(tanh_rnn(batch=4, width=24, rate=0.95, dtype=torch.float64), Auto(), rtol=1e-5)
    assert sum(t.numel() for t in tensors(slow.state)) > 4 * base.z0.numel()  # such as is counted here


def test_a_slow_contraction_is_accelerated_at_the_first_look() -> None:
    base = linear(torch.linspace(-0.95, 0.95, 24), batch=4, dtype=torch.float64)
    picard, anderson, auto = (solve(base, solver) for solver in (Picard(), FIRST, Auto()))
    assert auto.converged.all()
    assert auto.method_counts() == {"Anderson": 4}
    # Evaluations 0 to 3 are those of the plain iteration, and what they taught is used at once.
    assert torch.equal(auto.trace[:4], picard.trace[:4])
    assert (auto.trace[4] < 0.8 * picard.trace[4]).all()
    assert auto.nfe <= anderson.nfe + 3
    torch.testing.assert_close(auto.value, base.solution, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "base",
    [
        nearly_singular(batch=3, width=32, dtype=torch.float64),
        tanh_rnn(batch=3, width=32, rate=0.9, dtype=torch.float64),
        expanding(batch=3, width=24, dtype=torch.float64),
    ],
    ids=lambda base: base.name,
)
def test_what_needs_acceleration_takes_few_evaluations_more_than_with_it_alone(base: Problem) -> None:
    anderson, auto = (solve(base, solver) for solver in (FIRST, Auto()))
    assert auto.converged.all()
    assert auto.nfe <= anderson.nfe + 4


def test_a_contraction_that_is_too_slow_for_the_steps_allowed_is_accelerated() -> None:
    base = tanh_rnn(batch=4, width=24, rate=0.5, dtype=torch.float64)
    enough, few = (solve(base, Auto(), rtol=1e-5, max_steps=n) for n in (50, 12))
    assert enough.method_counts() == {"Picard": 4}
    assert int(enough.num_steps.max()) > 12
    assert few.converged.all()
    assert few.method_counts() == {"Anderson": 4}


def test_plain_steps_says_for_how_long_a_sample_is_left_with_the_plain_iteration() -> None:
    base = tanh_rnn(batch=4, width=24, rate=0.7, dtype=torch.float64)
    found = {n: solve(base, Auto(plain_steps=n), rtol=1e-5).method_counts() for n in (2, 100)}
    assert found == {2: {"Anderson": 4}, 100: {"Picard": 4}}


@pytest.mark.parametrize("first", [Anderson(), Broyden(), NewtonKrylov(), NewtonKrylov(derivative="jvp")])
def test_without_plain_steps_the_first_method_begins(first: Solver) -> None:
    base = tanh_rnn(batch=4, width=24, rate=0.8, dtype=torch.float64)
    alone, auto = (solve(base, s) for s in (first, Auto(methods=(first, Broyden()), plain_steps=0)))
    assert torch.equal(alone.value, auto.value)
    assert alone.nfe == auto.nfe
    assert auto.method.tolist() == [1] * 4


def test_samples_fare_in_a_mixed_batch_as_they_do_alone() -> None:
    base = mixed_difficulty(batch=6, width=24, easy=0.3, hard=0.97, num_hard=2, dtype=torch.float64)
    auto, picard = solve(base, Auto()), solve(base, Picard())
    assert auto.converged.all()
    assert auto.method.tolist() == [0] * 4 + [1] * 2
    assert torch.equal(auto.num_steps[:4], picard.num_steps[:4])
    torch.testing.assert_close(auto.value[:4], picard.value[:4], rtol=1e-12, atol=1e-12)
    for index in range(6):
        alone = solve(sample(base, index), Auto())
        assert alone.num_steps[0] == auto.num_steps[index]
        torch.testing.assert_close(alone.value[0], auto.value[index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compact", [False, True])
def test_samples_that_a_secant_method_gets_at_different_looks_fare_as_they_do_alone(compact: bool) -> None:
    # Each begins at a distance of its own from what falls slowly, so the plain iteration is found to be slow
    # later for some; what Anderson learnt of them meanwhile must not show.
    hard = nearly_singular(batch=8, width=64, dtype=torch.float64)
    easy = tanh_rnn(batch=4, width=64, rate=0.5, dtype=torch.float64)
    log: list[list[int]] = []

    def cell(z: Tensor, rows: Tensor) -> Tensor:
        both = torch.zeros(12, 64, dtype=torch.float64).index_copy(0, rows, z)
        return torch.cat([hard.f(both[:8]), easy.f(both[8:])])[rows]

    def run(rows: list[int], log: list[list[int]]) -> Solution:
        where = torch.tensor(rows)
        z0, rule = torch.cat([hard.z0, easy.z0])[where], Stopping(rtol=1e-6, max_steps=200)
        with torch.no_grad():
            return fixed_point(
                cell, z0, (where,), solver=watched(Auto(), log), stopping=rule, compact=compact
            )

    together = run(list(range(12)), log)
    if not compact:  # with it the log has the samples that are left
        assert len({next(i for i, row in enumerate(log) if row[k] == 1) for k in range(8)}) >= 2
    for index in range(12):
        alone = run([index], [])
        assert alone.num_steps[0] == together.num_steps[index]
        assert alone.method[0] == together.method[index]
        torch.testing.assert_close(alone.value[0], together.value[index], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("compact", [False, True])
def test_a_method_whose_samples_are_all_finished_waits_and_is_there_when_the_solve_goes_on(
    compact: bool,
) -> None:
    # What contracts by 0.97 is accelerated at once and arrives before what contracts by 0.7.
    base = mixed_difficulty(batch=6, width=8, easy=0.7, hard=0.97, num_hard=2, dtype=torch.float64)
    auto = Auto(plain_steps=100)
    first = solve(base, auto, compact=compact)
    assert first.method.tolist() == [0] * 4 + [1] * 2
    assert first.num_steps[4:].max() < first.num_steps[:4].min()
    resumed = auto.resume(first.state, first.value)
    assert resumed.method.tolist() == [0] * 4 + [1] * 2
    owners = torch.cat([part.rows for part in resumed.parts.items])
    assert sorted(owners.tolist()) == [4, 5]
    again = solve(base, auto, compact=compact, state=first.state, rtol=1e-9)
    assert again.converged.all()
    torch.testing.assert_close(again.value, base.solution, rtol=1e-7, atol=1e-7)


# From one method to the next ----------------------------------------------------------------------------


def test_a_sample_without_progress_is_handed_on_and_starts_at_its_best() -> None:
    points: list[float] = []

    def f(z: Tensor) -> Tensor:
        points.append(float(z))
        return mirror(2.0)(z)

    wrong_way = Script(share=-0.1)
    solution, log = walk(f, Auto(methods=(wrong_way, HALVES), patience=4, plain_steps=0))
    assert solution.method.tolist() == [2]
    assert solution.methods == ("Picard", "Script", "Script")
    # Given up at step 4, evaluated anew at its best at step 5, and then half way to 1 at every step.
    assert [row[0] for row in log[:6]] == [1, 1, 1, 1, 2, 2]
    assert points[5:8] == [0.0, 0.5, 0.75]
    # An error of 1 and a residual of 2 at step 5: 21 halvings.
    assert solution.num_steps.tolist() == [26]
    assert solution.nfe == 27


@dataclass(frozen=True, kw_only=True)
class Tires(Script):
    """Takes `share` of the way for so many steps, then `rest` of it."""

    rest: float = 0.02

    def step(self, z: Tensor, fz: Tensor, state: int) -> tuple[Tensor, int]:
        assert self.steps is not None
        return z + (self.share if state < self.steps else self.rest) * (fz - z), state + 1


@pytest.mark.parametrize(
    ("first", "from_the_start"),
    [
        (Script(share=0.25, steps=3), True),  # an eighth of the residual, and stuck
        (Script(share=0.25, steps=9), True),  # less than a hundredth of it, and stuck
        (Tires(share=0.25, steps=9), False),  # the same, and slow
    ],
)
def test_a_method_that_got_stuck_or_not_far_does_not_say_where_the_next_begins(
    first: Script, from_the_start: bool
) -> None:
    points: list[float] = []

    def f(z: Tensor) -> Tensor:
        points.append(float(z))
        return mirror(2.0)(z)

    auto = Auto(methods=(first, HALVES), patience=4, plain_steps=0)
    solution, log = walk(f, auto, max_steps=400, atol=1e-12)
    handed_on = [row[0] for row in log].index(2)
    best = max(points[: handed_on + 1])  # all are below the fixed point at 1
    assert 0 < best < 1
    assert points[handed_on + 1] == (0.0 if from_the_start else best)
    assert solution.converged.all()
    assert turns(log) == [1, 2]


def test_a_slow_method_is_kept_where_less_is_left_than_half_of_what_it_did() -> None:
    # Nine halvings, then 4 % an evaluation: all in all less than 8 % each from about the 150th on, where the
    # residual is down by exp(12). With 1e-6 to reach exp(3) are left then, with 1e-12 exp(16).
    tires = Tires(share=0.25, steps=9)
    for atol, turn in ((1e-12, [1, 2]), (1e-6, [1])):
        auto = Auto(methods=(tires, HALVES), patience=4, plain_steps=0)
        solution, log = walk(mirror(2.0), auto, max_steps=4000, atol=atol)
        assert solution.converged.all()
        assert turns(log) == turn
        assert len(log) > 150


def test_a_method_that_catches_up_learns_from_steps_that_it_would_refuse() -> None:
    solver = Anderson()
    state = solver.init(torch.zeros(2, 4, dtype=torch.float64))
    recent, z = [], torch.full((2, 4), 0.1, dtype=torch.float64)
    for _ in range(3):  # the residual grows a hundredfold a step, and with it that of a sample
        recent.append((z, -100 * z + 1))
        z = recent[-1][1]
    solver.catch_up(state, recent, None)
    assert state.history.num_columns == 2
    assert state.history.columns().all()


def test_a_method_that_catches_up_leaves_samples_alone_that_finished_meanwhile() -> None:
    rates = torch.tensor([0.9, -0.5, 0.3, 0.7], dtype=torch.float64)
    solver = Anderson(memory=3)
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, recent = solver.init(z), []
    one, two = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    for step in range(6):  # the history is full, and one sample finished while it was observed
        image = rates * z + 0.1 * torch.tanh(z) + 1
        difference = image - z
        seen: Any = SimpleNamespace(
            difference=difference,
            residual=difference.norm(dim=1),
            before=z.new_full((3,), torch.inf),
            all_improved=True,
            finished=None if step < 3 else one,
        )
        state = solver.observe(seen, state)
        recent = [*recent[-2:], (z, image)]
        z, state = solver.step(z, image, state)
    history = state.history
    kept = history.columns()
    before = history.df.clone(), history.left.clone()
    solver.catch_up(state, recent, two)
    for rows, old in zip((history.df, history.left), before, strict=True):
        assert torch.equal(rows[:2][kept[:2]], old[:2][kept[:2]])
        assert not torch.equal(rows[2], old[2])


def test_a_method_that_is_too_slow_is_left_before_it_stops() -> None:
    slow, fast = Script(share=0.02), Script(share=0.1)  # 4% and 20% of the error of gain 2
    for first, turn in ((slow, [0, 1, 2]), (fast, [0, 1])):
        solution, log = walk(mirror(2.0), Auto(methods=(first, HALVES), patience=4), max_steps=2000)
        assert solution.converged.all()
        assert turns(log) == turn


def test_a_method_that_would_not_arrive_in_time_is_left() -> None:
    for max_steps, turn in ((150, [0, 1]), (60, [0, 1, 2])):
        auto = Auto(methods=(Script(share=0.1), HALVES), patience=4)
        solution, log = walk(mirror(2.0), auto, max_steps=max_steps)
        assert solution.converged.all()
        assert turns(log) == turn


@pytest.mark.parametrize("first", [STUCK, HALVES])
def test_samples_change_hands_one_by_one_and_the_others_do_not_notice(first: Script) -> None:
    gains = (0.1, 1.0, 2.0, 1.9)
    auto = Auto(methods=(first, Script(share=0.4)), patience=4)
    solution, log = walk(mirror(*gains), auto, batch=4, max_steps=600)
    assert solution.converged.all()
    assert len({tuple(turns(log, index)) for index in range(4)}) > 1
    for index, gain in enumerate(gains):
        alone, own = walk(mirror(gain), auto, max_steps=600)
        assert turns(log, index) == turns(own)
        assert alone.num_steps[0] == solution.num_steps[index]
        assert torch.equal(alone.value[0], solution.value[index])


@pytest.mark.parametrize(
    ("methods", "best"),
    [
        ((Script(share=0.25, steps=3), Script(share=0.25, steps=9), STUCK), 2),
        ((Script(share=0.25, steps=5), STUCK, STUCK), 1),
        ((STUCK, STUCK, Script(share=0.25, steps=7)), 3),
    ],
)
def test_a_sample_is_given_to_a_method_once_and_then_to_the_best_for_good(
    methods: tuple[Solver, ...], best: int
) -> None:
    solution, log = walk(mirror(2.0), Auto(methods=methods, patience=2), max_steps=300)
    assert statuses(solution) == ["MAX_STEPS"]
    expected = [0, 1, 2, 3] if best == 3 else [0, 1, 2, 3, best]
    assert turns(log) == expected
    assert solution.method.tolist() == [best]


def test_each_sample_is_finished_by_the_first_method_that_can() -> None:
    easy = tanh_rnn(width=16, rate=0.3, dtype=torch.float64)
    slow = tanh_rnn(width=16, rate=0.74, dtype=torch.float64)
    hard = expanding(width=16, rate=4.0, dtype=torch.float64)

    def cell(z: Tensor) -> Tensor:
        return torch.cat([easy.f(z[:4]), slow.f(z[4:8]), hard.f(z[8:])])

    z0 = torch.cat([easy.z0, slow.z0, hard.z0])
    # Damped, the plain iteration gets on with the slow samples, but not with those that it drives away.
    auto = Auto(methods=(Picard(damping=0.7), Broyden()), patience=8)
    with torch.no_grad():
        rule = Stopping(rtol=1e-4, max_steps=400)
        solution = fixed_point(cell, z0, solver=auto, stopping=rule, on_failure="raise")
    assert solution.method[:4].tolist() == [0] * 4
    assert solution.method[8:].tolist() == [2] * 4
    assert "by Picard " in repr(solution)
    assert "Broyden " in repr(solution)
    answer = torch.cat([easy.solution, slow.solution, hard.solution])
    torch.testing.assert_close(solution.value, answer, rtol=1e-2, atol=1e-2)


def test_a_problem_that_stalls_anderson_is_solved_by_those_after_it() -> None:
    base = monotone(batch=8, width=128)
    settings = {"rtol": 1e-4, "max_steps": 400, "patience": 60}
    assert not solve(base, Anderson(memory=2), **settings).converged.any()
    methods = (Anderson(memory=2), Broyden(memory=100), NewtonKrylov(memory=40))
    auto = solve(base, Auto(methods=methods), **settings)
    assert auto.converged.all()
    assert "Anderson" not in auto.method_counts()


@pytest.mark.parametrize("derivative", ["difference", "jvp"])
def test_methods_that_ask_for_other_evaluations_work_beside_those_that_do_not(derivative: Any) -> None:
    easy, hard = tanh_rnn(width=16, rate=0.3, dtype=torch.float64), expanding(width=16, dtype=torch.float64)

    def cell(z: Tensor) -> Tensor:
        return torch.cat([easy.f(z[:4]), hard.f(z[4:])])

    auto = Auto(methods=(NewtonKrylov(derivative=derivative),))
    with torch.no_grad():
        z0, rule = torch.cat([easy.z0, hard.z0]), Stopping(rtol=1e-8, max_steps=200)
        solution = fixed_point(cell, z0, solver=auto, stopping=rule, on_failure="raise")
        alone = fixed_point(hard.f, hard.z0, solver=auto, stopping=rule)
    assert solution.method.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(alone.num_steps, solution.num_steps[4:])
    torch.testing.assert_close(solution.value, torch.cat([easy.solution, hard.solution]))


# Samples that are lost ----------------------------------------------------------------------------------


def test_samples_that_are_not_finite_from_the_start_are_not_handed_on() -> None:
    base = nearly_singular(batch=3, width=24, dtype=torch.float64)
    solution = fixed_point(
        lambda z: torch.where(torch.arange(3).unsqueeze(1) == 1, torch.nan, base.f(z)),
        base.z0,
        solver=Auto(),
        stopping=Stopping(rtol=1e-8, max_steps=100),
        on_failure="ignore",
    )
    assert solution.method.tolist() == [1, 0, 1]
    assert statuses(solution) == ["CONVERGED", "DIVERGED", "CONVERGED"]
    assert solution.num_steps[1] == 0


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e12])
@pytest.mark.parametrize("leap_at", [1, 2, 4])
def test_a_sample_that_blows_up_goes_on_at_once_from_a_sound_iterate(bad: float, leap_at: int) -> None:
    points: list[float] = []

    def f(z: Tensor) -> Tensor:
        points.append(float(z))
        return mirror(2.0)(z)

    wrecker = Script(share=0.1, steps=leap_at, leap=bad)
    auto = Auto(methods=(wrecker, HALVES), patience=10, plain_steps=0)
    solution, log = walk(f, auto)
    lost = leap_at + 1  # the evaluation of where it leapt to
    assert not abs(points[lost]) < 1e6
    assert [row[0] for row in log[lost - 1 : lost + 1]] == [1, 2]
    assert points[lost + 1] in points[:lost]
    assert solution.converged.all()
    assert solution.method.tolist() == [2]


def test_what_counts_as_a_blow_up_is_said_by_the_stopping_rule_alone() -> None:
    wrecker = Script(share=0.1, steps=1, leap=1000.0)  # where the residual is 1000 times the first one
    auto = Auto(methods=(wrecker, HALVES), patience=10, plain_steps=0)
    for blowup, turn in ((1e6, [1]), (1e2, [1, 2])):
        _, log = walk(mirror(1.5), auto, max_steps=4, blowup=blowup)
        assert turns(log) == turn


def test_the_host_reads_twice_where_samples_go_from_one_method_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All four samples are with one method until it is stuck, at the first look for two of them.
    for name, module in list(sys.modules.items()):
        if name.startswith("deqlib.") and hasattr(module, "can_look"):
            monkeypatch.setattr(module, "can_look", lambda z: False)
    reads: list[int] = []

    class Reads(Auto):
        def observe(self, seen: Seen, state: Any) -> Any:
            with Waits() as waits:
                state = super().observe(seen, state)
            reads.append(sum(waits.counts.values()))
            log.append(state.method.tolist())
            return state

    log: list[list[int]] = []
    gains = torch.tensor([[2.0], [2.0], [1.0], [1.0]], dtype=torch.float64)
    first = Script(share=0.25, steps=8)  # then it is stuck
    auto = Reads(methods=(first, HALVES), patience=8, plain_steps=0)
    rule = Stopping(rtol=1e-9, max_steps=40, patience=None)

    def f(z: Tensor) -> Tensor:
        slow = torch.tensor([[True], [True], [False], [False]])
        return torch.where(slow, z + gains * (1 - z), z + 2 * gains * (1 - z))

    iterate(f, torch.zeros(4, 1, dtype=torch.float64), auto, rule)
    changes = [step for step in range(1, len(log)) if log[step] != log[step - 1]]
    assert changes
    assert all(reads[step] <= 2 for step in changes), [reads[step] for step in changes]


@pytest.mark.parametrize("start", [0.0, 0.2, 1.0])
def test_a_sample_that_the_plain_iteration_throws_out_is_brought_back(start: float) -> None:
    def f(z: Tensor) -> Tensor:  # a fixed point at 0.25, which repels; infinite from 2 on
        return torch.where(z.abs() > 2, torch.inf, 1 - 3 * z)

    for auto in (Auto(), Auto(methods=(Picard(), Broyden()), patience=5)):
        solution, log = walk(f, auto, start=start)
        assert statuses(solution) == ["CONVERGED"]
        answer = torch.full((1, 1), 0.25, dtype=torch.float64)
        torch.testing.assert_close(solution.value, answer, rtol=1e-5, atol=0)
        assert 0 not in log[3]


# With the stopping rule ---------------------------------------------------------------------------------


def test_the_patience_of_the_rule_counts_anew_for_every_method() -> None:
    # No method makes any progress. The second gets four times the patience of the first, and `Stopping`
    # waits for it; the last to have the sample is given the patience of the rule.
    solution, log = walk(mirror(2.0), Auto(methods=(STUCK, STUCK), patience=6), patience=8)
    assert turns(log) == [0, 1, 2, 1]
    codes = [row[0] for row in log]
    second = codes.index(2)
    assert second >= 8  # the best iterate is the first: nothing was left of the patience then
    last = second + codes[second:].index(1)
    assert last - second >= 4 * 6
    assert statuses(solution) == ["STALLED"]
    assert solution.num_steps.tolist() == [last + 8]


def test_a_rule_of_less_patience_than_the_methods_gives_up_first() -> None:
    solution, log = walk(mirror(2.0), Auto(methods=(STUCK, STUCK), patience=6), patience=4)
    assert turns(log) == [0, 1]
    assert statuses(solution) == ["STALLED"]


def test_the_least_patience_hands_a_sample_on_at_the_next_evaluation() -> None:
    solution, log = walk(mirror(2.0), Auto(methods=(STUCK, HALVES), patience=1, plain_steps=0))
    assert [row[0] for row in log[:2]] == [1, 2]
    assert solution.converged.all()


def test_a_map_without_a_fixed_point_is_given_up() -> None:
    def cell(z: Tensor) -> Tensor:  # jumps over the diagonal
        return torch.where(z > 0, -1.0, 1.0)

    solution = fixed_point(cell, torch.zeros(4, 3), stopping=Stopping(max_steps=1000), on_failure="ignore")
    assert (solution.status == Status.STALLED).all()
    # A patience for each method and for the one that gets the samples last.
    assert solution.nfe < (len(Auto().methods) + 1) * 4 * Auto().patience + Stopping().patience
    assert solution.value.isfinite().all()


@pytest.mark.parametrize("steps", [1, 3, 7, 20])
def test_a_fixed_number_of_steps_is_the_first_methods_to_the_bit(steps: int) -> None:
    base = tanh_rnn(batch=3, width=24, rate=0.8, dtype=torch.float64)
    for first in (FIRST, Broyden(), NewtonKrylov(), NewtonKrylov(derivative="jvp")):
        auto = iterate(base.f, base.z0, Auto(methods=(first,)), Stopping.steps(steps, measure=True))
        alone = iterate(base.f, base.z0, first, Stopping.steps(steps, measure=True))
        assert torch.equal(auto.value, alone.value)
        assert torch.equal(auto.trace, alone.trace)
        assert auto.nfe == alone.nfe


@pytest.mark.parametrize("check_every", [2, 3, 7])
def test_how_often_the_host_looks_changes_nothing_where_looking_is_free(check_every: int) -> None:
    base = mixed_difficulty(batch=6, width=24, easy=0.3, hard=0.97, num_hard=2, dtype=torch.float64)
    often, seldom = (solve(base, Auto(), check_every=n) for n in (1, check_every))
    for name in ("value", "residual", "num_steps", "status", "method"):
        assert torch.equal(getattr(often, name), getattr(seldom, name)), name
    assert often.nfe <= seldom.nfe < often.nfe + check_every


@pytest.mark.parametrize("check_every", [1, 3])
def test_a_compact_solve_is_the_same_solve(check_every: int) -> None:
    bases = [
        mixed_difficulty(batch=8, width=24, easy=0.3, hard=0.97, num_hard=3, dtype=torch.float64),
        # Each of its samples takes another number of steps.
        tanh_rnn(batch=8, width=24, rate=0.9, dtype=torch.float64),
        monotone(batch=8, width=32, dtype=torch.float64),
    ]
    for base in bases:
        for auto in (Auto(), Auto(methods=(Anderson(memory=2), Broyden(), NewtonKrylov()), patience=6)):
            full, compact = (
                solve(base, auto, check_every=check_every, rtol=1e-5, compact=c) for c in (False, True)
            )
            assert int(compact.sample_nfe.sum()) < int(full.sample_nfe.sum())
            for name in ("status", "num_steps", "method"):
                assert torch.equal(getattr(full, name), getattr(compact, name)), (base.name, name)
            torch.testing.assert_close(full.value, compact.value, rtol=1e-7, atol=1e-7)


def test_rejections_of_all_methods_are_added_up() -> None:
    def cell(z: Tensor) -> Tensor:  # extrapolation from small z lands where the map throws it far away
        return torch.where(z.abs() > 1.5, 50 * z.abs() + 1, 0.9 * z + 0.2)

    solver = Anderson(growth=2.0)
    z0, rule = torch.zeros(2, 1), {"rtol": 1e-6, "patience": None}
    one = iterate(cell, z0, solver, Stopping(max_steps=8, **rule))
    auto = Auto(methods=(solver, solver), patience=3, plain_steps=0)
    many = iterate(cell, z0, auto, Stopping(max_steps=60, **rule))
    assert (one.rejections["growth"] >= 1).all()
    assert (many.rejections["growth"] > one.rejections["growth"]).all()
    assert many.method.tolist() != [0, 0]


# Going on with an earlier solve -------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
def test_samples_go_on_with_what_their_method_learnt(compact: bool) -> None:
    base = mixed_difficulty(batch=6, width=24, easy=0.3, hard=0.97, num_hard=2, dtype=torch.float64)
    first = solve(base, Auto(), compact=compact)
    draw = torch.Generator().manual_seed(1)
    moved = base.inputs[0] + 1e-2 * torch.randn(base.z0.shape, generator=draw, dtype=torch.float64)
    base = dataclasses.replace(base, z0=first.value, inputs=(moved, *base.inputs[1:]))
    old = solve(base, Auto(), compact=compact)
    resumed = solve(base, Auto(), compact=compact, state=first.state)
    assert resumed.converged.all()
    assert resumed.method.tolist() == [0] * 4 + [1] * 2
    assert (resumed.num_steps[4:] < old.num_steps[4:] - 5).all()
    assert torch.equal(resumed.num_steps[:4], old.num_steps[:4])
    again = solve(base, Auto(), compact=compact, state=first.state)
    assert torch.equal(again.value, resumed.value)  # the state was not used up


def test_the_history_of_another_solver_is_the_first_methods() -> None:
    base = nearly_singular(batch=3, width=24, dtype=torch.float64)
    first = solve(base, Anderson())
    base = dataclasses.replace(base, z0=first.value, inputs=(base.inputs[0] + 1e-3, *base.inputs[1:]))
    anderson = solve(base, FIRST, state=first.state)
    auto = solve(base, Auto(), state=first.state)
    assert torch.equal(anderson.value, auto.value)
    assert anderson.nfe == auto.nfe < solve(base, Auto()).nfe
    assert auto.method_counts() == {"Anderson": 3}


@pytest.mark.parametrize("compact", [False, True])
def test_a_resumed_solve_of_a_fixed_number_of_steps_goes_on_with_every_history(compact: bool) -> None:
    base = mixed_difficulty(batch=4, width=16, easy=0.3, hard=0.97, num_hard=1, dtype=torch.float64)
    state = solve(base, Auto(), compact=compact).state
    hard = sample(base, 3)
    alone = solve(hard, Auto(), compact=compact).state
    rule = Stopping.steps(4)
    found = approach(base.f, base.z0, Auto(), rule, state=state).settled().value
    expected = approach(hard.f, hard.z0, Auto(), rule, state=alone).settled().value
    torch.testing.assert_close(found[3], expected[0], rtol=1e-9, atol=1e-9)


def test_a_resumed_method_is_left_as_one_that_began_the_solve() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counts(Script):
        def resume(self, state: int, z0: Tensor) -> int:
            return state

    # A method that keeps nothing of an earlier solve does not begin the next: that begins plainly.
    for slow, turn in ((Counts(share=0.02), [1, 2]), (Script(share=0.02), [0, 1, 2])):
        first, _ = walk(mirror(2.0), Auto(methods=(slow, HALVES), patience=4), max_steps=8)
        assert first.method.tolist() == [1]
        log: list[list[int]] = []
        auto = watched(Auto(methods=(slow, HALVES), patience=4), log)
        rule = Stopping(rtol=0, atol=1e-6, max_steps=200, patience=None)
        solution = approach(mirror(2.0), first.value, auto, rule, state=first.state).settled()
        assert turns(log) == turn
        assert solution.converged.all()


def test_a_first_method_that_begins_the_solve_is_judged_by_its_progress_too() -> None:
    auto = Auto(methods=(Script(share=0.02), HALVES), patience=4, plain_steps=0)
    solution, log = walk(mirror(2.0), auto)
    assert turns(log) == [1, 2]
    assert solution.converged.all()
    # And does not count as the best of all, once all were tried.
    auto = Auto(methods=(STUCK, Script(share=0.25, steps=5)), patience=4, plain_steps=0)
    solution, log = walk(mirror(2.0), auto)
    assert turns(log) == [1, 2]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (Auto().init(torch.zeros(3, 8)), "expected the state of a solve of 4 samples, got one of 3"),
        (Anderson().init(torch.zeros(4, 7)), r"expected the state of a solve of \(4, 8\)"),
        (NewtonKrylov().init(torch.zeros(4, 8)), "by Anderson or Broyden, got NewtonKrylovState"),
    ],
)
def test_a_state_of_another_solve_is_refused(state: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fixed_point(lambda z: 0.5 * z + 1, torch.zeros(4, 8), solver=Auto(), state=state)


# Limits -------------------------------------------------------------------------------------------------

ALL = (Picard(), ReversiblePicard(), Anderson(), Anderson(kind="I"), Broyden(), NewtonKrylov(), Auto())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ALL, ids=repr)
@pytest.mark.parametrize("rate", [0.3, -0.9])
def test_states_of_one_number_converge(solver: Solver, rate: float, dtype: torch.dtype) -> None:
    x = torch.linspace(-2, 2, 5, dtype=dtype).unsqueeze(1)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(rate * z + x) + x

    solution = solve(Problem("one number", cell, torch.zeros_like(x), (x,), None), solver, rtol=1e-5)
    assert solution.converged.all(), solution
    torch.testing.assert_close(cell(solution.value, x), solution.value, rtol=1e-4, atol=1e-5)


def test_states_of_one_number_converge_by_gmres_where_the_map_is_affine() -> None:
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).unsqueeze(1)
    solution = solve(
        Problem("one number", lambda z, x: -3 * z + x, torch.zeros_like(x), (x,), None), GMRES(), rtol=1e-9
    )
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, x / 4)


def test_no_more_columns_are_kept_than_a_state_can_use() -> None:
    assert Anderson().init(torch.zeros(2, 1)).history.memory == 2
    assert Anderson().init(torch.zeros(2, 100)).history.memory == Anderson().memory


def test_an_empty_batch_is_solved() -> None:
    for rule in (Stopping(), Stopping.steps(3)):
        solution = iterate(lambda z: 0.9 * z, torch.zeros(0, 4), Auto(), rule)
        assert solution.value.shape == (0, 4)
        assert solution.method_counts() == {}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Auto(methods=()), ValueError, "at least one solver"),
        (lambda: Auto(methods=[Picard()]), TypeError, "must be a tuple"),
        (lambda: Auto(methods=(Picard(), "Broyden")), TypeError, r"methods\[1\] must be a single method"),
        (lambda: Auto(methods=(Auto(),)), TypeError, r"methods\[0\] must be a single method"),
        (lambda: Auto(patience=0), ValueError, "patience must be at least 1"),
        (lambda: Auto(plain_steps=-1), ValueError, "plain_steps must be at least 0"),
        (lambda: Auto(plain_steps=1.5), TypeError, "plain_steps"),
        (lambda: Auto(rounds=2), TypeError, "rounds"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
