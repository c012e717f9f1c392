"""Samples that leave by what is made of them: against loops written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import SOLVERS
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from deqlib import (
    JFB,
    HaltingScore,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceWarning,
    OutputDifference,
    Picard,
    PredictionEntropy,
    PredictionKL,
    Readout,
    Reversible,
    ReversiblePicard,
    Solution,
    StableArgMax,
    Status,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.diagnostics.settings import with_tolerance

WIDTH, CLASSES = 6, 5

Criterion = Callable[[Tensor, Tensor], Tensor]


def difference(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).pow(2).sum(1).sqrt() <= 0.05 * after.pow(2).sum(1).sqrt()


def divergence(before: Tensor, after: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=after), Categorical(logits=before)) <= 1e-3


def entropy(before: Tensor, after: Tensor) -> Tensor:
    return Categorical(logits=before).entropy() <= 1.2


def same_class(before: Tensor, after: Tensor) -> Tensor:
    return before.max(1).indices == after.max(1).indices


def halting(before: Tensor, after: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-before[:, 0])) >= 0.6


# Each kind of readout, and what it means.
KINDS: dict[str, tuple[Callable[..., Readout], Criterion]] = {
    "difference": (lambda **how: OutputDifference(rtol=0.05, **how), difference),
    "kl": (lambda **how: PredictionKL(threshold=1e-3, **how), divergence),
    "entropy": (lambda **how: PredictionEntropy(threshold=1.2, **how), entropy),
    "argmax": (lambda **how: StableArgMax(**how), same_class),
    "halting": (
        lambda head, **how: HaltingScore(head=lambda z: head(z)[:, 0], threshold=0.6, **how),
        halting,
    ),
}


@dataclass(frozen=True)
class Problem:
    """Samples that differ in how fast they settle, and a head."""

    matrix: Tensor
    weight: Tensor
    x: Tensor
    rate: Tensor

    @classmethod
    def draw(cls, seed: int, batch: int) -> Problem:
        draw = torch.Generator().manual_seed(seed)
        matrix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64))[0]
        weight = 2 * torch.randn(WIDTH, CLASSES, generator=draw, dtype=torch.float64)
        x = torch.randn(batch, WIDTH, generator=draw, dtype=torch.float64)
        # Slow enough for no residual to come to nothing, which rounding would decide.
        rate = 0.5 + 0.45 * torch.rand(batch, 1, generator=draw, dtype=torch.float64)
        return cls(matrix, weight, x, rate)

    def cell(self, z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        return rate * torch.tanh(z @ self.matrix) + x

    def head(self, z: Tensor) -> Tensor:
        return z @ self.weight

    def solve(self, stopping: Stopping, **how: Any) -> Solution:
        how = {"solver": Picard(), "on_failure": "ignore", **how}
        return fixed_point(self.cell, torch.zeros_like(self.x), (self.x, self.rate), stopping=stopping, **how)


def by_hand(
    problem: Problem, criterion: Criterion, rule: Stopping, num_in_a_row: int, damping: float
) -> list[Any]:
    """Value, steps and status of each sample: a loop of one sample after the other."""
    found = []
    for i in range(len(problem.x)):
        x, rate = problem.x[i : i + 1], problem.rate[i : i + 1]
        z, row = torch.zeros_like(x), 0
        for step in range(rule.max_steps + 1):
            fz = problem.cell(z, x, rate)
            met = bool((fz - z).norm() <= rule.rtol * fz.norm())
            row = row + 1 if criterion(problem.head(z), problem.head(fz)) else 0
            if step >= rule.min_steps and (met or row >= num_in_a_row):
                found.append((z[0], step, Status.CONVERGED if met else Status.EXITED))
                break
            if step == rule.max_steps:
                found.append((z[0], step, Status.MAX_STEPS))
            z = z + damping * (fz - z)
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 5),
    rtol=st.sampled_from([0.0, 1e-2]),
    num_in_a_row=st.integers(1, 3),
    damping=st.sampled_from([1.0, 0.7]),
    min_steps=st.sampled_from([0, 4]),
    compact=st.sampled_from([False, True, (0, 0)]),
    check_every=st.sampled_from([1, 3]),
)
def test_samples_leave_where_a_loop_by_hand_lets_them_go(
    kind: str,
    seed: int,
    batch: int,
    rtol: float,
    num_in_a_row: int,
    damping: float,
    min_steps: int,
    compact: Any,
    check_every: int,
) -> None:
    problem, (make, criterion) = Problem.draw(seed, batch), KINDS[kind]
    rule = Stopping(
        rtol=rtol,
        max_steps=20,
        patience=None,
        min_steps=min_steps,
        check_every=check_every,
        readout=make(head=problem.head, num_in_a_row=num_in_a_row),
        keep="last",
    )
    with torch.no_grad():
        found = problem.solve(rule, solver=Picard(damping=damping), compact=compact)
    for i, (value, steps, status) in enumerate(by_hand(problem, criterion, rule, num_in_a_row, damping)):
        assert Status(int(found.status[i])) == status
        assert found.num_steps[i] == steps
        torch.testing.assert_close(found.value[i], value)
    image = problem.cell(found.value, problem.x, problem.rate)
    torch.testing.assert_close(found.residual, (image - found.value).norm(dim=1), rtol=1e-6, atol=1e-12)
    if not compact and check_every == 1:  # every value is where the last evaluation was: none is made anew
        assert found.nfe == int(found.num_steps.max()) + 1


@given(
    seed=st.integers(0, 2**31),
    solver=st.sampled_from(sorted(SOLVERS)),
    kind=st.sampled_from(sorted(KINDS)),
    compact=st.sampled_from([False, (0, 0)]),
    keep=st.sampled_from(["best", "last"]),
)
def test_a_sample_leaves_as_by_itself_whatever_the_solver(
    seed: int, solver: str, kind: str, compact: Any, keep: Any
) -> None:
    problem = Problem.draw(seed, 4)
    readout = KINDS[kind][0](head=problem.head, num_in_a_row=2)
    rule = Stopping(rtol=1e-6, max_steps=12, patience=4, min_steps=2, readout=readout, keep=keep)
    with torch.no_grad():
        whole = problem.solve(rule, solver=SOLVERS[solver], compact=compact)
        for i in range(4):
            one = replace(problem, x=problem.x[i : i + 1], rate=problem.rate[i : i + 1])
            alone = one.solve(rule, solver=SOLVERS[solver])
            assert whole.status[i] == alone.status[0]
            assert whole.num_steps[i] == alone.num_steps[0]
            torch.testing.assert_close(whole.value[i], alone.value[0])


@pytest.mark.parametrize(("kind", "reads"), [("kl", 1), ("halting", 0)])
def test_with_the_plain_iteration_the_head_runs_once_a_step(kind: str, reads: int) -> None:
    problem, calls = Problem.draw(0, 4), []

    def head(z: Tensor) -> Tensor:
        calls.append(len(z))
        return torch.zeros(len(z), CLASSES) + torch.tensor([-1.0] + [0.0] * 4) * z[:, :1].abs()

    rule = Stopping(rtol=1e-30, max_steps=7, readout=KINDS[kind][0](head=head, num_in_a_row=99))
    with torch.no_grad():
        found = problem.solve(rule)
    assert len(calls) == found.nfe + reads


def test_the_last_iterate_is_that_of_a_loop_by_hand_and_the_residual_is_measured_there() -> None:
    # A rotation that grows, so that the best iterate is the first.
    turn = torch.tensor([[0.0, -1.05], [1.05, 0.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    cell = lambda z, x: z @ turn + x  # noqa: E731
    for patience, steps, status in ((None, 9, Status.MAX_STEPS), (4, 4, Status.STALLED)):
        z = torch.zeros_like(x)
        for _ in range(steps):
            z = cell(z, x)
        rule = Stopping(rtol=1e-9, max_steps=9, patience=patience)
        for keep, value in (("last", z), ("best", torch.zeros_like(x))):
            found = fixed_point(
                cell,
                torch.zeros_like(x),
                (x,),
                solver=Picard(),
                stopping=replace(rule, keep=keep),
                on_failure="ignore",
                backward=JFB(),
            )
            assert found.status.tolist() == [status] * 2
            torch.testing.assert_close(found.value, value)
            residual = (cell(value, x) - value).norm(dim=1)
            torch.testing.assert_close(found.residual, residual)
            assert torch.equal(found.trace[steps], found.relative_residual) == (keep == "last")


def test_a_batch_that_ends_at_its_last_iterates_is_not_evaluated_once_more() -> None:
    grows = torch.tensor([[2.0], [0.0]], dtype=torch.float64)  # the second is done at once
    cell = lambda z: grows * z + grows  # noqa: E731
    spent = {}
    for keep in ("last", "best"):
        rule = Stopping(rtol=1e-9, max_steps=6, keep=keep)
        with torch.no_grad():
            found = fixed_point(
                cell, torch.zeros(2, 1).double(), solver=Picard(), stopping=rule, on_failure="ignore"
            )
        assert found.status.tolist() == [Status.MAX_STEPS, Status.CONVERGED]
        torch.testing.assert_close(found.residual, (cell(found.value) - found.value).abs().squeeze(1))
        spent[keep] = found.nfe
    assert spent == {"last": 7, "best": 8}


def test_a_sample_that_left_at_another_than_its_best_iterate_is_walked_back_from_there() -> None:
    x = torch.tensor([[1.0], [0.3]], dtype=torch.float64, requires_grad=True)
    readout = HaltingScore(head=lambda z: z - 3)
    values = [
        fixed_point(
            lambda z, x: 1.3 * z + x,
            torch.zeros_like(x),
            (x,),
            solver=ReversiblePicard(),
            stopping=Stopping(rtol=0, readout=readout, keep="best"),
            backward=backward,
        )
        for backward in (Reversible(), Unroll())
    ]
    assert values[0].status.tolist() == [Status.EXITED] * 2
    assert values[0].num_steps[0] < values[0].num_steps[1]
    assert (values[0].residual > x.norm(dim=1)).any()  # that of the start
    g = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(found.value, x, g)[0] for found in values))


def test_of_a_sample_that_diverged_the_best_iterate_is_kept_whatever_is_asked() -> None:
    x = torch.tensor([[1.0], [1.0], [1.0]])
    rate = torch.tensor([[1e4], [float("nan")], [0.5]])
    readout = StableArgMax(head=lambda z: torch.cat([z, -z], 1), num_in_a_row=2)
    last = Stopping(keep="last")
    exits = replace(last, rtol=0, readout=readout, min_steps=2)
    for rule in (last, replace(last, patience=2), exits):
        found = fixed_point(
            lambda z, x, rate: rate * z + x,
            torch.zeros(3, 1),
            (x, rate),
            solver=Picard(),
            stopping=rule,
            on_failure="ignore",
        )
        assert found.status[:2].tolist() == [Status.DIVERGED] * 2  # though the class is stable
        assert found.value[:2].abs().max() <= 1
        assert found.status[2] == (Status.CONVERGED if rule.rtol else Status.EXITED)


@pytest.mark.parametrize("mode", ["jfb", "unroll", "reversible"])
def test_gradients_are_those_of_what_was_run(mode: str) -> None:
    problem = Problem.draw(3, 3)
    x = problem.x.clone().requires_grad_()
    rule = Stopping(rtol=0, readout=PredictionKL(head=problem.head, threshold=1e-4), keep="best")
    backward = {"jfb": JFB(), "unroll": Unroll(), "reversible": Reversible()}[mode]
    solver = ReversiblePicard() if mode == "reversible" else Picard()

    def solve(backward: Any) -> Solution:
        return fixed_point(
            problem.cell,
            torch.zeros_like(x),
            (x, problem.rate),
            solver=solver,
            stopping=rule,
            backward=backward,
        )

    found = solve(backward)
    assert found.status.tolist() == [Status.EXITED] * 3
    if mode == "jfb":
        expected = problem.cell(found.value.detach(), x, problem.rate)
    elif mode == "unroll":
        rows = []
        for i, steps in enumerate(found.num_steps.tolist()):
            z = torch.zeros_like(x[i : i + 1])
            for _ in range(steps):
                z = problem.cell(z, x[i : i + 1], problem.rate[i : i + 1])
            rows.append(z)
        expected = torch.cat(rows)
    else:
        expected = solve(Unroll()).value
    g = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, g)[0] for out in (found.value, expected)))


class Model(nn.Module):
    """A looped block and a head, which says when the loop ends."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        block = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(block.weight, gain=0.8)
        self.layer = ImplicitLayer(
            Block(block),
            solver=Picard(),
            stopping=Stopping(rtol=0, readout=PredictionKL(head=self.head, threshold=1e-4)),
            on_failure="raise",
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


class Block(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def test_a_head_of_the_model_stays_its_head_in_copies_and_is_no_parameter_of_the_layer() -> None:
    model = Model()
    twin = copy.deepcopy(model)
    assert twin.layer.stopping.readout.head is twin.head
    assert not [name for name in model.layer.state_dict() if "head" in name]
    assert "readout=PredictionKL(head=Linear, threshold=0.0001)" in repr(model.layer)
    assert model.layer.stopping == Stopping(rtol=0, readout=PredictionKL(head=model.head, threshold=1e-4))
    assert hash(model.layer.stopping) != hash(twin.layer.stopping)


def test_a_readout_works_under_transforms_and_says_where_it_cannot() -> None:
    model, x = Model(), torch.randn(3, 4, WIDTH)
    weights = dict(model.named_parameters())
    call = lambda weights, x: torch.func.functional_call(model, weights, (x,))  # noqa: E731
    model(x[0]).sum().backward()
    found = torch.func.grad(lambda weights: call(weights, x[0]).sum())(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight.grad)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: call(weights, x))(x), torch.stack([model(one) for one in x])
    )
    many = {name: torch.stack([weight, weight]) for name, weight in weights.items()}
    with pytest.raises(RuntimeError, match=r"PredictionKL: head uses tensors that torch.func.vmap batches"):
        torch.func.vmap(lambda weights: call(weights, x[0]))(many)


def test_what_was_asked_of_a_readout_is_no_failure_and_what_was_not_reached_names_it() -> None:
    problem = Problem.draw(1, 3)
    rule = Stopping(rtol=0, readout=PredictionEntropy(head=problem.head, threshold=10.0))
    assert problem.solve(rule, on_failure="raise").status.tolist() == [Status.EXITED] * 3
    never = Stopping(rtol=0, max_steps=2, readout=PredictionEntropy(head=problem.head, threshold=0))
    words = (
        r"3 MAX_STEPS.*the last iterate is kept.*loosen Stopping.readout \(now PredictionEntropy\(head=head"
    )
    with pytest.warns(NonConvergenceWarning, match=words):
        problem.solve(never, on_failure="warn")


def test_a_diagnosis_looks_at_the_fixed_point_that_a_readout_does_not_wait_for() -> None:
    readout = PredictionKL(head=HEAD)
    assert with_tolerance(Stopping(rtol=0, readout=readout, norm_axes=(-1,))) == Stopping(norm_axes=(-1,))
    rule = Stopping(rtol=1e-5, readout=readout, min_steps=3, norm_axes=(-1,), hold_places=True)
    assert with_tolerance(rule) == Stopping(rtol=1e-5, norm_axes=(-1,))


def test_a_readout_of_ones_own_needs_one_method() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Positive(Readout):
        def is_done(self, reading: Tensor, following: Tensor | None) -> Tensor:
            assert following is not None
            return (reading > 0).all(1) & (following > 0).all(1)

    with torch.no_grad():
        found = fixed_point(
            lambda z: z + 1,
            torch.tensor([[-2.0], [-4.0]]),
            solver=Picard(),
            stopping=Stopping(rtol=0, readout=Positive(head=lambda z: z)),
        )
    assert found.num_steps.tolist() == [3, 5]
    assert found.value.tolist() == [[1.0], [1.0]]


HEAD: Callable[[Tensor], Tensor] = lambda z: z  # noqa: E731


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PredictionKL(head=3), TypeError, r"PredictionKL: head must be callable.*got int"),
        (lambda: PredictionKL(head=HEAD, threshold=-1), ValueError, "PredictionKL: threshold must be in"),
        (
            lambda: StableArgMax(head=HEAD, num_in_a_row=0),
            ValueError,
            "num_in_a_row must be at least 1, got 0",
        ),
        (lambda: HaltingScore(head=HEAD, threshold=2), ValueError, r"threshold must be in \[0, 1\], got 2"),
        (lambda: OutputDifference(head=HEAD, by_place=1), TypeError, "by_place must be True or False"),
        (lambda: Stopping(readout=HEAD), TypeError, "Stopping: readout must be a readout such as"),
        (lambda: Stopping(min_steps=51), ValueError, "min_steps must be at most max_steps=50, got 51"),
        (lambda: Stopping(min_steps=-1), ValueError, "min_steps must be at least 0, got -1"),
        (
            lambda: Stopping(keep="first"),
            ValueError,
            r"keep must be one of \('best', 'last', None\), got 'first'",
        ),
        (lambda: Stopping(rtol=None, keep="best"), ValueError, "keep.*has no effect"),
        (lambda: Stopping(rtol=None, min_steps=2), ValueError, "min_steps.*has no effect"),
        (lambda: Stopping(hold_places=True), ValueError, "hold_places needs places.*norm_axes=None"),
        (lambda: Stopping(hold_places=True, norm_axes=(-1,), keep="best"), ValueError, 'keep="best" is one'),
        (
            lambda: ImplicitDifferentiation(stopping=Stopping(readout=PredictionKL(head=HEAD))),
            ValueError,
            "the rule of the adjoint, which is no state to be read",
        ),
        (
            lambda: ImplicitLayer(
                HEAD, solver=ReversiblePicard(), backward=Reversible(), stopping=Stopping(keep="last")
            ),
            ValueError,
            'Reversible: walks back from the best iterate.*keep=.last.*pass keep="best"',
        ),
    ],
)
def test_a_setting_out_of_range_or_without_effect_is_refused(
    make: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (lambda z: z.mean(), r"PredictionKL: head must return a tensor whose first axis is the batch of 3"),
        (lambda z: z[:1], r"the batch of 3, got shape \(1, 2\)"),
        (lambda z: (z,), "the batch of 3, got tuple"),
    ],
)
def test_a_head_that_gives_no_batch_is_refused(head: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fixed_point(
            lambda z: 0.5 * z + 1, torch.zeros(3, 2), stopping=Stopping(readout=PredictionKL(head=head))
        )


def test_an_output_of_one_number_a_sample_needs_no_axis_of_its_own() -> None:
    problem = Problem.draw(0, 3)
    found = [
        problem.solve(Stopping(rtol=0, readout=OutputDifference(head=head))).num_steps
        for head in (lambda z: z.sum(1), lambda z: z.sum(1, keepdim=True))
    ]
    assert torch.equal(*found)


def test_an_answer_that_is_none_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Number(Readout):
        def is_done(self, reading: Tensor, following: Tensor | None) -> Tensor:
            return reading

    with pytest.raises(ValueError, match=r"Number: is_done must return bool.*got \(3, 2\) in torch.float32"):
        fixed_point(lambda z: z + 1, torch.zeros(3, 2), stopping=Stopping(readout=Number(head=HEAD)))


def test_a_schedule_takes_the_least_steps_along() -> None:
    start, end = Stopping(max_steps=40, min_steps=0), Stopping(max_steps=8, min_steps=6)
    assert start.towards(end, 0.5).min_steps == 3
    assert start.towards(end, 1.0).min_steps == 6
