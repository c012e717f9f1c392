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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import deqlib

from ..data import ImageData, load_data, save_grid, tokenize
from ..evaluation import (
    Classifier,
    accuracy,
    balanced_labels,
    class_consistency,
    seconds_of,
    train_classifier,
    training_bytes,
)
from ..generation.sampling import decode_images, generate, sample_tokens
from ..generation.settings import Sampling
from ..model.config import ImplicitTrunkConfig, TransformerConfig
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from ..training import (
    TOKENIZERS,
    TRANSFORMERS,
    TokenizerPreset,
    TransformerPreset,
    cross_entropy,
    train_tokenizer,
    train_transformer,
    validation_loss,
)
from .knob import draw_knob

MODELS = ("viar", "var")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo."""

    out: Path = Path("runs/demo")
    tokenizer_seconds: float = TOKENIZERS["digits"].train.seconds
    transformer_seconds: float = TRANSFORMERS["digits-viar"].train.seconds  # of each of the two
    classifier_steps: int = 600
    per_class: int = 50  # generated images a class and setting
    iterations: tuple[int, ...] = (1, 2, 3, 5, 8, 12)  # points of the knob
    cfg: float = 1.5
    top_k: int | None = None
    top_p: float | None = 0.96
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """A piece of work whose result can be kept."""

    work: Callable[[Path], dict[str, Any]]  # from the stage's folder to its result, plain values only
    settings: Any  # all that decides the result, besides the stages before and the code
    before: tuple[str, ...] = ()  # names of the stages it builds on


@dataclass
class Stages:
    """Runs stages whose last result does not stand."""

    root: Path
    console: Console
    code: str = field(default_factory=lambda: _fingerprint_of_code())

    def run(self, name: str, stage: Stage) -> dict[str, Any]:
        """Result of one stage, from now or from the last time."""
        fingerprint, result = self._look_up(name, stage)
        if result is None:
            result = stage.work(self._begin(name, fingerprint))
            self._finish(name, fingerprint, result)
        return result

    def run_together(self, stages: dict[str, Stage]) -> dict[str, dict[str, Any]]:
        """Results of stages that do not build on one another, by name.

        Each runs in a process of its own on its share of the cores: small models gain little from more
        threads, and whatever else keeps the machine busy meets all of them alike. Their `work` is sent to
        those processes, so it must be picklable.
        """
        found = {name: self._look_up(name, stage) for name, stage in stages.items()}
        results = {name: result for name, (_, result) in found.items() if result is not None}
        todo = [name for name in stages if name not in results]
        if not todo:
            return results
        threads = max(1, torch.get_num_threads() // len(todo))
        columns = (TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[shown]}"))
        with (
            ProcessPoolExecutor(
                len(todo), get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
            ) as pool,
            Progress(SpinnerColumn(), *columns, console=self.console) as bar,
        ):
            running = {
                pool.submit(stages[name].work, self._begin(name, found[name][0])): (
                    name,
                    bar.add_task(name, total=None, shown=""),
                )
                for name in todo
            }
            while running:
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    name, task = running.pop(future)
                    results[name] = future.result()
                    self._finish(name, found[name][0], results[name])
                    bar.stop_task(task)
                for name, task in running.values():
                    bar.update(task, shown=_last_metrics(self.root / name))
        return results

    def _look_up(self, name: str, stage: Stage) -> tuple[str, dict[str, Any] | None]:
        """Fingerprint of a stage, and its last result if that stands."""
        upstream = [
            json.loads((self.root / b / "done.json").read_text())["fingerprint"] for b in stage.before
        ]
        key = json.dumps([stage.settings, upstream, self.code], sort_keys=True, default=str)
        fingerprint = hashlib.sha256(key.encode()).hexdigest()
        done = self.root / name / "done.json"
        if done.exists():
            record = json.loads(done.read_text())
            if record["fingerprint"] == fingerprint:
                self.console.print(f"[dim]{name}: unchanged, reused from {done.parent}[/dim]")
                return fingerprint, record["result"]
        return fingerprint, None

    def _begin(self, name: str, fingerprint: str) -> Path:
        """Folder of a stage: as an interrupted run of the same stage left it, else empty."""
        folder = self.root / name
        begun = folder / "begun.json"
        interrupted = begun.exists() and not (folder / "done.json").exists()
        if not (interrupted and json.loads(begun.read_text()) == fingerprint):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            begun.write_text(json.dumps(fingerprint))
        return folder

    def _finish(self, name: str, fingerprint: str, result: dict[str, Any]) -> None:
        done = self.root / name / "done.json"
        fresh = done.with_suffix(".new")
        fresh.write_text(json.dumps({"fingerprint": fingerprint, "result": result}, indent=2))
        os.replace(fresh, done)


def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Train, generate, measure; returns what `summary.json` holds."""
    stages, seed = Stages(config.out, console), config.seed
    codec, variants = TOKENIZERS["digits"], {name: TRANSFORMERS[f"digits-{name}"] for name in MODELS}
    codec = replace(codec, train=replace(codec.train, seconds=config.tokenizer_seconds, seed=seed))
    first = stages.run_together(
        {
            "tokenizer": Stage(partial(_train_tokenizer, codec), asdict(codec)),
            "classifier": Stage(
                partial(_train_classifier, codec.data, config.classifier_steps, seed),
                [codec.data, config.classifier_steps, seed],
            ),
        }
    )
    console.print(f"[dim]VIAR and VAR train side by side, {config.transformer_seconds:.0f} s each[/dim]")
    training = {}
    for name, variant in variants.items():
        train = replace(variant.train, seconds=config.transformer_seconds, seed=seed)
        variant = replace(variant, train=train)
        work = partial(_train_transformer, variant, config.out / "tokenizer")
        training[name] = Stage(work, asdict(variant), ("tokenizer",))
    trained = stages.run_together(training)

    with console.status("measuring"):
        measured = stages.run(
            "evaluation",
            Stage(
                partial(_evaluate, config),
                {**asdict(config), "out": None, "tokenizer_seconds": None, "transformer_seconds": None},
                ("tokenizer", "classifier", *MODELS),
            ),
        )
    for picture in ("samples.png", "knob.png"):
        shutil.copyfile(config.out / "evaluation" / picture, config.out / picture)
    summary = {
        "classifier": first["classifier"],
        "tokenizer": first["tokenizer"] | measured["tokenizer"],
        "models": {name: measured["models"][name] | {"training": trained[name]} for name in MODELS},
        "knob": measured["knob"],
        "sampling": {"cfg": config.cfg, "top_k": config.top_k, "top_p": config.top_p, "seed": seed},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (config.out / "summary.json").write_text(json.dumps(summary, indent=2))
    print_summary(summary, console)
    console.print(f"\n{config.out}/samples.png, {config.out}/knob.png, {config.out}/summary.json")
    return summary


def _train_tokenizer(preset: TokenizerPreset, folder: Path) -> dict[str, Any]:
    torch.manual_seed(preset.train.seed)
    data = load_data(preset.data, preset.model.image_side, augment=preset.augment)
    tokenizer = Tokenizer(preset.model)
    return train_tokenizer(
        tokenizer, data.train, folder, preset.train, loss=preset.loss, console=Console(quiet=True)
    )


def _train_classifier(source: str, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(seed)
    data = _real_digits(source)
    classifier = Classifier(data.num_classes, TOKENIZERS["digits"].model.image_side)
    train_classifier(classifier, data.train, steps=steps, seed=seed, console=Console(quiet=True))
    classifier.save(folder / "classifier.safetensors")
    return {"held_out_accuracy": accuracy(classifier, data.validation)}


def _train_transformer(preset: TransformerPreset, tokenizer: Path, folder: Path) -> dict[str, Any]:
    torch.manual_seed(preset.train.seed)
    codec = Tokenizer.from_pretrained(tokenizer)
    data = load_data(preset.data, codec.config.image_side, augment=preset.augment)
    model = NextScaleTransformer(preset.model)
    return train_transformer(model, codec, data.train, folder, preset.train, console=Console(quiet=True))


def _real_digits(source: str) -> ImageData:
    return load_data(source, TOKENIZERS["digits"].model.image_side)


def _last_metrics(folder: Path) -> str:
    """The last line of a run's log, for the screen."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return "  ".join(f"{key} {value:.4g}" for key, value in json.loads(lines[-1]).items())
    except (OSError, IndexError, ValueError):  # not yet there, or being written
        return ""


def _evaluate(config: DemoConfig, folder: Path) -> dict[str, Any]:
    data = _real_digits(TOKENIZERS["digits"].data)
    tokenizer = Tokenizer.from_pretrained(config.out / "tokenizer").eval()
    classifier = Classifier(data.num_classes, tokenizer.config.image_side)
    classifier.load(config.out / "classifier" / "classifier.safetensors").eval()
    models = {name: NextScaleTransformer.from_pretrained(config.out / name).eval() for name in MODELS}
    labels = balanced_labels(data.num_classes, config.per_class)
    sampling = {"cfg": config.cfg, "top_k": config.top_k, "top_p": config.top_p, "seed": config.seed}
    default = TRANSFORMERS["digits-viar"].model.trunk.iterations
    counts = sorted({*config.iterations, default})
    settings: list[tuple[str, int | None]] = [("viar", n) for n in counts] + [("var", None)]

    made: dict[tuple[str, int | None], tuple[Tensor, int]] = {}  # images, bytes of cache

    def make(name: str, iterations: int | None) -> dict[tuple[str, int | None], tuple[Tensor, int]]:
        sample = sample_tokens(models[name], tokenizer, labels, Sampling(iterations=iterations, **sampling))
        made[name, iterations] = decode_images(tokenizer, sample), sample.cache_bytes
        return made

    seconds = seconds_of([partial(make, name, n) for name, n in settings])
    knob = []
    for (name, iterations), taken in zip(settings, seconds, strict=True):
        images, cache_bytes = made[name, iterations]
        knob.append(
            {
                "model": name,
                "iterations": iterations,
                "class_consistency": class_consistency(classifier, images, labels),
                "validation_loss": validation_loss(
                    models[name], tokenizer, data.validation, iterations=iterations
                ),
                "images_per_second": len(labels) / taken,
                "cache_bytes": cache_bytes,
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
            "validation_loss": point["validation_loss"],
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
        ratio = f"{viar[key] / var[key]:.3f}" if var[key] else "-"  # no image may be of its class
        table.add_row(label, show(viar[key]), show(var[key]), ratio)
    table.add_row("training steps, in equal time", *(f"{m['training']['steps']:,}" for m in (viar, var)), "")
    console.print(table)
    knob = Table(title="The knob: iterations a scale, chosen at inference")
    for column in ("iterations", "class consistency", "validation loss", "images/s", "cache, MB"):
        knob.add_column(column, justify="right")
    for point in summary["knob"]:
        name = str(point["iterations"]) if point["model"] == "viar" else "VAR"
        knob.add_row(
            name,
            f"{point['class_consistency']:.3f}",
            f"{point['validation_loss']:.4f}",
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
