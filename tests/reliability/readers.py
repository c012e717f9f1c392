"""All that reads files and texts of others, each with small whole ones to begin from."""

from __future__ import annotations

import base64
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "viar"))

import numpy as np
import spoiling
import torch
from PIL import Image
from safetensors.torch import load_file, save
from tiny_models import SIDES, TRANSFORMER, tiny_tokenizer, tiny_transformer
from torch import Tensor, nn

from viar.app.calls import calls_of
from viar.app.drawing import Pair
from viar.checkpoints.convert import export_official, load_official
from viar.data import TokenShards, read_mask, read_picture
from viar.data.decoding import decode_bytes
from viar.data.shards import ShardSettings, checksum_path
from viar.evaluation import FeatureNetwork, Features, find_pictures
from viar.evaluation.references import check_reference
from viar.generation.series.folder import FORMAT, SeriesFolder
from viar.model.config import TokenizerConfig, TransformerConfig
from viar.pretrained import check_tensors, not_larger, read_config
from viar.training.config import TrainConfig
from viar.training.log import read_metrics
from viar.training.settings import compare_settings

SIDE = 6  # pixels, of the pictures that are fitted


@dataclass(frozen=True)
class Reader:
    """Something that reads.

    Attributes:
        what: is given, in words.
        share: of all inputs, in units of the smallest share.
        seeds: whole inputs.
        read: what is given, and ends or raises what is documented.
        names: of which an error has one.
        spoil: changes the structure of an input; default there is none above bytes.
        documented: errors that are.
    """

    what: str
    share: int
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    names: tuple[str, ...]
    spoil: spoiling.Spoil | None = None
    documented: tuple[type[Exception], ...] = (ValueError,)


def readers(folder: Path) -> Iterator[Reader]:
    """All of them.

    Args:
        folder: empty, for what they read by name.
    """
    yield from _of_pictures(folder)
    yield from _of_models(folder)
    yield from _of_settings(folder)
    yield from _of_numbers(folder)


def _of_pictures(folder: Path) -> Iterator[Reader]:
    path, mask = folder / "a.png", folder / "mask.png"
    seeds = _pictures()
    pngs = tuple(seed for seed in seeds if seed[:4] == b"\x89PNG")

    def page() -> Callable[[bytes], object]:
        ask = calls_of(Pair(tiny_transformer(), tiny_tokenizer()))["in_paint"]
        whole = base64.b64encode(pngs[0]).decode()

        def read(content: bytes) -> None:
            try:
                ask(
                    content.decode("latin-1"), whole, -1
                )  # a class that there is not, told after pictures are read
            except ValueError as error:
                if not str(error).startswith("label: "):
                    raise

        return read

    def sent(draw: Any, content: bytes) -> bytes:
        try:
            return b"data:," + base64.b64encode(spoiling.spoiled_bytes(draw, base64.b64decode(content)))
        except ValueError:
            return content

    yield Reader(
        "pictures, from memory", 40, seeds, lambda content: decode_bytes(content, "a.png"), ("a.png",), _png
    )
    yield Reader(
        "pictures, files", 8, seeds, _written(path, lambda: read_picture(path, SIDE)), ("a.png",), _png
    )
    yield Reader("masks", 6, pngs, _written(mask, lambda: read_mask(mask, SIDE, (8, 8))), ("mask.png",), _png)
    texts = tuple(base64.b64encode(seed) for seed in seeds[:3])
    yield Reader("pictures sent to the page", 30, texts, page(), ("picture",), sent)
    series = SeriesFolder(folder / "series", 8)
    series.path.mkdir()

    def read_series(index: int = 0) -> None:
        if series.prepare({"seed": 0}, 1, ("png",)) == []:
            series.read(index)

    (series.path / "series.json").write_text(json.dumps({"format": FORMAT, "seed": 0}))
    yield Reader(
        "pictures of a series", 6, pngs[:1], _written(series.picture(0), read_series), ("000000.png",), _png
    )
    told = series.path / "series.json"
    Image.new("RGB", (8, 8)).save(series.picture(0))
    seed = json.dumps({"format": FORMAT, "seed": 0}).encode()
    yield Reader("series.json", 70, (seed,), _written(told, read_series), ("series",), spoiling.spoiled_json)


def _png(draw: Any, content: bytes) -> bytes:
    whole = content[:4] == b"\x89PNG"
    return spoiling.spoiled_png(draw, content) if whole else spoiling.spoiled_bytes(draw, content)


def _pictures() -> tuple[bytes, ...]:
    """Pictures of 8 x 8 of every kind that is read, PNGs of three kinds first."""
    rgb = Image.effect_noise((8, 8), 60).convert("RGB")
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize((8, 8)))
    tag = Image.Exif()
    tag[0x0112] = 6
    profile = _profile()
    given: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "png", {}),
        (rgba, "png", {"icc_profile": profile, "exif": tag}),
        (rgb.quantize(5), "png", {"transparency": 1}),
        (Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000), "png", {}),
        (rgb, "jpeg", {"exif": tag, "icc_profile": profile}),
        (rgb.convert("CMYK"), "jpeg", {}),
        (rgb, "gif", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgba, "webp", {}),
        (rgb, "tiff", {"compression": "tiff_lzw"}),
        (rgb.convert("YCbCr"), "tiff", {}),
        (rgb.convert("1"), "tiff", {"compression": "group4"}),
        (rgb, "bmp", {}),
        (rgb, "ppm", {}),
        (rgb, "avif", {}),
    ]
    found = []
    for image, kind, options in given:
        written = io.BytesIO()
        try:
            image.save(written, kind, **options)
        except (OSError, KeyError):  # a Pillow without the library for this kind
            continue
        found.append(written.getvalue())
    return tuple(found)


def _profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


class _Two(nn.Module):
    """What settings are of, where those of a model would take long."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(2, 3)), nn.Parameter(torch.empty(4, dtype=torch.bfloat16))


def _of_models(folder: Path) -> Iterator[Reader]:
    weights = folder / "model.safetensors"
    whole = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})

    def header() -> None:
        from safetensors import SafetensorError

        try:
            with not_larger(weights):
                model = _Two()
            check_tensors(model, load_file(weights))
        except SafetensorError as error:  # which those who call it tell with the name of the file
            raise ValueError(f"model.safetensors: {error}") from error
        except ValueError as error:
            raise ValueError(f"model.safetensors: {error}") from error

    yield Reader(
        "headers of safetensors",
        100,
        (whole,),
        _written(weights, header),
        ("model.safetensors",),
        spoiling.spoiled_safetensors,
    )
    for kind, model in (("tokenizer", tiny_tokenizer()), ("transformer", tiny_transformer())):
        place = folder / kind
        model.save_pretrained(place)
        cls = type(model)
        read = lambda cls=cls, place=place: cls.from_pretrained(place)  # noqa: E731
        config, tensors = place / "config.json", place / "model.safetensors"
        yield Reader(
            f"weights of a {kind}",
            1,
            (tensors.read_bytes(),),
            _written(tensors, read),
            (kind,),
            spoiling.spoiled_safetensors,
        )
        yield Reader(
            f"settings beside weights of a {kind}",
            1,
            (config.read_bytes(),),
            _written(config, read),
            (kind,),
            spoiling.spoiled_json,
        )
    yield _of_configs(folder / "transformer")
    published = folder / "a.pth"
    torch.save(export_official(tiny_transformer("explicit")), published)
    small = published.read_bytes()
    torch.save({"model": {"a": torch.ones(2)}}, published, _use_new_zipfile_serialization=False)
    seeds = (small, published.read_bytes())
    yield Reader(
        "published checkpoints",
        3,
        seeds,
        _written(published, lambda: load_official(published)),
        ("a.pth",),
        spoiling.spoiled_archive,
    )


def _of_configs(folder: Path) -> Reader:
    """Settings alone, without a model that is made of them."""
    path = folder / "config.json"

    def read() -> None:
        values = read_config(folder)
        try:
            (TransformerConfig if "trunk" in values else TokenizerConfig).from_dict(values)
        except (TypeError, LookupError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error  # as `from_pretrained` does
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    seeds = tuple(
        json.dumps(model.config.to_dict()).encode() for model in (tiny_tokenizer(), tiny_transformer())
    )
    return Reader("config.json", 100, seeds, _written(path, read), ("config.json",), spoiling.spoiled_json)


def _of_settings(folder: Path) -> Iterator[Reader]:
    run = folder / "run"
    (run / "state").mkdir(parents=True)
    model, train = TRANSFORMER.to_dict(), asdict(TrainConfig(steps=3))
    settings = {
        "kind": "transformer",
        "model": model,
        "train": train,
        "data": {"images": 3, "augmentations": []},
    }
    settings = json.loads(json.dumps(settings))
    path = run / "run.json"
    yield Reader(
        "run.json",
        50,
        (json.dumps(settings).encode(),),
        _written(path, lambda: compare_settings(run, settings)),
        (str(run),),
        spoiling.spoiled_json,
    )
    metrics = folder / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step, "accuracy": 0.5}) for step in range(1, 6)]
    yield Reader(
        "metrics.jsonl",
        100,
        ("\n".join(lines).encode(),),
        _written(metrics, lambda: read_metrics(metrics)),
        (),
        spoiling.spoiled_json,
    )


def _of_numbers(folder: Path) -> Iterator[Reader]:
    tokens = folder / "tokens"
    tokens.mkdir()
    settings = ShardSettings(
        tokenizer="0" * 32,
        sides=SIDES,
        codebook_size=16,
        num_classes=3,
        origin={"data": "digits"},
        images=(5, 1),
        crops=1,
        seed=0,
        shard_size=4,
        batch_size=2,
    )
    told = tokens / "shards.json"
    told.write_text(json.dumps(asdict(settings)))
    for split in ("train", "validation"):
        for name, rows in settings.shards(split):
            np.save(tokens / name, np.zeros(len(rows), settings.dtype))
            checksum_path(tokens / name).write_text("")

    def read() -> None:
        rows = TokenShards(tokens)
        if len(rows):
            rows.__getitems__(range(min(len(rows), 5)))

    first = tokens / "train-00000.npy"
    whole = first.read_bytes()
    yield Reader("token files", 50, (whole,), _written(first, read), ("tokens",))
    first.write_bytes(whole)
    yield Reader(
        "shards.json", 50, (told.read_bytes(),), _written(told, read), ("tokens",), spoiling.spoiled_json
    )
    archive, network = folder / "reference.npz", FeatureNetwork("inception 1", _seen)
    yield Reader(
        "reference statistics and images",
        8,
        _archives(archive),
        _written(archive, lambda: check_reference(archive, network, SIDE)),
        ("reference.npz",),
        spoiling.spoiled_archive,
    )
    yield Reader(
        "archives of images",
        6,
        _archives(archive)[:1],
        _written(archive, lambda: list(find_pictures(archive).batches())),
        ("reference.npz",),
        spoiling.spoiled_archive,
    )


def _archives(path: Path) -> tuple[bytes, ...]:
    pixels = np.arange(3 * SIDE * SIDE * 3, dtype=np.uint8).reshape(3, SIDE, SIDE, 3)
    moments = {"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.zeros(12), "sigma_s": np.eye(12)}
    contents = []
    for write, arrays in (
        (np.savez, {"arr_0": pixels, "arr_1": np.arange(3)}),
        (np.savez_compressed, {**moments, "arr_0": pixels, "network": np.array("inception 1")}),
        (np.savez, {**moments, "count": np.array(9), "pooled": np.ones((3, 6), np.float32)}),
    ):
        write(path, **arrays)
        contents.append(path.read_bytes())
    return tuple(contents)


def _seen(images: Tensor) -> Features:
    pooled = torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)
    return Features(pooled, images[:, :, :2, :2].flatten(1))


def _written(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Reads what is given from a file of that name."""

    def write_and_read(content: bytes) -> object:
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()

    return write_and_read
