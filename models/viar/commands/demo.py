"""The whole job on real handwritten digits: tokenizer, VIAR, VAR, pictures, table.

Five stages, see `viar.commands.stages`: "tokenizer" and "classifier", then "viar" and "var", then
"evaluation".
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

import deqlib

from ..data import ImageData, TensorImages, load_data, save_grid, tokenize
from ..evaluation import (
    Classifier,
    accuracy,
    balanced_labels,
    class_consistency,
    seconds_of,
    train_classifier,
    training_bytes,
)
from ..files import replacing
from ..generation.sampling import decode_images, generate, sample_tokens
from ..generation.settings import Sampling
from ..model.config import ImplicitTrunkConfig, TransformerConfig, check_at_least
from ..model.schedule import checked_iterations
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from ..training import (
    TOKENIZERS,
    TRANSFORMERS,
    TokenizerRecipe,
    TrainConfig,
    TransformerRecipe,
    cross_entropy,
    train_tokenizer,
    train_transformer,
    validation_loss,
)
from .checks import check_run
from .demo_tables import print_summary
from .knob import draw_knob
from .stages import BEGUN, Result, Stage, Stages, fingerprint_of_code

MODELS = ("viar", "var")
PACKAGES = (Path(deqlib.__file__).parent, Path(__file__).parents[1])  # deqlib and viar, every room of it
DISTRIBUTIONS = ("torch", "scikit-learn", "numpy")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo."""

    out: Path = Path("runs/demo")
    tokenizer_seconds: float = 60.0
    transformer_seconds: float = 180.0  # of each of the two: of a demo one knows before how long it takes
    classifier_steps: int = 600
    per_class: int = 50  # generated images a class and setting
    iterations: tuple[int, ...] = (1, 2, 3, 5, 8, 12)  # points of the knob
    cfg: float = 1.5
    top_k: int | None = None
    top_p: float | None = 0.96
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate, before minutes of training."""
        counts = {"classifier_steps": self.classifier_steps, "per_class": self.per_class}
        check_at_least("DemoConfig", 1, **counts)
        if not self.iterations or min(self.iterations) < 1:
            raise ValueError(f"DemoConfig: iterations must be counts of at least 1, got {self.iterations}")
        checked_iterations(list(self.iterations))
        Sampling(**self.sampling)
        for seconds in (self.tokenizer_seconds, self.transformer_seconds):
            TrainConfig(seconds=seconds, seed=self.seed)

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of the sampler, besides the iterations."""
        return {"cfg": self.cfg, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}


def demo_command(config: Annotated[DemoConfig, tyro.conf.arg(name="")] = DemoConfig()) -> None:
    """Train tokenizer, VIAR and VAR on handwritten digits, generate, measure, draw.

    Args:
        config: Settings of the demo.
    """
    check_demo(config.out)
    run_demo(config, Console())


def check_demo(out: Path) -> None:
    """Raise `ValueError` unless the demo may work in `out`: new, or that of a demo before.

    A stage begins with an empty folder, so a folder of other work by the name of a stage is refused.
    """
    check_run(out)
    for name in ("tokenizer", "classifier", *MODELS, "evaluation"):
        folder = out / name
        if folder.is_dir() and any(folder.iterdir()) and not (folder / BEGUN).exists():
            raise ValueError(f"--out: {folder} is not of the demo, which would empty it; give another folder")


def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Train, generate, measure, or reuse what stands of an earlier run.

    Args:
        config: settings; its folder `out` is made.
        console: where progress and tables are shown.

    Returns:
        What `summary.json` holds: measures of "classifier", "tokenizer" and both "models", the points of the
        "knob", and the settings of "sampling". Bytes and seconds are plain numbers.
    """
    stages = Stages(config.out, console, fingerprint_of_code(PACKAGES, DISTRIBUTIONS))
    first = stages.run_together(_first_stages(config))
    console.print(f"[dim]VIAR and VAR train side by side, {config.transformer_seconds:.0f} s each[/dim]")
    trained = stages.run_together({name: _transformer_stage(name, config) for name in MODELS})
    with console.status("measuring"):
        measured = stages.run("evaluation", _evaluation_stage(config))
    for picture in ("samples.png", "knob.png"):
        shutil.copyfile(config.out / "evaluation" / picture, config.out / picture)
    summary = {
        "classifier": first["classifier"],
        "tokenizer": first["tokenizer"] | measured["tokenizer"],
        "models": {name: measured["models"][name] | {"training": trained[name]} for name in MODELS},
        "knob": measured["knob"],
        "sampling": config.sampling,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    with replacing(config.out / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode())
    print_summary(summary, console)
    written = ", ".join(f"{config.out}/{name}" for name in ("samples.png", "knob.png", "summary.json"))
    console.print(f"\n{written}", markup=False)
    return summary


# Training


def _first_stages(config: DemoConfig) -> dict[str, Stage]:
    recipe = TOKENIZERS["digits"]
    train = replace(recipe.train, steps=None, seconds=config.tokenizer_seconds, seed=config.seed)
    recipe = replace(recipe, train=train)
    settings = (recipe.data, config.classifier_steps, config.seed)
    return {
        "tokenizer": Stage(partial(_train_tokenizer, recipe), asdict(recipe)),
        "classifier": Stage(partial(_train_classifier, *settings), settings),
    }


def _transformer_stage(name: str, config: DemoConfig) -> Stage:
    recipe = TRANSFORMERS[f"digits-{name}"]
    train = replace(recipe.train, steps=None, seconds=config.transformer_seconds, seed=config.seed)
    recipe = replace(recipe, train=train)
    work = partial(_train_transformer, recipe, config.out / "tokenizer")
    return Stage(work, asdict(recipe), ("tokenizer",))


def _train_tokenizer(recipe: TokenizerRecipe, folder: Path) -> Result:
    torch.manual_seed(recipe.train.seed)
    data = load_data(
        recipe.data, recipe.model.image_side, augment=recipe.augment, augmentations=recipe.augmentations
    )
    tokenizer = Tokenizer(recipe.model)
    return train_tokenizer(
        tokenizer,
        data.train,
        folder,
        recipe.train,
        loss=recipe.loss,
        held_out=data.validation,
        console=Console(quiet=True),
    )


def _train_classifier(source: str, steps: int, seed: int, folder: Path) -> Result:
    torch.manual_seed(seed)
    data = _real_digits(source)
    classifier = Classifier(data.num_classes, TOKENIZERS["digits"].model.image_side)
    train_classifier(classifier, data.train, steps=steps, seed=seed, console=Console(quiet=True))
    classifier.save(folder / "classifier.safetensors")
    return {"held_out_accuracy": accuracy(classifier, data.validation)}


def _train_transformer(recipe: TransformerRecipe, tokenizer: Path, folder: Path) -> Result:
    torch.manual_seed(recipe.train.seed)
    codec = Tokenizer.from_pretrained(tokenizer)
    data = load_data(
        recipe.data, codec.config.image_side, augment=recipe.augment, augmentations=recipe.augmentations
    )
    model = NextScaleTransformer(recipe.model)
    return train_transformer(
        model,
        codec,
        data.train,
        folder,
        recipe.train,
        held_out=data.validation,
        console=Console(quiet=True),
    )


def _real_digits(source: str) -> ImageData:
    return load_data(source, TOKENIZERS["digits"].model.image_side)


# Evaluation


@dataclass(frozen=True)
class _Trained:
    """What the stages before the evaluation made, and the digits they are measured by."""

    tokenizer: Tokenizer
    classifier: Classifier
    models: dict[str, NextScaleTransformer]
    data: ImageData

    @classmethod
    def load(cls, out: Path) -> _Trained:
        data = _real_digits(TOKENIZERS["digits"].data)
        tokenizer = Tokenizer.from_pretrained(out / "tokenizer").eval()
        classifier = Classifier(data.num_classes, tokenizer.config.image_side)
        classifier.load(out / "classifier" / "classifier.safetensors").eval()
        models = {name: NextScaleTransformer.from_pretrained(out / name).eval() for name in MODELS}
        return cls(tokenizer, classifier, models, data)


def _evaluation_stage(config: DemoConfig) -> Stage:
    # Where the run lives and how long training took: the stages before tell what of that counts.
    settings = asdict(config) | {"out": None, "tokenizer_seconds": None, "transformer_seconds": None}
    return Stage(partial(_evaluate, config), settings, ("tokenizer", "classifier", *MODELS))


def _evaluate(config: DemoConfig, folder: Path) -> Result:
    """Measure the models, and draw samples and the knob."""
    trained = _Trained.load(config.out)
    knob = _measure_knob(trained, config)
    draw_knob(knob, folder / "knob.png")
    labels = balanced_labels(trained.data.num_classes, 10)
    images = generate(trained.models["viar"], trained.tokenizer, labels, **config.sampling)
    save_grid(images, folder / "samples.png", columns=10)
    return {
        "models": {name: _measure_model(trained, name, knob) for name in MODELS},
        "knob": knob,
        "tokenizer": _measure_tokenizer(trained),
    }


def _measure_knob(trained: _Trained, config: DemoConfig) -> list[Result]:
    """A point for each count of iterations of VIAR, and one for VAR."""
    labels = balanced_labels(trained.data.num_classes, config.per_class)
    counts = sorted({*config.iterations, _default_iterations()})
    settings: list[tuple[str, int | None]] = [("viar", count) for count in counts] + [("var", None)]
    made: dict[tuple[str, int | None], tuple[Tensor, int]] = {}  # images, bytes of cache

    def make(name: str, iterations: int | None) -> None:
        sampling = Sampling(iterations=iterations, **config.sampling)
        sample = sample_tokens(trained.models[name], trained.tokenizer, labels, sampling)
        made[name, iterations] = decode_images(trained.tokenizer, sample), sample.cache_bytes

    seconds = seconds_of([partial(make, *setting) for setting in settings])
    points = []
    for (name, iterations), taken in zip(settings, seconds, strict=True):
        images, cache_bytes = made[name, iterations]
        loss = validation_loss(
            trained.models[name], trained.tokenizer, trained.data.validation, iterations=iterations
        )
        points.append(
            {
                "model": name,
                "iterations": iterations,
                "class_consistency": class_consistency(trained.classifier, images, labels),
                "validation_loss": loss,
                "images_per_second": len(labels) / taken,
                "cache_bytes": cache_bytes,
            }
        )
    return points


def _measure_model(trained: _Trained, name: str, knob: list[Result]) -> Result:
    """Measures of a model with its own number of iterations."""
    model, iterations = trained.models[name], _default_iterations() if name == "viar" else None
    point = next(p for p in knob if p["model"] == name and p["iterations"] == iterations)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_loss": point["validation_loss"],
        "iterations": iterations,
        "class_consistency": point["class_consistency"],
        "images_per_second": point["images_per_second"],
        "peak_cache_bytes": point["cache_bytes"],
        "training_peak_bytes": _training_bytes(model.config, trained.tokenizer, trained.data),
    }


def _measure_tokenizer(trained: _Trained) -> Result:
    """Measures of held-out digits, encoded and decoded."""
    real = trained.data.validation
    assert isinstance(real, TensorImages)  # digits are held in memory
    images = trained.tokenizer.decode(trained.tokenizer.encode(real.images))
    return {
        "reconstruction_mse": float((images - real.images).square().mean()),
        "reconstruction_consistency": class_consistency(trained.classifier, (images + 1) / 2, real.labels),
    }


def _default_iterations() -> int:
    trunk = TRANSFORMERS["digits-viar"].model.trunk
    assert isinstance(trunk, ImplicitTrunkConfig)
    return trunk.iterations


def _training_bytes(config: TransformerConfig, tokenizer: Tokenizer, data: ImageData) -> int:
    """Memory of the deepest training step there can be, so that the draw of iterations has no say."""
    if isinstance(config.trunk, ImplicitTrunkConfig):
        config = replace(config, trunk=config.trunk.deepest)
    model = NextScaleTransformer(config).train()
    assert isinstance(data.train, TensorImages)
    batch = data.train.__getitems__(range(TRANSFORMERS["digits-viar"].train.batch_size))
    inputs, targets, labels = tokenize(tokenizer, *batch)
    return training_bytes(model, lambda: cross_entropy(model(labels, inputs), targets))
