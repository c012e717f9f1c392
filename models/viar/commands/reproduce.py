"""`viar reproduce`: the published evaluation, from published files to figures beside the published ones."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

from ..checksums import read_json, to_json
from ..data.decoding import shown
from ..evaluation.features import FeatureNetwork
from ..evaluation.inception import inception_network, usual_weights
from ..evaluation.published import (
    FIGURES,
    FILES,
    ITERATIONS,
    NUM_IMAGES,
    REFERENCE,
    TOKENIZER,
    VIAR,
    checked_digests,
)
from ..evaluation.references import check_reference, find_pictures, read_reference
from ..files import file_digest, held, replacing
from ..generation.series.folder import SETTINGS
from ..generation.series.series import generate_series
from ..generation.settings import Sampling
from ..model.config import ExplicitTrunkConfig, check_at_least
from ..model.transformer import NextScaleTransformer
from ..training.recipes import TOKENIZERS, TRANSFORMERS
from .checks import check_sampling, check_series
from .evaluate import TITLES, of_flag
from .flags import (
    DEFAULTS_AS_PUBLISHED,
    FlagsAsPublished,
    PublishedFlags,
    check_not_empty,
    given_flags,
    without,
)
from .loading import find_device, load_pair, process_index
from .output import report
from .stand_ins import stand_in_checkpoints, stand_in_network, stand_in_reference

NUM_DRY = 4  # images of a dry run: as many as precision and recall need
RECORD = "figures.json"
NAMES = ("fid", "sfid", "inception_score", "precision", "recall", "kid")  # of the table's rows
Published = Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(required but with --dry-run)")]
Num = Annotated[
    int | None,
    tyro.conf.arg(aliases=["--num-images"]),
    without(f"the published {NUM_IMAGES}; with --dry-run {NUM_DRY}"),
]
MEANINGLESS = "DRY RUN: weights and reference are random, so the figures mean nothing"


def reproduce_command(
    model: Published = None,
    tokenizer: Published = None,
    reference: Published = None,
    inception: Annotated[Path | None, without("where torch-fidelity keeps what it downloads")] = None,
    out: Path = Path("reproduction"),
    num: Num = None,
    sha256: tuple[str, ...] = (),
    dry_run: bool = False,
    shape: Literal["viar", "var-d16", "var-d20", "var-d24", "var-d30"] = "viar",
    flags: FlagsAsPublished = DEFAULTS_AS_PUBLISHED,
) -> None:
    """Repeat the published evaluation on ImageNet at 256 pixels: sample images, print FID, sFID and others.

    Settings are the published ones: of VIAR 10 iterations at every scale with keys and values of each, unless
    --iterations or --cache says otherwise. Run again, it goes on where it was stopped; figures that are there
    are not computed anew. Processes that torchrun or accelerate launch started share the sampling.

    Args:
        model: viar.pth or var_d16.pth to var_d30.pth, as published.
        tokenizer: vae_ch160v4096z32.pth.
        reference: VIRTUAL_imagenet256_labeled.npz, of ADM.
        inception: Weights of Inception.
        out: Folder of the images, in images/, and of figures.json.
        num: Images; a larger number goes on with the same images. torchrun needs it spelled out,
            --num-images.
        sha256: Digests that some of the files must have; not with --dry-run, which makes its own.
        dry_run: Take random weights and a made-up reference, and go through all of it with 4 images.
        shape: Of the random weights of --dry-run; var-d16 is the smallest.
        flags: How to sample.
    """
    check_not_empty(sha256=sha256)
    files = _files(model, tokenizer, reference, sha256, dry_run)
    num = (NUM_DRY if dry_run else NUM_IMAGES) if num is None else num
    check_at_least("viar reproduce", NUM_DRY, num=num)
    check_series(out / "images")
    network = _network(inception, find_device(flags.execution.device), dry_run, Console())
    with nullcontext() if process_index() else held(out):  # the first one holds it for all
        _reproduce(files, network, out, num, sha256, dry_run, shape, flags)


def _reproduce(
    files: dict[str, Path],
    network: FeatureNetwork,
    out: Path,
    num: int,
    sha256: tuple[str, ...],
    dry_run: bool,
    shape: str,
    flags: PublishedFlags,
) -> None:
    console = Console()
    if dry_run:
        _warn(console, MEANINGLESS)
        files, flags = _made_up(out / "stand-ins" / shape, shape, console), _small(flags, num)
    with console.status("digests of the files"):
        digests = checked_digests(files, sha256)
    transformer, codec = load_pair(str(files["--model"]), str(files["--tokenizer"]), flags.execution)
    sampling = as_published(flags.sampling, transformer)
    check_sampling(transformer, sampling, ())
    if not dry_run:
        with of_flag("--reference"):
            check_reference(files["--reference"], network, codec.config.image_side)
    batch_size = flags.execution.batch_size
    series = generate_series(
        transformer, codec, out / "images", num, sampling=sampling, batch_size=batch_size, console=console
    )
    if dist.is_initialized():
        dist.destroy_process_group()  # NCCL complains at exit of a group that is left.
    if process_index():
        return
    if dry_run:
        path = out / "stand-ins" / "reference.npz"
        files["--reference"] = stand_in_reference(path, network, codec.config.image_side)
        digests |= checked_digests({"--reference": path})
    assert series.archive is not None
    told = _told(files, digests) | {
        "dry_run": dry_run,
        "network": network.name,
        "num": num,
        "series": file_digest(out / "images" / SETTINGS),
    }
    figures = _figures(out / RECORD, told, series.archive, files["--reference"], network, console)
    published = {} if dry_run or num != NUM_IMAGES else published_figures(transformer, sampling)
    console.print(_table(figures, published))
    report({**told, "figures": figures, "published": published, "images": series.archive})
    images, record = shown(series.archive), shown(out / RECORD)
    _say(console, f"images in {images}, for ADM's own evaluator too; figures in {record}")
    if dry_run:
        _warn(console, MEANINGLESS)


def as_published(sampling: Sampling, model: NextScaleTransformer) -> Sampling:
    """Settings with the published iterations and cache of a VIAR, unless flags say otherwise.

    What else is published are the sampler's own defaults.

    Args:
        sampling: what flags say.
        model: a VAR, for which nothing changes, or a VIAR.
    """
    if isinstance(model.config.trunk, ExplicitTrunkConfig):
        return sampling
    iterations = ITERATIONS if sampling.iterations is None else sampling.iterations
    return replace(
        sampling, iterations=iterations, cache=sampling.cache if "cache" in given_flags() else "iterate"
    )


def published_figures(model: NextScaleTransformer, sampling: Sampling) -> dict[str, float]:
    """What is published of a model at such settings; empty where nothing is.

    Args:
        model: a VAR or VIAR.
        sampling: its settings.
    """
    explicit = isinstance(model.config.trunk, ExplicitTrunkConfig)
    iterations, cfg = sampling.iterations, sampling.cfg
    usual = Sampling(
        iterations=iterations, cfg=cfg, seed=sampling.seed, cache="equilibrium" if explicit else "iterate"
    )
    if sampling != usual or not isinstance(iterations, int | None):
        return {}
    return FIGURES.get((f"VAR-d{model.config.depth}" if explicit else "VIAR", cfg, iterations), {})


def _told(files: dict[str, Path], digests: dict[str, str]) -> dict[str, Any]:
    """Names and digests of the files, by flag."""
    return {"files": {flag: {"name": path.name, "sha256": digests[flag]} for flag, path in files.items()}}


def _files(
    model: Path | None,
    tokenizer: Path | None,
    reference: Path | None,
    sha256: tuple[str, ...],
    dry_run: bool,
) -> dict[str, Path]:
    """The files that flags name, all of them or, in a dry run, none."""
    named = {"--model": model, "--tokenizer": tokenizer, "--reference": reference}
    given = {flag: path for flag, path in named.items() if path is not None}
    if dry_run and (given or sha256):
        told = ", ".join([*given, *["--sha256"] * bool(sha256)])
        raise ValueError(f"{told}: a dry run makes its own files; leave the flag, or --dry-run")
    if not dry_run and "shape" in given_flags():
        raise ValueError("--shape: only with --dry-run; files have a shape of their own")
    for flag, name in {"--model": VIAR, "--tokenizer": TOKENIZER, "--reference": REFERENCE}.items():
        if not (dry_run or flag in given):
            raise ValueError(f"{flag}: expected {name} from {FILES[name].address}; --dry-run does without")
    return given


def _network(weights: Path | None, device: torch.device, dry_run: bool, console: Console) -> FeatureNetwork:
    """Inception, whose absence ends all but a dry run."""
    path = weights or usual_weights()
    if path.is_file():
        checked_digests({"--inception": path})
    try:
        return inception_network(weights, device)
    except ValueError as error:
        if not dry_run or weights is not None:
            raise ValueError(str(error).replace("features:", "--inception:", 1)) from error
        _warn(console, f"Inception is not here ({error}); a made-up network takes its place")
        return stand_in_network()


def _made_up(folder: Path, shape: str, console: Console) -> dict[str, Path]:
    """Checkpoints of a dry run, by the flags that name them otherwise."""
    config, codec_config = TRANSFORMERS[f"imagenet256-{shape}"].model, TOKENIZERS["imagenet256"].model
    with console.status("random weights"):
        paths = stand_in_checkpoints(folder, config, codec_config)
    return dict(zip(("--model", "--tokenizer"), paths, strict=True))


def _small(flags: PublishedFlags, num: int) -> PublishedFlags:
    """Weights in bfloat16 unless a flag says otherwise, and no more images in a batch than there are."""
    execution = flags.execution
    batch_size = min(execution.batch_size, num)
    return replace(
        flags, execution=replace(execution, dtype=execution.dtype or "bfloat16", batch_size=batch_size)
    )


def _figures(
    record: Path,
    told: dict[str, Any],
    archive: Path,
    reference: Path,
    network: FeatureNetwork,
    console: Console,
) -> dict[str, float | None]:
    """Figures of the images, from the record where it is of the same images, files and network."""
    if record.is_file():
        try:
            found = read_json(record)
            figures: dict[str, float | None] = found.pop("figures")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{shown(record)} is damaged ({error}); remove it") from error
        if found == told:
            _say(console, f"figures were there: {shown(record)}")
            return figures
    _say(console, f"figures by {network.name}")
    pictures = find_pictures(archive)
    with console.status("measuring"):
        real = read_reference(str(reference), network, pictures.image_side)
        figures = asdict(real.quality(real.see(pictures.batches())))
    with replacing(record) as file:
        file.write(to_json({**told, "figures": figures}))
    return figures


def _table(figures: dict[str, float | None], published: dict[str, float]) -> Table:
    table = Table()
    for head in ("figure", "here", "published"):
        table.add_column(head, justify="left" if head == "figure" else "right")
    for name in NAMES:
        value = figures[name]
        there = published.get(name)
        table.add_row(
            TITLES[name], "-" if value is None else f"{value:.4g}", "" if there is None else f"{there:.4g}"
        )
    return table


def _warn(console: Console, text: str) -> None:
    if not process_index():
        console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _say(console: Console, text: str) -> None:
    console.print(shown(text), markup=False, highlight=False, soft_wrap=True)
