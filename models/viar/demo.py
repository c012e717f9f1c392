"""The whole job on real handwritten digits: tokenizer, VIAR, VAR, pictures, table.

Every stage writes its own folder and a `done.json` with a fingerprint of all that went into it: its
settings, its data, the stages before and the code. A stage whose fingerprint stands is reused, one that
was interrupted goes on from its last state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import deqlib

from .config import ImplicitTrunkConfig, TransformerConfig
from .data import ImageData, load_data
from .evaluate import (
    Classifier,
    accuracy,
    balanced_labels,
    class_consistency,
    seconds_of,
    train_classifier,
    training_bytes,
)
from .pictures import draw_knob, save_grid
from .presets import TOKENIZERS, TRANSFORMERS
from .sampling import generate, sample_tokens
from .tokenizer import Tokenizer
from .train import cross_entropy, tokenize, train_tokenizer, train_transformer, validation_loss
from .transformer import NextScaleTransformer

MODELS = ("viar", "var")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo."""

    out: Path = Path("runs/demo")
    tokenizer_seconds: float = TOKENIZERS["digits"].train.seconds
    transformer_seconds: float = TRANSFORMERS["digits-viar"].train.seconds  # of each of the two
    classifier_steps: int = 600
    per_class: int = 100  # generated images a class and setting
    iterations: tuple[int, ...] = (1, 2, 3, 5, 8, 12)  # points of the knob
    cfg: float = 3.0
    top_k: int | None = None
    top_p: float | None = 0.96
    seed: int = 0


@dataclass
class Stages:
    """Runs a stage unless its result stands."""

    root: Path
    console: Console
    code: str = field(default_factory=lambda: _fingerprint_of_code())

    def run(self, name: str, settings: Any, before: list[str], work: Callable[[Path], dict[str, Any]]) -> Any:
        """Result of stage `name`, from `work(folder)` or from the last time.

        `settings` and the fingerprints of the stages `before` decide whether the last result stands.
        """
        folder = self.root / name
        upstream = [json.loads((self.root / b / "done.json").read_text())["fingerprint"] for b in before]
        key = json.dumps([settings, upstream, self.code], sort_keys=True, default=str)
        fingerprint = hashlib.sha256(key.encode()).hexdigest()
        done, begun = folder / "done.json", folder / "begun.json"
        if done.exists():
            record = json.loads(done.read_text())
            if record["fingerprint"] == fingerprint:
                self.console.print(f"[dim]{name}: unchanged, reused from {folder}[/dim]")
                return record["result"]
        if not (begun.exists() and json.loads(begun.read_text()) == fingerprint and not done.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            begun.write_text(json.dumps(fingerprint))
        result = work(folder)
        fresh = folder / "done.json.new"
        fresh.write_text(json.dumps({"fingerprint": fingerprint, "result": result}, indent=2))
        os.replace(fresh, done)
        return result


def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Train, generate, measure; returns what `summary.json` holds."""
    stages = Stages(config.out, console)
    preset = TOKENIZERS["digits"]

    def data_of(augment: int) -> ImageData:
        return load_data("digits", preset.model.image_side, augment=augment)

    data = data_of(0)

    def tokenizer_stage(folder: Path) -> dict[str, Any]:
        torch.manual_seed(config.seed)
        settings = replace(preset.train, seconds=config.tokenizer_seconds, seed=config.seed)
        tokenizer = Tokenizer(preset.model)
        images = data_of(preset.augment).train
        return train_tokenizer(tokenizer, images, folder, settings, loss=preset.loss, console=console)

    def classifier_stage(folder: Path) -> dict[str, Any]:
        torch.manual_seed(config.seed)
        classifier = Classifier(data.num_classes, preset.model.image_side)
        train_classifier(
            classifier, data.train, steps=config.classifier_steps, seed=config.seed, console=console
        )
        classifier.save(folder / "classifier.safetensors")
        return {"held_out_accuracy": accuracy(classifier, data.validation)}

    settings = [asdict(preset), config.tokenizer_seconds, config.seed]
    tokenizer_result = stages.run("tokenizer", settings, [], tokenizer_stage)
    tokenizer = Tokenizer.from_pretrained(config.out / "tokenizer").eval()
    settings = [config.classifier_steps, config.seed]
    classifier_result = stages.run("classifier", settings, [], classifier_stage)
    classifier = Classifier(data.num_classes, preset.model.image_side)
    classifier.load(config.out / "classifier" / "classifier.safetensors").eval()

    trained = {}
    for name in MODELS:
        variant = TRANSFORMERS[f"digits-{name}"]
        train = replace(variant.train, seconds=config.transformer_seconds, seed=config.seed)

        def transformer_stage(folder: Path, variant=variant, train=train) -> dict[str, Any]:  # type: ignore[no-untyped-def]
            torch.manual_seed(config.seed)
            model = NextScaleTransformer(variant.model)
            images = data_of(variant.augment).train
            return train_transformer(model, tokenizer, images, folder, train, console=console)

        settings = [asdict(variant), asdict(train)]
        trained[name] = stages.run(name, settings, ["tokenizer"], transformer_stage)
    models = {name: NextScaleTransformer.from_pretrained(config.out / name).eval() for name in MODELS}

    def evaluation_stage(folder: Path) -> dict[str, Any]:
        with console.status("measuring"):
            return _evaluate(config, data, tokenizer, classifier, models, folder)

    settings = {**asdict(config), "out": None}
    measured = stages.run("evaluation", settings, ["tokenizer", "classifier", *MODELS], evaluation_stage)
    for picture in ("samples.png", "knob.png"):
        shutil.copyfile(config.out / "evaluation" / picture, config.out / picture)
    summary = {
        "classifier": classifier_result,
        "tokenizer": tokenizer_result | measured["tokenizer"],
        "models": {name: measured["models"][name] | {"training": trained[name]} for name in MODELS},
        "knob": measured["knob"],
        "sampling": {"cfg": config.cfg, "top_k": config.top_k, "top_p": config.top_p, "seed": config.seed},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (config.out / "summary.json").write_text(json.dumps(summary, indent=2))
    print_summary(summary, console)
    console.print(f"\n{config.out}/samples.png, {config.out}/knob.png, {config.out}/summary.json")
    return summary


def _evaluate(
    config: DemoConfig,
    data: ImageData,
    tokenizer: Tokenizer,
    classifier: Classifier,
    models: dict[str, NextScaleTransformer],
    folder: Path,
) -> dict[str, Any]:
    labels = balanced_labels(data.num_classes, config.per_class)
    sampling = {"cfg": config.cfg, "top_k": config.top_k, "top_p": config.top_p, "seed": config.seed}
    default = TRANSFORMERS["digits-viar"].model.trunk.iterations
    counts = sorted({*config.iterations, default})
    settings: list[tuple[str, int | None]] = [("viar", n) for n in counts] + [("var", None)]

    def images_of(name: str, iterations: int | None) -> Tensor:
        return generate(models[name], tokenizer, labels, iterations=iterations, **sampling)

    seconds = seconds_of([lambda name=name, n=n: images_of(name, n) for name, n in settings])
    knob = []
    for (name, iterations), taken in zip(settings, seconds, strict=True):
        sample = sample_tokens(models[name], tokenizer, labels, iterations=iterations, **sampling)
        knob.append(
            {
                "model": name,
                "iterations": iterations,
                "class_consistency": class_consistency(classifier, images_of(name, iterations), labels),
                "images_per_second": len(labels) / taken,
                "cache_bytes": sample.cache_bytes,
            }
        )
    draw_knob(knob, folder / "knob.png")
    show = balanced_labels(data.num_classes, 10)
    save_grid(generate(models["viar"], tokenizer, show, **sampling), folder / "samples.png", columns=10)

    result = {}
    for name, model in models.items():
        iterations = default if name == "viar" else None
        point = next(p for p in knob if p["model"] == name and p["iterations"] == iterations)
        result[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "validation_loss": validation_loss(model, tokenizer, data.validation),
            "iterations": iterations,
            "class_consistency": point["class_consistency"],
            "images_per_second": point["images_per_second"],
            "peak_cache_bytes": point["cache_bytes"],
            "training_peak_bytes": _training_bytes(model.config, tokenizer, data),
        }
    held_out = data.validation.images  # type: ignore[attr-defined]  # digits are held in memory
    reconstruction = tokenizer.decode(tokenizer.encode(held_out))
    return {
        "models": result,
        "knob": knob,
        "tokenizer": {
            "reconstruction_mse": float((reconstruction - held_out).square().mean()),
            "reconstruction_consistency": class_consistency(
                classifier,
                (reconstruction + 1) / 2,
                data.validation.labels,  # type: ignore[attr-defined]
            ),
        },
    }


def _training_bytes(config: TransformerConfig, tokenizer: Tokenizer, data: ImageData) -> int:
    """Of the deepest training step there can be, so that the draw of iterations has no say."""
    if isinstance(config.trunk, ImplicitTrunkConfig):
        deepest = replace(
            config.trunk, no_grad=(config.trunk.no_grad[1],) * 2, grad=(config.trunk.grad[1],) * 2
        )
        config = replace(config, trunk=deepest)
    model = NextScaleTransformer(config).train()
    batch = data.train.__getitems__(range(TRANSFORMERS["digits-viar"].train.batch_size))
    inputs, targets, labels = tokenize(tokenizer, *batch)
    return training_bytes(model, lambda: cross_entropy(model(labels, inputs), targets))


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The table of `summary.json`."""
    viar, var = (summary["models"][name] for name in MODELS)
    real = summary["classifier"]["held_out_accuracy"]
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("parameters", "parameters", lambda v: f"{v:,}"),
        ("validation loss, nats a token", "validation_loss", lambda v: f"{v:.4f}"),
        (
            f"class consistency (classifier on real digits: {real:.3f})",
            "class_consistency",
            lambda v: f"{v:.3f}",
        ),
        ("images/s", "images_per_second", lambda v: f"{v:,.0f}"),
        ("peak cache, MB", "peak_cache_bytes", lambda v: f"{v / 1e6:.2f}"),
        ("training peak memory, MB", "training_peak_bytes", lambda v: f"{v / 1e6:.1f}"),
    ]
    table = Table(title="VAR and VIAR of equal width and training time, 8 x 8 digits")
    for column in ("", f"VIAR, {viar['iterations']} iterations", "VAR", "VIAR / VAR"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key, show in rows:
        table.add_row(label, show(viar[key]), show(var[key]), f"{viar[key] / var[key]:.3f}")
    table.add_row("training steps", *(f"{m['training']['steps']:,}" for m in (viar, var)), "")
    console.print(table)
    knob = Table(title="The knob: iterations a scale, chosen at inference")
    for column in ("iterations", "class consistency", "images/s", "cache, MB"):
        knob.add_column(column, justify="right")
    for point in summary["knob"]:
        name = str(point["iterations"]) if point["model"] == "viar" else "VAR"
        knob.add_row(
            name,
            f"{point['class_consistency']:.3f}",
            f"{point['images_per_second']:,.0f}",
            f"{point['cache_bytes'] / 1e6:.2f}",
        )
    console.print(knob)


def _fingerprint_of_code() -> str:
    """Hash of the sources that decide a result, and of the versions they run on."""
    digest = hashlib.sha256()
    for package in (Path(deqlib.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    for distribution in ("torch", "scikit-learn", "numpy"):
        digest.update(metadata.version(distribution).encode())
    return digest.hexdigest()
