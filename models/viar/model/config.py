"""Typed settings of the tokenizer and of the transformer.

Every config is a frozen, keyword-only dataclass that validates itself, converts to and from plain
dictionaries (`to_dict`, `from_dict`; used by `save_pretrained`) and can be changed with
`dataclasses.replace`. Defaults are those of the published 256-pixel models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from ..kinds import check_fields, shown
from .scales import check_sides

T = TypeVar("T")

Projection = Literal["random", "identity"]  # initial weights of what joins state and input

# Settings of a tokenizer and of a trunk that came later, as all were before.
BEFORE: dict[str, Any] = {"patch": 1, "projection": "random"}

DEEPEST = 2**16  # blocks; nobody has so many, and a damaged file may tell of any number

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


def _check_names(owner: str, values: Any) -> None:
    """Raise `TypeError` unless these are values by name."""
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise TypeError(f"{owner}: expected values by the name of a field, got {shown(values)}")


def _as_before(values: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that came later, where they are as all were before."""
    return {name: value for name, value in values.items() if BEFORE.get(name) != value}


def check_at_least(owner: str, minimum: int | float, **values: int | float) -> None:
    """Raise `ValueError` naming the first of `values` that is below `minimum` or no number to count with."""
    for name, value in values.items():
        if not minimum <= value < math.inf:
            raise ValueError(f"{owner}: {name} must be at least {minimum}, got {value}")
        if value >= 2**63:
            raise ValueError(f"{owner}: {name} must be below 2**63, got {value}")


def check_at_most(owner: str, maximum: int, **values: int) -> None:
    """Raise `ValueError` naming the first of `values` that is above `maximum`."""
    for name, value in values.items():
        if value > maximum:
            raise ValueError(f"{owner}: {name} must be at most {maximum}, got {value}")


def check_fraction(owner: str, **values: float) -> None:
    """Raise `ValueError` naming the first of `values` outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{owner}: {name} must be in [0, 1), got {value}")


def filled(value: T | None) -> T:
    """A setting whose default its config has filled in."""
    assert value is not None
    return value


def _tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Multi-scale residual VQ-VAE.

    An image has `sides[-1] * patch * 2 ** (len(multipliers) - 1)` pixels a side: the stem takes `patch`
    pixels a side at a time, every level but the last halves the resolution, and the last scale is as large
    as the feature map.
    """

    sides: tuple[int, ...] = SIDES_256  # side of each of the K token maps, rising
    codebook_size: int = 4096  # V, number of codes
    code_channels: int = 32  # Z, channels of a code
    base_channels: int = 160  # channels of the first level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level, in units of base_channels
    patch: int = 1  # pixels a side that become the channels of one position before the first level
    num_residual_blocks: int = 2  # of each level; the decoder's have one more
    num_groups: int = 32  # of channels in every GroupNorm
    dropout: float = 0.0  # rate in every residual block, in [0, 1)
    num_phi: int = 4  # Q, number of refinement convolutions shared by the scales; 0: one a scale
    phi_ratio: float = 0.5  # r in (1 - r) h + r conv(h)
    commitment: float = 0.25  # beta, weight of the encoder's half of the quantizer loss

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
        for name in ("sides", "multipliers"):
            object.__setattr__(self, name, _tuple(getattr(self, name)))
        check_sides("TokenizerConfig", self.sides)
        check_at_least(
            "TokenizerConfig",
            1,
            codebook_size=self.codebook_size,
            code_channels=self.code_channels,
            base_channels=self.base_channels,
            patch=self.patch,
            num_residual_blocks=self.num_residual_blocks,
            num_groups=self.num_groups,
        )
        check_at_least("TokenizerConfig", 0, num_phi=self.num_phi, commitment=self.commitment)
        blocks = self.num_residual_blocks
        check_at_most("TokenizerConfig", DEEPEST, num_phi=self.num_phi, num_residual_blocks=blocks)
        check_fraction("TokenizerConfig", dropout=self.dropout)
        if not 0 <= self.phi_ratio <= 1:
            raise ValueError(f"TokenizerConfig: phi_ratio must be in [0, 1], got {self.phi_ratio}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"TokenizerConfig: multipliers must hold a positive integer a level, got {self.multipliers}"
            )
        for multiplier in (1, *self.multipliers):
            if self.base_channels * multiplier % self.num_groups:
                raise ValueError(
                    f"TokenizerConfig: num_groups={self.num_groups} must divide the channels of every level, "
                    f"but base_channels={self.base_channels} times multiplier {multiplier} leaves a remainder"
                )

    @property
    def image_side(self) -> int:
        """Pixels a side of the images this tokenizer takes."""
        return self.sides[-1] * self.patch << (len(self.multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON.

        A setting of a later release is left out at the value that all tokenizers had before, so that
        fingerprints, and what runs and shards were made with, stay what they were.
        """
        return _as_before(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenizerConfig:
        """Inverse of `to_dict`.

        Args:
            values: by the name of a field; those left out take their defaults.

        Raises:
            TypeError: a name that is no field.
            ValueError: a value out of range.
        """
        _check_names("TokenizerConfig", values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ExplicitTrunkConfig:
    """`depth` different transformer blocks (VAR)."""


@dataclass(frozen=True, kw_only=True)
class ImplicitTrunkConfig:
    """A few blocks, one implicit block solved for its fixed point, a few blocks (VIAR)."""

    num_pre: int = 5  # explicit blocks before the implicit one
    num_post: int = 5  # explicit blocks after it
    no_grad: tuple[int, int] = (0, 10)  # training: least and most iterations without gradient
    grad: tuple[int, int] = (1, 12)  # training: least and most iterations with gradient, after those
    # Initial weights of what joins state and input: random, as published, or identity, which passes on both
    projection: Projection = "random"
    # Training: weight in the loss of the squared relative residual where the drawn iterations end
    residual_weight: float = 0.0
    # Training: weight in the loss of the mean square size of the block's Jacobian there
    jacobian_weight: float = 0.0
    iterations: int = 10  # outside training, where the caller does not say

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
        for name, minimum in (("no_grad", 0), ("grad", 1)):
            pair = _tuple(getattr(self, name))
            object.__setattr__(self, name, pair)
            if len(pair) != 2 or not minimum <= pair[0] <= pair[1]:
                raise ValueError(
                    f"ImplicitTrunkConfig: {name} must be (least, most) with "
                    f"{minimum} <= least <= most, got {pair}"
                )
        if self.projection not in get_args(Projection):
            raise ValueError(
                f"ImplicitTrunkConfig: projection must be one of {', '.join(get_args(Projection))}, "
                f"got {self.projection!r}"
            )
        check_at_least("ImplicitTrunkConfig", 0, num_pre=self.num_pre, num_post=self.num_post)
        for name in ("residual_weight", "jacobian_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"ImplicitTrunkConfig: {name} must be a finite number of at least 0, got {value}"
                )
        check_at_least("ImplicitTrunkConfig", 1, iterations=self.iterations)

    def with_depth(self, no_grad: int, grad: int) -> ImplicitTrunkConfig:
        """The same, but training takes these numbers of iterations at every step.

        Args:
            no_grad: iterations without gradient.
            grad: iterations with gradient, after those.
        """
        return replace(self, no_grad=(no_grad, no_grad), grad=(grad, grad))

    @property
    def deepest(self) -> ImplicitTrunkConfig:
        """The same, but training takes the most iterations at every step."""
        return self.with_depth(self.no_grad[1], self.grad[1])


TrunkConfig = ExplicitTrunkConfig | ImplicitTrunkConfig
_TRUNKS = {"explicit": ExplicitTrunkConfig, "implicit": ImplicitTrunkConfig}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Next-scale transformer: VAR with an explicit trunk, VIAR with an implicit one."""

    depth: int = 16  # D: blocks of the explicit trunk; also sets drop path and initial weights of both
    width: int | None = None  # C, channels of a token; default 64 * depth
    num_heads: int | None = None  # H, heads of attention; default depth
    sides: tuple[int, ...] = SIDES_256  # side of each of the K token maps, rising
    codebook_size: int = 4096  # V, number of codes
    code_channels: int = 32  # Z, channels of a code
    num_classes: int = 1000  # N; index N is the null class of guidance
    mlp_ratio: float = 4.0  # hidden width of every MLP, in units of C
    qk_norm: bool = True  # normalised queries and keys with a learned scale a head
    shared_modulation: bool = False  # one AdaLN projection for all blocks plus an offset a block
    drop_path: float | None = None  # largest rate, reached at the last block; default 0.1 * depth / 24
    label_dropout: float = 0.1  # training: chance that a label becomes the null class
    trunk: TrunkConfig = field(default_factory=ExplicitTrunkConfig)

    def __post_init__(self) -> None:
        """Resolve defaults that depend on other fields, then validate."""
        check_fields(self)
        owner = "TransformerConfig"
        object.__setattr__(self, "sides", _tuple(self.sides))
        check_sides(owner, self.sides)
        check_at_least(owner, 1, depth=self.depth)
        check_at_most(owner, DEEPEST, depth=self.depth)
        if self.width is None:
            object.__setattr__(self, "width", 64 * self.depth)
        if self.num_heads is None:
            object.__setattr__(self, "num_heads", self.depth)
        if self.drop_path is None:
            object.__setattr__(self, "drop_path", 0.1 * self.depth / 24)
        width, num_heads = filled(self.width), filled(self.num_heads)
        check_at_least(
            owner,
            1,
            width=width,
            num_heads=num_heads,
            codebook_size=self.codebook_size,
            code_channels=self.code_channels,
            num_classes=self.num_classes,
            mlp_ratio=self.mlp_ratio,
        )
        check_fraction(owner, drop_path=filled(self.drop_path), label_dropout=self.label_dropout)
        if width % num_heads:
            raise ValueError(f"{owner}: num_heads={num_heads} must divide width={width}")
        if isinstance(self.trunk, ImplicitTrunkConfig):
            used = self.trunk.num_pre + 1 + self.trunk.num_post
            if used > self.depth:
                raise ValueError(
                    f"{owner}: trunk has {used} blocks (num_pre + 1 + num_post), "
                    f"more than depth={self.depth}; raise depth or lower num_pre or num_post"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON; the trunk carries its kind.

        Settings of a later release are left out as those of `TokenizerConfig.to_dict` are.
        """
        values = dataclasses.asdict(self)
        kind = next(name for name, cls in _TRUNKS.items() if type(self.trunk) is cls)
        values["trunk"] = {"kind": kind, **_as_before(values["trunk"])}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """Inverse of `to_dict`.

        Args:
            values: by the name of a field, `trunk` with its `kind`; those left out take their defaults.

        Raises:
            TypeError: a name that is no field.
            ValueError: a value out of range, or no such kind of trunk.
        """
        _check_names("TransformerConfig", values)
        values = dict(values)
        trunk = values.pop("trunk", {"kind": "explicit"})
        _check_names("TransformerConfig: trunk", trunk)
        trunk = dict(trunk)
        kind = trunk.pop("kind", None)
        if kind not in _TRUNKS:
            raise ValueError(f"TransformerConfig: trunk kind must be one of {sorted(_TRUNKS)}, got {kind!r}")
        return cls(**values, trunk=_TRUNKS[kind](**trunk))
