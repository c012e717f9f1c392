"""Random small problems, hopeless ones among them: no solve may raise, hang, or return worse than it saw.

A problem that shows a fault can be had again: `faults(draw(seed, largest_exponent))`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from matplotlib.axes import Axes

from deqlib import Solution, Status, fixed_point

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...show import COLORS, legend_below
from .faults import FAULTS, Solve, faults
from .random_solves import LARGEST_EXPONENT, MAPS, draw

CHUNK = 500  # seeds a point


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
    legend_below(axes, 4)


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
