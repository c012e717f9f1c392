"""`viar generate`: a grid of images, or a series in a folder."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from torch import Tensor

from ..data import save_grid
from ..data.decoding import shown
from ..generation.report import GenerationReport
from ..generation.sampling import generate
from ..generation.series.folder import SeriesFolder
from ..generation.series.provenance import why_inexact
from ..generation.series.series import FORMATS, generate_series
from ..memory import BatchSize
from ..model.config import check_at_least
from ..model.transformer import NextScaleTransformer
from ..screen import tracked
from ..tokenizer import Tokenizer
from .checks import check_picture, check_sampling, check_series
from .flags import DEFAULTS, Flags, PartOfPair, SamplingFlags, check_not_empty, without
from .loading import load_pair, process_index
from .output import report


def generate_command(
    model: PartOfPair = None,
    tokenizer: PartOfPair = None,
    out: Annotated[Path | None, without("samples.png; with --num samples")] = None,
    labels: Annotated[tuple[int, ...], without("all")] = (),
    per_class: Annotated[int | None, without("10")] = None,
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num-images"])] = None,
    format: Annotated[tuple[Literal["png", "npz"], ...], without("both")] = (),
    report_: Annotated[bool, tyro.conf.arg(name="report")] = False,
    flags: Flags = DEFAULTS,
) -> None:
    """Generate images: into one PNG, a row a class, or with --num into a folder of numbered PNGs.

    With --num an image depends on its number, its label and the sampling settings alone. So a run that
    was stopped goes on where it was, one of another --batch-size or number of processes (accelerate launch,
    torchrun) gives the same files, and a larger --num continues the series. With --adaptive or weights
    below float32 the batch size has to stay the same for that.

    Args:
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VAR or VIAR; not without
            --tokenizer. A VIAR of handwritten digits comes with the package.
        tokenizer: The same, of its tokenizer.
        out: PNG to write; with --num a folder.
        labels: Classes; the number behind the last asks for none in particular. With --num the images get
            them in turn.
        per_class: Images of each; not with --num.
        num: Images to generate into a folder. torchrun needs it spelled out, --num-images.
        format: Only with --num: png keeps the numbered pictures, npz writes one archive for evaluation.
        report_: Print evaluations, residual, seconds and megabytes of cache of each scale; not with --num.
        flags: How to sample.
    """
    _check_exclusions(num, per_class, format, report_)
    check_not_empty(labels=labels, format=format)
    if num is None:
        path, columns = out or Path("samples.png"), 10 if per_class is None else per_class
        _generate_grid(model, tokenizer, path, labels, columns, flags, report_)
    else:
        folder = out or Path("samples")
        _generate_series(model, tokenizer, folder, labels, num, format or FORMATS, flags)


def generate_batches(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor,
    flags: SamplingFlags,
    console: Console,
    *,
    tell: Callable[[int, GenerationReport], None] | None = None,
) -> Iterator[Tensor]:
    """Images of all labels batch by batch, each made when it is asked for, with a progress bar.

    From where memory does not suffice for a batch on, they are half as large.

    Args:
        model: VAR or VIAR.
        tokenizer: its tokenizer.
        labels: (B,) classes.
        flags: how to sample, and how many at a time.
        console: where progress is shown.
        tell: is told the index of the first image of each batch, and what its scales took.

    Returns:
        Batches (B, 3, H, W) in [0, 1], on the CPU.
    """
    batch_size, sampling = flags.execution.batch_size, flags.sampling
    settings = vars(sampling)

    def tell_shortage(most: int) -> None:
        reason = why_inexact(model, tokenizer, sampling, sampling.schedule(model.trunk))
        others = f", which because of {reason} are others than more at a time" if reason else ""
        text = f"memory did not suffice: from here on {most} images are generated at a time{others}"
        console.print(text, style="yellow", highlight=False, soft_wrap=True)

    def make(part: range) -> Tensor:
        chunk, first = labels[part.start : part.stop], part.start
        if tell is None:
            images: Tensor = generate(model, tokenizer, chunk, first_index=first, **settings)
        else:
            made = generate(model, tokenizer, chunk, first_index=first, return_report=True, **settings)
            images, took = made
            tell(first, took)
        return images.cpu()

    parts = BatchSize(batch_size, tell_shortage).parts(range(len(labels)), make)
    num_batches = math.ceil(len(labels) / batch_size)
    yield from tracked(parts, "generate", total=num_batches, console=console)


def _check_exclusions(num: int | None, per_class: int | None, formats: tuple[str, ...], report: bool) -> None:
    if num is None:
        if formats:
            raise ValueError("--format: only with --num; without it there is one PNG")
    elif per_class is not None:
        raise ValueError("--num and --per-class exclude each other; give one of them")
    elif report:
        raise ValueError("--report: not with --num; generate a few images without it to see the report")


def _generate_grid(
    model: str | None,
    tokenizer: str | None,
    out: Path,
    labels: tuple[int, ...],
    per_class: int,
    flags: SamplingFlags,
    is_report: bool,
) -> None:
    check_at_least("viar generate", 1, per_class=per_class)
    check_picture(out)
    console, sampling = Console(), flags.sampling
    transformer, codec = load_pair(model, tokenizer, flags.execution)
    check_sampling(transformer, sampling, labels)
    classes = torch.tensor(labels or range(transformer.config.num_classes)).repeat_interleave(per_class)
    reports: list[dict[str, Any]] = []

    def tell(first_index: int, took: GenerationReport) -> None:
        totals = {"evaluations": took.evaluations, "seconds": took.seconds, "cache_bytes": took.cache_bytes}
        reports.append({"first_image": first_index, **totals, **asdict(took)})
        console.print(f"from image {first_index}\n{took}", highlight=False)

    batches = generate_batches(transformer, codec, classes, flags, console, tell=tell if is_report else None)
    images = torch.cat(list(batches))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, Path(os.path.realpath(out)), columns=per_class)
    report({"out": out, "num_images": len(images)} | ({"batches": reports} if is_report else {}))
    console.print(f"{len(images)} images in {shown(out)}", markup=False, highlight=False, soft_wrap=True)


def _generate_series(
    model: str | None,
    tokenizer: str | None,
    out: Path,
    labels: tuple[int, ...],
    num: int,
    formats: tuple[str, ...],
    flags: SamplingFlags,
) -> None:
    check_at_least("viar generate", 1, num=num)
    check_series(out)
    console, sampling = Console(), flags.sampling
    transformer, codec = load_pair(model, tokenizer, flags.execution)
    check_sampling(transformer, sampling, labels)
    series = generate_series(
        transformer,
        codec,
        out,
        num,
        sampling=sampling,
        labels=labels or None,
        formats=formats,
        batch_size=flags.execution.batch_size,
        console=console,
    )
    if dist.is_initialized():
        dist.destroy_process_group()  # NCCL complains at exit of a group that is left.
    if process_index() == 0:
        told = asdict(series)
        report({"out": told.pop("folder"), "num_images": told.pop("num"), **told})
        archive = f", all in {shown(series.archive)}" if series.archive else ""
        made = f"{series.made} made now, {series.resampled} of them sampled twice to be exact"
        rate = f"{series.made / max(series.seconds, 1e-9):.3g} images/s"
        there = SeriesFolder(series.folder, codec.config.image_side).count(sys.maxsize)
        beyond = f" ({there} are there)" if there > series.num else ""
        text = f"{series.num} images in {shown(series.folder)}{beyond}{archive};\n{made}, {rate}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
