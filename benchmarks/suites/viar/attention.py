"""Attention of all scales at once, forward and backward: scale by scale against one dense mask.

Both contenders call the same code with another `BlockCausal`: what `block_causal` makes of the ladder, and
one group of everything under the mask (L, L). `attention` is the product with keys and values alone, heads of
width 64; `VAR` and `VIAR` are whole trunks of six blocks as they are trained, VIAR's implicit block with two
iterations free and two recorded.

Points of bfloat16 are for a GPU and empty elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from viar import ExplicitTrunkConfig, ImplicitTrunkConfig, TransformerConfig
from viar.model.attention import query_groups
from viar.model.config import SIDES_256, SIDES_512, TrunkConfig
from viar.model.scales import BlockCausal, block_causal, block_causal_mask
from viar.model.transformer import build_trunk

from ...case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, product, worst_of
from ...measure import interleaved, milliseconds, peak_bytes, ratio
from ...rows import by_contender, grouped
from ...show import COLORS
from .models import DTYPES

LIMITS = {"time": 0.85, "deviation": 1e-6, "step": 1.0, "peak": 1.0}
TRUNKS: dict[str, TrunkConfig] = {
    "VAR": ExplicitTrunkConfig(),
    "VIAR": ImplicitTrunkConfig(num_pre=2, num_post=2, no_grad=(2, 2), grad=(2, 2)),
}
DIGITS = [1, 2, 3, 4]
POINT = ("what", "sides", "batch", "width", "dtype")
Task = Callable[[BlockCausal], list[Tensor]]  # gives what is compared: outputs and gradients


def build(run: Run, what: str, sides: list[int], batch: int, width: int, dtype: str) -> Iterator[Row]:
    """Seconds and peak bytes of a forward and a backward pass, and how far they are from the masked ones.

    Args:
        run: where; no rows of bfloat16 if the device is no GPU.
        what: "attention", "VAR" or "VIAR".
        sides: of the scales.
        batch: samples.
        width: C.
        dtype: of autocast.
    """
    if dtype != "float32" and run.device.type != "cuda":
        return
    length = sum(side * side for side in sides)
    with run.device:
        torch.manual_seed(0)
        task = (attention if what == "attention" else training)(what, sides, batch, width)
        dense = BlockCausal((length,), block_causal_mask(sides))
        forms = {"masked": dense, "by scales": block_causal(sides)}

    def compute(name: str) -> list[Tensor]:
        with torch.autocast(run.device.type, DTYPES[dtype], enabled=dtype != "float32"):
            return task(forms[name])

    def call(name: str) -> Callable[[], object]:
        return lambda: compute(name)

    expected = compute("masked")
    peaks = {name: peak_bytes(call(name), run.device) for name in forms}
    times = interleaved({name: call(name) for name in forms}, run.rounds)
    for name, form in forms.items():
        yield {
            "contender": name,
            "groups": len(form.sizes),
            "seconds": times[name],
            "peak_bytes": peaks[name],
            "deviation": max(map(deviation, compute(name), expected)),
        }


def attention(what: str, sides: list[int], batch: int, width: int) -> Task:
    """Queries of unit norm times 4, keys of unit norm, as at the start of a training."""
    shape = (batch, sum(side * side for side in sides), width // 64, 64)
    q, k, v, weight = (torch.randn(shape).transpose(1, 2) for _ in range(4))  # as projections leave them
    q, k = 4 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)

    def compute(causal: BlockCausal) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        parts = []
        for queries, keys, values, mask in query_groups(leaves[0], leaves[1], leaves[2], causal):
            parts.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0))
        # Not joined: in a model each group is projected by itself.
        weights = weight.to(parts[0].dtype).split_with_sizes(causal.sizes, 2)
        gradients = torch.autograd.grad(parts, leaves, weights)
        return [torch.cat([part.detach() for part in parts], 2), *gradients]

    return compute


def training(what: str, sides: list[int], batch: int, width: int) -> Task:
    """The trunk in training mode, all its parameters and its input taking gradients."""
    trunk = build_trunk(
        TransformerConfig(
            depth=6,
            width=width,
            num_heads=width // 64,
            sides=tuple(sides),
            drop_path=0.0,
            trunk=TRUNKS[what],
        )
    ).train()
    x_BLC = torch.randn(batch, sum(side * side for side in sides), width)
    weight, cond = torch.randn_like(x_BLC), torch.randn(batch, width)
    with torch.no_grad():  # large enough that every part matters, as nothing is at the start of a training
        for parameter in trunk.parameters():
            parameter.normal_(std=0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)

    def compute(causal: BlockCausal) -> list[Tensor]:
        x = x_BLC.detach().requires_grad_()
        image = trunk(x, trunk.modulate(cond), causal=causal).x_BLC
        leaves = [x, *trunk.parameters()]
        return [image.detach(), *torch.autograd.grad(image, leaves, weight.to(image.dtype))]

    return compute


def deviation(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float((actual - expected).norm() / expected.norm())


def bars(rows: list[Row]) -> list[Bar]:
    """Time where there is more than one group (else both do the same), peaks of trunks, and rounding."""
    times: dict[str, dict[str, float]] = {"attention": {}, "trunk": {}}
    peaks, deviations = {}, {}
    for point in grouped(rows, *POINT):
        found, row = by_contender(point), point[0]
        ours, masked = found["by scales"], found["masked"]
        name = described(row)
        if ours["groups"] > 1:
            kind = "attention" if row["what"] == "attention" else "trunk"
            times[kind][name] = ratio(ours["seconds"], masked["seconds"])
        if row["what"] != "attention":  # which is no place where a model's memory is at its peak
            peaks[name] = peak_ratio(found)
        elif row["dtype"] == "float32":
            deviations[name] = ours["deviation"]
    return [
        worst_of("attention by scales / masked, time", times["attention"], LIMITS["time"]),
        worst_of("trunk by scales / masked, time", times["trunk"], LIMITS["step"]),
        worst_of("trunk by scales / masked, peak memory", peaks, LIMITS["peak"]),
        worst_of("attention by scales, gradients off by", deviations, LIMITS["deviation"]),
    ]


def length(row: Row) -> int:
    """L."""
    return sum(side * side for side in row["sides"])


def described(row: Row) -> str:
    """A point in words."""
    return f"{row['what']}, L = {length(row)}, batch {row['batch']}, {row['dtype']}"


def peak_ratio(found: dict[str, Row]) -> float:
    """Of a point's rows by contender."""
    peak: float = found["by scales"]["peak_bytes"] / found["masked"]["peak_bytes"]
    return peak


def table(rows: list[Row]) -> Table:
    """One line a point."""
    head = (
        "what",
        "L",
        "batch",
        "width",
        "type",
        "masked, ms",
        "by scales, ms",
        "ratio",
        "peak, ratio",
        "off by",
    )
    lines = []
    for point in grouped(rows, *POINT):
        found, row = by_contender(point), point[0]
        ours, masked = found["by scales"], found["masked"]
        settings = (row["what"], str(length(row)), str(row["batch"]), str(row["width"]), row["dtype"])
        figures = (
            f"{ratio(ours['seconds'], masked['seconds']):.2f}",
            f"{peak_ratio(found):.2f}",
            f"{ours['deviation']:.0e}",
        )
        lines.append(
            (*settings, *(milliseconds(found[name]["seconds"]) for name in ("masked", "by scales")), *figures)
        )
    return Table("all scales at once, forward and backward", head, lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    labels = []
    for position, point in enumerate(grouped(rows, *POINT)):
        found, row = by_contender(point), point[0]
        labels.append(described(row))
        figures = (ratio(found["by scales"]["seconds"], found["masked"]["seconds"]), peak_ratio(found))
        for axis, figure in zip(axes, figures, strict=True):
            axis.barh(position, figure, 0.6, color=COLORS[0])
    for axis in axes:
        axis.axvline(1, color=COLORS[1], linestyle="--")
        axis.set(xlabel="by scales / masked")
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.invert_yaxis()


CASE = Case(
    "attention",
    "attention of all scales at once, scale by scale against a dense mask",
    build,
    grid=[
        *product(what=["attention"], sides=[list(SIDES_256)], batch=[8], width=[384], dtype=["float32"]),
        *product(what=["attention"], sides=[list(SIDES_512)], batch=[2], width=[384], dtype=["float32"]),
        *product(what=["VAR", "VIAR"], sides=[list(SIDES_256)], batch=[8], width=[384], dtype=["float32"]),
        *product(what=["VAR", "VIAR"], sides=[DIGITS], batch=[64], width=[64], dtype=["float32"]),
        *product(
            what=["attention", "VAR"], sides=[list(SIDES_256)], batch=[32], width=[1024], dtype=["bfloat16"]
        ),
    ],
    quick=[
        *product(what=["attention", "VAR", "VIAR"], sides=[[1, 10]], batch=[1], width=[64], dtype=["float32"])
    ],
    metrics={
        "groups": Metric(None),
        "seconds": SECONDS,
        "peak_bytes": Metric(),
        "deviation": Metric(noisy=True),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("time", "peak memory"), size=(5.2, 3.6)),
)
