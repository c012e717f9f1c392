"""The command `viar`: flags come from the typed dataclasses of the package."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from tyro.extras import SubcommandApp, subcommand_type_from_defaults

from .config import check_at_least
from .data import load_data
from .demo import DemoConfig, run_demo
from .evaluate import Classifier, accuracy, balanced_labels, class_consistency, train_classifier
from .iterations import Adaptive, Iterations
from .pictures import save_grid
from .presets import TOKENIZERS, TRANSFORMERS
from .sampling import generate
from .tokenizer import Tokenizer
from .train import train_tokenizer, train_transformer, validation_loss
from .transformer import NextScaleTransformer

app = SubcommandApp()
console = Console()

TokenizerChoice = Annotated[subcommand_type_from_defaults(TOKENIZERS), tyro.conf.arg(name="")]
TransformerChoice = Annotated[subcommand_type_from_defaults(TRANSFORMERS), tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample."""

    iterations: tuple[int, ...] = ()  # one for all scales, two for first and last, or one a scale
    adaptive: float | None = None  # instead: iterate until the relative residual is below this
    cfg: float = 1.5  # guidance; 0 switches it off
    top_k: int | None = 900  # most likely tokens kept
    top_p: float | None = 0.96  # probability kept
    seed: int = 0
    cache: Literal["equilibrium", "iterate"] = "equilibrium"
    batch_size: int = 100  # images generated at a time; changes memory, not the images

    def run(self, model: NextScaleTransformer, tokenizer: Tokenizer, labels: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of all labels, with a progress bar."""
        starts = range(0, len(labels), self.batch_size)
        return torch.cat(
            [
                generate(
                    model,
                    tokenizer,
                    labels[start : start + self.batch_size],
                    iterations=self._iterations(),
                    cfg=self.cfg,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    seed=self.seed,
                    first_index=start,
                    cache=self.cache,
                )
                for start in track(starts, "generate", console=console)
            ]
        )

    def _iterations(self) -> Iterations | None:
        if self.adaptive is not None:
            if self.iterations:
                raise ValueError("--iterations and --adaptive exclude each other; give one of them")
            return Adaptive(rtol=self.adaptive)
        if not self.iterations:
            return None
        if len(self.iterations) == 1:
            return self.iterations[0]
        return self.iterations if len(self.iterations) == 2 else list(self.iterations)


SamplingFlags = Annotated[Sampling, tyro.conf.arg(name="")]


@app.command(name="train-tokenizer")
def train_tokenizer_command(preset: TokenizerChoice, out: Path) -> None:
    """Train a tokenizer, starting from a preset whose every setting is a flag.

    Args:
        preset: Where to start from.
        out: Folder of the run. An interrupted run goes on.
    """
    _refuse_finished(out)
    data = load_data(preset.data, preset.model.image_side, augment=preset.augment)
    torch.manual_seed(preset.train.seed)
    tokenizer = Tokenizer(preset.model)
    _show(train_tokenizer(tokenizer, data.train, out, preset.train, loss=preset.loss, console=console))


@app.command(name="train")
def train_command(preset: TransformerChoice, tokenizer: str, out: Path) -> None:
    """Train a VAR or a VIAR on the tokens of a trained tokenizer.

    Args:
        preset: Where to start from; every setting is a flag.
        tokenizer: Folder or hub id of the tokenizer.
        out: Folder of the run. An interrupted run goes on.
    """
    _refuse_finished(out)
    codec = Tokenizer.from_pretrained(tokenizer)
    data = load_data(preset.data, codec.config.image_side, augment=preset.augment)
    torch.manual_seed(preset.train.seed)
    model = NextScaleTransformer(preset.model)
    _show(train_transformer(model, codec, data.train, out, preset.train, console=console))


@app.command(name="generate")
def generate_command(
    model: str,
    tokenizer: str,
    out: Path = Path("samples.png"),
    labels: tuple[int, ...] = (),
    per_class: int = 10,
    sampling: SamplingFlags = Sampling(),  # frozen
) -> None:
    """Generate images into one PNG, a row a class.

    Args:
        model: Folder or hub id of a VAR or VIAR.
        tokenizer: Folder or hub id of its tokenizer.
        out: PNG to write.
        labels: Classes; default all.
        per_class: Images of each.
        sampling: How to sample.
    """
    check_at_least("viar generate", 1, per_class=per_class)
    transformer, codec = _load(model, tokenizer)
    classes = torch.tensor(labels or range(transformer.config.num_classes))
    images = sampling.run(transformer, codec, classes.repeat_interleave(per_class))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, out, columns=per_class)
    console.print(f"{len(images)} images in {out}")


@app.command(name="evaluate")
def evaluate_command(
    model: str,
    tokenizer: str,
    data: str = "digits",
    per_class: int = 100,
    sampling: SamplingFlags = Sampling(),  # frozen
) -> None:
    """Print validation loss and class consistency as JSON.

    Args:
        model: Folder or hub id of a VAR or VIAR.
        tokenizer: Folder or hub id of its tokenizer.
        data: Source of real images: digits, mnist, or a folder with a sub-folder a class.
        per_class: Images generated of each class.
        sampling: How to sample.
    """
    check_at_least("viar evaluate", 1, per_class=per_class)
    transformer, codec = _load(model, tokenizer)
    source = load_data(data, codec.config.image_side)
    torch.manual_seed(0)
    classifier = Classifier(source.num_classes, codec.config.image_side)
    train_classifier(classifier, source.train, console=console)
    labels = balanced_labels(source.num_classes, per_class)
    images = sampling.run(transformer, codec, labels)
    _show(
        {
            "validation_loss": validation_loss(transformer, codec, source.validation),
            "class_consistency": class_consistency(classifier, images, labels),
            "classifier_held_out_accuracy": accuracy(classifier, source.validation),
        }
    )


@app.command(name="demo")
def demo_command(config: Annotated[DemoConfig, tyro.conf.arg(name="")] = DemoConfig()) -> None:  # noqa: B008
    """Train tokenizer, VIAR and VAR on handwritten digits, generate, measure, draw.

    Args:
        config: Settings of the demo.
    """
    run_demo(config, console)


def main() -> None:
    """Entry point: bad settings end with a message, not a traceback."""
    try:
        app.cli(prog="viar", config=(tyro.conf.CascadeSubcommandArgs,))
    except (ValueError, FileNotFoundError) as error:
        message = f"[red]viar:[/red] {escape(str(error))}"  # brackets in it are no markup
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)


def _refuse_finished(out: Path) -> None:
    if (out / "model.safetensors").exists():
        raise ValueError(f"--out: {out} holds a finished run; give another folder, or remove this one")


def _load(model: str, tokenizer: str) -> tuple[NextScaleTransformer, Tokenizer]:
    return NextScaleTransformer.from_pretrained(model).eval(), Tokenizer.from_pretrained(tokenizer).eval()


def _show(metrics: dict[str, Any]) -> None:
    console.print_json(json.dumps(metrics))


if __name__ == "__main__":
    main()
