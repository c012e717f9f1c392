"""The command `viar`: flags come from the typed dataclasses of the package."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from tyro.extras import SubcommandApp, subcommand_type_from_defaults

from ..checkpoints.convert import convert_checkpoint, describe, load_official
from ..data import load_data, read_mask, read_picture, save_edit, save_grid, save_picture
from ..evaluation import Classifier, accuracy, balanced_labels, class_consistency, train_classifier
from ..generation.editing import box_mask, edit
from ..generation.inference import prepare_inference
from ..generation.sampling import generate
from ..generation.series.series import FORMATS, generate_series
from ..generation.settings import Sampling as Settings
from ..model.config import check_at_least
from ..model.schedule import Adaptive, Budget, Iterations
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from ..training import TOKENIZERS, TRANSFORMERS, train_tokenizer, train_transformer, validation_loss
from .demo import DemoConfig, run_demo

app = SubcommandApp()
console = Console()

TokenizerChoice = Annotated[subcommand_type_from_defaults(TOKENIZERS), tyro.conf.arg(name="")]
Model = TypeVar("Model", NextScaleTransformer, Tokenizer)
TransformerChoice = Annotated[subcommand_type_from_defaults(TRANSFORMERS), tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample."""

    iterations: tuple[int, ...] = ()  # one for all scales, two for first and last, or one a scale
    adaptive: float | None = None  # instead: iterate until the relative residual is below this
    budget: int | None = None  # instead: evaluations in all, falling from the first scale to the last
    warm_start: bool = False  # start each scale where the fixed point of the one before suggests
    guidance_reuse: int = 0  # last scales that reuse the guidance of the scale before them; an approximation
    cfg: float = 1.5  # guidance; 0 switches it off
    top_k: int | None = 900  # most likely tokens kept
    top_p: float | None = 0.96  # probability kept
    seed: int = 0
    cache: Literal["equilibrium", "iterate"] = "equilibrium"
    batch_size: int = 100  # images generated at a time; changes memory, not the images (but see --num)
    device: str = "auto"  # cpu, cuda, or cuda:1; auto is cuda where there is one
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the blocks' weights; default as saved
    compile: bool = False  # compile the blocks: minutes at the first batch, for many on a GPU

    def run(
        self, model: NextScaleTransformer, tokenizer: Tokenizer, labels: torch.Tensor, report: bool = False
    ) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of all labels, on the CPU, with a progress bar.

        `report` prints what each scale of each batch took.
        """
        images = []
        for start in track(range(0, len(labels), self.batch_size), "generate", console=console):
            chunk = labels[start : start + self.batch_size]
            settings = {"first_index": start, **self.settings()}
            if report:
                made, took = generate(model, tokenizer, chunk, return_report=True, **settings)
                console.print(f"from image {start}\n{took}", highlight=False)
            else:
                made = generate(model, tokenizer, chunk, **settings)
            images.append(made.cpu())
        return torch.cat(images)

    def settings(self) -> dict[str, Any]:
        """What every function that samples takes by these names."""
        return {
            "iterations": self._iterations(),
            "cfg": self.cfg,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
            "cache": self.cache,
            "warm_start": self.warm_start,
            "guidance_reuse": self.guidance_reuse,
        }

    def _iterations(self) -> Iterations | None:
        given = {"iterations": bool(self.iterations), "adaptive": self.adaptive, "budget": self.budget}
        if sum(value not in (None, False) for value in given.values()) > 1:
            raise ValueError("--iterations, --adaptive and --budget exclude each other; give one of them")
        if self.adaptive is not None:
            return Adaptive(rtol=self.adaptive)
        if self.budget is not None:
            return Budget(evaluations=self.budget)
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
    out: Path | None = None,
    labels: tuple[int, ...] = (),
    per_class: int | None = None,
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num-images"])] = None,
    format: tuple[Literal["png", "npz"], ...] = (),
    report: bool = False,
    sampling: SamplingFlags = Sampling(),  # frozen
) -> None:
    """Generate images: into one PNG, a row a class, or with --num into a folder of numbered PNGs.

    With --num an image depends on its number, its label and the sampling settings alone. So a run that
    was stopped goes on where it was, one of another --batch-size or number of processes (accelerate launch,
    torchrun) gives the same files, and a larger --num continues the series. With --adaptive or weights
    below float32 the batch size has to stay the same for that.

    Args:
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VAR or VIAR.
        tokenizer: The same, of its tokenizer.
        out: PNG to write, default samples.png; with --num a folder, default samples.
        labels: Classes; default all. With --num the images get them in turn.
        per_class: Images of each, default 10; not with --num.
        num: Images to generate into a folder. torchrun needs it spelled out, --num-images.
        format: Only with --num: png keeps the numbered pictures, npz writes one archive for evaluation;
            default both.
        report: Print evaluations, residual, seconds and cache of each scale; not with --num.
        sampling: How to sample.
    """
    if num is not None:
        if per_class is not None:
            raise ValueError("--num and --per-class exclude each other; give one of them")
        if report:
            raise ValueError("--report: not with --num; generate a few images without it to see the report")
        _generate_series(model, tokenizer, out or Path("samples"), labels, num, format or FORMATS, sampling)
        return
    if format:
        raise ValueError("--format: only with --num; without it there is one PNG")
    out, per_class = out or Path("samples.png"), 10 if per_class is None else per_class
    check_at_least("viar generate", 1, per_class=per_class)
    transformer, codec = _load(model, tokenizer, sampling)
    classes = torch.tensor(labels or range(transformer.config.num_classes))
    images = sampling.run(transformer, codec, classes.repeat_interleave(per_class), report)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, out, columns=per_class)
    console.print(f"{len(images)} images in {out}")


def _generate_series(
    model: str,
    tokenizer: str,
    out: Path,
    labels: tuple[int, ...],
    num: int,
    formats: tuple[str, ...],
    sampling: Sampling,
) -> None:
    transformer, codec = _load(model, tokenizer, sampling)
    report = generate_series(
        transformer,
        codec,
        out,
        num,
        labels=labels or None,
        formats=formats,
        batch_size=sampling.batch_size,
        console=console,
        sampling=Settings(**sampling.settings()),
    )
    if dist.is_initialized():
        dist.destroy_process_group()  # NCCL complains if it is left
    if _process() == 0:
        archive = f", all in {report.archive}" if report.archive else ""
        console.print(
            f"{report.num} images in {report.folder}{archive}; {report.made} made now, {report.resampled} of "
            f"them sampled twice to be exact, {report.made / max(report.seconds, 1e-9):.3g} images/s"
        )


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
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VAR or VIAR.
        tokenizer: The same, of its tokenizer.
        data: Source of real images: digits, mnist, or a folder with a sub-folder a class.
        per_class: Images generated of each class.
        sampling: How to sample.
    """
    check_at_least("viar evaluate", 1, per_class=per_class)
    transformer, codec = _load(model, tokenizer, sampling)
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


@app.command(name="edit")
def edit_command(
    model: str,
    tokenizer: str,
    image: Path,
    label: int,
    box: tuple[float, float, float, float] | None = None,
    mask: Path | None = None,
    invert: bool = False,
    keep: Literal["features", "codes"] = "features",
    border: int | None = None,
    num: int = 1,
    out: Path = Path("edited.png"),
    sampling: SamplingFlags = Sampling(),  # frozen
) -> None:
    """Make a part of a picture anew: in-painting, out-painting with --invert, or into another class.

    Writes the result, and beside it a strip of the picture, the mask and every result.

    Args:
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VAR or VIAR.
        tokenizer: The same, of its tokenizer.
        image: Picture to edit; one of another size than the model's is resized and its centre cut out.
        label: Class that guides the new part.
        box: The part to make anew: top, left, bottom, right as fractions of the picture.
        mask: Instead of a box, a picture of the same size: white keeps, black is made anew.
        invert: Turn box or mask round, for out-painting.
        keep: Hold the kept part's features and pixels, or its codes alone, as published.
        border: Pixels over which kept passes into new; default half a token. With features only.
        num: Results to make; they differ in their random numbers.
        out: PNG to write. Several are numbered: edited-0.png, edited-1.png. The strip is edited-strip.png.
        sampling: How to sample.
    """
    check_at_least("viar edit", 1, num=num)
    transformer, codec = _load(model, tokenizer, sampling)
    side = codec.config.image_side
    picture, size = read_picture(image, side)
    if size != (side, side):
        cut = f"{image} is {size[0]} x {size[1]}: resized, and the centre of {side} x {side} cut out"
        console.print(escape(cut))
    if box is not None and mask is None:
        kept = box_mask(box, side)
    elif mask is not None and box is None:
        kept = read_mask(mask, side, size)
    else:
        raise ValueError("expected one of --box and --mask, got " + ("none" if box is None else "both"))
    kept = 1 - kept if invert else kept
    before = picture.to(_device(sampling.device)).expand(min(num, sampling.batch_size), -1, -1, -1)
    edited = torch.cat(
        [
            edit(
                transformer,
                codec,
                before[: num - start],
                kept,
                [label] * len(before[: num - start]),
                keep=keep,
                border=border,
                first_index=start,
                sampling=Settings(**sampling.settings()),
            ).cpu()
            for start in track(range(0, num, sampling.batch_size), "edit", console=console)
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for index, result in enumerate(edited):
        save_picture(result, out if num == 1 else out.with_stem(f"{out.stem}-{index}"))
    strip = out.with_stem(f"{out.stem}-strip")
    save_edit(picture, kept, edited, strip)
    console.print(f"{num} edited in {out.parent}, side by side in {strip}")


@app.command(name="convert")
def convert_command(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    sides: tuple[int, ...] = (),
    num_heads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a published checkpoint into a folder that the other commands read, or such a folder into one.

    Args:
        source: File with a published tokenizer, VAR or VIAR (.pth, .safetensors), or a folder.
        out: Folder; or file ending in .safetensors or .pth.
        sides: Of a published tokenizer off the 256-pixel ladder.
        num_heads: Of a published transformer without a learned attention scale; default width / 64.
        overwrite: Replace what out holds.
    """
    model = convert_checkpoint(source, out, sides=sides or None, num_heads=num_heads, overwrite=overwrite)
    table = Table(title=str(out), show_header=False)
    for name, value in describe(model).items():
        table.add_row(name, value)
    console.print(table)


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
        process = f" (process {_process()})" if _process() else ""
        message = f"[red]viar:[/red] {escape(str(error))}{process}"  # brackets in it are no markup
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("[red]viar:[/red] interrupted")
        sys.exit(130)


def _refuse_finished(out: Path) -> None:
    if (out / "model.safetensors").exists():
        raise ValueError(f"--out: {out} holds a finished run; give another folder, or remove this one")


def _load(model: str, tokenizer: str, sampling: Sampling) -> tuple[NextScaleTransformer, Tokenizer]:
    """Both ready to generate, on the device."""
    where = _device(sampling.device)
    transformer = _load_one(NextScaleTransformer, model, "--model").to(where)
    codec = _load_one(Tokenizer, tokenizer, "--tokenizer").to(where)
    dtype = None if sampling.dtype is None else getattr(torch, sampling.dtype)
    prepare_inference(transformer, codec, dtype=dtype, compile=sampling.compile)
    return transformer, codec


def _load_one(kind: type[Model], source: str, flag: str) -> Model:
    if not Path(source).is_file():
        return kind.from_pretrained(source).eval()
    loaded = load_official(source)
    if not isinstance(loaded, kind):
        raise ValueError(f"{flag}: expected a {kind.__name__}, found a {type(loaded).__name__} in {source}")
    return loaded.eval()


def _device(name: str) -> torch.device:
    """Of that name; of several processes each gets a GPU of its own."""
    found = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if found else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type != "cuda":
        return device
    if not found:
        raise ValueError(f"--device: {name} asked for, but PyTorch finds no GPU; use cpu")
    own = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if own >= torch.cuda.device_count():
        raise ValueError(f"--device: no GPU {own}, PyTorch finds {torch.cuda.device_count()}")
    return torch.device("cuda", own)


def _process() -> int:
    """Index of this process among those started together."""
    return int(os.environ.get("RANK", 0))


def _show(metrics: dict[str, Any]) -> None:
    console.print_json(json.dumps(metrics))


if __name__ == "__main__":
    main()
