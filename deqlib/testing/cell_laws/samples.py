# ruff: noqa: D102  # the name of a test says what it is about
"""Samples do not depend on one another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ..._torch import tree_map
from ...state import AUTOMATIC
from .base import Evaluation, demand
from .output import OutputLaws
from .trees import difference, finite_samples, is_finite, rows_of


class SampleLaws(OutputLaws):
    """Samples do not depend on one another."""

    def test_a_sample_that_moves_leaves_the_others_where_they_are(self) -> None:
        setup = self._setup_of_independent()
        other = self._setup(seed=1)
        expected = setup.image()
        for sample in (0, self.batch - 1):
            row = torch.tensor([sample])
            others = torch.tensor([k for k in range(self.batch) if k != sample])
            found = setup.image(self._exchange(setup, other, row))
            apart = difference(rows_of(found, others), rows_of(expected, others))
            demand(
                self._compared(
                    f"another state and other inputs of sample {sample} should change no other sample", apart
                )
            )

    def test_the_order_of_the_samples_does_not_matter(self) -> None:
        setup = self._setup_of_independent()
        order = torch.randperm(self.batch, generator=setup.generator)
        found = setup.part(order)
        apart = difference(found, rows_of(setup.image(), order))
        demand(
            self._compared(f"samples in the order {order.tolist()} should give outputs in that order", apart)
        )

    def test_a_sample_gives_the_same_alone_as_in_its_batch(self) -> None:
        setup = self._setup_of_independent()
        expected = setup.image()
        for samples in ([0], [self.batch - 1], [0, self.batch - 1]):
            rows = torch.tensor(samples)
            what = f"samples {samples} in a batch of their own should give the same as in that of all"
            try:
                found = setup.part(rows)
            except Exception as error:
                raise AssertionError(
                    f"{what}, but the cell raised {error!r}; {self._independence()}"
                ) from error
            demand(self._compared(what, difference(found, rows_of(expected, rows))))

    def test_a_sample_that_is_not_finite_stays_the_only_one(self) -> None:
        setup = self._setup_of_independent()
        expected, row = setup.image(), torch.tensor([1])
        others = torch.tensor([k for k in range(self.batch) if k != 1])
        for value in (math.nan, math.inf):
            spoilt = self._exchange(setup, self._filled(setup, value), row)
            what = f"a sample of {value} should leave the others as they are"
            try:
                found = rows_of(setup.image(spoilt), others)
            except Exception as error:
                raise AssertionError(
                    f"{what}, but the cell raised {error!r}; {self._independence()}"
                ) from error
            if not is_finite(found):
                bad = [
                    k for k, ok in zip(others.tolist(), finite_samples(found).tolist(), strict=True) if not ok
                ]
                raise AssertionError(f"{what}, but samples {bad} are not finite; {self._independence()}")
            demand(self._compared(what, difference(found, rows_of(expected, others))))

    def _setup_of_independent(self) -> Evaluation:
        if not self.independent:
            pytest.skip("`independent` is False: not promised")
        self._require(self._output_fault, self._repetition_fault)
        return self._setup()

    def _independence(self) -> str:
        return (
            "nothing may mix samples: use norms over a sample (LayerNorm, GroupNorm, RMSNorm), BatchNorm "
            "only in eval(), attention over tokens (batch_first=True), and sums over other axes than the "
            "first; say in `axes` which inputs samples share if one has as many rows as `batch`; or set "
            "`independent = False` on the test class"
        )

    def _compared(self, what: str, apart: float) -> str | None:
        allowed = self._tolerance()
        if apart <= allowed:
            return None
        return (
            f"{what}, but the difference is {apart:.1e} (relative, `tolerances` allow {allowed:g}); "
            f"{self._independence()}"
        )

    def _exchange(self, setup: Evaluation, other: Evaluation, row: Tensor) -> tuple[Any, tuple[Any, ...]]:
        """A point and its inputs, with some samples those of another."""
        axes = self.axes if self.axes is not None else (AUTOMATIC,) * len(setup.inputs)
        inputs = tuple(
            _with_rows(a, b, axis, self.batch, row)
            for a, b, axis in zip(setup.inputs, other.inputs, axes, strict=True)
        )
        return _with_rows(setup.z, other.z, 0, self.batch, row), inputs

    def _filled(self, setup: Evaluation, value: float) -> Evaluation:
        def fill(leaf: Any) -> Any:
            is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return torch.full_like(leaf, value) if is_float else leaf

        z, inputs = tree_map(fill, setup.z), tree_map(fill, setup.inputs)
        return Evaluation(setup.cell, z, z, inputs, self.axes, self.batch, setup.generator)


def _with_rows(ours: Any, theirs: Any, axis: int | str | None, batch: int, rows: Tensor) -> Any:
    """A state or input with some samples those of another."""
    if axis is None:
        return ours

    def one(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        along = axis
        if along == AUTOMATIC:
            if a.dim() == 0 or a.shape[0] != batch:
                return a
            along = 0
        assert isinstance(along, int)
        where = rows.to(a.device)
        return a.index_copy(along, where, b.index_select(along, where))

    return tree_map(one, ours, theirs)
