"""`viar train-tokenizer` and `viar train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from tyro.extras import subcommand_type_from_defaults

from ..data import Batch, BatchedDataset, TokenShards, is_shards, load_data
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from ..training import (
    TOKENIZERS,
    TRANSFORMERS,
    TokenizerPreset,
    TransformerPreset,
    train_tokenizer,
    train_transformer,
)
from .loading import show_found

TokenizerChoice = Annotated[
    TokenizerPreset, tyro.conf.arg(name="", constructor=subcommand_type_from_defaults(TOKENIZERS))
]
TransformerChoice = Annotated[
    TransformerPreset, tyro.conf.arg(name="", constructor=subcommand_type_from_defaults(TRANSFORMERS))
]


def train_tokenizer_command(preset: TokenizerChoice, out: Path) -> None:
    """Train a tokenizer, starting from a preset whose every setting is a flag.

    Args:
        preset: Where to start from.
        out: Folder of the run. An interrupted run goes on.
    """
    _refuse_finished(out)
    console = Console()
    data = load_data(preset.data, preset.model.image_side, augment=preset.augment)
    show_found(data, console, batch_size=preset.train.batch_size)
    torch.manual_seed(preset.train.seed)
    tokenizer = Tokenizer(preset.model)
    metrics = train_tokenizer(
        tokenizer,
        data.train,
        out,
        preset.train,
        loss=preset.loss,
        held_out=data.validation,
        console=console,
    )
    console.print_json(json.dumps(metrics))


def train_command(preset: TransformerChoice, tokenizer: str, out: Path) -> None:
    """Train a VAR or a VIAR on the tokens of a trained tokenizer.

    Args:
        preset: Where to start from; every setting is a flag.
        tokenizer: Folder or hub id of the tokenizer.
        out: Folder of the run. An interrupted run goes on.
    """
    _refuse_finished(out)
    console = Console()
    codec = Tokenizer.from_pretrained(tokenizer)
    data = _images_or_tokens(preset, codec, console)
    torch.manual_seed(preset.train.seed)
    model = NextScaleTransformer(preset.model)
    metrics = train_transformer(model, codec, data, out, preset.train, console=console)
    console.print_json(json.dumps(metrics))


def _images_or_tokens(
    preset: TransformerPreset, codec: Tokenizer, console: Console
) -> BatchedDataset[Batch] | TokenShards:
    """What `--data` names: a source of images, or a folder of their tokens."""
    if not is_shards(preset.data):
        data = load_data(preset.data, codec.config.image_side, augment=preset.augment)
        show_found(data, console, batch_size=preset.train.batch_size)
        return data.train
    if preset.augment:
        raise ValueError(
            f"--augment: {preset.data} holds tokens, which cannot be changed, got {preset.augment}; "
            "give it to viar tokenize"
        )
    return TokenShards(preset.data)


def _refuse_finished(out: Path) -> None:
    if (out / "model.safetensors").exists():
        raise ValueError(f"--out: {out} holds a finished run; give another folder, or remove this one")
