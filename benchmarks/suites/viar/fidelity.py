"""Against the numbers that the published programs produced: tokens exactly, the rest within a bar."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from matplotlib.axes import Axes
from torch import Tensor

import viar
from viar.checkpoints.official import official_names
from viar.generation.sampling import decode_images
from viar.model.scales import scale_slices

from ...baselines.viar import Baseline
from ...baselines.viar import sample_tokens as baseline_tokens
from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...environment import ROOT
from ...show import COLORS, listing

LIMIT = 2e-4
LEAST_NORM = 5e-6  # of a gradient; smaller ones are rounding
REFERENCE = ROOT / "tests" / "viar" / "golden_reference.py"


def build(run: Run, numbers: str) -> Iterator[Row]:
    """Tokens that differ, by case, and the largest deviation, by kind of number.

    Args:
        run: where.
        numbers: "generation", "tokenizer" or "training".
    """
    # The bar is for float32; a GPU would round convolutions to TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield from _NUMBERS[numbers](reference(), run.device)


def _generation(golden: SimpleNamespace, device: torch.device) -> Iterator[Row]:
    """Tokens of every generation, ours and the baseline's, and the worst pixel of ours."""
    expected, tokenizer = _expected(golden, device), golden.golden_tokenizer().to(device)
    worst, cfg = 0.0, golden.golden_config()["cfg"]
    labels = golden.golden_labels().to(device)
    schedules = golden.golden_config()["gen_iterations"]
    cases = {"var.generate": None} | {f"viar.generate.{a}.{b}": (a, b) for a, b in schedules}
    for name, iterations in cases.items():
        model = golden.golden_transformer(name.split(".")[0]).to(device)
        kind = {} if iterations is None else {"cache": "iterate"}
        settings = {"iterations": iterations, "cfg": cfg, "top_k": 1, **kind}
        sample = viar.sample_tokens(model, tokenizer, labels, viar.Sampling(**settings))
        wanted = expected[f"{name}.tokens"]
        yield _tokens("viar", name, torch.cat(sample.tokens, 1), wanted)
        simple, _ = baseline_tokens(Baseline.of(model), tokenizer, labels, iterations, cfg, 1, 0.0, None)
        yield _tokens("baseline", name, torch.cat(simple, 1), wanted)
        worst = max(worst, _deviation(decode_images(tokenizer, sample), expected[f"{name}.image"]))
    yield {"contender": "viar", "what": "images", "deviation": worst}


def _tokenizer(golden: SimpleNamespace, device: torch.device) -> Iterator[Row]:
    """Tokens of images, and the worst of features, f_hat, teacher's input and decoded images."""
    expected, tokenizer = _expected(golden, device), golden.golden_tokenizer().to(device)
    images = golden.golden_images().to(device)
    yield _tokens("viar", "encoding", torch.cat(tokenizer.encode(images), 1), expected["tokens"])
    tokens = [expected["tokens"][:, where] for where in scale_slices(tokenizer.config.sides)]
    with torch.no_grad():
        found = {
            "features": tokenizer.features(images),
            "f_hat": tokenizer.quantizer.decode_tokens(tokens),
            "teacher_input": tokenizer.next_scale_inputs(tokens),
            "reconstruction": tokenizer.decode(tokens),
            "reconstruction_scale0": tokenizer.decode(tokens[:1]),
        }
    worst = max(_deviation(value, expected[name]) for name, value in found.items())
    yield {"contender": "viar", "what": "images", "deviation": worst}


def _training(golden: SimpleNamespace, device: torch.device) -> Iterator[Row]:
    """Worst logit, and worst norm of a parameter's gradient in units of itself."""
    expected = _expected(golden, device)
    labels, inputs = golden.golden_labels().to(device), expected["teacher_input"]
    with torch.no_grad():
        var = golden.golden_transformer("var").to(device)
        logit = _deviation(var(labels, inputs), expected["var.logits"])
    gradient = 0.0
    for rounds, norms in golden.golden_grad_norms().items():
        no_grad, grad = map(int, rounds.split("."))
        model = golden.golden_transformer("viar", no_grad=(no_grad,) * 2, grad=(grad,) * 2).train().to(device)
        logits = model(labels, inputs)
        logit = max(logit, _deviation(logits.detach(), expected[f"viar.logits.{rounds}"]))
        probe = torch.from_numpy(golden.uniform("probe", tuple(logits.shape))).float().to(device)
        (logits * probe).mean().backward()
        ours = official_names(model)
        for name, norm in norms.items():
            found = model.get_parameter(ours[name]).grad.norm()
            gradient = max(gradient, abs(float(found) - norm) / max(norm, LEAST_NORM))
    yield {"contender": "viar", "what": "logits", "deviation": logit}
    yield {"contender": "viar", "what": "gradients", "deviation": gradient}


_NUMBERS = {"generation": _generation, "tokenizer": _tokenizer, "training": _training}


def _tokens(contender: str, name: str, actual: Tensor, expected: Tensor) -> Row:
    differing = int((actual != expected).sum())
    return {"contender": contender, "what": f"tokens, {name}", "differing": differing}


def _deviation(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


def _expected(golden: SimpleNamespace, device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in golden.golden_tensors().items()}


def reference() -> SimpleNamespace:
    """The tests' regeneration of the published models, which is in no package."""
    return SimpleNamespace(**runpy.run_path(str(REFERENCE)))


def deviations(rows: list[Row]) -> dict[str, float]:
    """The largest of every kind of number."""
    found: dict[str, float] = {}
    for row in rows:
        if "deviation" in row:
            found[row["what"]] = max(row["deviation"], found.get(row["what"], 0.0))
    return found


def bars(rows: list[Row]) -> list[Bar]:
    """Tokens exactly, the rest within `LIMIT`."""
    tokens = [row for row in rows if "differing" in row]
    note = ", ".join(f"{row['contender']}: {row['what']}" for row in tokens if row["differing"])
    differing = sum(row["differing"] for row in tokens) if tokens else math.nan
    found = [Bar(f"golden tokens that differ, {len(tokens)} cases", differing, 0, note)]
    for name, value in deviations(rows).items():
        found.append(Bar(f"golden {name}: largest deviation", value, LIMIT))
    return found


def table(rows: list[Row]) -> Table:
    """One line a case."""
    columns: dict[str, Callable[[Row], str]] = {
        "what": lambda row: row["what"],
        "whose": lambda row: row["contender"],
        "deviation": lambda row: str(row["differing"]) if "differing" in row else f"{row['deviation']:.1e}",
    }
    return listing("against the published programs", rows, columns)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    (axis,) = axes
    found = deviations(rows)
    axis.barh(list(found), list(found.values()), color=COLORS[0])
    axis.axvline(LIMIT, color=COLORS[1], linestyle="--", label="bar")
    axis.set(xscale="log", xlabel="largest deviation")
    axis.legend(frameon=False, fontsize=8)


CASE = Case(
    "fidelity",
    "tokens, logits, gradients and images against the numbers of the published programs",
    build,
    grid=product(numbers=_NUMBERS),
    quick=product(numbers=_NUMBERS),
    metrics={"differing": Metric(), "deviation": Metric(noisy=True)},
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("against the published programs",), size=(5.2, 2.6)),
)
