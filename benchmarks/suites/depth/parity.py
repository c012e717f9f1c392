"""How far information travels: running parity along a line, by a cell that sees one place back."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import cross_entropy

from deqlib import JFB, Backward, ImplicitDifferentiation, ImplicitLayer, PhantomGradient, Picard, Stopping

from ...case import COUNT, SECONDS, Case, Metric, Picture, Row, Run, Settings, Table, product
from ...measure import seconds
from ...rows import distinct, grouped, having
from ...show import COLORS, curve, pivot
from .contenders import Explicit, MakeBody, MakeCell, of_depth, parameters
from .show import STYLES, depth_axis
from .training import Batch, Reader, train

WIDTH, BATCH, RATE = 32, 32, 1e-2
LONGER = (1, 2, 4)  # lengths of tests, in lengths of training
TESTED = 1000  # sequences
TEST_SEED = 20261125  # of sequences that had no part in choosing the settings
TOLERANCE = 1e-3
STEPS_A_PLACE = 4  # most solver steps to the tolerance
BACKWARD: dict[str, Callable[[Stopping], Backward]] = {
    "JFB": lambda rule: JFB(),
    "PhantomGradient": lambda rule: PhantomGradient(),
    "ImplicitDifferentiation": lambda rule: ImplicitDifferentiation(solver=Picard(), stopping=rule),
}
TO_TOLERANCE = tuple(f"implicit, {mode}, to {TOLERANCE:g}" for mode in BACKWARD)
DEEPER = ", deeper for longer"
FIXED = ("explicit, untied", "explicit, tied", "implicit, ImplicitDifferentiation")


def sequences(generator: torch.Generator, number: int, length: int) -> Batch:
    """Random signs (number, length, 1), and whether the ones up to each place are odd in number, 0 or 1."""
    bits = torch.randint(2, (number, length), generator=generator)
    return (2.0 * bits - 1).unsqueeze(-1), bits.cumsum(1) % 2


def build(run: Run, depth: int | None, length: int, updates: int, seeds: int) -> Iterator[Row]:
    """Accuracy at the last place by seed, for every contender and length of test.

    With depth None implicit layers are solved to a tolerance, in training and in the test.
    """
    bodies: dict[str, MakeBody]
    if depth is None:
        bodies = {
            name: partial(_to_tolerance, mode, length)
            for name, mode in zip(TO_TOLERANCE, BACKWARD, strict=True)
        }
    else:
        bodies = {name: of_depth(name, depth) for name in FIXED}
    batch = partial(_batch, run.device, length)
    rows: dict[tuple[str, int], Row] = {}
    for seed in range(seeds):
        for name, make_body in bodies.items():
            torch.manual_seed(seed)
            model = Reader(make_body, 1, WIDTH, 2).to(run.device)
            work = partial(train, model, batch, _loss, updates=updates, seed=seed, rate=RATE)
            spent = seconds(work)
            for label, tested, figures in _tests(run, model, name, depth, length):
                row = rows.setdefault((label, tested), {"parameters": parameters(model), "seconds": []})
                row["seconds"].append(spent)
                for metric, value in figures.items():
                    row.setdefault(metric, []).append(value)
    for (label, tested), row in rows.items():
        yield {"contender": label, "tested": tested, **row}


def _to_tolerance(mode: str, length: int, make_cell: MakeCell) -> ImplicitLayer:
    rule = _rule(length)
    return ImplicitLayer(
        make_cell(), solver=Picard(), backward=BACKWARD[mode](rule), stopping=rule, on_failure="ignore"
    )


def _rule(length: int) -> Stopping:
    """No patience: while news travels down the line, the residual need not fall."""
    return Stopping(rtol=TOLERANCE, max_steps=STEPS_A_PLACE * length, patience=None)


def _batch(device: torch.device, length: int, generator: torch.Generator) -> Batch:
    x, y = sequences(generator, BATCH, length)
    return x.to(device), y.to(device)


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    """Every place counts."""
    return cross_entropy(logits.flatten(0, 1), y.flatten())


def _tests(
    run: Run, model: Reader, name: str, depth: int | None, length: int
) -> Iterator[tuple[str, int, Settings]]:
    """By label and length, accuracy at the last place and steps taken.

    What has one set of weights is tested twice on longer sequences: as deep as trained, and as many times
    deeper as the sequence is longer.
    """
    for factor in LONGER:
        tested = factor * length
        x, y = sequences(torch.Generator().manual_seed(TEST_SEED), TESTED, tested)
        test = partial(_test, model, x.to(run.device), y.to(run.device))
        if depth is None:
            yield name, tested, test(_rule(tested))
            continue
        yield name, tested, test(depth)
        if name != FIXED[0]:
            yield name + DEEPER, tested, test(factor * depth)


@torch.no_grad()
def _test(model: Reader, x: Tensor, y: Tensor, rule: int | Stopping) -> Settings:
    """With so many evaluations, or to a tolerance."""
    body, taken = model.body, float(rule) if isinstance(rule, int) else 0.0
    if isinstance(body, Explicit):
        assert isinstance(rule, int)
        body.depth = rule
        logits = model(x)
    else:
        assert isinstance(body, ImplicitLayer)
        solution = body.solve(
            model.embed(x), stopping=Stopping.steps(rule) if isinstance(rule, int) else rule
        )
        logits, taken = model.head(solution.value), float(solution.num_steps.float().mean())
    right = logits[:, -1].argmax(-1) == y[:, -1]
    return {"accuracy": float(right.float().mean()), "steps": taken}


def _table(rows: list[Row]) -> Table:
    lengths = distinct(rows, "tested")

    def line(point: list[Row]) -> Row:
        """All tests of a contender and depth."""
        accuracy = {row["tested"]: statistics.median(row["accuracy"]) for row in point}
        return {**point[0], "accuracy": " / ".join(f"{accuracy[length]:.2f}" for length in lengths)}

    return pivot(
        f"accuracy at the last place, lengths {' / '.join(map(str, lengths))}, trained on the first",
        [line(point) for point in grouped(rows, "contender", "depth")],
        "contender",
        "contender",
        lambda row: "to tolerance" if row["depth"] is None else f"depth {row['depth']}",
        lambda row: row["accuracy"],
        missing="",
        more={
            "s of training, deepest": lambda line: f"{statistics.median(line[-1]['seconds']):.1f}",
            "parameters, deepest": lambda line: f"{max(row['parameters'] for row in line):,}",
        },
    )


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    for axis, length in zip(axes, distinct(rows, "tested"), strict=True):
        here = having(rows, tested=length)
        for name in distinct(here, "contender"):
            points = having(here, contender=name)
            if name in TO_TOLERANCE:
                color = COLORS[len(STYLES) + TO_TOLERANCE.index(name)]
                curve(axis, points, "steps", "accuracy", "*", color=color, label=name, markersize=11)
            else:
                style, color = STYLES[name.removesuffix(DEEPER)]
                style = style[0] + (":" if name.endswith(DEEPER) else "-")
                look = {"color": color, "label": name, "markersize": 3, "alpha": 0.8}
                curve(axis, points, "depth", "accuracy", style, **look)
        depth_axis(axis, rows)
        axis.set(xlabel="depth in training; stars: steps taken", ylim=(0.4, 1.05))
        axis.axvline(length, color="black", linewidth=0.7, linestyle=":")
    axes[-1].legend(frameon=False, fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _panels(rows: list[Row]) -> list[str]:
    lengths = distinct(rows, "tested")
    return [f"tested on length {length}{' (trained)' * (not i)}" for i, length in enumerate(lengths)]


CASE = Case(
    "parity",
    "running parity along a line, where a cell sees one place back; also on longer lines than trained on",
    build,
    grid=product(depth=(2, 4, 8, 16, 32, None), length=(16,), updates=(500,), seeds=(3,)),
    quick=product(depth=(2, 4, None), length=(4,), updates=(30,), seeds=(1,)),
    metrics={
        "accuracy": Metric("higher", noisy=True),
        "steps": Metric(None, noisy=True),
        "seconds": SECONDS,
        "parameters": COUNT,
    },
    table=_table,
    picture=Picture(_paint, _panels, size=(4.6, 3.6)),
)
