"""What is kept in files: how each is written, and what is made of it, to be compared with damaged ones."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tiny_models import tiny_config, tiny_tokenizer, tiny_transformer, uniform

from benchmarks.results import Results
from viar import NextScaleTransformer, Sampling, Tokenizer, export_official, load_official
from viar.checkpoints.convert import convert_checkpoint
from viar.commands import reproduce
from viar.commands.stages import Stage, Stages
from viar.data import ImageData, TensorImages, TokenShards, read_picture, save_picture, write_shards
from viar.evaluation import Classifier
from viar.evaluation.features import FeatureNetwork, Features
from viar.evaluation.moments import Moments
from viar.evaluation.quality import Reference
from viar.evaluation.references import find_pictures, read_reference, save_reference
from viar.generation.series.series import generate_series
from viar.pretrained import fingerprint
from viar.training import TrainConfig, train_transformer
from viar.training import loop as training_loop

SIDE = 6  # pixels of the tokenizer's images
MODEL, CODEC = tiny_transformer(), tiny_tokenizer()
STEPS = 3
EXAMPLE = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Kept:
    """Files, and what is made of them.

    Attributes:
        what: they are, in words.
        write: them into a folder.
        read: what is made of them, to be compared.
        files: of the folder that are damaged, as patterns; default all.
        others: writes files of the same names that may lie in their place.
    """

    what: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    files: tuple[str, ...] = ("**/*",)
    others: tuple[Callable[[Path], object], ...] = ()


def quiet() -> Console:
    return Console(file=io.StringIO())


def pictures(count: int = 12) -> TensorImages:
    return TensorImages(uniform(count, 3, SIDE, SIDE) * 2 - 1, torch.arange(count) % 3)


# Models


def _published(name: str) -> tuple[Callable[[Path], object], Callable[[Path], object]]:
    def write(folder: Path) -> None:
        MODEL.save_pretrained(folder / "model")
        convert_checkpoint(folder / "model", folder / name)
        shutil.rmtree(folder / "model")

    return write, lambda folder: fingerprint(load_official(folder / name))


def _foreign(name: str) -> Callable[[Path], object]:
    """A published file of the name that holds another model."""
    return lambda folder: torch.save(export_official(tiny_transformer("explicit", seed=3)), folder / name)


def _write_judge(folder: Path) -> None:
    torch.manual_seed(0)
    Classifier(3, 8, 2).save(folder / "classifier.safetensors")


def _read_judge(folder: Path) -> object:
    return fingerprint(Classifier.read(folder / "classifier.safetensors", 8))


# Data


def _shards(folder: Path, seed: int = 0) -> None:
    data = ImageData(pictures(), pictures(5), 3, ("cat", "dog", "owl"))
    write_shards(
        tiny_tokenizer(seed), data, folder, origin={"data": "a"}, shard_size=8, batch_size=4, console=quiet()
    )


def _read_shards(folder: Path) -> object:
    read = []
    for split in ("train", "validation"):
        shards = TokenShards(folder, split)
        shards.check(CODEC)
        shards.verify()
        settings = asdict(shards.settings)
        read.append((settings, [part.tolist() for part in shards.__getitems__(range(len(shards)))]))
    return read


def _written_again(folder: Path) -> object:
    _shards(folder)
    return _read_shards(folder)


def _write_pictures(folder: Path) -> None:
    for index, image in enumerate(uniform(3, 3, SIDE, SIDE)):
        save_picture(image, folder / f"{index}.png")


def _read_pictures(folder: Path) -> object:
    return [read_picture(path, SIDE)[0].tolist() for path in sorted(folder.glob("*.png"))]


# Images


def _series(folder: Path) -> None:
    generate_series(MODEL, CODEC, folder, 3, labels=(2, 1), batch_size=3, console=quiet())


def _other_series(folder: Path) -> None:
    """One of other pixels a side: nothing tells a whole picture from another of the same size."""
    pair = tiny_transformer(sides=(1, 2)), tiny_tokenizer(sides=(1, 2))
    generate_series(*pair, folder, 3, sampling=Sampling(seed=1), batch_size=3, console=quiet())


def _series_gone_on_with(folder: Path) -> object:
    _series(folder)
    found: dict[str, object] = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".json")
    }
    for path in folder.glob("*.npz"):  # where dates and the like may differ, which nothing reads
        with np.load(path) as arrays:
            found[path.name] = {name: array.tolist() for name, array in arrays.items()}
    return found


def _series_looked_at(folder: Path) -> object:
    found = find_pictures(folder)
    assert found.labels is not None
    return found.labels.tolist(), [batch.tolist() for batch in found.batches()]


def _network() -> FeatureNetwork:
    return FeatureNetwork("small", lambda images: Features(images.mean((2, 3)).double()))


def write_reference(folder: Path) -> None:
    pooled = uniform(8, 3).double()
    reference = Reference("a", _network(), Moments.of(pooled), None, pooled.float())
    save_reference(reference, folder / "reference.npz")


def _read_reference(folder: Path) -> object:
    reference = read_reference(str(folder / "reference.npz"), _network(), SIDE)
    assert reference.pooled is not None
    moments = reference.moments
    return moments.count, moments.mean.tolist(), moments.covariance.tolist(), reference.pooled.tolist()


def _write_archive(folder: Path) -> None:
    pixels = (uniform(6, SIDE, SIDE, 3) * 255).byte().numpy()
    np.savez(folder / "images.npz", arr_0=pixels, arr_1=np.arange(6))


def _read_archive(folder: Path) -> object:
    found = find_pictures(folder / "images.npz")
    assert found.labels is not None
    return found.labels.tolist(), [batch.tolist() for batch in found.batches()]


# Results


def _figures(folder: Path) -> object:
    """Figures of a reproduction; pictures that it measures are not among its files."""
    beside = folder.parent / f"{folder.name}-pictures"
    beside.mkdir(exist_ok=True)
    if not (beside / "images.npz").exists():
        _write_archive(beside)
    images = beside / "images.npz"
    told = {"num": 6, "network": "small", "files": {"--model": {"name": "a", "sha256": "ab"}}}
    return reproduce._figures(folder / "figures.json", told, images, images, _network(), quiet())


def stage(folder: Path) -> object:
    stages = Stages(folder, quiet(), "code")
    return stages.run("judge", Stage(lambda _: {"accuracy": 0.975, "steps": [1, 2]}, {"seed": 1}))


def write_results(folder: Path) -> None:
    Results.load(min(EXAMPLE.glob("recipes_*.json"))).save(folder / "results.json")


def _read_results(folder: Path) -> object:
    return asdict(Results.load(folder / "results.json"))


# Runs


class _Killed(Exception):
    """What ends a run half way."""


def train(folder: Path, seed: int = 0, sample_every: int = 0) -> NextScaleTransformer:
    torch.manual_seed(seed)
    model = NextScaleTransformer(tiny_config(drop_path=0.3))
    data = pictures()
    every = {"save_every": 1e-9, "validate_every": 1, "sample_every": sample_every}
    config = TrainConfig(steps=STEPS, batch_size=4, lr=3e-3, seed=seed, **every)
    train_transformer(model, CODEC, data, folder, config, held_out=data, console=quiet())
    return model


def half_a_run(folder: Path, seed: int = 0, sample_every: int = 0) -> None:
    """A run that ended before its last step, with a state and the best weights so far."""
    original, calls = training_loop.set_progress, []

    def set_progress(*args: Any, **options: Any) -> None:
        calls.append(None)
        if len(calls) == STEPS:
            raise _Killed
        original(*args, **options)

    training_loop.set_progress = set_progress
    try:
        train(folder, seed, sample_every)
    except _Killed:
        return
    finally:
        training_loop.set_progress = original
    raise AssertionError("the run was not ended")


def _rest_of_a_run(folder: Path) -> object:
    """Its weights; the log of a run tells of it, and has no part in it."""
    train(folder)
    weights = NextScaleTransformer.from_pretrained(folder)
    return fingerprint(weights), hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


def model_swaps() -> tuple[Callable[[Path], object], ...]:
    """Models of another kind and of another size, of which any file may lie in the place of ours."""
    larger = tiny_transformer(width=32)
    return (CODEC.save_pretrained, larger.save_pretrained)


KEPT = {
    "transformer": Kept(
        "model.safetensors and config.json of a transformer",
        MODEL.save_pretrained,
        lambda folder: fingerprint(NextScaleTransformer.from_pretrained(folder)),
        ("config.json", "model.safetensors"),
        model_swaps(),
    ),
    "tokenizer": Kept(
        "model.safetensors and config.json of a tokenizer",
        CODEC.save_pretrained,
        lambda folder: fingerprint(Tokenizer.from_pretrained(folder)),
        ("config.json", "model.safetensors"),
        (MODEL.save_pretrained, tiny_tokenizer(code_channels=8).save_pretrained),
    ),
    "pth": Kept("a published .pth", *_published("viar.pth")),
    "safetensors": Kept("published weights in .safetensors", *_published("viar.safetensors")),
    "judge": Kept("a judge", _write_judge, _read_judge),
    "tokens": Kept("tokens that are learnt from", _shards, _read_shards, others=(lambda f: _shards(f, 1),)),
    "tokens again": Kept("tokens that are made to their end", _shards, _written_again),
    "pictures": Kept("PNG files that are learnt from", _write_pictures, _read_pictures),
    "series": Kept("a series that goes on", _series, _series_gone_on_with, others=(_other_series,)),
    "looked at": Kept("a series that is evaluated", _series, _series_looked_at, ("*.png", "series.json")),
    "reference": Kept("statistics of a reference", write_reference, _read_reference),
    "archive": Kept("an archive of images", _write_archive, _read_archive),
    "figures": Kept("figures.json of a reproduction", _figures, _figures),
    "stage": Kept("done.json and begun.json of a stage", stage, stage),
    "results": Kept("figures of benchmarks", write_results, _read_results),
    "run": Kept(
        "state, best weights, log and settings of a run that goes on",
        half_a_run,
        _rest_of_a_run,
        ("run.json", "metrics.jsonl", "state/*", "best/*/model.safetensors"),
        (lambda f: half_a_run(f, 1),),
    ),
}
