"""A trained model as the start of another: same weights, other classes or other sides.

What belongs to a class or to a scale moves with it, and what is new has initial weights:

| tensor | kept |
| --- | --- |
| class embedding | rows of the first classes; the row of no class, at its new place |
| scale embeddings, positions | rows of scales of the same side |
| first positions | where the first side is the same |
| refinement convolutions, one a scale; use of codes | those of scales of the same side |

Everything else is kept as it is, so with classes and sides as they were the model is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kinds import checked
from ..model.config import TokenizerConfig, TransformerConfig
from ..model.scales import scale_slices
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer

# Settings that may differ from those of the weights. All others decide which weights there are, or what they
# mean.
FREE = {
    "num_classes",
    "sides",
    "drop_path",
    "label_dropout",
    "trunk.no_grad",
    "trunk.grad",
    "trunk.residual_weight",
    "trunk.jacobian_weight",
    "trunk.iterations",
    "dropout",
    "commitment",
}


Rows = list[tuple[int, int]]  # where each row that is kept was, and where it is now


@dataclass(frozen=True)
class _Move:
    """Where the rows of a tensor come from, and what there is to say of it."""

    rows: Rows
    text: str
    axis: int = 0
    source: str | None = None  # name of the tensor they come from, where that is another


@checked
def adapt_transformer(
    trained: NextScaleTransformer, config: TransformerConfig
) -> tuple[NextScaleTransformer, list[str]]:
    """A transformer of `config` with the weights of a trained one.

    Args:
        trained: where the weights come from; left as it is.
        config: may have other classes, sides, rates of dropout and settings of training.

    Returns:
        The model, whose new weights are drawn from PyTorch's generator, and a line of text for each tensor
        that is not that of `trained`.

    Raises:
        ValueError: `config` differs in something else, such as width, depth or the kind of trunk.
    """
    check_adaptable(trained.config, config)
    model = NextScaleTransformer(config)
    moves = _class_moves(trained.config.num_classes, config.num_classes)
    moves |= _scale_moves(trained.config.sides, config.sides)
    return model, _take(trained, model, moves)


@checked
def adapt_tokenizer(trained: Tokenizer, config: TokenizerConfig) -> tuple[Tokenizer, list[str]]:
    """A tokenizer of `config` with the weights of a trained one.

    Args:
        trained: where the weights come from; left as it is.
        config: may have other sides, another rate of dropout and another commitment.

    Returns:
        The model, whose new weights are drawn from PyTorch's generator, and a line of text for each tensor
        that is not that of `trained`.

    Raises:
        ValueError: `config` differs in something else, such as the codebook's size.
    """
    check_adaptable(trained.config, config)
    model = Tokenizer(config)
    old, new = trained.config.sides, config.sides
    moves = {}
    if old != new:
        scales = _same_side(old, new)
        moves["quantizer.usage"] = _Move(scales, _counted("scales", len(old), len(new), len(scales)))
        if not config.num_phi:
            moves |= _convolution_moves(old, new, config.code_channels)
    return model, _take(trained, model, moves)


def check_adaptable(
    old: TransformerConfig | TokenizerConfig, new: TransformerConfig | TokenizerConfig
) -> None:
    """Raise `ValueError` unless weights of a model of settings `old` can start one of `new`.

    Args:
        old: of the weights.
        new: asked for.
    """
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    names = [n for n in {**before, **after} if n not in FREE and before.get(n) != after.get(n)]
    if "trunk.kind" in names:  # all else follows from it
        names = ["trunk.kind"]
    if names:
        listed = "; ".join(f"{name}: {before.get(name)} there, {after.get(name)} asked for" for name in names)
        raise ValueError(f"its weights are of other settings, which must stay as they are: {listed}")


def _class_moves(old: int, new: int) -> dict[str, _Move]:
    if old == new:
        return {}
    kept = min(old, new)
    rows = [*((row, row) for row in range(kept)), (old, new)]
    text = f"{_counted('classes', old, new, kept)}; row of no class: {old} to {new}"
    return {"class_embed.weight": _Move(rows, text)}


def _scale_moves(old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, _Move]:
    if old == new:
        return {}
    scales, before, after = _same_side(old, new), scale_slices(old), scale_slices(new)
    text = _counted("scales", len(old), len(new), len(scales))
    tokens = [pair for a, b in scales for pair in zip(_range(before[a]), _range(after[b]), strict=True)]
    moves = {"level_embed.weight": _Move(scales, text), "pos_embed": _Move(tokens, text, axis=1)}
    if old[0] != new[0]:
        moves["pos_start"] = _Move([], f"new, for a first side of {new[0]} instead of {old[0]}")
    return moves


def _convolution_moves(old: tuple[int, ...], new: tuple[int, ...], channels: int) -> dict[str, _Move]:
    """Refinement convolutions, one a scale."""
    before = {after: before for before, after in _same_side(old, new)}
    moves = {}
    for scale, side in enumerate(new):
        for part in ("weight", "bias"):
            source = before.get(scale)
            if source == scale:
                continue
            rows = [] if source is None else [(row, row) for row in range(channels)]
            text = "new" if source is None else f"that of scale {source} before"
            moves[f"quantizer.phi.{scale}.{part}"] = _Move(
                rows, f"{text}, for side {side}", source=f"quantizer.phi.{source}.{part}"
            )
    return moves


@torch.no_grad()
def _take(
    trained: NextScaleTransformer | Tokenizer,
    model: NextScaleTransformer | Tokenizer,
    moves: dict[str, _Move],
) -> list[str]:
    """Copy the weights, in place, and say what is not as it was."""
    weights = trained.state_dict()
    for name, tensor in model.state_dict().items():  # shares memory with the model
        move = moves.get(name)
        if move is None:
            tensor.copy_(weights[name])
        elif move.rows:
            before, after = (torch.tensor(rows) for rows in zip(*move.rows, strict=True))
            tensor.index_copy_(move.axis, after, weights[move.source or name].index_select(move.axis, before))
    return [f"{name}: {move.text}" for name, move in moves.items()]


def _same_side(old: Sequence[int], new: Sequence[int]) -> Rows:
    """Scales of the same side: number of each among the old ones, and among the new ones."""
    return [(old.index(side), scale) for scale, side in enumerate(new) if side in old]


def _range(where: slice) -> Iterable[int]:
    return range(where.start, where.stop)


def _counted(what: str, old: int, new: int, kept: int) -> str:
    return f"{kept} of {old} {what} kept, {old - kept} dropped, {new - kept} new"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    trunk = values.pop("trunk", {})
    return {**values, **{f"trunk.{name}": value for name, value in trunk.items()}}
