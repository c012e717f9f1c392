"""The whole job on digits of MNIST: what comes with the package at work, then VIAR and VAR trained alike.

Six stages, see `viar.commands.stages`: "shipped", pictures and the knob of the shipped VIAR; "tokenizer", the
shipped one; "viar", "var" and "judge" side by side; then "evaluation".
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

import deqlib

from ..data import load_data
from ..evaluation import accuracy, judge
from ..files import held, replacing
from ..generation.settings import Sampling
from ..model.config import check_at_least
from ..model.schedule import checked_iterations
from ..model.transformer import NextScaleTransformer
from ..pretrained import fingerprint
from ..tokenizer import Tokenizer
from ..training import TRANSFORMERS, TrainConfig, TransformerRecipe, train_transformer
from ..training.log import read_metrics
from ..weights import load_shipped
from .checks import check_run
from .demo_measures import draw_shipped, measure
from .demo_tables import print_shipped, print_summary
from .output import report
from .stages import BEGUN, Result, Stage, Stages, fingerprint_of_code

MODELS = ("viar", "var")
STAGES = ("shipped", "tokenizer", *MODELS, "judge", "evaluation")
PACKAGES = (Path(deqlib.__file__).parent, Path(__file__).parents[1])  # deqlib and viar, every room of it
DISTRIBUTIONS = ("torch", "mlxtend", "numpy")
SOURCE = "mnist"  # of pictures, and the name of the shipped models
DEPTH = 8  # of VAR: a step of it then takes as long as one of VIAR
MEASUREMENTS = 6  # of held-out pictures while a model trains


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo."""

    out: Path = Path("runs/demo")  # folder of pictures, models and summary.json
    steps: int = 1500  # of the training of VIAR, and of that of VAR
    per_class: int = 50  # generated images a class and setting
    iterations: tuple[int, ...] = (1, 2, 3, 5, 8)  # points of the knob
    cfg: float = 1.5  # guidance; 0 switches it off
    top_k: int | None = None  # most likely tokens kept; None keeps all
    top_p: float | None = 0.96  # probability kept; None keeps all
    seed: int = 0  # of training and images

    def __post_init__(self) -> None:
        """Validate, before minutes of training."""
        check_at_least("DemoConfig", 1, steps=self.steps, per_class=self.per_class)
        if not self.iterations or min(self.iterations) < 1:
            raise ValueError(f"DemoConfig: iterations must be counts of at least 1, got {self.iterations}")
        checked_iterations(list(self.iterations))
        Sampling(**self.sampling)
        TrainConfig(steps=self.steps, seed=self.seed)

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of the sampler, besides the iterations."""
        return {"cfg": self.cfg, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}


def demo_command(config: Annotated[DemoConfig, tyro.conf.arg(name="")] = DemoConfig()) -> None:
    """Show the shipped VIAR of handwritten digits, train VIAR and VAR alike, generate, measure, draw.

    Args:
        config: Settings of the demo.
    """
    check_demo(config.out)
    with held(config.out):
        report({"out": config.out, **run_demo(config, Console())})


def check_demo(out: Path) -> None:
    """Raise `ValueError` unless the demo may work in `out`: new, or that of a demo before.

    A stage begins with an empty folder, so a folder of other work by the name of a stage is refused.
    """
    check_run(out)
    for name in STAGES:
        folder = out / name
        if folder.is_dir() and any(folder.iterdir()) and not (folder / BEGUN).exists():
            raise ValueError(f"--out: {folder} is not of the demo, which would empty it; give another folder")


def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Show, train, generate, measure, or reuse what stands of an earlier run.

    Args:
        config: settings; its folder `out` is made.
        console: where progress and tables are shown.

    Returns:
        What `summary.json` holds: the knob of the "shipped" VIAR; measures of the "judge", of "real" pictures
        and of all "models"; the points of the "knob" of the VIAR that was trained; and the settings of
        "sampling". Bytes and seconds are plain numbers.
    """
    stages = Stages(config.out, console, fingerprint_of_code(PACKAGES, DISTRIBUTIONS))
    with console.status("the shipped VIAR generates"):
        shipped = stages.run("shipped", _shipped_stage(config))
        stages.run("tokenizer", _tokenizer_stage())
    _publish(config.out, "shipped", ("shipped.png", "shipped_knob.png"), console)
    print_shipped(shipped["knob"], console)
    console.print(f"[dim]VIAR and VAR train side by side, {config.steps:,} steps each[/dim]")
    trained = stages.run_together(
        {**{name: _transformer_stage(name, config) for name in MODELS}, "judge": _judge_stage()}
    )
    with console.status("measuring"):
        measured = stages.run("evaluation", _evaluation_stage(config))
    summary = {
        "shipped": shipped,
        "judge": trained["judge"],
        **measured,
        "models": {
            name: about | ({"training": trained[name]} if name in MODELS else {})
            for name, about in measured["models"].items()
        },
        "sampling": config.sampling,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    with replacing(config.out / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode())
    print_summary(summary, console)
    _publish(config.out, "evaluation", ("samples.png", "knob.png"), console)
    console.print(f"{config.out}/summary.json", markup=False)
    return summary


def _publish(out: Path, stage: str, pictures: tuple[str, ...], console: Console) -> None:
    """Put pictures of a stage where one looks for them, and say where."""
    for picture in pictures:
        with replacing(out / picture) as file:
            file.write((out / stage / picture).read_bytes())
        console.print(f"{out / picture}", markup=False)


# What comes with the package


def _shipped_stage(config: DemoConfig) -> Stage:
    model, codec = load_shipped(SOURCE)
    settings = (fingerprint(model), fingerprint(codec), config.iterations, config.sampling)
    return Stage(partial(_show_shipped, config), settings)


def _show_shipped(config: DemoConfig, folder: Path) -> Result:
    model, codec = load_shipped(SOURCE)
    held_out = load_data(SOURCE, codec.config.image_side).validation
    return {"knob": draw_shipped(model, codec, held_out, config.iterations, config.sampling, folder)}


def _tokenizer_stage() -> Stage:
    """The shipped tokenizer beside the models that learn from its tokens, as commands want it."""
    return Stage(_copy_tokenizer, fingerprint(load_shipped(SOURCE)[1]))


def _copy_tokenizer(folder: Path) -> Result:
    load_shipped(SOURCE)[1].save_pretrained(folder)
    return {}


# Training


def _transformer_stage(name: str, config: DemoConfig) -> Stage:
    recipe = TRANSFORMERS[f"mnist-{name}-d12"]
    train = replace(
        recipe.train,
        steps=config.steps,
        seed=config.seed,
        sample_every=0,
        validate_every=max(1, config.steps // MEASUREMENTS),
    )
    model = replace(recipe.model, depth=DEPTH, drop_path=None)  # the drop path of that depth
    recipe = replace(recipe, data=SOURCE, model=model, train=train)
    work = partial(_train_transformer, recipe, config.out / "tokenizer")
    return Stage(work, asdict(recipe), ("tokenizer",))


def _train_transformer(recipe: TransformerRecipe, tokenizer: Path, folder: Path) -> Result:
    torch.manual_seed(recipe.train.seed)
    codec = Tokenizer.from_pretrained(tokenizer)
    data = load_data(recipe.data, codec.config.image_side)
    result = train_transformer(
        NextScaleTransformer(recipe.model),
        codec,
        data.train,
        folder,
        recipe.train,
        held_out=data.validation,
        console=Console(quiet=True),
    )
    rows = read_metrics(folder / "metrics.jsonl")
    last = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    return result | {"last_over_best": last / result["validation_loss"]}


def _judge_stage() -> Stage:
    return Stage(partial(_train_judge, SOURCE), SOURCE)


def _train_judge(source: str, folder: Path) -> Result:
    data = load_data(source, load_shipped(source)[1].config.image_side)
    return {
        "held_out_accuracy": accuracy(judge(data, cache=folder, console=Console(quiet=True)), data.validation)
    }


# Evaluation


def _evaluation_stage(config: DemoConfig) -> Stage:
    # Where the run lives and how long training took: the stages before tell what of that counts.
    settings = asdict(config) | {"out": None, "steps": None}
    return Stage(partial(_evaluate, config), settings, ("shipped", "tokenizer", *MODELS, "judge"))


def _evaluate(config: DemoConfig, folder: Path) -> Result:
    """Measure all models, and draw samples and the knob."""
    out = config.out
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    models = {name: NextScaleTransformer.from_pretrained(out / name) for name in MODELS}
    models["shipped"] = load_shipped(SOURCE)[0]
    data = load_data(SOURCE, tokenizer.config.image_side)
    judged_by = judge(data, cache=out / "judge", console=Console(quiet=True))
    settings = config.iterations, config.per_class, config.sampling
    return measure(models, tokenizer, data, judged_by, *settings, folder)
