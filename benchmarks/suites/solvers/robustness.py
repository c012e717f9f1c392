"""Random small problems, hopeless ones among them: no solve may raise, hang, or return worse than it saw.

What a solve claims is judged by what its cell was asked: every evaluation is recorded, in float64. A problem
that shows a fault can be had again: `faults(draw(seed, largest_exponent))`.
"""

from __future__ import annotations

import math
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deqlib import (
    Anderson,
    Auto,
    Broyden,
    NewtonKrylov,
    Picard,
    Solution,
    Solver,
    Status,
    Stopping,
    fixed_point,
)

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...show import COLORS

SECONDS = 20  # what one of these solves may take before it counts as hanging
LARGEST_EXPONENT = 30  # states are scaled by up to 10 to this power, and down likewise
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FAULTS = ("raises", "hangs", "worse than the best seen", "not finite", "inconsistent")

Solve = Callable[..., Solution]


class Hanging(Exception):
    """A solve that goes on when it should have ended."""


def _affine(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
    # A sum in a fixed order: products of matrices may round differently when samples leave the batch.
    return (z.unsqueeze(2) * a).sum(1) + x


def _limited(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """Not defined far from the origin."""
    inside = torch.linalg.vector_norm(z, dim=1, keepdim=True) < 3
    return torch.where(inside, _affine(z, x, a), torch.nan)


def _cliff(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """Infinite far from the origin."""
    return torch.where(z.abs() < 3, _affine(z, x, a), torch.inf)


# z (B, D), x (B, D), a (B, D, D) -> (B, D)
MAPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": _affine,
    "non-normal": _affine,
    "singular": _affine,
    "tanh": lambda z, x, a: torch.tanh(_affine(z, x, a)),
    "relu": lambda z, x, a: torch.relu(_affine(z, x, a)),
    "constant": lambda z, x, a: x + torch.zeros_like(z),
    "zero": lambda z, x, a: torch.zeros_like(z),
    "identity": lambda z, x, a: z,
    "two-cycle": lambda z, x, a: 2 * x - z,
    "drift": lambda z, x, a: z + x,
    "explosion": lambda z, x, a: z.square() + 1 + x.abs(),
    "jump": lambda z, x, a: torch.where(z > x, -1.0, 1.0).to(z.dtype),
    "limited": _limited,
    "cliff": _cliff,
}


@dataclass(frozen=True)
class Drawn:
    """A problem and the settings of its solve, all from one seed."""

    seed: int
    kind: str
    z0: Tensor  # (B, D)
    x: Tensor  # (B, D)
    a: Tensor  # (B, D, D)
    scale: Tensor  # (B, 1), f(z) = scale * map(z / scale)
    poison: Tensor  # (B, 1), added to f(z): 0, NaN or infinity
    solver: Solver
    stopping: Stopping
    compact: bool

    def f(self, z: Tensor, ids: Tensor) -> Tensor:
        """The map for the samples with these numbers."""
        scale, poison = self.scale[ids], self.poison[ids]
        if self.kind == "identity" and not bool(poison.isnan().any() | poison.isinf().any()):
            return z  # the very tensor that came in
        return scale * MAPS[self.kind](z / scale, self.x[ids], self.a[ids]) + poison

    def to(self, device: torch.device) -> Drawn:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **moved)

    def __str__(self) -> str:
        batch, width = self.z0.shape
        dtype = str(self.z0.dtype).removeprefix("torch.")
        scales = f", scale {self.scale.tolist()}" if bool((self.scale != 1).any()) else ""
        poison = f", poison {self.poison.flatten().tolist()}" if bool((self.poison != 0).any()) else ""
        return (
            f"{self.kind} {batch}x{width} {dtype}{scales}{poison}, {self.solver}, {self.stopping}, "
            f"compact={self.compact}"
        )


def draw(seed: int, largest_exponent: float = LARGEST_EXPONENT) -> Drawn:
    """The case of this seed."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kind, dtype = choose.choice(list(MAPS)), choose.choice(DTYPES)
    batch, width = choose.choice([0, 1, 1, 2, 3, 4, 4]), choose.choice([1, 1, 2, 3, 4, 6])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.ones(batch, 1, dtype=torch.float64)
    if choose.random() < 0.2:
        exponents = 2 * torch.rand(batch, 1, generator=generator, dtype=torch.float64) - 1
        scale = 10 ** (largest_exponent * exponents)
    z0 = normal(batch, width) * scale if choose.random() < 0.5 else torch.zeros(batch, width)
    poison = torch.zeros(batch, 1)
    if batch and choose.random() < 0.15:
        value = choose.choice([math.nan, math.inf, -math.inf])
        (z0 if choose.random() < 0.2 else poison)[choose.randrange(batch)] = value
    return Drawn(
        seed=seed,
        kind=kind,
        z0=z0.to(dtype),
        x=normal(batch, width).to(dtype),
        a=_matrices(kind, batch, width, choose, normal).to(dtype),
        scale=scale.to(dtype),
        poison=poison.to(dtype),
        solver=_solver(choose),
        stopping=Stopping(
            rtol=10 ** choose.uniform(-6, -1),
            atol=choose.choice([0.0, 0.0, 1e-4]),
            max_steps=choose.randint(1, 40),
            check_every=choose.choice([1, 1, 2, 5]),
            patience=choose.choice([None, 1, 3, 10, 25]),
            blowup=choose.choice([10.0, 1e6]),
        ),
        compact=choose.random() < 0.4,
    )


def _matrices(
    kind: str, batch: int, width: int, choose: random.Random, normal: Callable[..., Tensor]
) -> Tensor:
    """(B, D, D), of a spectral radius up to 1.5."""
    radius = choose.uniform(0, 1.5)
    if kind == "tanh":
        return normal(batch, width, width) * choose.uniform(0, 5)
    values = normal(batch, width).clamp(-1, 1) * radius
    if kind == "singular":
        values[:, 0] = 1
    schur = torch.diag_embed(values)
    if kind == "non-normal":
        schur = schur + torch.triu(normal(batch, width, width), 1) * choose.choice([1, 10])
    basis = torch.linalg.qr(normal(batch, width, width))[0]
    return basis @ schur @ basis.mT


def _solver(choose: random.Random, methods: int = 5) -> Solver:
    """Any solver; the first so many `methods`."""
    growth = choose.choice([1.0, 10.0, 1e4, math.inf])
    restart = choose.choice([None, 1, 5, 25])
    match choose.randrange(methods):
        case 0:
            return Picard(damping=choose.choice([1, 0.5]))
        case 1:
            return Anderson(
                memory=choose.randint(1, 8),
                ridge=choose.choice([0, 1e-7, 1e-2]),
                damping=choose.choice([1, 0.7]),
                kind=choose.choice(["I", "II"]),
                growth=growth,
                restart=restart,
            )
        case 2:
            return Broyden(memory=choose.randint(1, 10), growth=growth, restart=restart)
        case 3:
            return NewtonKrylov(
                memory=choose.randint(1, 8),
                derivative=choose.choice(["difference", "jvp"]),
                forcing=choose.choice([0.01, 0.1, 0.9]),
                max_backtracks=choose.randint(0, 4),
            )
        case _:
            patience = choose.choice([1, 3, 10])
            plain_steps = choose.choice([0, 4, 18])
            if choose.random() < 0.5:
                return Auto(patience=patience, plain_steps=plain_steps)
            methods = tuple(_solver(choose, 4) for _ in range(choose.randint(1, 3)))
            return Auto(methods=methods, patience=patience, plain_steps=plain_steps)


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

    case: Drawn
    calls: int = 0
    seen: dict[int, list[Sight]] = field(default_factory=dict)  # by sample

    def __call__(self, z: Tensor, ids: Tensor) -> Tensor:
        """The cell for the samples with these numbers."""
        self.calls += 1
        if self.calls > self.case.stopping.max_steps + 1:
            raise Hanging(f"evaluation {self.calls} of at most {self.case.stopping.max_steps + 1}")
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


def faults(case: Drawn, solve: Solve = fixed_point) -> list[tuple[str, str]]:
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
                compact=case.compact,
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


def _wrong_counts(case: Drawn, witness: Witness, solution: Solution) -> list[str]:
    """Of evaluations and shapes."""
    batch, wrong = len(case.z0), []
    if solution.value.shape != case.z0.shape or solution.value.dtype != case.z0.dtype:
        wrong.append(f"value of {tuple(solution.value.shape)} in {solution.value.dtype}")
    if solution.nfe != witness.calls:
        wrong.append(f"nfe {solution.nfe}, counted {witness.calls}")
    if solution.trace is None or solution.trace.shape != (solution.nfe, batch):
        wrong.append("trace of another shape than (nfe, batch)")
    counted = [len(witness.seen.get(sample, [])) for sample in range(batch)]
    if solution.sample_nfe.tolist() != counted:
        wrong.append(f"sample_nfe {solution.sample_nfe.tolist()}, counted {counted}")
    return wrong


def _wrong_end(
    said: _Claim, end: Sight, finite: bool, seen: list[Sight], rule: Stopping
) -> Iterator[tuple[str, str]]:
    """Of one sample, given what it was seen to be."""
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


def build(
    run: Run, seed_from: int, seeds: int, largest_exponent: float, solve: Solve = fixed_point
) -> list[Row]:
    """Faults of so many problems, and how the samples ended.

    Args:
        run: of which only the device counts.
        seed_from: seed of the first; the others follow.
        seeds: how many.
        largest_exponent: see `LARGEST_EXPONENT`.
        solve: what is called as `fixed_point`.
    """
    failures: list[dict[str, Any]] = []
    endings: dict[str, Counter[str]] = {kind: Counter() for kind in MAPS}
    for seed in range(seed_from, seed_from + seeds):
        drawn = draw(seed, largest_exponent).to(run.device)

        def counted(*args: Any, ended: Counter[str] = endings[drawn.kind], **settings: Any) -> Solution:
            solution = solve(*args, **settings)
            ended.update(Status(code).name for code in solution.status.tolist())
            return solution

        if found := faults(drawn, counted):
            failures.append({"seed": seed, "problem": str(drawn), "faults": found})
    kinds = Counter(kind for failure in failures for kind in {kind for kind, _ in failure["faults"]})
    return [
        {
            "faulty": len(failures),
            "faults": {kind: kinds[kind] for kind in FAULTS},
            "failures": failures,
            "endings": {kind: dict(ended) for kind, ended in endings.items()},
        }
    ]


def bars(rows: list[Row]) -> list[Bar]:
    """No fault at all."""
    seeds = [str(failure["seed"]) for row in rows for failure in row["failures"]]
    more = f" and {len(seeds) - 10} more" if len(seeds) > 10 else ""
    note = f"of {_drawn(rows)}" + (f"; seeds {', '.join(seeds[:10])}{more}" if seeds else "")
    return [Bar("random problems with a fault", len(seeds), 0, note)]


def _drawn(rows: list[Row]) -> int:
    return sum(row["seeds"] for row in rows)


def endings(rows: list[Row]) -> dict[str, Counter[str]]:
    """By kind of map, how many samples ended with which status."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for kind, ended in row["endings"].items():
            found.setdefault(kind, Counter()).update(ended)
    return found


def table(rows: list[Row]) -> Table:
    """One line a kind of fault, with the first problem that shows it."""
    failures = [failure for row in rows for failure in row["failures"]]
    lines = []
    for kind in FAULTS:
        told = [
            f"seed {failure['seed']}: {what}; {failure['problem']}"
            for failure in failures
            for fault, what in failure["faults"]
            if fault == kind
        ]
        lines.append((kind, str(sum(row["faults"][kind] for row in rows)), *(told[:1] or [""])))
    total = sum(endings(rows).values(), Counter[str]())
    ended = ", ".join(f"{count:,} {status.lower()}" for status, count in sorted(total.items()))
    return Table(f"{_drawn(rows):,} random problems; samples: {ended}", ("fault", "problems", "first"), lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    found = {kind: ended for kind, ended in endings(rows).items() if ended}
    before = [0.0] * len(found)
    for status, color in zip(("CONVERGED", "STALLED", "DIVERGED", "MAX_STEPS"), COLORS, strict=False):
        shares = [ended[status] / sum(ended.values()) for ended in found.values()]
        axes[0].barh(list(found), shares, left=before, color=color, label=status.lower().replace("_", " "))
        before = [a + b for a, b in zip(before, shares, strict=True)]
    axes[0].set(xlim=(0, 1), xlabel="share of samples")
    axes[0].invert_yaxis()
    axes[0].set_axisbelow(True)
    axes[0].figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)


CHUNK = 500

CASE = Case(
    "robustness",
    "random small problems, hopeless ones among them: faults, which must be 0",
    build,
    grid=product(seed_from=range(0, 10_000, CHUNK), seeds=[CHUNK], largest_exponent=[LARGEST_EXPONENT]),
    quick=product(seed_from=[0, 100], seeds=[100], largest_exponent=[LARGEST_EXPONENT]),
    metrics={
        "faulty": Metric(),
        "faults": Metric(better=None),
        "failures": Metric(better=None),
        "endings": Metric(better=None),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: [f"how {_drawn(rows):,} random problems end"], size=(6.4, 4.2)),
)
