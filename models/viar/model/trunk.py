"""The middle of the transformer, explicit (VAR) or implicit (VIAR), on one contract.

    x_BLC = trunk(x_BLC, cond, mask_LL=None, cache=None, iterations=None)

Without a cache all scales go through at once under the block-causal mask (teacher forcing). With one,
`x_BLC` is the next scale alone: keys and values of the past are read from the cache, its own are left there.
Nothing outside this file asks which trunk it talks to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqlib import ImplicitLayer, Picard, StochasticJFB, Stopping

from .attention import KeyValue
from .blocks import Block, gelu
from .cache import EquilibriumCache, IterateCache, Solve
from .config import ImplicitTrunkConfig, TransformerConfig
from .scales import resize_tokens
from .schedule import Adaptive, Iterations, iteration_schedule

CACHES = ("equilibrium", "iterate")

# What a CPU works on at a time, in numbers of a state: a block's activations then stay in its caches.
CPU_CHUNK = 400_000


class Trunk(nn.Module, ABC):
    """What the transformer and the sampler know of a trunk."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sides = config.sides
        self.head_shape = (config.num_heads, config.width // config.num_heads)

    @abstractmethod
    def schedule(self, iterations: Iterations | None) -> list[int] | list[Adaptive] | list[None]:
        """Iterations of each scale, defaults filled in; raises on what the trunk cannot do."""

    @abstractmethod
    def new_cache(
        self,
        kind: str,
        schedule: Sequence[int | Adaptive | None],
        *,
        measure: bool = False,
        warm_start: bool = False,
    ) -> EquilibriumCache:
        """Empty cache for one generation of all scales under `schedule`; see `viar.model.cache`."""

    @abstractmethod
    def named_blocks(self) -> Iterator[tuple[str, Block]]:
        """Every block under the name of its keys and values."""

    @abstractmethod
    def compiled_parts(self) -> Iterator[nn.Module]:
        """What is worth compiling, each called many times."""

    @abstractmethod
    def _joint(
        self, x_BLC: Tensor, cond: Tensor, mask_LL: Tensor | None, iterations: int | Adaptive | None
    ) -> Tensor:
        """All scales at once."""

    @abstractmethod
    def _advance(self, x_BLC: Tensor, cache: EquilibriumCache, iterations: int | Adaptive | None) -> Tensor:
        """The scale that the cache has open."""

    def seed_depth(self, seed: int) -> None:  # a hook, not a duty
        """Seed whatever the trunk draws in training; the same seed everywhere draws the same."""

    def take_penalty(self) -> Tensor | None:  # a hook, not a duty
        """What the last call that recorded gradients adds to the loss, a scalar, given out once; or None."""
        return None

    @property
    def weight_type(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def compute_type(self) -> torch.dtype:
        """Type of activations, keys and values: that of the weights, where the device computes in it."""
        weight = next(self.parameters())
        return weight.dtype if computes_in(weight.dtype, weight.device) else torch.float32

    def forward(
        self,
        x_BLC: Tensor,
        cond: Tensor,
        *,
        mask_LL: Tensor | None = None,
        cache: EquilibriumCache | None = None,
        iterations: int | Adaptive | None = None,
    ) -> Tensor:
        """Tokens (B, L, C) after the trunk.

        Args:
            x_BLC: tokens of all scales, or with a cache of the next one.
            cond: what blocks are modulated by, see `Block.modulate`.
            mask_LL: true where row may attend to column; not with a cache.
            cache: from `new_cache`.
            iterations: of the implicit block, one entry of `schedule`.

        Raises:
            ValueError: `iterations` where they do not apply; a cache together with a mask, or while gradients
                are recorded.
        """
        if cache is None:
            return self._joint(x_BLC, cond, mask_LL, iterations)
        if torch.is_grad_enabled():
            raise ValueError("cache: it is overwritten as scales go on, so call under torch.no_grad()")
        if mask_LL is not None:
            raise ValueError("mask_LL: a scale attends to all that its cache holds; give one of the two")
        x_BLC, cond = x_BLC.to(self.compute_type), cond.to(self.weight_type)
        cache.open_scale(x_BLC.shape[1], self._like(x_BLC))
        if not cache.modulations:
            cache.modulations = {
                name: block.modulate(cond).to(x_BLC.dtype) for name, block in self.named_blocks()
            }
        return self._advance(x_BLC, cache, iterations)

    def _like(self, x_BLC: Tensor) -> Tensor:
        """Batch, heads, head width, type and device of keys and values, (B, H, 0, C / H)."""
        kind = x_BLC.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BLC.dtype
        heads, width = self.head_shape
        return x_BLC.new_empty(len(x_BLC), heads, 0, width, dtype=dtype)


class ExplicitTrunk(Trunk):
    """`depth` different blocks, drop path rising linearly."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in drop_path_rates(config))

    def schedule(self, iterations: Iterations | None) -> list[None]:
        """No iterations."""
        if iterations is not None:
            raise ValueError(
                f"iterations: an explicit trunk has none to choose, got {iterations!r}; leave it at None"
            )
        return [None] * len(self.sides)

    def new_cache(
        self,
        kind: str,
        schedule: Sequence[int | Adaptive | None],
        *,
        measure: bool = False,
        warm_start: bool = False,
    ) -> EquilibriumCache:
        """One set of keys and values a block."""
        check_cache_kind(kind)
        if kind == "iterate":
            raise ValueError("cache: 'iterate' needs an implicit trunk; use cache='equilibrium'")
        if warm_start:
            raise ValueError("warm_start: an explicit trunk has nothing to start; leave it at False")
        return EquilibriumCache(self.sides, measure=measure)

    def named_blocks(self) -> Iterator[tuple[str, Block]]:
        """See `Trunk.named_blocks`."""
        yield from _named("blocks", self.blocks)

    def compiled_parts(self) -> Iterator[nn.Module]:
        """See `Trunk.compiled_parts`."""
        yield from self.blocks

    def _joint(
        self, x_BLC: Tensor, cond: Tensor, mask_LL: Tensor | None, iterations: int | Adaptive | None
    ) -> Tensor:
        if iterations is not None:
            self.schedule(iterations)  # raises
        return run_blocks(self.blocks, x_BLC, cond, mask_LL)

    def _advance(self, x_BLC: Tensor, cache: EquilibriumCache, iterations: int | Adaptive | None) -> Tensor:
        if iterations is not None:
            self.schedule(iterations)  # raises
        return advance_blocks("blocks", self.blocks, x_BLC, cache)


class ImplicitCell(nn.Module):
    """f(z, u) = block(projection(concat(z, u))), with a two-layer projection 2C -> 2C -> C.

    The first projection splits into a half for z and a half for u; u's half does not change over
    iterations, so `inject` computes it once and the cell takes the result.
    """

    def __init__(self, config: TransformerConfig, drop_path: float) -> None:
        super().__init__()
        C = config.width
        self.width = C
        self.projection_in = nn.Linear(2 * C, 2 * C)
        self.projection_out = nn.Linear(2 * C, C)
        self.block = Block(config, drop_path)

    def inject(self, u_BLC: Tensor) -> Tensor:
        """u's half of the first projection with its bias, (B, L, 2C)."""
        weight, bias = self.projection_in.weight[:, self.width :], self.projection_in.bias
        return F.linear(u_BLC, weight.to(u_BLC.dtype), bias.to(u_BLC.dtype))

    def forward(
        self,
        z_BLC: Tensor,
        injection: Tensor,  # (B, L, 2C), from `inject`
        modulation: Tensor,  # (6, B, 1, C), from the block
        mask_LL: Tensor | None = None,
        slot: KeyValue | None = None,  # see `Attention.forward`
    ) -> Tensor:
        """f(z, u); leaves the block's keys and values at z in the slot."""
        weight = self.projection_in.weight[:, : self.width]
        hidden = torch.addmm(injection.flatten(0, 1), z_BLC.flatten(0, 1), weight.t())
        x_BLC = self.projection_out(gelu(hidden)).view_as(z_BLC)
        return self.block(x_BLC, modulation, mask_LL, slot)


class ImplicitTrunk(Trunk):
    """Blocks, one implicit block solved for its fixed point, blocks (arXiv 2605.01220).

    Drop path rates are those the kept blocks have in the explicit trunk of the same depth: the first
    `num_pre`, the middle one, the last `num_post`.

    In training the number of iterations is drawn at every call (`StochasticJFB`) from `depth_generator`,
    which starts from one seed in every process, so that processes training together draw the same.

    With a `residual_weight` w the block is also asked to stand still where those iterations end: one more
    evaluation there gives the penalty w mean ||f(z) - z||^2 / ||f(z)||^2 over tokens, the denominator held
    constant, for `take_penalty`. Few iterations are enough then, and both caches soon agree. Not part of
    the published recipe. Drop path of the block counts as movement.
    """

    layer_name = "implicit"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        trunk = config.trunk
        assert isinstance(trunk, ImplicitTrunkConfig)
        rates = drop_path_rates(config)
        self.default_iterations = trunk.iterations
        self.residual_weight = trunk.residual_weight
        self._penalty: Tensor | None = None
        self.pre = nn.ModuleList(Block(config, rate) for rate in rates[: trunk.num_pre])
        self.depth_generator = torch.Generator().manual_seed(0)
        self.layer = ImplicitLayer(
            ImplicitCell(config, rates[config.depth // 2]),
            solver=Picard(),
            backward=StochasticJFB(no_grad=trunk.no_grad, grad=trunk.grad, generator=self.depth_generator),
            stopping=Stopping.steps(trunk.iterations),
            # Only Adaptive can miss a tolerance, and then by the cap its caller chose.
            on_failure="ignore",
        )
        self.post = nn.ModuleList(Block(config, rate) for rate in rates[config.depth - trunk.num_post :])

    def seed_depth(self, seed: int) -> None:
        """Seed the draw of iterations."""
        self.depth_generator.manual_seed(seed)

    def take_penalty(self) -> Tensor | None:
        """See `Trunk.take_penalty`; None without a `residual_weight`."""
        penalty, self._penalty = self._penalty, None  # kept, it would keep the graph
        return penalty

    def schedule(self, iterations: Iterations | None) -> list[int] | list[Adaptive]:
        """One count or `Adaptive` a scale."""
        return iteration_schedule(
            self.default_iterations if iterations is None else iterations, len(self.sides)
        )

    def new_cache(
        self,
        kind: str,
        schedule: Sequence[int | Adaptive | None],
        *,
        measure: bool = False,
        warm_start: bool = False,
    ) -> EquilibriumCache:
        """See `viar.model.cache` for the two kinds."""
        check_cache_kind(kind)
        if kind == "equilibrium":
            return EquilibriumCache(self.sides, measure=measure, warm_start=warm_start)
        if warm_start:
            raise ValueError("warm_start: needs cache='equilibrium', which keeps one state; got 'iterate'")
        counts = [n for n in schedule if isinstance(n, int)]
        if len(counts) != len(schedule):
            raise ValueError("cache: 'iterate' needs fixed counts, got Adaptive; use cache='equilibrium'")
        return IterateCache(self.sides, counts, self.layer_name, measure=measure)

    def named_blocks(self) -> Iterator[tuple[str, Block]]:
        """See `Trunk.named_blocks`."""
        yield from _named("pre", self.pre)
        yield self.layer_name, self._cell.block
        yield from _named("post", self.post)

    def compiled_parts(self) -> Iterator[nn.Module]:
        """See `Trunk.compiled_parts`."""
        yield from (*self.pre, self._cell, *self.post)

    @property
    def _cell(self) -> ImplicitCell:
        cell = self.layer.cell
        assert isinstance(cell, ImplicitCell)
        return cell

    def _joint(
        self, x_BLC: Tensor, cond: Tensor, mask_LL: Tensor | None, iterations: int | Adaptive | None
    ) -> Tensor:
        u_BLC = run_blocks(self.pre, x_BLC, cond, mask_LL)
        inputs = (self._cell.inject(u_BLC), self._cell.block.modulate(cond), mask_LL)
        if iterations is None:
            z_BLC = self.layer.solve(*inputs, z0=u_BLC).value
            if self.residual_weight and torch.is_grad_enabled():
                self._penalty = self.residual_weight * squared_residual(self._cell(z_BLC, *inputs), z_BLC)
        elif torch.is_grad_enabled():
            raise ValueError(
                "iterations: while gradients are recorded the trunk draws its own number, "
                f"got {iterations!r}; leave it at None or call under torch.no_grad()"
            )
        else:
            how = (
                iterations.rule
                if isinstance(iterations, Adaptive)
                else {"stopping": Stopping.steps(iterations)}
            )
            z_BLC = self.layer.solve(*inputs, z0=u_BLC, **how).value
        return run_blocks(self.post, z_BLC, cond, mask_LL)

    def _advance(self, x_BLC: Tensor, cache: EquilibriumCache, iterations: int | Adaptive | None) -> Tensor:
        u_BLC = advance_blocks("pre", self.pre, x_BLC, cache)
        z_BLC = self._solve_scale(u_BLC, cache, self.default_iterations if iterations is None else iterations)
        return advance_blocks("post", self.post, z_BLC, cache)

    def _solve_scale(self, u_BLC: Tensor, cache: EquilibriumCache, iterations: int | Adaptive) -> Tensor:
        """The implicit block at one scale; its keys and values are those of the last evaluation."""
        cell, start_BLC = in_type_of(u_BLC, self._cell), self._start(u_BLC, cache)
        parts, solves = [], []
        for rows in row_chunks(u_BLC):
            inputs = (self._cell.inject(u_BLC[rows]), cache.modulations[self.layer_name][:, rows], None)

            def f(z_BLC: Tensor, iteration: int = 0, rows: slice = rows, inputs: tuple = inputs) -> Tensor:
                return cell(z_BLC, *inputs, cache.slot(self.layer_name, rows, iteration))

            if isinstance(iterations, Adaptive):
                before_last, used = iterations.solve(f, start_BLC[rows])
            else:
                before_last = start_BLC[rows]
                for i in range(iterations - 1):
                    before_last = f(before_last, i if cache.per_iteration else 0)
                used = torch.full((len(before_last),), iterations - 1, device=u_BLC.device)
            parts.append(f(before_last, iterations - 1 if cache.per_iteration else 0))
            residual = relative_change(parts[-1], before_last) if cache.measure else None
            solves.append(Solve(used + 1, residual))
        z_BLC = torch.cat(parts)
        cache.solves.append(Solve.joined(solves))
        if cache.warm_start:
            cache.displacement = z_BLC - u_BLC
        return z_BLC

    def _start(self, u_BLC: Tensor, cache: EquilibriumCache) -> Tensor:
        """u, moved as far as the fixed point of the scale before lay from its own u if that is asked for."""
        if cache.displacement is None:
            return u_BLC
        return u_BLC + resize_tokens(cache.displacement[: len(u_BLC)], math.isqrt(u_BLC.shape[1]))


def build_trunk(config: TransformerConfig) -> Trunk:
    """The trunk `config.trunk` asks for."""
    implicit = isinstance(config.trunk, ImplicitTrunkConfig)
    return ImplicitTrunk(config) if implicit else ExplicitTrunk(config)


def drop_path_rates(config: TransformerConfig) -> list[float]:
    """Rate of each of the `depth` blocks, rising linearly from 0 to `drop_path`."""
    return [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]


def run_blocks(blocks: nn.ModuleList, x_BLC: Tensor, cond: Tensor, mask_LL: Tensor | None) -> Tensor:
    """Explicit blocks in turn, all scales at once."""
    for block in blocks:
        x_BLC = block(x_BLC, block.modulate(cond), mask_LL)
    return x_BLC


def advance_blocks(name: str, blocks: nn.ModuleList, x_BLC: Tensor, cache: EquilibriumCache) -> Tensor:
    """Explicit blocks in turn, the open scale alone."""
    for layer, block in _named(name, blocks):
        run, modulation = in_type_of(x_BLC, block), cache.modulations[layer]
        x_BLC = torch.cat(
            [
                run(x_BLC[rows], modulation[:, rows], None, cache.slot(layer, rows))
                for rows in row_chunks(x_BLC)
            ]
        )
    return x_BLC


def row_chunks(x_BLC: Tensor) -> Iterator[slice]:
    """Samples to compute at a time: all of them, on a CPU as many as its caches hold."""
    rows = len(x_BLC)
    if x_BLC.device.type == "cpu":
        rows = max(1, CPU_CHUNK * rows // max(1, x_BLC.numel()))
    for start in range(0, max(1, len(x_BLC)), max(1, rows)):
        yield slice(start, min(start + rows, len(x_BLC)))


def in_type_of(x_BLC: Tensor, module: nn.Module) -> Callable[..., Tensor]:
    """`module` with weights of the type of `x_BLC`: itself, or a call with widened copies."""
    parameters = dict(module.named_parameters())
    if all(p.dtype == x_BLC.dtype for p in parameters.values()):
        return module
    widened: Mapping[str, Tensor] = {
        name: p.to(x_BLC.dtype)
        for name, p in parameters.items()
        if "modulation" not in name  # a third of the weights, used once a generation
    }
    return partial(_call_with, module, widened)


def _call_with(module: nn.Module, parameters: Mapping[str, Tensor], *inputs: object) -> Tensor:
    return torch.func.functional_call(module, dict(parameters), inputs)


def relative_change(new_BLC: Tensor, old_BLC: Tensor) -> Tensor:
    """||new - old|| / ||new|| a sample, (B,)."""
    new, old = new_BLC.float().flatten(1), old_BLC.float().flatten(1)
    return (new - old).norm(dim=1) / new.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def squared_residual(new_BLC: Tensor, old_BLC: Tensor) -> Tensor:
    """Mean over tokens of ||new - old||^2 / ||new||^2, scalar; no gradient through the denominator."""
    new, old = new_BLC.float(), old_BLC.float()
    size_BL = new.detach().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((new - old).square().sum(-1) / size_BL).mean()


def _named(prefix: str, blocks: nn.ModuleList) -> Iterator[tuple[str, Block]]:
    for i, block in enumerate(blocks):
        yield f"{prefix}.{i}", block


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in `dtype`.

    A CPU without them takes ten times as long as in float32.
    """
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device.type != "cpu" or dtype not in names:
        return True
    ask = getattr(torch.ops.mkldnn, names[dtype], None)  # no public way to ask; not every build has it
    return ask is not None and bool(ask())


def check_cache_kind(kind: str) -> None:
    """Raise `ValueError` unless `kind` names a cache."""
    if kind not in CACHES:
        raise ValueError(f"cache: expected one of {CACHES}, got {kind!r}")
