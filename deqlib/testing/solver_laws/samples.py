# ruff: noqa: D102  # the name of a test says what it is about
"""Every sample is solved by itself, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ...counting import CountedCell
from ...driver import iterate
from ...solution import Status
from ...stopping import Stopping
from ..problems import tanh_rnn
from ..strategies import contractions
from .base import SOLVABLE, SolverLaws, part_of, random_data

_NAN, _INF = float("nan"), float("inf")


class SampleLaws(SolverLaws):
    """Every sample is solved by itself, whatever else is in the batch."""

    @random_data
    @given(data=st.data())
    def test_a_sample_alone_is_solved_as_in_its_batch(self, data: Any) -> None:
        problem = data.draw(contractions(max_rate=self.contraction, dtypes=[torch.float64]))
        together = self._solve(problem, rtol=1e-7)
        for sample in range(len(problem.z0)):
            alone = self._solve(problem.samples([sample]), rtol=1e-7)
            self._check_same(alone, part_of(together, [sample]), f"sample {sample} alone and in its batch")

    @random_data
    @given(data=st.data(), seed=st.integers(0, 99))
    def test_the_order_of_the_samples_does_not_matter(self, data: Any, seed: int) -> None:
        problem = data.draw(contractions(max_rate=self.contraction, dtypes=[torch.float64]))
        order = torch.randperm(len(problem.z0), generator=torch.Generator().manual_seed(seed)).tolist()
        expected = part_of(self._solve(problem, rtol=1e-7), order)
        self._check_same(
            self._solve(problem.samples(order), rtol=1e-7), expected, f"samples in the order {order}"
        )

    @pytest.mark.parametrize(
        "trouble", ["nan", "inf", "huge", "nan later", "inf later", "diverges", "at rest"]
    )
    def test_a_troubled_batch_mate_changes_nothing_for_the_others(self, trouble: str) -> None:
        problem = tanh_rnn(width=6, rate=0.75 * self.contraction, dtype=torch.float64)
        last = torch.arange(4).unsqueeze(1) == 3

        def cell(z: Tensor, *inputs: Any) -> Tensor:
            image = problem.cell(z, *inputs)
            away = z.abs().amax(1, keepdim=True) > 0.3
            match trouble:
                case "nan" | "inf":
                    other = image + float(trouble)
                case "huge":
                    other = image * 1e300
                case "nan later":
                    other = torch.where(away, _NAN, image)
                case "inf later":
                    other = torch.where(away, _INF, image)
                case "diverges":
                    other = z.square() + 50 * z + 1  # no fixed point near, none that attracts
                case _:
                    other = z
            return torch.where(last, other, image)

        healthy = self._solve(problem, rtol=1e-6)
        mixed = self._solve(dataclasses.replace(problem, cell=cell), rtol=1e-6)
        assert mixed.value.isfinite().all(), f"the best iterates should be finite, got {mixed.value}"
        others = [0, 1, 2]
        self._check_same(
            part_of(mixed, others), part_of(healthy, others), "beside a troubled sample", exact=True
        )
        if trouble in ("nan", "inf", "nan later", "inf later"):
            assert mixed.status[3] == Status.DIVERGED, f"should be DIVERGED, got {mixed}"

    @pytest.mark.parametrize("bad", [_NAN, _INF, -_INF, 1e300, 1e-300])
    def test_a_step_keeps_a_sample_that_is_not_finite_to_itself(self, bad: float) -> None:
        problem = tanh_rnn(batch=3, width=6, rate=0.75 * self.contraction, dtype=torch.float64)
        row = torch.arange(3).unsqueeze(1) == 1
        values = []
        for value in (_NAN, bad):
            spoilt = _spoilt(CountedCell(problem.f), row, value)
            with torch.no_grad():
                values.append(iterate(spoilt, problem.z0, self.solver, Stopping.steps(15)).value[[0, 2]])
        assert torch.equal(*values), f"rows beside one of {bad} should be those beside one of NaN"
        assert values[1].isfinite().all(), f"rows beside one of {bad} should be finite, got {values[1]}"

    @pytest.mark.parametrize("check_every", [3, 1000])
    def test_looking_seldom_changes_no_value_and_no_status(self, check_every: int) -> None:
        problem = SOLVABLE["mixed"](self.contraction, torch.float64)
        often = self._solve(problem, rtol=1e-5, max_steps=40)
        seldom = self._solve(problem, rtol=1e-5, max_steps=40, check_every=check_every)
        self._check_same(seldom, often, f"with check_every={check_every}", exact=True)

    def test_finished_samples_may_leave_the_batch(self) -> None:
        problem = SOLVABLE["mixed"](self.contraction, torch.float64)
        full, compact = self._solve(problem, rtol=1e-6), self._solve(problem, rtol=1e-6, compact=True)
        self._check_same(compact, full, "with compact=True")
        # The whole batch has the last word, which is one evaluation.
        assert (compact.sample_nfe <= full.sample_nfe + 1).all(), "a compact solve should not evaluate more"


def _spoilt(f: CountedCell, row: Tensor, value: float) -> Callable[[Tensor], Tensor]:
    """The map with one row that is `value` from the third evaluation on."""

    def image(z: Tensor) -> Tensor:
        good = f(z)
        return torch.where(row & (f.evaluations > 2), torch.full_like(good, value), good)

    return image
