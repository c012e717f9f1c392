"""The two trainings: what each is fitted to, and with which loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import Batch, BatchedDataset, TensorImages, TokenizedImages
from ..generation.sampling import check_pair
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .config import TrainConfig
from .loop import fit
from .losses import tokenizer_loss, transformer_loss
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
    data: BatchedDataset[Batch],
    folder: Path,
    config: TrainConfig,
    *,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on the tokens of images and save to `folder`; resumes a run that was interrupted there.

    Images that are held in memory are tokenized once, others batch by batch. The loss is the cross-entropy,
    plus the trunk's penalty where `ImplicitTrunkConfig.residual_weight` asks for one. Every
    `config.sample_every` steps a grid of generated images is written into `folder`/samples, a row a class, of
    the first ten classes, always of the same seed.

    Args:
        model: trained in place.
        tokenizer: put into evaluation mode and frozen.
        data: images with labels.
        folder: of the run.
        config: settings.
        console: where progress is shown; default standard output.

    Returns:
        The last logged metrics, with steps and seconds.

    Raises:
        ValueError: model and tokenizer differ in size, or the batch does not divide into parts and among
            processes.
        FloatingPointError: the loss is not finite; nothing is saved then.
    """
    check_pair(model, tokenizer)
    tokenizer.eval().requires_grad_(False)
    in_memory = isinstance(data, TensorImages)
    samples: BatchedDataset[Any] = TokenizedImages(tokenizer, data) if in_memory else data
    step_loss = transformer_loss(None if in_memory else tokenizer, seed=config.seed)
    draw = generated(tokenizer)
    return fit(model, step_loss, samples, folder, config, name="transformer", draw=draw, console=console)
