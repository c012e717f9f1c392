"""What is wrong with a solve, judged by what its cell was asked: every evaluation is recorded, in float64."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deqlib import Solution, Status, Stopping, fixed_point

from .random_solves import RandomSolve

SECONDS = 20  # what one of these solves may take before it counts as hanging
FAULTS = ("raises", "hangs", "worse than the best seen", "not finite", "inconsistent")

Solve = Callable[..., Solution]  # with the arguments of `fixed_point`


class Hanging(Exception):
    """A solve that goes on when it should have ended."""


@dataclass
class Sight:
    """One sample at one point, in float64."""

    residual: float
    size: float  # norm of the image
    finite: bool  # the point and the residual
    rounding: float  # how far off the residual may be computed

    def excess(self, rule: Stopping) -> float:
        """By how much the residual exceeds the tolerance."""
        return self.residual - rule.atol - (rule.rtol or 0) * self.size


@dataclass
class Witness:
    """The cell of a case, which records what it is asked."""

    case: RandomSolve
    calls: int = 0
    seen: dict[int, list[Sight]] = field(default_factory=dict)  # by sample

    def __call__(self, z: Tensor, ids: Tensor) -> Tensor:
        """The cell for the samples with these numbers."""
        self.calls += 1
        most = self.case.stopping.max_steps + 2  # the last one asks the whole batch
        if self.calls > most:
            raise Hanging(f"evaluation {self.calls} of at most {most}")
        fz = self.case.f(z, ids)
        for sample, sight in zip(ids.tolist(), look(z, fz), strict=True):
            self.seen.setdefault(sample, []).append(sight)
        return fz


def look(z: Tensor, fz: Tensor) -> list[Sight]:
    """Every sample."""
    # A half-precision state is kept in float32, and seen here only rounded.
    units = 4 if z.dtype == torch.bfloat16 else 16
    unit, tiny = units * torch.finfo(z.dtype).eps, torch.finfo(z.dtype).tiny
    z, fz = z.double(), fz.double()
    norms = [torch.linalg.vector_norm(v, dim=1).tolist() for v in (fz - z, fz, z)]
    finite = (z.isfinite() & fz.isfinite()).all(1).tolist()
    return [
        Sight(r, size, ok, unit * (size + at) + tiny) for r, size, at, ok in zip(*norms, finite, strict=True)
    ]


@contextmanager
def _alarm(limit: int) -> Iterator[None]:
    """Raise `Hanging` after so many seconds, where the system can."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(signum: int, frame: object) -> None:
        raise Hanging(f"more than {limit} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def faults(case: RandomSolve, solve: Solve = fixed_point) -> list[tuple[str, str]]:
    """What is wrong with the solve of a case: kind of fault, and what happened."""
    witness, ids = Witness(case), torch.arange(len(case.z0), device=case.z0.device)
    try:
        with torch.no_grad(), _alarm(SECONDS):
            solution = solve(
                witness,
                case.z0,
                (ids,),
                solver=case.solver,
                stopping=case.stopping,
                on_failure="ignore",
                # No guess, which costs evaluations to be sure of.
                compact=(0,) if case.compact else False,
            )
    except Hanging as error:
        return [("hangs", str(error))]
    except Exception as error:
        return [("raises", f"{type(error).__name__}: {error}")]
    found = [("inconsistent", what) for what in _wrong_counts(case, witness, solution)]
    with torch.no_grad():
        ends = look(solution.value, case.f(solution.value, ids))
    finite = solution.value.isfinite().all(1).tolist()
    for sample, end in enumerate(ends):
        said = _Claim(solution, sample)
        for kind, what in _wrong_end(said, end, finite[sample], witness.seen[sample], case.stopping):
            found.append((kind, f"sample {sample}, {said.status.name}: {what}"))
    return found


class _Claim:
    """What a solution says of one sample."""

    def __init__(self, solution: Solution, sample: int) -> None:
        assert solution.residual is not None
        self.status = Status(int(solution.status[sample]))
        self.steps = int(solution.num_steps[sample])
        self.residual = float(solution.residual[sample])


def _wrong_counts(case: RandomSolve, witness: Witness, solution: Solution) -> list[str]:
    """Of evaluations and shapes."""
    batch, wrong = len(case.z0), []
    if solution.value.shape != case.z0.shape or solution.value.dtype != case.z0.dtype:
        wrong.append(f"value of {tuple(solution.value.shape)} in {solution.value.dtype}")
    if solution.nfe != witness.calls:
        wrong.append(f"nfe {solution.nfe}, counted {witness.calls}")
    # The evaluation that asks the whole batch, once the loop is over, is in no row of the trace.
    rows = [(solution.nfe - asked, batch) for asked in (0, 1)]
    if solution.trace is None or solution.trace.shape not in rows:
        wrong.append("trace of another shape than (nfe, batch), or of one row less")
    counted = [len(witness.seen.get(sample, [])) for sample in range(batch)]
    if solution.sample_nfe.tolist() != counted:
        wrong.append(f"sample_nfe {solution.sample_nfe.tolist()}, counted {counted}")
    return wrong


def _wrong_end(
    said: _Claim, end: Sight, finite: bool, seen: list[Sight], rule: Stopping
) -> Iterator[tuple[str, str]]:
    """What is wrong with how one sample ended, given its residuals as they were seen on the way."""
    best = min((sight for sight in seen if sight.finite), key=lambda sight: sight.residual, default=None)
    if best is not None and not finite:
        yield "not finite", f"a residual of {best.residual:.3g} was seen"
    elif (
        # One that met the tolerance may have had a smaller residual before, relative to a smaller image.
        best is not None
        and said.status != Status.CONVERGED
        and not end.residual <= best.residual + best.rounding + end.rounding  # so that NaN is worse
    ):
        yield "worse than the best seen", f"{end.residual:.6g}, but {best.residual:.6g} was seen"
    if end.finite and not abs(said.residual - end.residual) <= end.rounding:
        yield "inconsistent", f"residual {said.residual:.6g}, recomputed {end.residual:.6g}"
    if said.status == Status.CONVERGED and not end.excess(rule) <= end.rounding:
        yield "inconsistent", f"residual {end.residual:.6g}, {end.excess(rule):.3g} above the tolerance"
    if said.status != Status.CONVERGED and any(s.finite and s.excess(rule) < -s.rounding for s in seen):
        yield "inconsistent", "an iterate met the tolerance"
    if said.status == Status.COMPLETED:
        yield "inconsistent", "completed, but a tolerance was asked for"
    if said.status == Status.MAX_STEPS and said.steps != rule.max_steps:
        yield "inconsistent", f"{said.steps} steps of {rule.max_steps}"
    if said.status == Status.STALLED and (rule.patience is None or said.steps < rule.patience):
        yield "inconsistent", f"{said.steps} steps with a patience of {rule.patience}"
    if not 0 <= said.steps < len(seen):
        yield "inconsistent", f"{said.steps} steps in {len(seen)} evaluations"
