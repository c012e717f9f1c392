"""`viar evaluate`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..data import ImageData
from ..data.decoding import shown
from ..evaluation import (
    Classifier,
    Evaluation,
    Pictures,
    Quality,
    Reference,
    accuracy,
    balanced_labels,
    data_reference,
    evaluate_images,
    find_pictures,
    inception_network,
    judge_network,
    read_reference,
    save_reference,
    with_held_out,
)
from ..evaluation import judge as judge_of
from ..evaluation.references import ARCHIVE
from ..files import check_writable, file_digest, replacing
from ..generation.settings import Sampling
from ..model.config import check_at_least
from ..model.schedule import Adaptive
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from ..training import validation_loss
from .checks import check_classes, check_sampling
from .flags import (
    DEFAULTS_OF_MEASURING,
    ExecutionFlags,
    FlagsOfMeasuring,
    PartOfPair,
    SamplingFlags,
    given_flags,
    no_prefix,
    optional,
    without,
)
from .generate import generate_batches
from .loading import SHIPPED_DATA, find_device, load_images, load_pair
from .output import plain, report

JUDGE, INCEPTION = "judge", "inception"
ARGUMENTS = ("features", "source")  # of functions whose messages begin with the argument, not with a flag
TITLES = {
    "num_images": "images",
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception score",
    "class_consistency": "class consistency",
    "memorisation": "distance to training pictures",
}


@dataclass(frozen=True, kw_only=True)
class ComparisonFlags:
    """What images are compared with, and by what."""

    # Source of real images: digits, mnist, emoji, or a folder with a sub-folder a class. A judge is trained
    # on them, and their held-out ones are measured beside.
    data: Annotated[
        str | None,
        without(f"digits; of the model that comes with the package {SHIPPED_DATA}; with --images none"),
    ] = None
    # File of statistics or images (.npz), folder of pictures, or source of images. Pictures of a folder that
    # have another size than the images are cut to theirs.
    reference: Annotated[str | None, without("training pictures of --data")] = None
    # what the digest of the file --reference begins with; another file is refused
    sha256: Annotated[str | None, optional] = None
    features: str = JUDGE  # judge, inception, or inception:FILE with its weights
    # Folder where the judge of --data is kept; only with --data where --images are given.
    judge: Annotated[Path | None, without("trained anew; that of mnist comes with the package")] = None
    # file (.npz) to write, for a later --reference
    save_statistics: Annotated[Path | None, optional] = None


def evaluate_command(
    model: PartOfPair = None,
    tokenizer: PartOfPair = None,
    images: Path | None = None,
    per_class: int = 100,
    out: Annotated[Path | None, without("printed below the table")] = None,
    comparison: Annotated[ComparisonFlags, no_prefix] = ComparisonFlags(),
    flags: FlagsOfMeasuring = DEFAULTS_OF_MEASURING,
) -> None:
    """Print FID and other figures of a model's images, or of images made before, beside those of real ones.

    Args:
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VAR or VIAR; not without
            --tokenizer. A VIAR of handwritten digits comes with the package.
        tokenizer: The same, of its tokenizer.
        images: In place of a model: a folder of pictures, such as viar generate --num writes, or an .npz. All
            pictures of a folder are cut to the size of the first.
        per_class: Images generated of each class.
        out: File for all figures, as JSON.
        comparison: What to compare with.
        flags: How to sample; with --images only --device has a use, and the others are refused.
    """
    check_at_least("viar evaluate", 1, per_class=per_class)
    _check_given((model, tokenizer), images, comparison)
    _check_outputs(out, comparison)
    console = Console()
    if images is None:
        result, evaluation = _evaluate_model((model, tokenizer), per_class, comparison, flags, console)
    else:
        result, evaluation = _evaluate_pictures(images, comparison, flags, console)
    result |= {"settings": vars(comparison), **asdict(evaluation), "ratios": evaluation.ratios()}
    result = plain(result)
    console.print(_table(evaluation))
    is_told = report(result)
    if out is None:
        if not is_told:
            console.print_json(json.dumps(result, allow_nan=False))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(os.path.realpath(out)), in_turn=True) as written:
        written.write(json.dumps(result, indent=1, allow_nan=False).encode())
    console.print(f"figures in {shown(out)}", markup=False, highlight=False, soft_wrap=True)


def _evaluate_model(
    pair: tuple[str | None, str | None],
    per_class: int,
    comparison: ComparisonFlags,
    flags: SamplingFlags,
    console: Console,
) -> tuple[dict[str, Any], Evaluation]:
    transformer, codec = load_pair(*pair, flags.execution)
    check_sampling(transformer, flags.sampling, ())
    name = comparison.data or (SHIPPED_DATA if pair == (None, None) else "digits")
    if comparison.data is None:
        console.print(f"--data is not given: images are compared with {name}", soft_wrap=True)
    source = _load_source(name, codec.config.image_side, console)
    check_classes(transformer, name, source.num_classes)
    reference, measures = _reference(source, codec.config.image_side, comparison, flags, console)
    labels = balanced_labels(source.num_classes, per_class)
    images = generate_batches(transformer, codec, labels, flags, console)
    evaluation = evaluate_images(_then_told(images, console), labels, reference)
    with console.status("loss of held-out pictures"):
        loss = _loss(transformer, codec, source, flags.sampling)
    told = {
        "model": pair[0] or f"shipped {SHIPPED_DATA}",
        "tokenizer": pair[1] or f"shipped {SHIPPED_DATA}",
        "data": name,
        "per_class": per_class,
        "dtype": str(transformer.trunk.weight_type).removeprefix("torch."),
        "sampling": _settings(transformer, flags.sampling),
        "validation_loss": loss,
    }
    return {**told, **_consistency(evaluation), **measures}, evaluation


def _then_told(images: Iterator[Tensor], console: Console) -> Iterator[Tensor]:
    """The images, and a line when there are no more: figures of many take a while."""
    yield from images
    console.print("measuring the images")


def _settings(model: NextScaleTransformer, sampling: Sampling) -> dict[str, Any]:
    """Settings of the sampler, with the iterations of each scale."""
    schedule = [repr(n) if isinstance(n, Adaptive) else n for n in sampling.schedule(model.trunk)]
    return vars(sampling) | {"iterations": schedule}


def _loss(
    model: NextScaleTransformer, codec: Tokenizer, source: ImageData, sampling: Sampling
) -> float | None:
    """Validation loss by as many iterations as images are sampled with; `None` if scales have others."""
    first, *others = sampling.schedule(model.trunk)
    if isinstance(first, Adaptive) or any(n != first for n in others):
        return None
    return validation_loss(model, codec, source.validation, iterations=first)


def _evaluate_pictures(
    images: Path, comparison: ComparisonFlags, flags: SamplingFlags, console: Console
) -> tuple[dict[str, Any], Evaluation]:
    with of_flag("--images"):
        pictures = find_pictures(images)
    side, name, labels = pictures.image_side, comparison.data, pictures.labels
    source = None if name is None else _load_source(name, side, console)
    if source is not None and labels is not None and int(labels.max()) >= source.num_classes:
        raise ValueError(
            f"--data: {shown(name)} has {source.num_classes} classes, the images are of class "
            f"{int(labels.max())}; give the images that the model was trained on"
        )
    reference, measures = _reference(source, side, comparison, flags, console)
    with console.status("measuring the images"):
        evaluation = evaluate_images(_batches(pictures), labels, reference)
    return {"images": str(images), "data": name, **_consistency(evaluation), **measures}, evaluation


def _batches(pictures: Pictures) -> Iterator[Tensor]:
    with of_flag("--images"):
        yield from pictures.batches()


def _reference(
    source: ImageData | None,
    image_side: int,
    comparison: ComparisonFlags,
    flags: SamplingFlags,
    console: Console,
) -> tuple[Reference, dict[str, Any]]:
    """What to compare with, and what is to be said of it."""
    device = find_device(flags.execution.device)
    judge: Classifier | None = None
    told: dict[str, Any] = {}
    if source is not None:
        judge = judge_of(source, cache=comparison.judge, console=console).to(device)
        with console.status("the judge looks at held-out pictures"):
            told["classifier_held_out_accuracy"] = accuracy(judge, source.validation)
    if comparison.features == JUDGE:
        assert judge is not None
        network = judge_network(judge)
    else:
        with of_flag("--features"):
            weights = comparison.features.partition(":")[2]
            network = inception_network(Path(weights) if weights else None, device)
    with console.status("features of what is compared with"):
        if comparison.reference is None:
            assert source is not None
            assert judge is not None
            reference = data_reference(source, judge, network)
        else:
            with of_flag("--reference"):
                reference = read_reference(
                    comparison.reference, network, image_side, sha256=comparison.sha256
                )
            if source is not None and judge is not None:
                reference = with_held_out(reference, source, judge)
    if comparison.save_statistics is not None:
        comparison.save_statistics.parent.mkdir(parents=True, exist_ok=True)
        save_reference(reference, Path(os.path.realpath(comparison.save_statistics)))
    return reference, told | {"network": network.name, "reference": _told(reference, comparison)}


def _told(reference: Reference, comparison: ComparisonFlags) -> dict[str, Any]:
    """What tells a reference from others."""
    told: dict[str, Any] = {"name": reference.name, "num_images": reference.moments.count}
    file = None if comparison.reference is None else Path(comparison.reference)
    return told if file is None or not file.is_file() else told | {"sha256": file_digest(file)}


def _consistency(evaluation: Evaluation) -> dict[str, float | None]:
    return {"class_consistency": evaluation.generated.class_consistency}


def _table(evaluation: Evaluation) -> Table:
    """All figures; those of held-out pictures beside those of as many images, and the ratio."""
    columns: list[tuple[str, Quality]] = [("images", evaluation.generated)]
    if evaluation.matched is not evaluation.generated:
        columns.append((f"{evaluation.matched.num_images} of them", evaluation.matched))
    if evaluation.real is not None:
        columns.append(("held-out pictures", evaluation.real))
    ratios = evaluation.ratios()
    table = Table(title="Images against the reference, beside real ones")
    for heading in ("", *(heading for heading, _ in columns), *(["ratio"] if ratios else [])):
        table.add_column(heading, justify="right" if heading else "left")
    for name, title in TITLES.items():
        cells = [_shown(getattr(quality, name)) for _, quality in columns]
        table.add_row(title, *cells, *([_shown(ratios.get(name))] if ratios else []))
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _load_source(name: str, image_side: int, console: Console) -> ImageData:
    source = load_images(name, image_side, console, as_they_are=True)
    if not len(source.validation):
        raise ValueError(
            f"--data: {shown(name)} has nothing to hold out and measure; give two pictures of a class"
        )
    return source


def _check_given(
    pair: tuple[str | None, str | None], images: Path | None, comparison: ComparisonFlags
) -> None:
    """Raise `ValueError` unless there is one thing to evaluate, and something to compare it with."""
    if images is not None and pair != (None, None):
        raise ValueError("--images: they are made already; give these, or --model and --tokenizer")
    if images is not None:
        _refuse_sampling()
    name = comparison.features.partition(":")[0]
    if name not in (JUDGE, INCEPTION) or (name == JUDGE and comparison.features != JUDGE):
        raise ValueError(
            f"--features: expected {JUDGE}, {INCEPTION} or {INCEPTION}:FILE, got {comparison.features!r}"
        )
    if images is not None and comparison.data is None:
        if name == JUDGE:
            raise ValueError("--data: a judge learns from real images; give them, or --features inception")
        if comparison.reference is None:
            raise ValueError("--reference: without --data there is nothing to compare with; give one of them")
        if comparison.judge is not None:
            raise ValueError("--judge: it is of real images; give them with --data, or leave the flag")
    if comparison.sha256 is not None and comparison.reference is None:
        raise ValueError("--sha256: this is the digest of the file --reference, which is not given")


def _refuse_sampling() -> None:
    """Raise `ValueError` naming flags that say how images are made, where they are made already."""
    names = {field.name for kind in (SamplingFlags, Sampling, ExecutionFlags) for field in fields(kind)}
    names = {"per_class", *names} - {"settings", "execution", "device"}
    if found := sorted(given_flags() & {*names, *(f"no_{name}" for name in names)}):
        told = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise ValueError(f"{told}: of no use with --images, which are made already; leave it")


def _check_outputs(out: Path | None, comparison: ComparisonFlags) -> None:
    """Raise `ValueError` unless all that is to be written can be, and can be read again."""
    statistics, judge = comparison.save_statistics, comparison.judge
    for flag, file in (("--out", out), ("--save-statistics", statistics)):
        if file is not None:
            check_writable(file, flag, folder=False)
    if statistics is not None and statistics.suffix != ARCHIVE:
        raise ValueError(f"--save-statistics: expected a name that ends in {ARCHIVE}, got {statistics}")
    if statistics is not None and out is not None and statistics.resolve() == out.resolve():
        raise ValueError(f"--save-statistics: {statistics} is --out too; give another name")
    # A judge that was kept may be read where nothing can be written.
    if judge is not None and not any(judge.glob("judge-*.safetensors")):
        check_writable(judge, "--judge", folder=True)


@contextmanager
def of_flag(flag: str) -> Iterator[None]:
    """Say by which flag it came, where something cannot be read.

    Args:
        flag: takes the place of the argument that the message names.

    Raises:
        ValueError: the one that was raised, with the flag.
    """
    try:
        yield
    except ValueError as error:
        owner, _, text = str(error).partition(": ")
        if owner == "sha256":
            raise ValueError(f"--{error}") from error
        raise ValueError(f"{flag}: {text if owner in ARGUMENTS else error}") from error
