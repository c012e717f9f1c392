"""What training makes small: the loss of the tokenizer, the loss of the transformer, and their pieces.

Shape letters: B batch, L tokens of all scales, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather, reduce
from torch import Tensor, nn

from ..data import Batch, BatchedDataset, TokenBatch, all_batches, tokenize
from ..kinds import checked, shown
from ..model.config import check_at_least
from ..model.transformer import NextScaleTransformer
from ..seeds import seed_at
from ..tokenizer import Tokenizer, TokenizerOutput
from ..tokenizer.quantizer import in_use_share, perplexity
from .critic import Critic
from .log import is_logged

KMEANS_ROUNDS = 3  # before the first step
EDGE_LEVELS = 3  # full resolution, half and a quarter

# A loss that carries gradient, and further numbers to log.
LossAndNumbers = tuple[Tensor, dict[str, float | Tensor]]
# (model as prepared for training, batch, step from 0) -> loss
StepLoss = Callable[[nn.Module, Sequence[Tensor], int], LossAndNumbers]

# (images or rows of tokens, labels) -> what the transformer trains on
ToTokens = Callable[[Tensor, Tensor], TokenBatch]


def tokenizer_loss(
    tokenizer: Tokenizer,
    *,
    kind: str,
    revive_every: int,
    init_codebook: bool,
    seed: int,
    perceptual: nn.Module | None = None,
    perceptual_weight: float = 1.0,
    critic: Critic | None = None,
) -> StepLoss:
    """Reconstruction and quantizer loss of a batch of images (B, 3, H, W) with labels, and others if given.

    Before the first step the codes become those that k-means finds for its batch, if asked and if that has as
    many vectors as there are codes; a few times over, since what a scale is left with hangs on the codes of
    those before it. In every `revive_every`-th step, counted from 1, codes that fell out of use are replaced.
    Of a batch that comes in parts, calls of one step one after another, the first part does both: later ones
    would change codes for which there are gradients already.

    Args:
        tokenizer: the model itself, whose codebook is kept.
        kind: see `reconstruction_loss`.
        revive_every: steps, at least 1.
        init_codebook: whether the codes start from data.
        seed: of the vectors that become codes.
        perceptual: called with images and reconstruction, gives distances of any shape; their mean is added.
        perceptual_weight: of that mean.
        critic: gives an adversarial loss from its first step on.

    Raises:
        ValueError: a term of `kind` is unknown, or `revive_every` is below 1.
    """
    loss_terms(kind)
    check_at_least("tokenizer_loss", 1, revive_every=revive_every)
    quantizer, generator = tokenizer.quantizer, torch.Generator()
    last_step, revived = -1, torch.zeros(())

    def step_loss(model: nn.Module, batch: Sequence[Tensor], step: int) -> LossAndNumbers:
        nonlocal last_step, revived
        is_first_part, last_step = step != last_step, step
        images = batch[0]
        output = model(images)
        _share_usage(quantizer.usage)
        generator.manual_seed(seed_at(seed, step))
        metrics: dict[str, float | Tensor] = {}
        num_vectors = len(output.vectors) * PartialState().num_processes
        if init_codebook and step == 0 and num_vectors >= quantizer.codebook.num_embeddings:
            for _ in range(KMEANS_ROUNDS if is_first_part else 0):
                vectors = _of_all_processes(output.vectors, quantizer.sides)
                quantizer.init_codebook(vectors, generator=generator)
                output = model(images)
                _share_usage(quantizer.usage)
        elif (step + 1) % revive_every == 0:
            if is_first_part:
                vectors = _of_all_processes(output.vectors, quantizer.sides)
                revived = quantizer.revive_dead_codes(vectors, generator=generator)
            metrics["revived"] = revived
        reconstruction = reconstruction_loss(images, output.reconstruction, kind)
        metrics |= {"reconstruction": reconstruction.detach(), "quantizer": output.loss.detach()}
        if is_logged(step + 1):
            # As held-out images are measured.
            metrics["squared_error"] = F.mse_loss(output.reconstruction.detach().clamp(-1, 1).float(), images)
            metrics |= _health(output, quantizer.usage)
        others = reconstruction
        if perceptual is not None:
            distance = perceptual.to(images.device)(images, output.reconstruction).mean()
            others = others + perceptual_weight * distance
            metrics["perceptual"] = distance.detach()
        loss = others + output.loss
        if critic is not None and step >= critic.config.start:
            last_layer = tokenizer.decoder.conv_out.weight
            adversarial, numbers = critic.against(
                images, output.reconstruction, others=others, last_layer=last_layer
            )
            loss, metrics = loss + adversarial, metrics | numbers
        return loss, metrics

    return step_loss


def _health(output: TokenizerOutput, usage_KV: Tensor) -> dict[str, float | Tensor]:
    """What each scale, from 1, has of the codebook in use, and what it leaves of the features."""
    found = {
        "usage": in_use_share(usage_KV),
        "perplexity": perplexity(usage_KV),
        "left": output.left,
    }
    return {f"{name}_{k}": value for name, values in found.items() for k, value in enumerate(values, start=1)}


def _of_all_processes(
    vectors_NZ: Tensor,  # (B * L, Z), scale by scale, of this process's images
    sides: Sequence[int],
) -> Tensor:
    """The vectors of the whole batch in the order of one process: codebooks must change alike everywhere.

    Each process has every so-manieth image of the batch.
    """
    num_processes = PartialState().num_processes
    if num_processes == 1:
        return vectors_NZ
    length, channels = sum(side * side for side in sides), vectors_NZ.shape[1]
    num_images = len(vectors_NZ) // length  # of each process
    parts = torch.split(vectors_NZ, [num_images * side * side for side in sides])
    all_parts = [
        gather(part.contiguous())
        .view(num_processes, num_images, side * side, channels)
        .transpose(0, 1)
        .reshape(-1, channels)
        for part, side in zip(parts, sides, strict=True)
    ]
    return torch.cat(all_parts)


def _share_usage(usage_KV: Tensor) -> None:
    """Make hits of codes those of all processes, on average: each has counted those of its own images."""
    usage_KV.copy_(reduce(usage_KV, reduction="mean"))


def transformer_loss(to_tokens: ToTokens | None, *, seed: int) -> StepLoss:
    """Cross-entropy of a batch, plus the trunk's penalty where its config asks for one.

    Args:
        to_tokens: makes a `TokenBatch` of a batch; None where batches are that already.
        seed: of the draw of iterations, the same in all parts of a batch and in all processes.
    """
    depth = torch.Generator()

    def step_loss(model: nn.Module, batch: Sequence[Tensor], step: int) -> LossAndNumbers:
        depth.manual_seed(seed_at(seed, step))
        if to_tokens is not None:
            batch = to_tokens(*batch)
        inputs, targets, labels = batch
        logits, penalty = model(labels, inputs, generator=depth, return_penalty=True)
        loss = cross_entropy(logits, targets)
        numbers: dict[str, float | Tensor] = {}
        if is_logged(step + 1):
            sides = extract_model_from_parallel(model).config.sides
            told = token_numbers(logits.detach(), targets, sides)
            numbers |= {name: value.mean() for name, value in told.items() if name != "loss"}
        if penalty is None:
            return loss, numbers
        return loss + penalty, {"cross_entropy": loss.detach(), "penalty": penalty.detach(), **numbers}

    return step_loss


def token_numbers(
    logits_BLV: Tensor,
    targets_BL: Tensor,  # int64 in [0, V)
    sides: Sequence[int],
) -> dict[str, Tensor]:
    """Of each sample, (B,): the loss in nats a token, that of each scale, and the share of right tokens.

    They are "loss", "accuracy", and "loss_1" and so on, the mean over the scale's tokens.
    """
    losses_BL = F.cross_entropy(logits_BLV.transpose(1, 2), targets_BL, reduction="none")
    right_BL = logits_BLV.argmax(-1) == targets_BL
    scales = torch.split(losses_BL, [side * side for side in sides], dim=1)
    return {
        "loss": losses_BL.mean(1),
        "accuracy": right_BL.float().mean(1),
        **{f"loss_{k}": losses_Bl.mean(1) for k, losses_Bl in enumerate(scales, start=1)},
    }


def check_classes(labels: Tensor, num_classes: int) -> None:
    """Raise `ValueError` unless labels are classes: the model would take N for no class at all.

    Args:
        labels: (B,) int64, on the CPU: they are read.
        num_classes: N, of the model.
    """
    if not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels: expected the model's classes, 0 to {num_classes - 1}, got values from {low} to {high}; "
            "give the model as many classes as the images have (num_classes)"
        )


@checked
def cross_entropy(
    logits_BLV: Tensor,
    targets_BL: Tensor,  # int64 in [0, V)
) -> Tensor:
    """Mean over all positions of all scales in nats, scalar.

    Raises:
        ValueError: other shapes or types, or on a CPU a target that is no token.
    """
    is_fit = logits_BLV.is_floating_point() and logits_BLV.device == targets_BL.device
    if not is_fit or targets_BL.dtype != torch.int64 or logits_BLV.shape[:-1] != targets_BL.shape:
        raise ValueError(
            "logits, targets: expected floating-point (B, L, V) and int64 (B, L) on one device, got "
            f"{shown(logits_BLV)} and {shown(targets_BL)}"
        )
    try:
        return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
    except IndexError as error:
        raise ValueError(f"targets: expected tokens 0 to {logits_BLV.shape[-1] - 1}, got others") from error


@checked
@torch.no_grad()
def validation_loss(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    data: BatchedDataset[Batch],
    *,
    iterations: int | None = None,
    batch_size: int = 256,
) -> float:
    """Cross-entropy of held-out images in nats a token, in evaluation mode.

    Args:
        model: left in the mode it was in; one with weights below float32 computes in their type.
        tokenizer: on the model's device, in evaluation mode.
        data: images.
        iterations: of the implicit block; default the config's.
        batch_size: images at a time.

    Raises:
        ValueError: no images, images of another size, or `iterations` with an explicit trunk.
    """
    if not len(data):
        raise ValueError("data: expected at least 1 image to measure the loss of, got 0")
    device = model.pos_embed.device
    training, total = model.training, 0.0
    low = None if model.trunk.weight_type == torch.float32 else model.trunk.weight_type
    model.eval()
    for images, labels in all_batches(data, batch_size):
        inputs, targets, labels = tokenize(tokenizer, images.to(device), labels.to(device))
        with torch.autocast(device.type, dtype=low, enabled=low is not None):
            logits = model(labels, inputs, iterations)
        total += float(cross_entropy(logits, targets)) * len(labels)
    model.train(training)
    return total / len(data)


def _edges(images: Tensor, reconstruction: Tensor) -> Tensor:
    # The sharp changes that a mean pixel error hardly notices, at several resolutions. Taking differences is
    # linear, so the differences of the error are the error of the differences.
    error = reconstruction - images
    total = error.new_zeros(())
    for _ in range(EDGE_LEVELS):
        if min(error.shape[-2:]) < 2:
            break
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total / EDGE_LEVELS


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss, "edges": _edges}


@checked
def loss_terms(kind: str) -> list[str]:
    """The terms of a reconstruction loss.

    Args:
        kind: see `reconstruction_loss`.

    Raises:
        ValueError: one of them is unknown.
    """
    terms = kind.split("+")
    if unknown := [term for term in terms if term not in TERMS]:
        raise ValueError(f"kind must be terms out of {list(TERMS)} joined by '+', got {unknown} in {kind!r}")
    return terms


@checked
def reconstruction_loss(images: Tensor, reconstruction: Tensor, kind: str = "l1+l2") -> Tensor:
    """Scalar loss between images (B, 3, H, W) and their reconstruction, the mean over all pixels.

    Args:
        images: in [-1, 1].
        reconstruction: not clamped, so that pixels out of range still have a gradient.
        kind: terms joined by "+", each with weight 1: "l1" mean absolute error, "l2" mean squared error,
            "edges" mean absolute error of the differences between neighbouring pixels, averaged over
            full, half and quarter resolution.

    Raises:
        ValueError: shapes or devices differ, images are not floating point, or a term of `kind` is unknown.
    """
    terms = loss_terms(kind)
    both = (images, reconstruction)
    if not all(one.is_floating_point() for one in both) or images.device != reconstruction.device:
        raise ValueError(
            "images, reconstruction: expected floating point on one device, got "
            f"{shown(images)} and {shown(reconstruction)}"
        )
    if images.shape != reconstruction.shape:
        raise ValueError(
            f"reconstruction must have the shape of images, {tuple(images.shape)}, "
            f"got {tuple(reconstruction.shape)}"
        )
    losses = [TERMS[term](images, reconstruction.float()) for term in terms]
    return sum(losses[1:], start=losses[0])
