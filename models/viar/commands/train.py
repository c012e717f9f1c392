"""`viar train-tokenizer` and `viar train`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro
from rich.console import Console
from tyro.extras import subcommand_type_from_defaults

from ..data import Batch, BatchedDataset, TokenShards, is_shards
from ..data.decoding import shown
from ..generation.sampling import check_same_sizes
from ..model.config import ImplicitTrunkConfig, TokenizerConfig, TransformerConfig
from ..model.transformer import NextScaleTransformer
from ..pretrained import fingerprint
from ..tokenizer import Tokenizer
from ..training import (
    TOKENIZERS,
    TRANSFORMERS,
    TokenizerRecipe,
    TrainConfig,
    TransformerRecipe,
    adapt_tokenizer,
    adapt_transformer,
    check_adaptable,
    check_device,
    loss_terms,
    train_tokenizer,
    train_transformer,
)
from ..training.asked import Asked
from ..training.dry_run import (
    Build,
    Make,
    Train,
    deepest_and_mean,
    made_up_tokenizer,
    random_images,
    random_tokens,
    two_steps,
)
from .checks import check_beside_data, check_run
from .flags import given_flags, optional
from .loading import load_images, load_model, process_index
from .output import report
from .perceptual import load_perceptual

Config = TypeVar("Config", TransformerConfig, TokenizerConfig)
Recipe = TypeVar("Recipe", TokenizerRecipe, TransformerRecipe)


def _told(recipe: TokenizerRecipe | TransformerRecipe) -> str:
    """What the help says of a recipe."""
    model, train = recipe.model, recipe.train
    if isinstance(model, TokenizerConfig):
        tokens = sum(side * side for side in model.sides)
        sizes = f"{model.image_side} pixels in {tokens} tokens of {model.codebook_size} codes"
    elif isinstance(model.trunk, ImplicitTrunkConfig):
        sizes = f"{model.trunk.num_pre} + implicit + {model.trunk.num_post} blocks of width {model.width}"
    else:
        sizes = f"{model.depth} blocks of width {model.width}"
    return f"{sizes}; {train.steps:,} steps of {train.batch_size} images"


def _recipes(recipes: Mapping[str, Recipe]) -> type[Recipe]:
    """For the parser: one of some recipes, whose every setting is a flag."""
    return subcommand_type_from_defaults(recipes, {name: _told(recipe) for name, recipe in recipes.items()})


TokenizerChoice = Annotated[TokenizerRecipe, tyro.conf.arg(name="", constructor=_recipes(TOKENIZERS))]
TransformerChoice = Annotated[
    TransformerRecipe,
    tyro.conf.arg(name="", constructor=_recipes(TRANSFORMERS)),
    tyro.conf.AvoidSubcommands,  # the recipe decides the kind of trunk
]
NeededToTrain = tyro.conf.arg(help_behavior_hint="(required but with --dry-run)")
Out = Annotated[Path | None, NeededToTrain]
From = Annotated[str | None, tyro.conf.arg(name="from"), optional]
CLASSES_NAMED = 20  # in a line of text


def train_tokenizer_command(
    recipe: TokenizerChoice, out: Out = None, from_: From = None, dry_run: bool = False
) -> None:
    """Train a tokenizer, starting from a recipe whose every setting is a flag.

    Args:
        recipe: Where to start from.
        out: Folder of the run. An interrupted run goes on.
        from_: Start from the weights of a trained tokenizer: a folder, a hub id or a published checkpoint.
            Its settings are kept; --model.sides may be others.
        dry_run: Only tell parameters, memory and time, from two steps on pictures that are made up.
    """
    out = _checked_out(out, recipe, dry_run)
    loss_terms(recipe.loss)
    _check_no_inert_flags(recipe)
    console = Console()
    trained = None if from_ is None else load_model(Tokenizer, from_, "--from")
    config = recipe.model if trained is None else _settings_of(trained.config, recipe.model)
    train = partial(
        train_tokenizer,
        loss=recipe.loss,
        init_codebook=trained is None,
        perceptual=load_perceptual(recipe.perceptual, config.image_side),
        perceptual_weight=recipe.perceptual_weight,
        adversarial=recipe.adversarial,
    )
    if dry_run:
        build, make = partial(Tokenizer, config), random_images(config.image_side)
        _dry_run(console, [build], partial(train, console=Console(quiet=True)), make, recipe.train)
        return
    _say(console, _never_adversarial(recipe))
    batch_size = recipe.train.batch_size
    data = load_images(
        recipe.data,
        config.image_side,
        console,
        augment=recipe.augment,
        augmentations=recipe.augmentations,
        batch_size=batch_size,
    )
    torch.manual_seed(recipe.train.seed)
    if trained is None:
        tokenizer = Tokenizer(config)
    else:
        tokenizer, changes = adapt_tokenizer(trained, config)
        _say(console, changes)
    with _telling_of_an_end(out):
        metrics = train(
            tokenizer,
            data.train,
            out,
            recipe.train,
            held_out=data.validation,
            origin=_origin(from_, trained),
            console=console,
        )
    _tell(console, out, metrics)


def _check_no_inert_flags(recipe: TokenizerRecipe) -> None:
    """Raise `ValueError` where the user set what a loss that is switched off does not look at."""
    given = given_flags() - {"adversarial.weight"}
    if not recipe.adversarial.weight and (idle := [n for n in given if n.startswith("adversarial.")]):
        raise ValueError(
            f"--{min(idle).replace('_', '-')}: no adversarial loss; give --adversarial.weight, as 0.8"
        )
    if recipe.perceptual is None and "perceptual_weight" in given:
        raise ValueError("--perceptual-weight: no perceptual loss; give --perceptual")


def _never_adversarial(recipe: TokenizerRecipe) -> list[str]:
    """A line where the run ends before its adversarial loss begins: one may want that for a first look."""
    adversarial, steps = recipe.adversarial, recipe.train.steps
    if not adversarial.weight or steps is None or adversarial.start < steps:
        return []
    return [
        f"no adversarial loss: it begins after step {adversarial.start:,} of {steps:,}; --adversarial.start "
        "says when"
    ]


def train_command(
    recipe: TransformerChoice,
    tokenizer: Annotated[str | None, NeededToTrain] = None,
    out: Out = None,
    from_: From = None,
    dry_run: bool = False,
) -> None:
    """Train a VAR or a VIAR on the tokens of a trained tokenizer.

    The model gets as many classes as the images have, and the scales and codes of the tokenizer, unless
    --model.num-classes, --model.sides and so on say what they must be.

    Args:
        recipe: Where to start from; every setting is a flag.
        tokenizer: Folder, hub id or published checkpoint of the tokenizer.
        out: Folder of the run. An interrupted run goes on.
        from_: Start from the weights of a trained model: a folder, a hub id or a published checkpoint. Its
            settings are kept; classes are those of the images, and sides those of the tokenizer.
        dry_run: Only tell parameters, memory and time, from two steps on tokens that are made up.
    """
    out = _checked_out(out, recipe, dry_run)
    console = Console()
    trained = None if from_ is None else load_model(NextScaleTransformer, from_, "--from")
    codec = _codec(tokenizer, recipe.model if trained is None else trained.config, dry_run)
    if trained is None:
        config, owner = _with_sizes_of(codec.config, recipe.model, console), "the recipe's"
    else:
        config = _settings_of(trained.config, recipe.model, sides=codec.config.sides)
        owner = "the checkpoint's"
    check_same_sizes(config, codec.config)
    if dry_run:
        builds = [partial(NextScaleTransformer, some) for some in deepest_and_mean(config)]
        train = partial(_fit_to_tokens, codec)
        _dry_run(console, builds, train, random_tokens(config), recipe.train)
        return
    data, held_out, num_classes, class_names = _images_or_tokens(recipe, codec.config.image_side, console)
    config = _with_classes_of(recipe.data, num_classes, config, owner, console)
    torch.manual_seed(recipe.train.seed)
    if trained is None:
        model = NextScaleTransformer(config)
    else:
        model, changes = adapt_transformer(trained, config)
        _say(console, [*_matched(class_names, trained.config.num_classes), *changes])
    with _telling_of_an_end(out):
        metrics = train_transformer(
            model,
            codec,
            data,
            out,
            recipe.train,
            held_out=held_out,
            class_names=class_names,
            origin=_origin(from_, trained),
            console=console,
        )
    _tell(console, out, metrics)


def _checked_out(out: Path | None, recipe: TokenizerRecipe | TransformerRecipe, dry_run: bool) -> Path:
    """The folder of a run, which may live there on a device that can do what is asked for.

    A dry run needs neither.
    """
    if out is not None:
        check_run(out)
        check_beside_data(out, recipe.data)
    elif not dry_run:
        raise ValueError("--out: give the folder of the run; or --dry-run, which needs none")
    if not dry_run:
        check_device(recipe.train)
    return Path() if out is None else out


def _codec(tokenizer: str | None, config: TransformerConfig, dry_run: bool) -> Tokenizer:
    """The tokenizer that is given, or one that is made up for a dry run."""
    if tokenizer is not None:
        return load_model(Tokenizer, tokenizer, "--tokenizer")
    if not dry_run:
        raise ValueError("--tokenizer: give a trained tokenizer; or --dry-run, which needs none")
    return made_up_tokenizer(config)


def _fit_to_tokens(
    codec: Tokenizer, model: NextScaleTransformer, data: BatchedDataset[Batch], out: Path, config: TrainConfig
) -> dict[str, float]:
    return train_transformer(model, codec, data, out, config, console=Console(quiet=True))


Source = BatchedDataset[Batch] | TokenShards


def _images_or_tokens(
    recipe: TransformerRecipe, image_side: int, console: Console
) -> tuple[Source, Source, int, tuple[str, ...]]:
    """What `--data` names, images or a folder of their tokens: to train on, and held out.

    Then how many classes they have, and their names.
    """
    if not is_shards(recipe.data):
        images = load_images(
            recipe.data,
            image_side,
            console,
            augment=recipe.augment,
            augmentations=recipe.augmentations,
            batch_size=recipe.train.batch_size,
        )
        return images.train, images.validation, images.num_classes, images.class_names
    for flag in ("augment", "augmentations"):
        if given := getattr(recipe, flag):
            raise ValueError(
                f"--{flag}: {shown(recipe.data)} holds tokens, which cannot be changed, got {given}; "
                "give it to viar tokenize"
            )
    tokens = TokenShards(recipe.data)
    held_out = TokenShards(recipe.data, "validation")
    return tokens, held_out, tokens.settings.num_classes, tokens.settings.class_names


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


def _with_sizes_of(codec: TokenizerConfig, config: TransformerConfig, console: Console) -> TransformerConfig:
    """Settings with the scales and codes of the tokenizer where the user gave no others, which is said."""
    theirs = {name: getattr(codec, name) for name in ("sides", "codebook_size", "code_channels")}
    changed = {
        name: value
        for name, value in theirs.items()
        if value != getattr(config, name) and f"model.{name}" not in given_flags()
    }
    _say(
        console,
        [
            f"{name} is {value} as in the tokenizer, instead of the recipe's {getattr(config, name)}"
            for name, value in changed.items()
        ],
    )
    return replace(config, **changed)


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


def _settings_of(trained: Config, recipe: Config, **fitted: Any) -> Config:
    """Settings of trained weights, with those that the user gave, and `fitted` where the user did not.

    Raises:
        ValueError: weights cannot have a setting that was given, or the recipe has another trunk.
    """
    given = {name.removeprefix("model.") for name in given_flags() if name.startswith("model.")}
    given |= {name.replace("no_", "", 1) for name in given if name.startswith("no_")}  # --model.no-qk-norm
    values, asked = trained.to_dict(), recipe.to_dict()
    trunk, asked_trunk = values.pop("trunk", {}), asked.pop("trunk", {})
    if trunk.get("kind") != asked_trunk.get("kind"):
        raise ValueError(
            f"--from: its weights have an {trunk['kind']} trunk, the recipe's is {asked_trunk['kind']}; "
            "start from a recipe of the same kind (VAR is explicit, VIAR implicit)"
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
        console.print(shown(line), markup=False, highlight=False, soft_wrap=True)


def _tell(console: Console, out: Path, metrics: Mapping[str, float]) -> None:
    """How a run ended."""
    if not report({"out": out, "done": True, **metrics}):
        console.print_json(json.dumps(metrics))


@contextmanager
def _telling_of_an_end(out: Path) -> Iterator[None]:
    """Inside, a training that SIGTERM ends tells how far it came."""
    try:
        yield
    except Asked as ended:
        report({"out": out, "done": False, "steps": ended.step})
        raise


def _dry_run(
    console: Console, builds: Sequence[Build], train: Train, make: Make, config: TrainConfig
) -> None:
    """Take two steps, and tell what they took; the first of several processes does."""
    with console.status("two steps"):
        told = two_steps(builds, train, make, config)
    if not report(asdict(told)) and not process_index():
        _say(console, told.lines())
