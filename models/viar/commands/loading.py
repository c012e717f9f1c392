"""What the flags `--model`, `--tokenizer` and `--device` name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.markup import escape

from ..checkpoints.convert import load_official
from ..data import ImageData
from ..generation.inference import prepare_inference
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .flags import ExecutionFlags

Model = TypeVar("Model", NextScaleTransformer, Tokenizer)


def load_pair(model: str, tokenizer: str, flags: ExecutionFlags) -> tuple[NextScaleTransformer, Tokenizer]:
    """Model and tokenizer, ready to generate, on the device that is asked for.

    Args:
        model: folder, hub id or published checkpoint file.
        tokenizer: the same.
        flags: device, type of the weights and whether to compile.

    Raises:
        ValueError: a file holds the other of the two; no such device.
    """
    where = find_device(flags.device)
    transformer = _load(NextScaleTransformer, model, "--model").to(where)
    codec = _load(Tokenizer, tokenizer, "--tokenizer").to(where)
    dtype = None if flags.dtype is None else getattr(torch, flags.dtype)
    prepare_inference(transformer, codec, dtype=dtype, compile=flags.compile)
    return transformer, codec


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
        return device
    if not found:
        raise ValueError(f"--device: {name} asked for, but PyTorch finds no GPU; use cpu")
    own = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if own >= torch.cuda.device_count():
        raise ValueError(f"--device: no GPU {own}, PyTorch finds {torch.cuda.device_count()}")
    return torch.device("cuda", own)


def show_found(data: ImageData, console: Console, *, batch_size: int = 1) -> None:
    """Say what a folder of pictures was found to hold, before time is spent on it; once for all processes.

    Args:
        data: of any source; embedded ones have nothing to say.
        console: where to say it.
        batch_size: images that are learnt from at a time.
    """
    if process_index():
        return
    if data.report is not None:
        console.print(escape(str(data.report)), highlight=False, soft_wrap=True)
    if batch_size > len(data.train):
        console.print(
            f"note: a batch of {batch_size} holds some of the {len(data.train)} pictures several times"
        )


def process_index() -> int:
    """Index of this process among those that a launcher started together, from 0."""
    return int(os.environ.get("RANK", 0))


def _load(kind: type[Model], source: str, flag: str) -> Model:
    if not Path(source).is_file():
        return kind.from_pretrained(source).eval()
    loaded = load_official(source)
    if not isinstance(loaded, kind):
        raise ValueError(f"{flag}: expected a {kind.__name__}, found a {type(loaded).__name__} in {source}")
    return loaded.eval()
