"""`viar train-tokenizer` and `viar train`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro
from rich.console import Console
from tyro.extras import subcommand_type_from_defaults

from ..data import Batch, BatchedDataset, TokenShards, is_shards
from ..data.decoding import shown
from ..generation.sampling import check_same_sizes
from ..model.config import TokenizerConfig, TransformerConfig
from ..model.transformer import NextScaleTransformer
from ..pretrained import fingerprint
from ..tokenizer import Tokenizer
from ..training import (
    TOKENIZERS,
    TRANSFORMERS,
    TokenizerPreset,
    TransformerPreset,
    adapt_tokenizer,
    adapt_transformer,
    check_adaptable,
    check_device,
    loss_terms,
    train_tokenizer,
    train_transformer,
)
from .checks import check_beside_data, check_run
from .flags import given_flags
from .loading import load_images, load_model

TokenizerChoice = Annotated[
    TokenizerPreset, tyro.conf.arg(name="", constructor=subcommand_type_from_defaults(TOKENIZERS))
]
TransformerChoice = Annotated[
    TransformerPreset,
    tyro.conf.arg(name="", constructor=subcommand_type_from_defaults(TRANSFORMERS)),
    tyro.conf.AvoidSubcommands,  # the preset decides the kind of trunk
]
From = Annotated[str | None, tyro.conf.arg(name="from")]
CLASSES_NAMED = 20  # in a line of text
Config = TypeVar("Config", TransformerConfig, TokenizerConfig)


def train_tokenizer_command(preset: TokenizerChoice, out: Path, from_: From = None) -> None:
    """Train a tokenizer, starting from a preset whose every setting is a flag.

    Args:
        preset: Where to start from.
        out: Folder of the run. An interrupted run goes on.
        from_: Start from the weights of a trained tokenizer: a folder, a hub id or a published checkpoint.
            Its settings are kept; --model.sides may be others.
    """
    check_run(out)
    check_beside_data(out, preset.data)
    loss_terms(preset.loss)
    check_device(preset.train)
    console = Console()
    trained = None if from_ is None else load_model(Tokenizer, from_, "--from")
    config = preset.model if trained is None else _settings_of(trained.config, preset.model)
    batch_size = preset.train.batch_size
    data = load_images(
        preset.data,
        config.image_side,
        console,
        augment=preset.augment,
        augmentations=preset.augmentations,
        batch_size=batch_size,
    )
    torch.manual_seed(preset.train.seed)
    if trained is None:
        tokenizer = Tokenizer(config)
    else:
        tokenizer, changes = adapt_tokenizer(trained, config)
        _say(console, changes)
    metrics = train_tokenizer(
        tokenizer,
        data.train,
        out,
        preset.train,
        loss=preset.loss,
        init_codebook=trained is None,
        held_out=data.validation,
        origin=_origin(from_, trained),
        console=console,
    )
    console.print_json(json.dumps(metrics))


def train_command(preset: TransformerChoice, tokenizer: str, out: Path, from_: From = None) -> None:
    """Train a VAR or a VIAR on the tokens of a trained tokenizer.

    The model gets as many classes as the images have, unless --model.num-classes says how many it must be.

    Args:
        preset: Where to start from; every setting is a flag.
        tokenizer: Folder, hub id or published checkpoint of the tokenizer.
        out: Folder of the run. An interrupted run goes on.
        from_: Start from the weights of a trained model: a folder, a hub id or a published checkpoint. Its
            settings are kept; classes are those of the images, and sides those of the tokenizer.
    """
    check_run(out)
    check_beside_data(out, preset.data)
    check_device(preset.train)
    console = Console()
    codec = load_model(Tokenizer, tokenizer, "--tokenizer")
    trained = None if from_ is None else load_model(NextScaleTransformer, from_, "--from")
    config, owner = preset.model, "the preset's"
    if trained is not None:
        config, owner = (
            _settings_of(trained.config, preset.model, sides=codec.config.sides),
            "the checkpoint's",
        )
    check_same_sizes(config, codec.config)
    data, num_classes, class_names = _images_or_tokens(preset, codec.config.image_side, console)
    config = _with_classes_of(preset.data, num_classes, config, owner, console)
    torch.manual_seed(preset.train.seed)
    if trained is None:
        model = NextScaleTransformer(config)
    else:
        model, changes = adapt_transformer(trained, config)
        _say(console, [*_matched(class_names, trained.config.num_classes), *changes])
    metrics = train_transformer(
        model,
        codec,
        data,
        out,
        preset.train,
        class_names=class_names,
        origin=_origin(from_, trained),
        console=console,
    )
    console.print_json(json.dumps(metrics))


def _images_or_tokens(
    preset: TransformerPreset, image_side: int, console: Console
) -> tuple[BatchedDataset[Batch] | TokenShards, int, tuple[str, ...]]:
    """What `--data` names, images or a folder of their tokens, how many classes it has, and their names."""
    if not is_shards(preset.data):
        batch_size = preset.train.batch_size
        images = load_images(
            preset.data,
            image_side,
            console,
            augment=preset.augment,
            augmentations=preset.augmentations,
            batch_size=batch_size,
        )
        return images.train, images.num_classes, images.class_names
    for flag in ("augment", "augmentations"):
        if given := getattr(preset, flag):
            raise ValueError(
                f"--{flag}: {shown(preset.data)} holds tokens, which cannot be changed, got {given}; "
                "give it to viar tokenize"
            )
    tokens = TokenShards(preset.data)
    return tokens, tokens.settings.num_classes, tokens.settings.class_names


def _matched(names: tuple[str, ...], before: int) -> list[str]:
    """Which classes of the data go on with which of the `before` ones of a checkpoint, which has no names."""
    numbered = [f"{number} {shown(name)}" for number, name in enumerate(names)]
    parts = {
        "go on with the checkpoint's classes of the same numbers": numbered[:before],
        "new": numbered[before:],
    }
    texts = [
        f"{', '.join(some[:CLASSES_NAMED])}{' and so on' if len(some) > CLASSES_NAMED else ''}: {text}"
        for text, some in parts.items()
        if some
    ]
    return [f"classes are matched by number, not by name; {'; '.join(texts)}"] if names else []


def _with_classes_of(
    source: str, found: int, config: TransformerConfig, owner: str, console: Console
) -> TransformerConfig:
    """Settings with as many classes as images or tokens have, which is said if it is a change.

    Raises:
        ValueError: the user gave another number.
    """
    before = config.num_classes
    if before == found:
        return config
    if "model.num_classes" in given_flags():
        raise ValueError(
            f"--model.num-classes: {shown(source)} has {found} classes, got {before}; leave the flag, or "
            "give other images"
        )
    _say(console, [f"num_classes is {found} as in the data, instead of {owner} {before}"])
    return replace(config, num_classes=found)


def _settings_of(trained: Config, preset: Config, **fitted: Any) -> Config:
    """Settings of trained weights, with those that the user gave, and `fitted` where the user did not.

    Raises:
        ValueError: weights cannot have a setting that was given, or the preset has another trunk.
    """
    given = {name.removeprefix("model.") for name in given_flags() if name.startswith("model.")}
    given |= {name.replace("no_", "", 1) for name in given if name.startswith("no_")}  # --model.no-qk-norm
    values, asked = trained.to_dict(), preset.to_dict()
    trunk, asked_trunk = values.pop("trunk", {}), asked.pop("trunk", {})
    if trunk.get("kind") != asked_trunk.get("kind"):
        raise ValueError(
            f"--from: its weights have an {trunk['kind']} trunk, the preset's is {asked_trunk['kind']}; "
            "start from a preset of the same kind (VAR is explicit, VIAR implicit)"
        )
    values |= {name: value for name, value in fitted.items() if name not in given}
    values |= {name: value for name, value in asked.items() if name in given}
    trunk |= {name: value for name, value in asked_trunk.items() if f"trunk.{name}" in given}
    config = type(trained).from_dict({**values, "trunk": trunk} if trunk else values)
    try:
        check_adaptable(trained, config)
    except ValueError as error:
        raise ValueError(f"--from: {error}") from error
    return config


def _origin(source: str | None, trained: NextScaleTransformer | Tokenizer | None) -> dict[str, str]:
    """What is kept of where a run was started from."""
    return {} if trained is None else {"source": str(source), "fingerprint": fingerprint(trained)}


def _say(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
