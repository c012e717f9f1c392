"""Convergence of VIAR's implicit block at inference: plain iteration, Anderson and Broyden, warm starts.

The model is one of the published kind: trained at random depth, without a penalty on the residual. The codes
of held-out pictures take the place of sampled ones, so that all solvers meet the same equations, scale by
scale and with the scales before solved. There is no guidance.

All is measured evaluation by evaluation: the relative residual ||f(z) - z|| / ||f(z)|| of a sample where the
n-th evaluation takes place, and the cosine of a token's state that it gives, which is what n iterations hand
on, to the state of the last evaluation. The paper does not say to which state it compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import viar
from deqlib import Anderson, Broyden, Picard, Solver

from ...case import Case, Metric, Picture, Row, Run, Table, product
from ...rows import having
from ...show import COLORS, listing
from .mnist import held_out, trained_mnist
from .paper import PUBLISHED

SOLVERS: dict[str, Solver] = {"Picard": Picard(), "Anderson": Anderson(), "Broyden": Broyden()}
STARTS = ("input", "warm")
EVALUATIONS = 24  # of a scale; the last of them gives the end
TOLERANCES = (1e-2, 1e-3)
PAPER = {row["iterations"]: row["similarity"] for row in PUBLISHED["VIAR"] if "similarity" in row}
SHOWN = sorted(PAPER)
ALL = "all scales"


class Evaluation(NamedTuple):
    """One of the implicit block."""

    z_BlC: Tensor
    image_BlC: Tensor


def build(run: Run, solver: str, start: str, images: int) -> Iterator[Row]:
    """One row a scale, and one of all, in which a scale counts by its tokens.

    Args:
        run: where.
        solver: a name of `SOLVERS`.
        start: "input", that of the block, or "warm", as the scale before suggests.
        images: at most so many; 500 are held out.
    """
    trained = trained_mnist(run)
    pictures, labels = held_out(trained, images)
    tokens = trained.tokenizer.encode(pictures)
    # No tolerance is ever met, and the driver's loop leaves one evaluation for the output.
    endless = viar.Adaptive(rtol=0.0, max_steps=EVALUATIONS - 2, solver=SOLVERS[solver])
    sampling = viar.Sampling(iterations=endless, warm_start=start == "warm", cfg=0)
    with evaluations(trained.viar) as solves:
        viar.sample_tokens(
            trained.viar,
            trained.tokenizer,
            labels,
            sampling,
            replace=lambda scale, sampled: trained.tokenizer.quantizer.embed(tokens[scale]),
        )
    rows = [{"contender": f"{side} x {side}", **found} for side, found in by_scale(solves).items()]
    weights = [side * side for side in trained.viar.config.sides]
    yield from rows
    yield {"contender": ALL, **_together(rows, weights)}


@contextmanager
def evaluations(model: viar.NextScaleTransformer) -> Iterator[list[list[Evaluation]]]:
    """Of the implicit block while a model generates, solve by solve: a scale of some samples each."""
    solves: list[list[Evaluation]] = []
    injected: list[Tensor] = []

    def note(cell: nn.Module, inputs: tuple[Any, ...], image: Tensor) -> None:
        z, injection = inputs[:2]
        if not injected or injection is not injected[-1]:  # which a solve computes once
            injected.append(injection)
            solves.append([])
        solves[-1].append(Evaluation(z, image))

    trunk: Any = model.trunk
    hook = trunk.layer.cell.register_forward_hook(note)
    try:
        yield solves
    finally:
        hook.remove()


def by_scale(solves: list[list[Evaluation]]) -> dict[int, Row]:
    """What is measured of each scale, by its side."""
    scales: dict[int, list[list[Evaluation]]] = {}
    for solve in solves:
        scales.setdefault(solve[0].z_BlC.shape[1], []).append(solve)
    return {round(tokens**0.5): _measured(found) for tokens, found in scales.items()}


def _measured(solves: list[list[Evaluation]]) -> Row:
    residual_NB = torch.cat([_padded([relative_residual(e) for e in solve]) for solve in solves], 1)
    cosine_NB = torch.cat(
        [_padded([_cosine(e.image_BlC, solve[-1].image_BlC) for e in solve]) for solve in solves], 1
    )
    row: Row = {"residual": residual_NB.mean(1).tolist(), "cosine": cosine_NB.mean(1).tolist()}
    for tolerance in TOLERANCES:
        arrived_NB = residual_NB <= tolerance
        # All that are never there count as many as there were.
        needed_B = torch.where(arrived_NB.any(0), arrived_NB.int().argmax(0) + 1, EVALUATIONS)
        row[f"evaluations_{tolerance:g}"] = float(needed_B.double().mean())
        row[f"arrived_{tolerance:g}"] = float(arrived_NB.any(0).double().mean())
    return row


def relative_residual(evaluation: Evaluation) -> Tensor:
    """||f(z) - z|| / ||f(z)|| of each sample, (B,)."""
    image = evaluation.image_BlC.flatten(1)
    residual_B: Tensor = (image - evaluation.z_BlC.flatten(1)).norm(dim=1) / image.norm(dim=1)
    return residual_B


def _cosine(a_BlC: Tensor, b_BlC: Tensor) -> Tensor:
    """Mean over the tokens of each sample, (B,)."""
    return torch.cosine_similarity(a_BlC, b_BlC, dim=-1).mean(1)


def _padded(values: list[Tensor]) -> Tensor:
    """(EVALUATIONS, B): a solve that can do no better ends early, and stays as it is."""
    return torch.stack(values + values[-1:] * (EVALUATIONS - len(values)))


def _together(rows: list[Row], weights: list[int]) -> Row:
    """Means over scales."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], list):
            return [mean(list(at)) for at in zip(*values, strict=True)]
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    return {name: mean([row[name] for row in rows]) for name in rows[0] if name != "contender"}


def table(rows: list[Row]) -> Table:
    """The paper's cosines; scale by scale for the plain iteration from the input; every solver and start."""
    scales = [row for row in having(rows, solver="Picard", start="input") if row["contender"] != ALL]
    published = {"solver": "the paper", "start": "", "contender": "ImageNet, 256 pixels", "cosine": PAPER}
    lines = [published, *(_by_count(row) for row in [*scales, *having(rows, contender=ALL)])]
    columns: dict[str, Callable[[Row], str]] = {
        "solver": lambda row: row["solver"],
        "start": lambda row: row["start"],
        "scale": lambda row: row["contender"],
        **{f"cosine, {n} it.": partial(_shown, "cosine", n, ".4f") for n in SHOWN},
        **{f"residual, {n} it.": partial(_shown, "residual", n, ".1e") for n in SHOWN},
        **{f"evaluations to {tolerance:g}": partial(_needed, tolerance) for tolerance in TOLERANCES},
    }
    return listing("VIAR of MNIST, evaluation by evaluation of the implicit block", lines, columns)


def _by_count(row: Row) -> Row:
    """The same with what is there evaluation by evaluation under their numbers, from 1."""
    counted = {name: dict(enumerate(row[name], start=1)) for name in ("cosine", "residual")}
    return {**row, **counted}


def _shown(name: str, count: int, form: str, row: Row) -> str:
    return format(row[name][count], form) if name in row else ""


def _needed(tolerance: float, row: Row) -> str:
    """In brackets where not all samples of all scales are there in the end."""
    name = f"evaluations_{tolerance:g}"
    if name not in row:
        return ""
    return f"{row[name]:.1f}" if row[f"arrived_{tolerance:g}"] == 1 else f"({row[name]:.1f})"


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    apart, residual, solvers = axes
    last = EVALUATIONS - 1  # the one after it is at the best state seen, for the output
    counts = range(1, last + 1)
    scales = [row for row in having(rows, solver="Picard", start="input") if row["contender"] != ALL]
    for row, color in zip(scales, COLORS, strict=False):
        look = {"color": color, "linewidth": 1.2, "label": row["contender"]}
        apart.plot(counts, [1 - cosine for cosine in row["cosine"][:last]], **look)
        residual.plot(counts, row["residual"][:last], **look)
    apart.plot(list(PAPER), [1 - cosine for cosine in PAPER.values()], "k*", label="the paper, ImageNet")
    for row in having(rows, contender=ALL):
        color, style = COLORS[list(SOLVERS).index(row["solver"])], ("-", "--")[STARTS.index(row["start"])]
        label = f"{row['solver']}, {row['start']}"
        solvers.plot(counts, row["residual"][:last], style, color=color, linewidth=1.2, label=label)
    for axis in axes:
        axis.set(xlabel="evaluations of a scale", yscale="log")
    apart.set(xlim=(1, 14), ylim=(1e-5, 0.3))
    for axis in (apart, solvers):
        axis.legend(frameon=False, fontsize=8)


CASE = Case(
    "convergence",
    "VIAR of MNIST: residual and cosine to the end by iteration, scale by scale; solvers and warm starts",
    build,
    grid=product(solver=list(SOLVERS), start=STARTS, images=[200]),
    quick=product(solver=list(SOLVERS), start=STARTS, images=[4]),
    metrics={
        "residual": Metric(None, noisy=True),
        "cosine": Metric(None, noisy=True),
        **{f"evaluations_{tolerance:g}": Metric(noisy=True) for tolerance in TOLERANCES},
        **{f"arrived_{tolerance:g}": Metric("higher", noisy=True) for tolerance in TOLERANCES},
    },
    table=table,
    picture=Picture(
        _paint,
        lambda rows: (
            "1 - cosine to the end, plain iteration",
            "relative residual, plain iteration",
            "relative residual, all scales",
        ),
        size=(4.4, 3.6),
    ),
)
