"""The loop of every solve, forward and adjoint.

The driver alone calls the map, so evaluations are counted exactly. What becomes of one sample: at every
evaluation its residual is measured and its best iterate kept (`progress.py`); when it meets the tolerance, is
lost, or makes no progress, it is finished, and from then on it is held at its best iterate, or leaves the
batch that the map sees (`compaction.py`). The others get their next iterate from the solver, which is told
what was measured if it asks for it. The loop ends when all are finished or no steps are left; whether those
that met the tolerance are CONVERGED is then asked of the whole batch (`confirmation.py`). It works on flat
states (B, D).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._autocast import autocast_dtype, without_autocast
from .compaction import Batch, Takeable
from .confirmation import Claim
from .exiting import ExitingRecord
from .fused import is_available
from .fused.record import MOST_NUMBERS, FusedRecord
from .progress import Record, UnitNorms, measure, relative
from .solution import NonConvergenceError, Solution, Status
from .solvers import Solver
from .solvers.base import Query, Seen, overrides
from .state import Layout, Map
from .steps import Clock, Course, Pace
from .stopping import Stopping


def iterate(
    f: Map,
    z0: Tensor,  # (B, D)
    solver: Solver,
    stopping: Stopping,
    *,
    unit_norms: UnitNorms | None = None,
) -> Solution:
    """What `approach` finds, settled at the cost of an evaluation where that is open."""
    return approach(f, z0, solver, stopping, unit_norms=unit_norms).settled()


def approach(
    f: Map,
    z0: Tensor,  # (B, D)
    solver: Solver,
    stopping: Stopping,
    *,
    state: Any = None,
    unit_norms: UnitNorms | None = None,
    layout: Layout | None = None,
    compact: Takeable | None = None,
    course: Course | None = None,
    clock: Clock | None = None,
) -> Claim:
    """Iterate `solver` on `f` from `z0` until `stopping` says so; the solution's value is flat.

    Args:
        f: the map.
        z0: starting point.
        solver: the method.
        stopping: the rule.
        state: of an earlier solve, to go on with what it learnt.
        unit_norms: norms to judge a sample by; default one, over all of its numbers.
        layout: how a state lies in (B, D); for a rule with a readout or with places that stand still.
        compact: `f` again if finished samples are to leave the batch that it sees.
        course: how many steps each sample takes, with a fixed number of them; default all of them.
        clock: of `f`, if it is to be told which step an evaluation belongs to.

    Returns:
        What was found, to be settled: by an evaluation of `f` at the value that the caller makes anyway, or
        by one more. That raises `ValueError` where the map of some samples alone is not that of the whole
        batch, see `compact`.
    """
    state = solver.init(z0) if state is None else solver.resume(state, z0)
    if stopping.is_fixed:
        pace = Pace(z0, stopping.max_steps, course, clock)
        found = _iterate_fixed(f, z0, solver, state, stopping, unit_norms, pace)
        return Claim(found, f, stopping, unit_norms, is_open=False)
    record = record_of(z0, solver, stopping, unit_norms, layout)
    batch, exchange = Batch(f, record, compact, clock), Exchange()
    for _ in iterations(batch, z0, solver, state, exchange):
        exchange.answer(batch.f)
    assert exchange.claim is not None
    return exchange.claim


@dataclass(eq=False)
class Exchange:
    """Where the iterations of a solve wait for its map, and leave what they found.

    Whoever answers may evaluate the points of several solves together. Either side clears what it takes, so
    that a state lives no longer than it is needed.

    Attributes:
        point: where the map is wanted, (B, D).
        query: what the solver wants to know there, if it asks.
        images: the map there, (B, D), and what the solver is to get, (B, D).
        claim: what was found, once the iterations have ended.
    """

    point: Tensor | None = None
    query: Query | None = None
    images: tuple[Tensor, Tensor] | None = None
    claim: Claim | None = None

    def answer(self, f: Map) -> None:
        """Evaluate the map for the iterations."""
        assert self.point is not None
        self.images = _evaluate(f, self.point, self.query)

    def taken(self) -> tuple[Tensor, Tensor]:
        """The images, which are not kept."""
        images, self.point, self.query, self.images = self.images, None, None, None
        assert images is not None
        return images


def record_of(
    z0: Tensor,  # (B, D)
    solver: Solver,
    stopping: Stopping,
    unit_norms: UnitNorms | None,
    layout: Layout | None,
) -> Record:
    """What keeps the books, with kernels of its own where there are any; see `approach`."""
    may_recover = overrides(solver, "observe")
    if not stopping.is_by_residual:
        return ExitingRecord(z0, stopping, unit_norms, may_recover=may_recover, layout=layout)
    fits = unit_norms is None and z0.numel() > 0 and z0.shape[1] <= MOST_NUMBERS
    # No numbers of it: how a starting point lies in memory says nothing about the iterates.
    is_fused = fits and is_available(z0[:0])
    kind = FusedRecord if is_fused else Record
    return kind(z0, stopping, unit_norms, may_recover=may_recover)


def _iterate_fixed(
    f: Map,
    z: Tensor,
    solver: Solver,
    state: Any,
    stopping: Stopping,
    unit_norms: UnitNorms | None,
    pace: Pace,
) -> Solution:
    """A fixed number of steps: the value is the last iterate."""
    trace, asks = [], overrides(solver, "query")
    for step in range(stopping.max_steps):
        query = solver.query(state) if asks else None
        point = z if query is None or query.point is None else pace.hold(step, query.point, z)
        pace.tell(step)
        fz, image = _evaluate(f, point, query)
        if stopping.measure:
            trace.append(relative(*measure(fz.detach() - point.detach(), fz, unit_norms)))
        z_next, state = _step(solver, point, image, state)
        z = pace.hold(step, z_next, z)
    pace.tell(stopping.max_steps)
    residual = None
    if stopping.measure:
        fz = f(z)
        norms = measure(fz.detach() - z.detach(), fz, unit_norms)
        residual = norms[0].amax(1) if norms[0].dim() == 2 else norms[0]
        trace.append(relative(*norms))
    nfe = stopping.max_steps + int(stopping.measure)
    zeros = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    return Solution(
        value=z,
        residual=residual,
        relative_residual=trace[-1] if trace else None,
        num_steps=zeros + stopping.max_steps if pace.steps is None else pace.steps,
        status=zeros + int(Status.COMPLETED),
        nfe=nfe,
        sample_nfe=zeros + nfe,
        trace=torch.stack(trace) if trace else None,
        method=zeros,
        methods=(type(solver).__name__,),
        rejections={},
        state=state,
    )


def iterations(
    batch: Batch,
    z: Tensor,  # (B, D)
    solver: Solver,
    state: Any,
    exchange: Exchange,
) -> Iterator[None]:
    """Until every sample is finished: the value is each sample's best iterate.

    Waits wherever the map is wanted; the exchange must have been answered before it goes on.

    Args:
        batch: the samples, and what is known of them.
        z: where they begin, (B, D).
        solver: the method.
        state: the solver's.
        exchange: where the map is asked for, and the claim is left.
    """
    record, stopping = batch.record, batch.record.rule
    observes, asks = overrides(solver, "observe"), overrides(solver, "query")
    while True:
        query = solver.query(state) if asks else None
        if query is not None and query.point is not None:
            z, record.follows_image = batch.hold(query.point), False
        batch.tell()
        exchange.point, exchange.query = z, query
        yield
        fz, image = exchange.taken()
        at_check = record.nfe % stopping.check_every == 0
        batch.observe(z, fz, at_check)
        if record.holds_places:
            image = record.moving(_seen_at(z, query), image)
        if record.step == stopping.max_steps or (at_check and record.count() == 0):
            break
        if observes:
            state = solver.observe(_View(record), state)
        if at_check:
            state, z, image = batch.drop_finished(state, z, image)
        del fz, query  # before more memory is asked for
        z_next, state = _step(solver, z, image, state)
        record.follows_image = z_next is image
        del image, z
        record.difference = None
        z = batch.hold(z_next)
        del z_next
    exchange.claim = batch.claim(z, fz, state, type(solver).__name__)


def _evaluate(f: Map, z: Tensor, query: Query | None) -> tuple[Tensor, Tensor]:
    """f(z), and what the solver is to get: J times its direction, where it asked for that, else f(z)."""
    if query is None or query.direction is None:
        if query is not None and query.wanted is not None:
            raise ValueError("Query: wanted says who gets J v, so it needs a direction v; leave it out")
        fz = f(z)
        return fz, fz
    try:
        fz, product = torch.func.jvp(f, (z,), (query.direction,))[:2]
    except (NonConvergenceError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        # The first evaluation of a solve asks for no product, and the cell took it.
        raise RuntimeError(
            "the solver asks for products with the Jacobian in forward mode (derivative='jvp'), and the cell "
            f"does something there that PyTorch refuses ({str(error).strip()}); use "
            "NewtonKrylov(derivative='difference') or another solver"
        ) from error
    return fz, product if query.wanted is None else torch.where(query.wanted.unsqueeze(1), product, fz)


def _seen_at(z: Tensor, query: Query | None) -> Tensor:
    """What the map that leaves everything as it is gives the solver where `_evaluate` gives it an image."""
    if query is None or query.direction is None:
        return z
    return (
        query.direction
        if query.wanted is None
        else torch.where(query.wanted.unsqueeze(1), query.direction, z)
    )


def _step(solver: Solver, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One solver step, in the precision of the state: autocast is for the cell."""
    if autocast_dtype(z.device.type) is not None:
        with without_autocast(z.device.type):
            made = solver.step(z, fz, state)
    else:
        made = solver.step(z, fz, state)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Tensor)):
        name, got = type(solver).__name__, type(made).__name__
        raise TypeError(f"{name}.step: must return the next iterate, a tensor, and the state, got {got}")
    if made[0].shape != z.shape or made[0].dtype != z.dtype:
        name, got = type(solver).__name__, f"{tuple(made[0].shape)} in {made[0].dtype}"
        raise ValueError(
            f"{name}.step: the next iterate must be like z, {tuple(z.shape)} in {z.dtype}, got {got}"
        )
    return made


@dataclass(frozen=True)
class _View:
    """What a solver sees of the record: all samples of the batch, or the rows of some."""

    record: Record
    rows: Tensor | None = None

    def _cut(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def steps_left(self) -> int:
        return self.record.rule.max_steps - self.record.step

    @property
    def difference(self) -> Tensor | None:
        return self.record.difference if self.rows is None else None

    @property
    def residual(self) -> Tensor:
        return self._cut(self.record.residual)

    @property
    def goal(self) -> Tensor:
        return self._cut(self.record.goal)

    @property
    def blowup(self) -> float:
        return self.record.rule.blowup

    @property
    def before(self) -> Tensor:
        return self._cut(self.record.before)

    @property
    def since(self) -> Tensor:
        return self.step - self._cut(self.record.steps_of_best())

    @property
    def best(self) -> Tensor:
        return self._cut(self.record.best())

    @property
    def improved(self) -> Tensor:
        return self._cut(self.record.improved)

    @property
    def all_improved(self) -> bool:
        return self.record.all_improved

    @property
    def finished(self) -> Tensor | None:
        finished = self.record.finished
        return None if finished is None else self._cut(finished)

    @property
    def may_look(self) -> bool:
        return self.record.looks

    def of(self, rows: Tensor) -> Seen:
        return _View(self.record, rows if self.rows is None else self.rows[rows])

    def note(self, cause: str, which: Tensor) -> None:
        refused = self.record.samples.refused
        counts = refused.get(cause, torch.zeros_like(self.record.samples.num_steps))
        which = (which & self._cut(self.record.samples.active)).to(counts.dtype)
        refused[cause] = counts + which if self.rows is None else counts.index_add(0, self.rows, which)

    def counts(self, *causes: str) -> tuple[Tensor, ...] | None:
        if self.rows is not None:
            return None
        refused, like = self.record.samples.refused, self.record.samples.num_steps
        for cause in causes:
            if cause not in refused:
                refused[cause] = torch.zeros_like(like)
        return tuple(refused[cause] for cause in causes)

    def assign(self, methods: tuple[str, ...], method: Tensor, new: Tensor | None = None) -> None:
        now = self.record.samples
        self.record.methods, now.method = methods, method
        if new is not None:
            now.begun = torch.where(new, self.record.step, now.begun)
