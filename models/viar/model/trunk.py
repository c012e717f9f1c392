"""The contract of the transformer's middle, and the explicit trunk of VAR.

    modulations = trunk.modulate(cond)
    output = trunk(x_BLC, modulations, causal=None, cache=None, iterations=None, ...)

Explicit blocks, a middle, explicit blocks: in VAR the middle does nothing, in VIAR it is solved for.

Without a cache all scales go through at once block-causally (teacher forcing). With one,
`x_BLC` is the next scale alone: keys and values of the past are read from the cache, its own are left there.
A trunk keeps nothing of a call: whatever it computes is in its `TrunkOutput`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deqlib import EquilibriumCache, KeyValueCache

from ..kinds import check_kind
from .blocks import Block
from .cache import IterateCache, check_cache_name, tokens_of
from .config import TransformerConfig, filled
from .execution import computes_in, in_type_of, joined, row_chunks
from .scales import BlockCausal
from .schedule import Adaptive, Iterations

Modulations = Mapping[str, Tensor]  # of every block by its name, (6, B, 1, C), see `Block.modulate`


class ScaleSolve(NamedTuple):
    """How the implicit block got along at one scale."""

    evaluations: Tensor  # (B,) of the cell, the last one included
    # (B,) relative, ||f(z) - z|| / ||f(z)|| where the last evaluation took place; `None` if not asked for
    residual: Tensor | None
    u_BLC: Tensor  # what went into the block
    z_BLC: Tensor  # what came out of it

    @property
    def displacement(self) -> Tensor:
        """The block's output minus its input, (B, l, C): what a warm start begins with."""
        return self.z_BLC - self.u_BLC


class TrunkOutput(NamedTuple):
    """What a trunk computes."""

    x_BLC: Tensor  # tokens after the trunk
    penalty: Tensor | None = None  # scalar to add to the training loss; `None` where there is none
    solve: ScaleSolve | None = None  # of an implicit block, with a cache


class Call(NamedTuple):
    """What a forward of a trunk is asked for; see `Trunk.forward`."""

    modulations: Modulations
    causal: BlockCausal | None
    cache: KeyValueCache | None
    iterations: int | Adaptive | None
    generator: torch.Generator | None
    displacement: Tensor | None
    measure: bool
    recompute: bool  # keep arguments of blocks alone for the backward pass, which evaluates them again


class Trunk(nn.Module, ABC):
    """What the transformer and the sampler know of a trunk.

    Args:
        config: of the whole transformer.

    Attributes:
        checkpoint_activations: see `NextScaleTransformer.checkpoint_activations`.
    """

    checkpoint_activations = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        check_kind("config: expected", config, TransformerConfig)
        self.sides = config.sides
        heads = filled(config.num_heads)
        self.head_shape = (heads, filled(config.width) // heads)

    @abstractmethod
    def schedule(
        self, iterations: Iterations | None, *, cache: str = "equilibrium", warm_start: bool = False
    ) -> list[int] | list[Adaptive] | list[None]:
        """Iterations of each scale, defaults filled in.

        Args:
            iterations: see `viar.generate`.
            cache: the kind of cache they are meant for.
            warm_start: whether scales start where the one before suggests.

        Raises:
            ValueError, TypeError: the trunk cannot do one of them, or not all together.
        """

    @abstractmethod
    def new_cache(self, kind: str, schedule: Sequence[int | Adaptive | None]) -> KeyValueCache:
        """Empty cache for one generation of all scales.

        Args:
            kind: "equilibrium" or "iterate", see `viar.model.cache`.
            schedule: iterations of each scale, from `schedule`.

        Raises:
            ValueError: no such kind, or one that does not go with the trunk or the schedule.
        """

    def init_own(self) -> None:
        """Give initial weights of the trunk's own to what is to have others than `init_weights` gave."""

    @abstractmethod
    def blocks_before(self) -> Iterator[tuple[str, Block]]:
        """The explicit blocks before the middle, each under the name of its modulation, keys and values."""

    @abstractmethod
    def blocks_after(self) -> Iterator[tuple[str, Block]]:
        """Those after it."""

    @abstractmethod
    def named_blocks(self) -> Iterator[tuple[str, Block]]:
        """Every block with its name, in order."""

    @abstractmethod
    def compiled_parts(self) -> Iterator[nn.Module]:
        """What is worth compiling, each called many times."""

    @abstractmethod
    def _middle(self, u_BLC: Tensor, call: Call) -> TrunkOutput:
        """What stands between the explicit blocks, from the tokens that come out of the first ones."""

    @property
    def weight_type(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def compute_type(self) -> torch.dtype:
        """Type of activations, keys and values: that of the weights, where the device computes in it."""
        weight = next(self.parameters())
        return weight.dtype if computes_in(weight.dtype, weight.device) else torch.float32

    def modulate(self, cond: Tensor) -> dict[str, Tensor]:
        """What the class makes of every block, (6, B, 1, C) by the block's name; constant over scales.

        Args:
            cond: class embedding (B, C), or (B, 6, C) with shared modulation, see `Block.modulate`.
        """
        return {name: block.modulate(cond) for name, block in self.named_blocks()}

    def forward(
        self,
        x_BLC: Tensor,
        modulations: Modulations,
        *,
        causal: BlockCausal | None = None,
        cache: KeyValueCache | None = None,
        iterations: int | Adaptive | None = None,
        generator: torch.Generator | None = None,
        displacement: Tensor | None = None,
        measure: bool = False,
    ) -> TrunkOutput:
        """Tokens (B, L, C) after the trunk, and what else a call computes.

        Args:
            x_BLC: tokens of all scales, or with a cache of the next one.
            modulations: from `modulate`.
            causal: which tokens see which, from `viar.model.scales.block_causal`; default: all see all. Not
                with a cache.
            cache: from `new_cache`.
            iterations: of the implicit block, one entry of `schedule`; default that of the config.
            generator: draws the random depth of an implicit block in training, on the CPU; default PyTorch's
                own. An explicit trunk draws nothing. Activation checkpointing computes a call again: seed the
                generator inside of what is checkpointed, or the second draw is another.
            displacement: with a cache: the implicit block starts so far from its input, resized to this
                scale; (B or more, p^2, C) from the `ScaleSolve` of the scale before. Default: at its input.
            measure: with a cache: fill in `ScaleSolve.residual`.

        Raises:
            TypeError: `iterations` that are no entry of a schedule.
            ValueError: `iterations` where they do not apply; `causal` for another number of tokens; a cache
                together with `causal`, or while gradients are recorded; `displacement` or `measure` without a
                cache.
        """
        if not (iterations is None or isinstance(iterations, int | Adaptive)):
            raise TypeError(f"iterations: expected one entry of `schedule`, got {iterations!r}")
        if iterations is not None or displacement is not None:  # refuse what the trunk cannot do
            kind = "iterate" if isinstance(cache, IterateCache) else "equilibrium"
            self.schedule(iterations, cache=kind, warm_start=displacement is not None)
        if cache is None:
            if displacement is not None or measure:
                raise ValueError("displacement, measure: they are of a single scale; give its cache too")
        elif torch.is_grad_enabled():
            raise ValueError("cache: it is overwritten as scales go on, so call under torch.no_grad()")
        elif causal is not None:
            raise ValueError("causal: a scale attends to all that its cache holds; give one of the two")
        else:
            x_BLC = x_BLC.to(self.compute_type)
            cache.open(x_BLC.shape[1], self._like(x_BLC))
        if causal is not None and sum(causal.sizes) != x_BLC.shape[1]:
            raise ValueError(
                f"causal: expected groups of {x_BLC.shape[1]} tokens in all, as x_BLC has, got {causal.sizes}"
            )
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        call = Call(modulations, causal, cache, iterations, generator, displacement, measure, recompute)
        output = self._middle(run_blocks(self.blocks_before(), x_BLC, call), call)
        return output._replace(x_BLC=run_blocks(self.blocks_after(), output.x_BLC, call))

    def _like(self, x_BLC: Tensor) -> Tensor:
        """Batch, heads, head width, type and device of keys and values, (B, H, 0, C / H)."""
        kind = x_BLC.device.type
        casts = torch.is_autocast_enabled(kind) and x_BLC.dtype != torch.float64  # which it leaves alone
        dtype = torch.get_autocast_dtype(kind) if casts else x_BLC.dtype
        heads, width = self.head_shape
        return x_BLC.new_empty(len(x_BLC), heads, 0, width, dtype=dtype)


class ExplicitTrunk(Trunk):
    """`depth` different blocks, drop path rising linearly (VAR, arXiv 2404.02905).

    Args:
        config: of the whole transformer.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in drop_path_rates(config))

    def schedule(
        self, iterations: Iterations | None, *, cache: str = "equilibrium", warm_start: bool = False
    ) -> list[None]:
        """No iterations, one `None` a scale; see `Trunk.schedule`.

        Raises:
            ValueError: iterations, a cache of iterates, or a warm start.
        """
        if iterations is not None:
            raise ValueError(
                f"iterations: an explicit trunk has none to choose, got {iterations!r}; leave it at None"
            )
        check_cache_name(cache)
        if cache == "iterate":
            raise ValueError("cache: 'iterate' needs an implicit trunk; use cache='equilibrium'")
        if warm_start:
            raise ValueError("warm_start: an explicit trunk has nothing to start; leave it at False")
        return [None] * len(self.sides)

    def new_cache(self, kind: str, schedule: Sequence[int | Adaptive | None]) -> EquilibriumCache:
        """One set of keys and values a block, of the kind "equilibrium"; see `Trunk.new_cache`."""
        self.schedule(None, cache=kind)
        return EquilibriumCache(tokens_of(self.sides))

    def blocks_before(self) -> Iterator[tuple[str, Block]]:
        """All of them; see `Trunk.blocks_before`."""
        yield from named(self.blocks, "blocks")

    def blocks_after(self) -> Iterator[tuple[str, Block]]:
        """None; see `Trunk.blocks_after`."""
        yield from ()

    def named_blocks(self) -> Iterator[tuple[str, Block]]:
        """See `Trunk.named_blocks`."""
        yield from self.blocks_before()

    def compiled_parts(self) -> Iterator[nn.Module]:
        """See `Trunk.compiled_parts`."""
        yield from self.blocks

    def _middle(self, u_BLC: Tensor, call: Call) -> TrunkOutput:
        return TrunkOutput(u_BLC)


def drop_path_rates(config: TransformerConfig) -> list[float]:
    """Rate of each of the `depth` blocks, rising linearly from 0 to `drop_path`."""
    return [filled(config.drop_path) * i / max(config.depth - 1, 1) for i in range(config.depth)]


def named(blocks: nn.ModuleList, prefix: str) -> Iterator[tuple[str, Block]]:
    """Blocks under the names of their modulations and of their keys and values."""
    for i, block in enumerate(blocks):
        assert isinstance(block, Block)
        yield f"{prefix}.{i}", block


def run_blocks(blocks: Iterator[tuple[str, Block]], x_BLC: Tensor, call: Call) -> Tensor:
    """Explicit blocks in turn: all scales at once; with a cache the open one, a few samples at a time."""
    for name, block in blocks:
        modulation = call.modulations[name]
        if call.cache is None:
            x_BLC = evaluated(block, x_BLC, modulation, call.causal, recompute=call.recompute)
            continue
        run, modulation = in_type_of(x_BLC, block), modulation.to(x_BLC.dtype)
        x_BLC = joined(
            [
                run(x_BLC[rows], modulation[:, rows], None, call.cache.slot(name, rows))
                for rows in row_chunks(x_BLC)
            ]
        )
    return x_BLC


def evaluated(module: nn.Module, *args: object, recompute: bool) -> Tensor:
    """`module(*args)`; with `recompute` evaluated again in the backward pass, random numbers as they were."""
    output: Tensor = checkpoint(module, *args, use_reentrant=False) if recompute else module(*args)
    return output
