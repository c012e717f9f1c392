"""The two trainings: what each is fitted to, and with which loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ..data import Batch, BatchedDataset, TensorImages, TokenizedImages, TokenShards, from_rows, tokenize
from ..data.tokens import TokenBatch
from ..generation.sampling import check_pair
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .config import TrainConfig
from .loop import fit
from .losses import ToTokens, tokenizer_loss, transformer_loss
from .samples import generated, reconstructed


def train_tokenizer(
    tokenizer: Tokenizer,
    data: BatchedDataset[Batch],
    folder: Path,
    config: TrainConfig,
    *,
    loss: str = "l1+l2",
    revive_every: int = 20,
    held_out: BatchedDataset[Batch] | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on images and save to `folder`; resumes a run that was interrupted there.

    The loss is the reconstruction's plus the quantizer's. The codebook starts from data.

    Args:
        tokenizer: trained in place.
        data: images with labels, which are not looked at.
        folder: of the run.
        config: settings.
        loss: terms of the reconstruction loss, see `reconstruction_loss`.
        revive_every: steps after which codes that fell out of use are replaced.
        held_out: images of which some are drawn beside what the tokenizer makes of them, every
            `config.sample_every` steps, into `folder`/samples; default none.
        console: where progress is shown; default standard output.

    Returns:
        The last logged metrics, with steps, seconds, and the share of the codebook in use.

    Raises:
        ValueError: a term of `loss` is unknown, or the batch does not divide into parts and among processes.
        FloatingPointError: the loss is not finite; nothing is saved then.
    """
    step_loss = tokenizer_loss(tokenizer, kind=loss, revive_every=revive_every, seed=config.seed)
    draw = reconstructed(held_out) if held_out is not None and len(held_out) else None
    metrics = fit(tokenizer, step_loss, data, folder, config, name="tokenizer", draw=draw, console=console)
    return metrics | {"codebook_usage": tokenizer.quantizer.total_codebook_usage()}


def train_transformer(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    data: BatchedDataset[Batch] | TokenShards,
    folder: Path,
    config: TrainConfig,
    *,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on the tokens of images and save to `folder`; resumes a run that was interrupted there.

    Images that are held in memory are tokenized once, others batch by batch; of `TokenShards` nothing is. The
    loss is the cross-entropy, plus the trunk's penalty where `ImplicitTrunkConfig.residual_weight` asks for
    one. Every `config.sample_every` steps a grid of generated images is written into `folder`/samples, a row
    a class, of the first ten classes, always of the same seed.

    Args:
        model: trained in place.
        tokenizer: put into evaluation mode and frozen.
        data: images with labels, or their tokens.
        folder: of the run.
        config: settings.
        console: where progress is shown; default standard output.

    Returns:
        The last logged metrics, with steps and seconds.

    Raises:
        ValueError: model and tokenizer differ in size, tokens are of another tokenizer or of another number
            of classes, or the batch does not divide into parts and among processes.
        FloatingPointError: the loss is not finite; nothing is saved then.
    """
    check_pair(model, tokenizer)
    tokenizer.eval().requires_grad_(False)
    if isinstance(data, TokenShards):
        data.check(tokenizer)
        check_classes(model, data)
    samples: BatchedDataset[Any] = data
    to_tokens: ToTokens | None = partial(_tokenized, tokenizer)
    if isinstance(data, TensorImages):
        samples, to_tokens = TokenizedImages(tokenizer, data), None
    step_loss = transformer_loss(to_tokens, seed=config.seed)
    draw = generated(tokenizer)
    return fit(model, step_loss, samples, folder, config, name="transformer", draw=draw, console=console)


def check_classes(model: NextScaleTransformer, data: TokenShards) -> None:
    """Raise `ValueError` unless the model has the classes of the tokens."""
    found, own = data.settings.num_classes, model.config.num_classes
    if found != own:
        raise ValueError(
            f"{data.folder} holds tokens of {found} classes, the model has {own}; give the model as many, "
            f"--model.num-classes {found}"
        )


def _tokenized(tokenizer: Tokenizer, batch: Tensor, labels: Tensor) -> TokenBatch:
    """Of images, or of tokens that are known."""
    make = tokenize if batch.is_floating_point() else from_rows
    return make(tokenizer.to(batch.device), batch, labels)
