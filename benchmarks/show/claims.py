"""What the paper claims of VIAR (arXiv 2605.01220), and what the committed figures show for it."""

from __future__ import annotations

from dataclasses import dataclass

from ..case import Table
from ..results import committed, newest_bars

HEAD = ("the paper", "there: ImageNet, 256 pixels", "here", "at which scale", "measured by")
SHAPE = "published shape, weights untrained"
MNIST = "MNIST, models of 0.36 M and 1.83 M"
SHIPPED = "MNIST, the shipped VIAR of 0.73 M"
FRONTIER = "MNIST, one VIAR of 0.36 M, VARs of 0.33 M to 0.93 M, medians of three seeds"
NOT_HERE = "cannot be shown here"
REPRODUCE = "viar reproduce"


@dataclass(frozen=True)
class Claim:
    """A claim and what there is beside it.

    Attributes:
        said: the claim.
        published: its figure in the paper.
        here: what is shown for it, with the values of `bars` in their order where it has braces.
        scale: of what is shown.
        command: that measures it.
        bars: names of bars, each behind its suite.
    """

    said: str
    published: str
    here: str
    scale: str
    command: str
    bars: tuple[tuple[str, str], ...] = ()


CLAIMS = (
    Claim(
        "38 % of VAR's parameters",
        "770.9 M of 2,010.0 M",
        "the same counts",
        SHAPE,
        "viar --case paper",
    ),
    Claim(
        "training memory does not grow with iterations",
        "stated",
        "{:.3g} x with 100 iterations off the tape instead of the fewest; those on the tape count, and the "
        "deepest step that training draws takes {:.3g} of VAR's",
        MNIST,
        "recipes",
        (
            ("recipes", "memory of a step, 100 iterations off the tape / fewest, worst"),
            ("recipes", "memory of the deepest step, VIAR / VAR, worst"),
        ),
    ),
    Claim(
        "compute is a knob at inference, without training again",
        "FID 2.39, 2.22, 2.17, 2.16 at 2, 5, 8, 10 iterations",
        "loss with 4 iterations {:.3g} of that with 1, and with more never above {:.4f} of that with fewer, "
        "in the worst run; class consistency of the digits of 8 x 8 is flat",
        MNIST,
        "recipes; viar --case knob",
        (
            ("recipes", "knob: loss with 4 iterations / with 1, worst"),
            ("recipes", "knob: loss with more iterations / with fewer, worst"),
        ),
    ),
    Claim(
        "images get better with iterations",
        "the FID above, 50,000 images",
        "FID in the judge's features 17.3 to 18.4, 7.58 to 7.89, 7.09 to 7.41, 7.10 to 7.41 with 1, 2, 4, 8 "
        "iterations, three times 500 images; held-out pictures have 1.59",
        SHIPPED,
        "viar evaluate --cfg 1 --top-p None --iterations N --per-class 50 --seed N",
    ),
    Claim(
        "quality of VAR-d30",
        "FID 2.16, sFID 8.07, IS 300.1, precision 0.81, recall 0.59; VAR 2.08, 8.82, 306.8, 0.82, 0.59",
        f"{NOT_HERE}: neither published weights nor ImageNet are at hand",
        "-",
        REPRODUCE,
    ),
    Claim(
        "inference in 8.53 GB",
        "0.44 of VAR's 19.24 GB, iterations falling from 10 to 2; 0.58 at 10 throughout",
        "{:.3g} of VAR's peak, iterations from 10 to 2, one image, without the decoder; keys and values "
        "{:.3g} of VAR's however many iterations there are",
        f"{SHAPE}, CPU",
        "viar --case trunks; viar --case cache",
        (
            ("viar", "peak memory VIAR / VAR, depth 30"),
            ("viar", "cache VIAR / VAR, equilibrium, 2 to 20 iterations"),
        ),
    ),
    Claim(
        "32.08 images/s",
        "2.12 times VAR's 15.16, RTX 4090",
        "{:.3g} of VAR's time an image, iterations from 10 to 2, one image at a time",
        f"{SHAPE}, CPU",
        "viar --case trunks",
        (("viar", "time VIAR / VAR, depth 30"),),
    ),
    Claim(
        "the state converges",
        "cosine to the end state 0.914, 0.985, 0.997, 0.999 after 2, 5, 8, 10 iterations",
        "0.9951 after 2, 1.0000 from 5 on; a residual of 0.001 takes 9.2 evaluations, 7.7 with Anderson, 7.8 "
        "with Broyden; a warm start helps none of them",
        SHIPPED,
        "viar --case convergence",
    ),
    Claim(
        "edits without training for it",
        "pictures",
        "in-painting the centre of held-out digits keeps the class of all but {:.3g}; the seam's error is "
        "{:.3g} of that of the published way",
        SHIPPED,
        "viar --case editing",
        (
            ("viar", "in-painted digits not of their class"),
            ("viar", "seam error of in-painted digits, ours / published way"),
        ),
    ),
    Claim(
        "one VIAR dominates VAR over quality and cost",
        "FID beside memory and images/s",
        "not here: of five VARs trained alike, {:.0f} have a smaller FID than VIAR has at their evaluations, "
        "{:.0f} at their memory; the loss of VIAR at equal steps is up to {:.4g} of that of a VAR of 24 "
        "blocks, which learns slowly, and at equal time at most {:.3g}",
        FRONTIER,
        "viar --case frontier; recipes",
        (
            ("viar", "VARs with a smaller distance than VIAR at their evaluations, of 5"),
            ("viar", "VARs with a smaller distance than VIAR at their peak memory, of 5"),
            ("recipes", "loss, VIAR / VAR, equal steps, worst"),
            ("recipes", "loss, VIAR / VAR, equal time, worst"),
        ),
    ),
)


def claims_table() -> Table:
    """One line a claim.

    Raises:
        ValueError: a bar that a claim names is in no committed figures.
    """
    lines = []
    for claim in CLAIMS:
        here = claim.here.format(*(bar_value(suite, name) for suite, name in claim.bars))
        lines.append((claim.said, claim.published, here, claim.scale, f"`{claim.command}`"))
    return Table("claims of the paper", HEAD, lines)


def bar_value(suite: str, name: str) -> float:
    """What a bar measured, in the newest committed figures of its suite on a CPU.

    Raises:
        ValueError: there is no such bar, or it measured nothing.
    """
    values = {bar["name"]: bar["value"] for bar in newest_bars(committed(suite))}
    if values.get(name) is None:
        raise ValueError(f"{name}: no committed figures of {suite!r} have a value of this bar")
    return float(values[name])
