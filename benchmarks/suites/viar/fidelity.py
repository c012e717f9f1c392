"""Against the numbers that the published programs produced: tokens exactly, the rest within a bar."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import viar
from viar.official import official_names
from viar.sampling import decode_images
from viar.scales import scale_slices

from ...baselines.viar import Baseline
from ...baselines.viar import sample_tokens as baseline_tokens
from ...report import Bar

LIMIT = 2e-4
LEAST_NORM = 5e-6  # of a gradient; smaller ones are rounding
REFERENCE = Path(__file__).parents[3] / "tests" / "viar" / "golden_reference.py"


def measure(device: torch.device) -> dict[str, dict[str, float]]:
    """Tokens that differ, by case, and the largest deviation, by kind of number."""
    golden = reference()
    expected = {name: value.to(device) for name, value in golden.golden_tensors().items()}
    tokenizer = golden.golden_tokenizer().to(device)
    models = {name: golden.golden_transformer(name).to(device) for name in ("var", "viar")}
    differing, images = _generated(golden, expected, tokenizer, models)
    encoded = torch.cat(tokenizer.encode(golden.golden_images().to(device)), 1)
    differing["encoding"] = _differing(encoded, expected["tokens"])
    logits, gradients = _logits_and_gradients(golden, expected, models["var"], device)
    return {
        "tokens": differing,
        "deviations": {
            "images": max(images, _reconstructions(golden, expected, tokenizer)),
            "logits": logits,
            "gradients": gradients,
        },
    }


def _generated(
    golden: ModuleType, expected: dict[str, Tensor], tokenizer: viar.Tokenizer, models: dict[str, Any]
) -> tuple[dict[str, float], float]:
    """Differing tokens of every generation, ours and the baseline's, and the worst pixel of ours."""
    differing: dict[str, float] = {}
    worst, cfg = 0.0, golden.golden_config()["cfg"]
    labels = golden.golden_labels().to(expected["tokens"].device)
    schedules = golden.golden_config()["gen_iterations"]
    cases = {"var.generate": None} | {f"viar.generate.{a}.{b}": (a, b) for a, b in schedules}
    for name, iterations in cases.items():
        model = models[name.split(".")[0]]
        kind = {} if iterations is None else {"cache": "iterate"}
        settings = {"iterations": iterations, "cfg": cfg, "top_k": 1, **kind}
        sample = viar.sample_tokens(model, tokenizer, labels, **settings)
        wanted = expected[f"{name}.tokens"]
        differing[name] = _differing(torch.cat(sample.tokens, 1), wanted)
        simple, _ = baseline_tokens(Baseline.of(model), tokenizer, labels, iterations, cfg, 1, 0.0, None)
        differing[f"{name}, baseline"] = _differing(torch.cat(simple, 1), wanted)
        pictures = decode_images(tokenizer, sample)
        worst = max(worst, _deviation(pictures, expected[f"{name}.image"]))
    return differing, worst


def _reconstructions(golden: ModuleType, expected: dict[str, Tensor], tokenizer: viar.Tokenizer) -> float:
    """The worst of features, f_hat, teacher's input and decoded images."""
    tokens = [expected["tokens"][:, where] for where in scale_slices(tokenizer.config.sides)]
    with torch.no_grad():
        features = tokenizer.features(golden.golden_images().to(expected["tokens"].device))
        found = {
            "features": features,
            "f_hat": tokenizer.quantizer.decode_tokens(tokens),
            "teacher_input": tokenizer.next_scale_inputs(tokens),
            "reconstruction": tokenizer.decode(tokens),
            "reconstruction_scale0": tokenizer.decode(tokens[:1]),
        }
    return max(_deviation(value, expected[name]) for name, value in found.items())


def _logits_and_gradients(
    golden: ModuleType, expected: dict[str, Tensor], var: viar.NextScaleTransformer, device: torch.device
) -> tuple[float, float]:
    """Worst logit, and worst norm of a parameter's gradient in units of itself."""
    labels, inputs = golden.golden_labels().to(device), expected["teacher_input"]
    with torch.no_grad():
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
    return logit, gradient


def bars(row: dict[str, dict[str, float]]) -> list[Bar]:
    """Tokens exactly, the rest within `LIMIT`."""
    note = ", ".join(name for name, count in row["tokens"].items() if count)
    found = [
        Bar(f"golden tokens that differ, {len(row['tokens'])} cases", sum(row["tokens"].values()), 0, note)
    ]
    for name, value in row["deviations"].items():
        found.append(Bar(f"golden {name}: largest deviation", value, LIMIT))
    return found


def table(row: dict[str, dict[str, float]]) -> Table:
    """One line a case."""
    shown = Table(title="against the published programs")
    shown.add_column("what")
    shown.add_column("deviation", justify="right")
    for name, count in row["tokens"].items():
        shown.add_row(f"tokens, {name}", f"{count:.0f}")
    for name, value in row["deviations"].items():
        shown.add_row(name, f"{value:.1e}")
    return shown


def _differing(actual: Tensor, expected: Tensor) -> float:
    return float((actual != expected).sum())


def _deviation(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


def reference() -> ModuleType:
    """The tests' regeneration of the published models, which is no package."""
    spec = importlib.util.spec_from_file_location("golden_reference", REFERENCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
