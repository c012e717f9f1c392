"""Places of a sample, such as tokens, that stand still one by one: against loops written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import SOLVERS
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import deqlib
from deqlib import (
    JFB,
    Auto,
    HaltingScore,
    NewtonKrylov,
    OutputDifference,
    Picard,
    PredictionKL,
    Solution,
    StableArgMax,
    Status,
    Stopping,
    Unroll,
    fixed_point,
)

WIDTH, CLASSES = 4, 3


@dataclass(frozen=True)
class Tokens:
    """Tokens that look at those before them, each at a pace of its own."""

    mix: Tensor  # (L, L), causal
    matrix: Tensor
    weight: Tensor
    x: Tensor  # (B, L, C)
    rate: Tensor  # (B, L, 1)

    @classmethod
    def draw(cls, seed: int, batch: int, length: int, reach: float = 1.0) -> Tokens:
        draw = torch.Generator().manual_seed(seed)
        look = torch.rand(length, length, generator=draw, dtype=torch.float64).tril(-1)
        mix = torch.eye(length, dtype=torch.float64) + reach * look / length
        matrix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64))[0]
        weight = torch.randn(WIDTH, CLASSES, generator=draw, dtype=torch.float64)
        x = torch.randn(batch, length, WIDTH, generator=draw, dtype=torch.float64)
        rate = 0.4 + 0.5 * torch.rand(batch, length, 1, generator=draw, dtype=torch.float64)
        return cls(mix, matrix, weight, x, rate)

    def cell(self, z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        return torch.tanh(rate * (self.mix @ z @ self.matrix) + x)

    def head(self, z: Tensor) -> Tensor:
        return z @ self.weight

    def solve(self, stopping: Stopping, x: Tensor | None = None, **how: Any) -> Solution:
        how = {"solver": Picard(), "on_failure": "ignore", **how}
        x = self.x if x is None else x
        return fixed_point(self.cell, torch.zeros_like(x), (x, self.rate), stopping=stopping, **how)

    def residual(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of every token, and what it is relative to, (B, L) each."""
        image = self.cell(z, self.x, self.rate)
        return (image - z).norm(dim=-1), image.norm(dim=-1)

    def by_hand(self, rule: Stopping, threshold: float | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, steps of each token, and whether all of them were done: a loop over the whole batch."""
        z = torch.zeros_like(x)
        steps = torch.full(x.shape[:2], rule.max_steps)
        done = torch.zeros_like(steps, dtype=torch.bool)
        for step in range(rule.max_steps + 1):
            fz = self.cell(z, x, self.rate)
            now = (fz - z).norm(dim=-1) <= rule.rtol * fz.norm(dim=-1)
            if threshold is not None:
                after, before = (Categorical(logits=self.head(state)) for state in (fz, z))
                now = now | (kl_divergence(after, before) <= threshold)
            new = now & ~done & (step >= rule.min_steps)
            steps = torch.where(new, step, steps)
            done = done | new
            if step < rule.max_steps:
                z = torch.where(done.unsqueeze(-1), z, fz)
        return z, steps, done.all(1)


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 4),
    length=st.integers(1, 5),
    rtol=st.sampled_from([1e-6, 1e-2]),
    threshold=st.sampled_from([None, 1e-3]),
    min_steps=st.sampled_from([0, 5]),
    compact=st.sampled_from([False, True, (0, 0)]),
    check_every=st.sampled_from([1, 3]),
)
def test_tokens_stand_still_where_a_loop_by_hand_holds_them(
    seed: int,
    batch: int,
    length: int,
    rtol: float,
    threshold: float | None,
    min_steps: int,
    compact: Any,
    check_every: int,
) -> None:
    tokens = Tokens.draw(seed, batch, length)
    rule = Stopping(
        rtol=rtol,
        max_steps=25,
        patience=None,
        min_steps=min_steps,
        check_every=check_every,
        norm_axes=(-1,),
        hold_places=True,
        readout=None if threshold is None else PredictionKL(head=tokens.head, threshold=threshold),
    )
    value, steps, done = tokens.by_hand(rule, threshold, tokens.x)
    with torch.no_grad():
        found = tokens.solve(rule, compact=compact)
    torch.testing.assert_close(found.value, value)
    assert torch.equal(found.place_steps, steps)
    assert torch.equal(found.num_steps, steps.amax(1))
    # What is said of the value is a fact of it, though others moved on after a token stood still.
    residual, scale = tokens.residual(found.value)
    torch.testing.assert_close(found.residual, residual.amax(1), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.relative_residual, (residual / scale).amax(1), rtol=1e-6, atol=1e-12)
    assert torch.equal(found.status == Status.MAX_STEPS, ~done)
    assert ((residual <= 1.5 * rtol * scale).all(1) | ~found.converged).all()
    exits = found.status == Status.EXITED
    assert torch.equal(found.converged | exits, done)
    assert (~(residual <= rtol * scale).all(1) | ~exits).all()


def test_a_token_that_others_left_behind_is_done_and_its_sample_has_not_converged() -> None:
    # The first goes to 10 slowly. The second hardly moves at any step, and by 2 percent in the end.
    def cell(z: Tensor) -> Tensor:
        return torch.cat([0.9 * z[:, :1] + 1, 0.01 * z[:, :1] + 5], 1)

    rule = Stopping(rtol=1e-2, norm_axes=(-1,), hold_places=True)
    found = fixed_point(cell, torch.zeros(1, 2, 1), solver=Picard(), stopping=rule, on_failure="raise")
    first = next(k for k in range(99) if 0.9**k <= 1e-2 * 10 * (1 - 0.9 ** (k + 1)))
    assert found.place_steps.tolist() == [[first, 1]]
    assert found.status == Status.EXITED
    assert found.value[0, 1] == 5
    left_behind = 0.01 * found.value[:, 0, 0]
    torch.testing.assert_close(found.residual, left_behind)
    torch.testing.assert_close(found.relative_residual, left_behind / (5 + left_behind))
    assert found.relative_residual > 1e-2


def test_tokens_that_know_nothing_of_one_another_are_solved_as_if_each_were_a_sample() -> None:
    tokens = Tokens.draw(0, 3, 5, reach=0.0)
    as_tokens = tokens.solve(Stopping(rtol=1e-5, norm_axes=(-1,), hold_places=True))
    flat = Tokens(
        torch.ones(1, 1).double(),
        tokens.matrix,
        tokens.weight,
        tokens.x.flatten(0, 1).unsqueeze(1),
        tokens.rate.flatten(0, 1).unsqueeze(1),
    )
    as_samples = flat.solve(Stopping(rtol=1e-5))
    assert as_tokens.converged.all()
    assert torch.equal(as_tokens.place_steps.flatten(), as_samples.num_steps)
    assert as_tokens.place_steps.min() < as_tokens.place_steps.max()
    torch.testing.assert_close(as_tokens.value.flatten(0, 1), as_samples.value.squeeze(1))


@pytest.mark.parametrize("name", [*SOLVERS, "auto", "newton"])
def test_a_token_that_stands_still_does_not_move_whatever_the_solver(name: str) -> None:
    solver = (SOLVERS | {"auto": Auto(), "newton": NewtonKrylov()})[name]
    tokens, seen = Tokens.draw(1, 2, 4), []

    def cell(z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        seen.append(z.clone())
        return tokens.cell(z, x, rate)

    with torch.no_grad():
        found = fixed_point(
            cell,
            torch.zeros_like(tokens.x),
            (tokens.x, tokens.rate),
            solver=solver,
            stopping=Stopping(rtol=1e-3, max_steps=100, norm_axes=(-1,), hold_places=True),
            on_failure="ignore",
        )
    early = found.place_steps < found.num_steps.unsqueeze(1)
    assert early.any() or name == "newton"  # whose steps move all tokens at once
    for step, at in enumerate(seen):
        still = found.place_steps <= step
        assert torch.equal(at[still], found.value[still])
    assert (found.status <= Status.STALLED).logical_or(found.status == Status.EXITED).all()


def test_gradients_go_through_the_loop_as_it_was_run() -> None:
    tokens = Tokens.draw(2, 2, 4)
    x = tokens.x.clone().requires_grad_()
    rule = Stopping(rtol=1e-3, norm_axes=(-1,), hold_places=True)
    found = tokens.solve(rule, x, backward=Unroll())
    assert (found.place_steps < found.num_steps.unsqueeze(1)).any()
    g = torch.randn_like(x)
    expected = tokens.by_hand(rule, None, x)[0]
    torch.testing.assert_close(*(torch.autograd.grad(out, x, g)[0] for out in (found.value, expected)))
    value = tokens.solve(rule, x, backward=JFB()).value
    once = tokens.cell(value.detach(), x, tokens.rate)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, g)[0] for out in (value, once)))


def test_residuals_are_those_of_the_value_where_samples_left_the_batch() -> None:
    tokens = Tokens.draw(9, 6, 3)
    rule = Stopping(
        rtol=0, norm_axes=(-1,), hold_places=True, readout=PredictionKL(head=tokens.head, threshold=1e-5)
    )
    with torch.no_grad():
        found = tokens.solve(rule, compact=(0, 0))
    assert found.status.tolist() == [Status.EXITED] * 6
    assert found.sample_nfe.min() < found.sample_nfe.max()
    torch.testing.assert_close(found.residual, tokens.residual(found.value)[0].amax(1))


def test_a_state_of_several_leaves_has_steps_of_its_own_structure() -> None:
    tokens = Tokens.draw(3, 2, 3)
    z0 = {"h": torch.zeros_like(tokens.x), "m": torch.zeros(2, 5, dtype=torch.float64)}

    def cell(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"h": tokens.cell(z["h"], tokens.x, tokens.rate), "m": 0.5 * z["m"] + 1}

    found = fixed_point(
        cell, z0, solver=Picard(), stopping=Stopping(norm_axes=(-1,), hold_places=True), on_failure="ignore"
    )
    alone = tokens.solve(Stopping(norm_axes=(-1,), hold_places=True))
    assert torch.equal(found.place_steps["h"], alone.place_steps)
    assert found.place_steps["m"].tolist() == [9, 9]  # 1 / 2^9 is a thousandth of 2 or less
    torch.testing.assert_close(found.value["h"], alone.value)


def test_one_answer_a_sample_stops_all_of_its_tokens_and_one_a_token_those_of_every_leaf() -> None:
    tokens = Tokens.draw(4, 3, 4)
    rule = {"rtol": 0.0, "norm_axes": (-1,), "hold_places": True}
    by_sample = HaltingScore(head=lambda z: z.abs().sum((1, 2)) - 6)
    found = tokens.solve(Stopping(readout=by_sample, **rule))
    assert torch.equal(found.place_steps, found.num_steps.unsqueeze(1).expand(3, 4))
    by_token = OutputDifference(head=tokens.head, by_place=True)
    one = tokens.solve(Stopping(readout=by_token, **rule))
    assert one.place_steps.unique().numel() > 1
    both = fixed_point(
        lambda z: (tokens.cell(z[0], tokens.x, tokens.rate), tokens.cell(z[1], tokens.x, tokens.rate)),
        (torch.zeros_like(tokens.x), torch.zeros_like(tokens.x)),
        solver=Picard(),
        stopping=Stopping(readout=OutputDifference(head=lambda z: tokens.head(z[0]), by_place=True), **rule),
    )
    for steps in both.place_steps:
        assert torch.equal(steps, one.place_steps)


@given(seed=st.integers(0, 2**31), rtol=st.sampled_from([0.05, 0.2]))
def test_a_head_that_looks_at_all_tokens_reads_them_where_they_stand(seed: int, rtol: float) -> None:
    tokens = Tokens.draw(seed, 3, 5)

    def pooled(z: Tensor) -> Tensor:
        return tokens.head(z.mean(1))

    rule = Stopping(
        rtol=rtol,
        max_steps=30,
        norm_axes=(-1,),
        hold_places=True,
        readout=PredictionKL(head=pooled, threshold=1e-5),
    )
    found = tokens.solve(rule)
    z, held = torch.zeros_like(tokens.x), torch.zeros(3, 5, dtype=torch.bool)
    for step in range(31):
        image = torch.where(held.unsqueeze(-1), z, tokens.cell(z, tokens.x, tokens.rate))
        after, before = (Categorical(logits=pooled(state)) for state in (image, z))
        met = (image - z).norm(dim=-1) <= rtol * image.norm(dim=-1)
        held = held | met | (kl_divergence(after, before) <= 1e-5).unsqueeze(1)
        assert torch.equal(held, found.place_steps <= step)
        z = torch.where(held.unsqueeze(-1), z, image)
    torch.testing.assert_close(found.value, z)


def test_a_newton_step_leaves_out_places_that_stand_still_since_its_first_evaluation() -> None:
    tokens = Tokens.draw(3, 3, 6)
    rules = [Stopping(rtol=1e-4, norm_axes=(-1,), hold_places=hold) for hold in (False, True)]
    together, held = (tokens.solve(rule, solver=NewtonKrylov(derivative="jvp")) for rule in rules)
    assert held.converged.all()
    assert held.nfe <= together.nfe


def test_an_error_has_the_steps_of_places_in_the_structure_of_the_state() -> None:
    rule = Stopping(max_steps=3, norm_axes=(-1,), hold_places=True)
    with pytest.raises(deqlib.NonConvergenceError) as failure:
        fixed_point(
            lambda z: 1 - z, torch.zeros(2, 3, 5, 4), solver=Picard(), stopping=rule, on_failure="raise"
        )
    assert failure.value.solution.place_steps.shape == (2, 3, 5)


def test_without_places_a_sample_waits_for_the_answers_of_all() -> None:
    tokens = Tokens.draw(5, 3, 4)
    readout = OutputDifference(head=tokens.head, by_place=True)
    found = tokens.solve(Stopping(rtol=0, readout=readout))
    z = torch.zeros_like(tokens.x)
    for step in range(int(found.num_steps.max()) + 1):
        fz = tokens.cell(z, tokens.x, tokens.rate)
        apart, size = (tokens.head(fz) - tokens.head(z)).norm(dim=-1), tokens.head(fz).norm(dim=-1)
        assert torch.equal((apart <= 1e-2 * size).all(1), found.num_steps <= step)
        z = fz


def test_answers_that_are_not_of_the_places_are_refused() -> None:
    tokens = Tokens.draw(6, 2, 4)
    readout = StableArgMax(head=lambda z: z[:, :3])
    words = (
        r"norm_axes=\(-1,\) is_done must return one answer a sample or one for each of 4 places, got \(2, 3\)"
    )
    with pytest.raises(ValueError, match=words):
        tokens.solve(Stopping(norm_axes=(-1,), readout=readout))


def test_steps_of_tokens_are_recorded_and_mapped_over() -> None:
    tokens = Tokens.draw(7, 2, 3)
    rule = Stopping(norm_axes=(-1,), hold_places=True)
    with deqlib.record() as solves:
        found = tokens.solve(rule)
    assert torch.equal(solves[0].solution.place_steps, found.place_steps)
    twice = torch.stack([tokens.x, 2 * tokens.x])
    mapped = torch.func.vmap(lambda x: tokens.solve(rule, x).place_steps)(twice)
    assert torch.equal(mapped[0], found.place_steps)
    assert torch.equal(mapped[1], tokens.solve(rule, twice[1]).place_steps)
    assert tokens.solve(Stopping(norm_axes=(-1,))).place_steps is None


def test_a_stream_has_the_places_of_each_sample_stand_still_as_it_does_alone() -> None:
    tokens = Tokens.draw(3, batch=7, length=4)
    for readout in (None, PredictionKL(head=tokens.head, threshold=1e-4)):
        for solver in (Picard(), deqlib.Anderson(memory=3)):
            rule = Stopping(
                rtol=1e-6, max_steps=200, norm_axes=(-1,), hold_places=True, min_steps=2, readout=readout
            )
            layer = deqlib.ImplicitLayer(tokens.cell, solver=solver, stopping=rule)
            samples = list(zip(tokens.x, tokens.rate, strict=True))
            with torch.no_grad():
                found = list(deqlib.solve_stream(layer, samples, batch_size=3))
                alone = [layer.solve(x[None], rate[None]) for x, rate in samples]
            assert len({tuple(solution.place_steps.flatten().tolist()) for solution in alone}) > 1
            for one, expected in zip(found, alone, strict=True):
                assert one.place_steps.equal(expected.place_steps)
                assert one.status.equal(expected.status)
                torch.testing.assert_close(one.value, expected.value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", ["has_aux", "with_step"])
def test_a_stream_refuses_cells_that_know_or_tell_more(option: str) -> None:
    layer = deqlib.ImplicitLayer(lambda z, x: z, solver=Picard(), **{option: True})
    with torch.no_grad(), pytest.raises(ValueError, match=f"a layer of {option}=True"):
        deqlib.solve_stream(layer, torch.ones(3, 2), batch_size=2)
