"""Solving samples that come one after the other: who is finished leaves the batch, who waits enters."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, islice, takewhile
from typing import Any

import torch
from torch import Tensor

from .._autocast import coarsest_dtype
from .._checks import check_instance, check_integer, check_keywords
from .._torch import tree_map
from ..fixed_point import check_setting, in_shape, outside_of_graphs
from ..layer import ImplicitLayer, refuse_sharded
from ..naming import Caller
from ..recording import is_recording, note
from ..reporting import FORWARD, Attempt, report_failure
from ..solution import Solution
from ..stopping import Stopping
from .cohorts import Cohort, Company, Entrance

_ENTER = 0.25  # share of the places that is free before samples enter: every cohort costs steps of its solver


def solve_stream(
    layer: ImplicitLayer,
    samples: Iterable[Any],
    *,
    batch_size: int,
    stopping: Stopping | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Stream:
    """Solve many samples, of which a few are hard, without the others waiting for these.

    `for sample, solution in zip(samples, solve_stream(layer, samples, batch_size=32)):` A finished sample
    leaves the batch that the cell sees, and the next one enters. Each solution is that of
    `layer.solve(sample[None])`, but for rounding and one evaluation more, which says that samples do not
    depend on one another. They come in the order of the samples: a hard one keeps back those behind it, which
    are solved meanwhile and wait in memory.

    Settings are those of the layer; its `compact` is not asked, since finished samples always leave.
    `on_failure` is applied to samples that entered together, when the first of them is due. In training
    mode a cell must not draw masks for each sample (`deqlib.nn.Dropout`), nor `BatchNorm` look at the batch.

    Args:
        layer: whose fixed points are wanted.
        samples: any number of them, drawn when places become free. Each is what the layer takes, without the
            batch axis: a tensor (...), a pytree of tensors, or a tuple of these where the cell takes several
            inputs. A tensor (N, ...) is N samples, `zip(x, y)` are samples of two inputs.
        batch_size: most samples that the cell is evaluated on together.
        stopping: of this stream; default the layer's.
        kwargs: inputs of the cell by name, passed as they are: what all samples share.

    Returns:
        A `Stream`, an iterator over one `Solution` a sample, each of a batch of one, without gradient and
        with `state` `None`.

    Raises:
        TypeError, ValueError: a setting of the wrong kind; a fixed number of steps, where no sample finishes
            early; a layer of `has_aux` or `with_step`; while solving: samples of different structure, shape,
            dtype or device.
        RuntimeError: autograd records, and would get nothing.
        NonConvergenceError: while solving, see `deqlib.fixed_point`.
    """
    check_instance("solve_stream", ImplicitLayer, "a deqlib.ImplicitLayer", layer=layer)
    check_integer("solve_stream", 1, batch_size=batch_size)
    if kwargs is not None:
        check_keywords("solve_stream", kwargs)
    rule = layer.stopping if stopping is None else stopping
    check_setting("solve_stream", "stopping", rule)
    if rule.is_fixed:
        raise ValueError(
            f"solve_stream: stopping must have a tolerance, got {rule}: with a fixed number of steps no "
            "sample finishes early; solve batch by batch"
        )
    if layer.has_aux or layer.with_step:
        option = "has_aux" if layer.has_aux else "with_step"
        raise ValueError(
            f"solve_stream: samples are at different steps beside one another, got a layer of {option}=True; "
            "solve batch by batch"
        )
    is_one = isinstance(samples, tuple) or (isinstance(samples, Tensor) and not samples.dim())
    if is_one or not isinstance(samples, Iterable):
        raise TypeError(
            "solve_stream: samples must be an iterable of samples, and no tuple, which holds the inputs of "
            f"one, got {type(samples).__name__}; pass zip(x, y) for a cell of two inputs, or a list"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "solve_stream: its values carry no gradient, and autograd records here; call it under "
            "torch.no_grad(), and train on layer(x)"
        )
    refuse_sharded(layer.cell)
    return Stream(layer, iter(samples), int(batch_size), rule, dict(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """What a stream did so far.

    Attributes:
        batch_size: most samples in an evaluation.
        num_samples: those whose solutions were handed out.
        nfe: evaluations of the cell.
        sample_nfe: samples in all of these together: the work of the cell.
        seconds: spent solving and drawing samples, without what was done between two solutions.
    """

    batch_size: int
    num_samples: int = 0
    nfe: int = 0
    sample_nfe: int = 0
    seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the places that were taken, on average over evaluations, in [0, 1]."""
        return self.sample_nfe / max(self.nfe * self.batch_size, 1)

    @property
    def samples_per_second(self) -> float:
        """Throughput; 0 before anything was done."""
        return self.num_samples / self.seconds if self.seconds else 0.0

    def __repr__(self) -> str:
        return (
            f"StreamReport({self.num_samples} samples in {self.seconds:.3g} s, "
            f"{self.samples_per_second:.3g} a second; nfe={self.nfe} of up to {self.batch_size} samples, "
            f"{self.occupancy:.0%} occupied)"
        )


class Stream(Iterator[Solution]):
    """Solutions in the order of the samples; made by `solve_stream`, whose arguments it has.

    Args:
        layer: whose fixed points are wanted.
        samples: an iterator over them.
        batch_size: most samples that the cell is evaluated on together.
        stopping: the rule.
        kwargs: inputs of the cell by name, which all samples share.

    Attributes:
        report: what was done so far.
    """

    def __init__(
        self,
        layer: ImplicitLayer,
        samples: Iterator[Any],
        batch_size: int,
        stopping: Stopping,
        kwargs: dict[str, Any],
    ) -> None:
        self.report = StreamReport(batch_size=batch_size)
        # As they are now: the layer's may change while samples are on their way.
        self._solver, self._on_failure = layer.solver, layer.on_failure
        self._layer, self._stopping, self._samples = layer, stopping, samples
        self._entrance = Entrance(layer.cell, layer.init, layer.solver, stopping, kwargs)
        self._company = Company()
        self._queue: deque[Cohort] = deque()  # in order of entry
        self._confirmed: deque[tuple[Cohort, Solution]] = deque()
        self._due: deque[Solution] = deque()

    def __next__(self) -> Solution:
        """The next sample's.

        Raises:
            StopIteration: there are no more samples.
            NonConvergenceError: samples that entered together failed. It has the solution of all of these;
                the stream goes on behind them.
        """
        run = outside_of_graphs(self._stopping, self._layer.backward)
        if run is not None:
            found: Solution = run(self.__next__)
            return found
        began = time.perf_counter()
        try:
            with torch.no_grad():
                while not self._due:
                    while not self._confirmed:
                        self._admit()
                        if not self._queue:
                            raise StopIteration
                        self._advance()
                    self._hand_out(*self._confirmed.popleft())
        finally:
            self._count(seconds=time.perf_counter() - began)
        self._count(num_samples=1)
        return self._due.popleft()

    def _count(self, **more: float) -> None:
        changed: dict[str, Any] = {name: getattr(self.report, name) + by for name, by in more.items()}
        self.report = replace(self.report, **changed)

    def _admit(self) -> None:
        """Let samples enter, if there is room for enough of them."""
        places = self.report.batch_size
        taken = sum(cohort.num_at_work for cohort in self._queue)
        if taken and places - taken < _ENTER * places:
            return
        samples = list(islice(self._samples, places - taken))
        if samples:
            self._queue.append(self._entrance.enter(samples))

    def _advance(self) -> None:
        """One evaluation for the cohorts at work, and one for those that wait to be confirmed, if any."""
        at_work = [cohort for cohort in self._queue if not cohort.is_finished]
        if at_work:
            number = sum(cohort.num_at_work for cohort in at_work)
            self._company.evaluate(at_work)
            self._count(nfe=1, sample_nfe=number)
        finished = list(takewhile(lambda cohort: cohort.is_finished, self._queue))
        totals = accumulate(len(cohort) for cohort in finished)
        fitting = sum(total <= self.report.batch_size for total in totals)
        # As many as there is room for, unless there is nobody left to wait for.
        if fitting < len(finished) or len(finished) == len(self._queue):
            cohorts = [self._queue.popleft() for _ in range(fitting)]
            solutions = self._company.confirm(cohorts)
            self._count(nfe=1, sample_nfe=sum(map(len, cohorts)))
            self._confirmed.extend(zip(cohorts, solutions, strict=True))

    def _hand_out(self, cohort: Cohort, solution: Solution) -> None:
        """A cohort's solutions are due, once they are recorded and their failures reported."""
        layer, layout = self._layer, cohort.layout
        caller, dtype = Caller.now(layer.cell, layer), coarsest_dtype(layout.dtypes, layout.device.type)
        whole = in_shape(solution, layout, self._stopping)
        if is_recording():
            note(caller.label, "forward", whole)
        attempt = Attempt(caller, FORWARD, self._solver, self._stopping, type(layer.backward).__name__, dtype)
        report_failure(attempt, solution, self._on_failure, cohort.start, lambda _: whole)
        self._due.extend(_by_sample(whole))


def _by_sample(solution: Solution) -> Iterator[Solution]:
    """The solution of a batch as solutions of batches of one."""
    assert solution.residual is not None
    assert solution.relative_residual is not None
    steps, evaluations = solution.num_steps.tolist(), solution.sample_nfe.tolist()
    for i, (num_steps, nfe) in enumerate(zip(steps, evaluations, strict=True)):
        one = slice(i, i + 1)
        value, place_steps = (
            None if tree is None else tree_map(lambda leaf, one=one: leaf[one], tree)
            for tree in (solution.value, solution.place_steps)
        )
        yield replace(
            solution,
            value=value,
            residual=solution.residual[one],
            relative_residual=solution.relative_residual[one],
            num_steps=solution.num_steps[one],
            status=solution.status[one],
            nfe=nfe,
            sample_nfe=solution.sample_nfe[one],
            trace=None if solution.trace is None else solution.trace[: num_steps + 1, one],
            method=solution.method[one],
            rejections={cause: counts[one] for cause, counts in solution.rejections.items()},
            place_steps=place_steps,
            state=None,
        )
