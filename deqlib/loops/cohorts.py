"""Samples that enter a batch at different times, each solved as if it were alone.

Samples that enter together make a *cohort*: it is solved by the driver's own iterations, with books and a
solver state of its own. The points that cohorts at work want evaluated are one batch of the cell, their
*company*. A sample that met the tolerance did so in a company that has changed since: finished cohorts are
evaluated once more, together, and that says which of their samples are CONVERGED.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._scope import Scope
from .._torch import tree_flatten, tree_unflatten
from ..compaction import Batch
from ..driver import Exchange, iterations, record_of
from ..solution import Solution
from ..solvers import Solver
from ..solvers.base import Query
from ..starting import starting_point
from ..state import FlatMap, Layout, cut, flatten
from ..stopping import Stopping


class Cohort:
    """Samples that entered together, and how far their solve is.

    Attributes:
        map: of all of them, on flat states.
        start: where they began, (B, D).
        exchange: where the solve waits for the map.
    """

    def __init__(self, f: FlatMap, start: Tensor, solver: Solver, stopping: Stopping) -> None:
        self.map, self.start, self.exchange = f, start, Exchange()
        axes, layout = stopping.norm_axes, f.layout
        unit_norms = None if axes is None else lambda z: layout.norms(z, axes)
        self._seats = _Seats(f)
        record = record_of(start, solver, stopping, unit_norms, layout)
        batch = Batch(f, record, self._seats, leaves_at_once=True)
        self._iterations = iterations(batch, start, solver, solver.init(start), self.exchange)
        self.go_on()

    def __len__(self) -> int:
        return len(self.start)

    @property
    def layout(self) -> Layout:
        """Of all of them."""
        return self.map.layout

    @property
    def is_finished(self) -> bool:
        """Whether none of them is at work."""
        return self.exchange.claim is not None

    @property
    def num_at_work(self) -> int:
        """How many of them take part in the next evaluation."""
        return 0 if self.exchange.point is None else len(self.exchange.point)

    def go_on(self) -> None:
        """To the next evaluation, or to the end."""
        next(self._iterations, None)

    def inputs_at_work(self) -> tuple[Any, ...]:
        """What the cell is given for those at work."""
        rows = self._seats.rows
        return self.map.inputs if rows is None else cut(self.map.inputs, 0, len(self), rows)


class _Seats:
    """What the driver cuts instead of the map, which it does not call: a note of who is still there."""

    guess = clock = None

    def __init__(self, f: FlatMap) -> None:
        self.rows: Tensor | None = None  # `None`: all
        self.resolution = f.resolution

    def __call__(self, z: Tensor) -> Tensor:
        raise AssertionError("cohorts are evaluated by their company")

    def take(self, samples: Tensor) -> _Seats:
        self.rows = samples
        return self


class Entrance:
    """Makes cohorts of samples.

    Args:
        cell: `cell(z, *inputs, **keywords) -> z`.
        init: makes the starting point, see `deqlib.ImplicitLayer`.
        solver: the method.
        stopping: the rule.
        keywords: inputs that all samples share.
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        init: Callable[..., Any] | None,
        solver: Solver,
        stopping: Stopping,
        keywords: dict[str, Any],
    ) -> None:
        self._cell, self._init, self._solver, self._stopping = cell, init, solver, stopping
        self._keywords, self._scope = keywords, _StreamScope()
        self._first: Any = None  # sample
        self._number = 0  # of samples so far

    def enter(self, samples: list[Any]) -> Cohort:
        """The cohort of these samples, each without a batch axis.

        Raises:
            TypeError, ValueError: they hold something else than tensors, or are not like the first sample.
        """
        if self._number == 0:
            self._first = samples[0]
        inputs = self._stacked(samples)
        self._number += len(samples)
        start = starting_point(self._init, inputs, self._keywords)
        f, z0 = flatten(self._cell, start, inputs, keywords=self._keywords)
        if len(z0) != len(samples):
            raise ValueError(
                "solve_stream: init must make a state of as many samples as its inputs have, "
                f"{len(samples)}, got {len(z0)}"
            )
        return Cohort(replace(f, scope=self._scope), z0, self._solver, self._stopping)

    def _stacked(self, samples: list[Any]) -> tuple[Any, ...]:
        """The inputs of the cell for these samples together."""
        known = [_leaves(sample) for sample in samples]
        expected = _leaves(self._first)
        for i, (leaves, spec) in enumerate(known):
            for leaf in leaves:
                if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
                    is_tensor = isinstance(leaf, Tensor)
                    got = f"tensor of layout {leaf.layout}" if is_tensor else type(leaf).__name__
                    raise TypeError(
                        "solve_stream: a sample must be a dense tensor, a pytree of these, or a tuple of "
                        f"these, got a {got} in sample {self._number + i}; make it one, or pass what all "
                        "samples share in kwargs"
                    )
            if spec != expected[1] or list(map(_kind, leaves)) != list(map(_kind, expected[0])):
                raise ValueError(
                    "solve_stream: all samples must have the structure, shapes, dtypes and device of the "
                    f"first, {_shown(self._first)}, got {_shown(samples[i])} as sample {self._number + i}; "
                    "pad them to one shape, or make a stream for each"
                )
        columns = zip(*(leaves for leaves, _ in known), strict=True)
        inputs: tuple[Any, ...] = tree_unflatten([torch.stack(column) for column in columns], expected[1])
        return inputs


class Company:
    """The batches of the cell that cohorts make together; the last is kept while nobody comes or goes."""

    def __init__(self) -> None:
        self._members: list[tuple[Cohort, int]] = []
        self._map: FlatMap | None = None

    def evaluate(self, cohorts: list[Cohort]) -> None:
        """Evaluate the cell once for all of these, which are at work, and go on with each."""
        members = [(cohort, cohort.num_at_work) for cohort in cohorts]
        if self._map is None or members != self._members:
            self._map, self._members = _joined(members, [c.inputs_at_work() for c in cohorts]), members
        counts = [number for _, number in members]
        points = [exchange.point for cohort in cohorts if (exchange := cohort.exchange).point is not None]
        together = Exchange(torch.cat(points), _asked([c.exchange.query for c in cohorts], points))
        together.answer(self._map)
        parts = [torch.split(images, counts) for images in together.taken()]
        for cohort, *images in zip(cohorts, *parts, strict=True):
            cohort.exchange.images = (images[0], images[1])
            cohort.go_on()

    def confirm(self, cohorts: list[Cohort]) -> list[Solution]:
        """What these, which are finished, have found, settled by one evaluation of all of their samples.

        The values are flat.
        """
        members = [(cohort, len(cohort)) for cohort in cohorts]
        claims = [claim for cohort in cohorts if (claim := cohort.exchange.claim) is not None]
        f = _joined(members, [cohort.map.inputs for cohort in cohorts])
        images = f(torch.cat([claim.solution.value for claim in claims]))
        counts = [number for _, number in members]
        found = [
            claim.decided(image) for claim, image in zip(claims, torch.split(images, counts), strict=True)
        ]
        return [replace(s, nfe=s.nfe + 1, sample_nfe=s.sample_nfe + 1) for s in found]


class _StreamScope(Scope):
    """What modules in the cell remember over a stream."""

    def per_sample(self, key: Hashable, batch: int, make: Callable[[int], Tensor]) -> Tensor:
        """Samples come and go, so that nothing can be drawn for a batch.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "solve_stream: a module in the cell draws a mask for every sample (deqlib.nn.Dropout in training "
            "mode), and samples come and go; call layer.eval(), or solve batch by batch"
        )


def _joined(members: list[tuple[Cohort, int]], inputs: list[tuple[Any, ...]]) -> FlatMap:
    """The map of the samples of several cohorts.

    Args:
        members: the cohorts, and how many samples of each.
        inputs: of these samples.
    """
    first, number = members[0][0].map, sum(number for _, number in members)
    if len(inputs) > 1:
        leaves = [tree_flatten(of_cohort)[0] for of_cohort in inputs]
        spec = tree_flatten(inputs[0])[1]
        together = tree_unflatten([torch.cat(column) for column in zip(*leaves, strict=True)], spec)
    else:
        together = inputs[0]
    return replace(first, inputs=together, layout=first.layout.of_batch(number))


def _asked(queries: list[Query | None], points: list[Tensor]) -> Query | None:
    """What the solvers of several cohorts ask for, as one query.

    Args:
        queries: of the cohorts.
        points: of the cohorts, (B, D) each.
    """
    if all(query is None or query.direction is None for query in queries):
        return None
    directions, wanted = [], []
    for query, point in zip(queries, points, strict=True):
        direction, mask = (None, None) if query is None else (query.direction, query.wanted)
        if mask is None:
            mask = point.new_full((len(point),), direction is not None, dtype=torch.bool)
        directions.append(torch.zeros_like(point) if direction is None else direction)
        wanted.append(mask)
    return Query(direction=torch.cat(directions), wanted=torch.cat(wanted))


def _leaves(sample: Any) -> tuple[list[Any], Any]:
    """The tensors of a sample, as the inputs of a cell."""
    return tree_flatten(sample if isinstance(sample, tuple) else (sample,))


def _kind(leaf: Any) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype, leaf.device


def _shown(sample: Any) -> str:
    leaves, _ = _leaves(sample)
    return ", ".join(
        f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')} on {leaf.device}" for leaf in leaves
    )
