"""What the flags `--model`, `--tokenizer`, `--from` and `--device` name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.markup import escape

from ..checkpoints.convert import load_official
from ..data import ImageData, load_data
from ..data.decoding import shown
from ..data.sources import is_in_memory
from ..generation.inference import prepare_inference
from ..generation.sampling import check_pair
from ..launch import launched
from ..model.transformer import NextScaleTransformer
from ..pretrained import CONFIG, WEIGHTS
from ..tokenizer import Tokenizer
from ..weights import load_shipped
from .flags import ExecutionFlags, given_flags

Model = TypeVar("Model", NextScaleTransformer, Tokenizer)
SHIPPED_DATA = "mnist"  # of the models that commands use where none are given
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")  # the hub is not asked for others
HOSTS_OF_WEIGHTS = (
    "cpu",
    "cuda",
    "mps",
    "xpu",
)  # devices that compute; "meta" and others of PyTorch's do not


def load_pair(
    model: str | None, tokenizer: str | None, flags: ExecutionFlags
) -> tuple[NextScaleTransformer, Tokenizer]:
    """Model and tokenizer of the same sizes, ready to generate, on the device that is asked for.

    Args:
        model: folder, hub id or published checkpoint file; without it and `tokenizer` the two that come with
            the package, which is said.
        tokenizer: the same.
        flags: device, type of the weights, whether to compile and to capture.

    Raises:
        ValueError: no such device; only one of the two is given, cannot be read or is the other, or their
            sizes differ.
    """
    find_device(flags.device)  # before time is spent on reading
    transformer, codec = _shipped_or_given(model, tokenizer)
    make_ready(transformer, codec, flags)
    return transformer, codec


def make_ready(transformer: NextScaleTransformer, codec: Tokenizer, flags: ExecutionFlags) -> None:
    """Put model and tokenizer on the device that is asked for, ready to generate; in place.

    Args:
        transformer: VAR or VIAR.
        codec: its tokenizer.
        flags: device, type of the weights, whether to compile and to capture.

    Raises:
        ValueError: no such device, or the two have other sizes.
    """
    where = find_device(flags.device)
    check_pair(transformer, codec)
    dtype = None if flags.dtype is None else getattr(torch, flags.dtype)
    transformer.to(where)
    codec.to(where)
    prepare_inference(transformer, codec, dtype=dtype, compile=flags.compile, graphs=flags.graphs)


def _shipped_or_given(model: str | None, tokenizer: str | None) -> tuple[NextScaleTransformer, Tokenizer]:
    if model is not None and tokenizer is not None:
        return (
            load_model(NextScaleTransformer, model, "--model"),
            load_model(Tokenizer, tokenizer, "--tokenizer"),
        )
    if model is None and tokenizer is None:
        say(
            f"the VIAR of handwritten digits ({SHIPPED_DATA}) that comes with the package; --model and "
            "--tokenizer give another"
        )
        return load_shipped(SHIPPED_DATA)
    given, missing = ("--model", "--tokenizer") if tokenizer is None else ("--tokenizer", "--model")
    raise ValueError(
        f"{given}: given without {missing}, and a model knows the codes of its own tokenizer alone; give "
        "both, or neither for the models that come with the package"
    )


def load_model(kind: type[Model], source: str, flag: str) -> Model:
    """A model in evaluation mode, on the CPU.

    Args:
        kind: class that is expected.
        source: folder, hub id or published checkpoint file.
        flag: that named it, for the message.

    Raises:
        ValueError: it cannot be read, is of another kind, or has weights that are no numbers.
    """
    path = Path(source)
    if path.name in (CONFIG, WEIGHTS) and (path.parent / CONFIG).is_file() and path.is_file():
        raise ValueError(
            f"{flag}: {shown(source)} is a part of a model; give its folder, {shown(path.parent)}"
        )
    if not path.is_file():
        _say_where(source, flag)
    try:
        with Console(quiet=process_index() > 0).status(f"reading {escape(shown(source))}"):
            loaded = load_official(source) if path.is_file() else kind.from_pretrained(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag}: {error}") from error
    if not isinstance(loaded, kind):
        raise ValueError(f"{flag}: expected a {kind.__name__}, found a {type(loaded).__name__} in {source}")
    for name, tensor in loaded.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{flag}: {shown(source)} has weights that are not finite, the first of them {name}; its "
                "training went wrong, give an earlier one"
            )
    return loaded.eval()


def _say_where(source: str, flag: str) -> None:
    """Say that the hub is asked for what is not here: without a network that takes half a minute.

    Raises:
        ValueError: what stands before the slash is a folder, so a path is meant; the hub is not told of it.
    """
    if os.path.exists(source) or not HUB_NAME.fullmatch(source):
        return
    first, slash, rest = source.partition("/")
    if slash and os.path.isdir(first):
        raise ValueError(
            f"{flag}: no {shown(rest)} in the folder {shown(first)}; give what is there (the Hugging Face "
            f"hub is not asked for {shown(source)} where a folder {shown(first)} is)"
        )
    say(f"{flag}: no folder or file {shown(source)} here, so the Hugging Face hub is asked for it")


def say(line: str) -> None:
    """Print a note beside what a command gives, on standard error; the first of several processes does."""
    if not process_index():
        Console(stderr=True).print(shown(line), markup=False, highlight=False, soft_wrap=True)


def find_device(name: str) -> torch.device:
    """The device of that name, "auto" for a GPU where there is one.

    "cuda" without a number is a GPU of its own for each of several processes.

    Raises:
        ValueError: no such device.
    """
    found = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if found else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type != "cuda":
        return _other_device(device)
    if not found:
        raise ValueError(f"--device: {name} asked for, but PyTorch finds no GPU; use cpu")
    own = launched("LOCAL_RANK") if device.index is None else device.index
    if own >= torch.cuda.device_count():
        raise ValueError(f"--device: no GPU {own}, PyTorch finds {torch.cuda.device_count()}")
    return torch.device("cuda", own)


def _other_device(device: torch.device) -> torch.device:
    """The device, if it is there."""
    there = device.type in HOSTS_OF_WEIGHTS and not (device.type == "cpu" and device.index)
    try:
        if there:
            torch.zeros(1, device=device).add(1)
    except Exception:  # each kind of device has an error of its own for not being there
        there = False
    if not there:
        raise ValueError(
            f"--device: {device} asked for, but this PyTorch finds no such device; expected auto, cpu, cuda "
            "or cuda:N"
        )
    return device


def load_images(
    source: str,
    image_side: int,
    console: Console,
    *,
    augment: int = 0,
    augmentations: tuple[str, ...] | None = None,
    batch_size: int = 1,
    as_they_are: bool = False,
) -> ImageData:
    """Images that `--data` names, and what a folder was found to hold, said before time is spent on it.

    Args:
        source: of the images, see `viar.data.load_data`.
        image_side: pixels a side.
        console: where to say what was found; the first of several processes does.
        augment: changed versions to add of each training image; of a folder none, unless the user gave it.
        augmentations: names of those that training images go through; of a folder in place of a preset's own
            images "crop", unless the user gave them.
        batch_size: images that are learnt from at a time.
        as_they_are: training images are not changed when they are drawn, not even cut at random.

    Raises:
        ValueError, PermissionError: what cannot be served; the flag is named.
    """
    if not is_in_memory(source):  # a recipe's are for the images that it names
        augment = augment if "augment" in given_flags() else 0
        others = "data" in given_flags() and "augmentations" not in given_flags()
        augmentations = None if others else augmentations
    if as_they_are:
        augmentations = ()
    try:
        with console.status(f"looking at {escape(shown(source))}"):
            data = load_data(source, image_side, augment=augment, augmentations=augmentations)
    except (ValueError, PermissionError) as error:
        owner, _, text = str(error).partition(": ")
        flag = f"--{owner}" if owner in ("augment", "augmentations") else "--data"
        text = text if owner in ("augment", "augmentations", "source", "image_side") else str(error)
        kind = PermissionError if isinstance(error, PermissionError) else ValueError
        raise kind(f"{flag}: {text}") from error
    if process_index():
        return data
    if data.report is not None:
        console.print(escape(str(data.report)), highlight=False, soft_wrap=True)
    if batch_size > len(data.train):
        console.print(
            f"note: a batch of {batch_size} holds some of the {len(data.train)} pictures several times"
        )
    return data


def num_processes() -> int:
    """How many processes a launcher started together, on all machines."""
    return launched("WORLD_SIZE")


def process_index() -> int:
    """Index of this process among those that a launcher started together, from 0."""
    return launched("RANK")
