"""The middle of the transformer, explicit (VAR) or implicit (VIAR), on one contract.

    x_BLC = trunk(x_BLC, cond, mask_LL=None, cache=None, iterations=None)

Without a cache all scales go through at once under the block-causal mask (teacher forcing). With one,
`x_BLC` is the next scale alone; the trunk reads the past from the cache and commits the scale to it.
Nothing outside this file asks which trunk it talks to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqlib import ImplicitLayer, Picard, StochasticJFB, Stopping

from .attention import KeyValue
from .blocks import Block
from .cache import EquilibriumCache, IterateCache
from .config import ImplicitTrunkConfig, TransformerConfig
from .iterations import Adaptive, Iterations, iteration_schedule

CACHES = ("equilibrium", "iterate")


class Trunk(nn.Module, ABC):
    """What the transformer and the sampler know of a trunk."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sides = config.sides

    @abstractmethod
    def schedule(self, iterations: Iterations | None) -> list[int] | list[Adaptive] | list[None]:
        """Iterations of each scale, defaults filled in; raises on what the trunk cannot do."""

    @abstractmethod
    def new_cache(self, kind: str, schedule: Sequence[int | Adaptive | None]) -> EquilibriumCache:
        """Empty cache for one generation of all scales under `schedule`."""

    def seed_depth(self, seed: int) -> None:  # a hook, not a duty
        """Seed whatever the trunk draws in training; the same seed everywhere draws the same."""

    @abstractmethod
    def forward(
        self,
        x_BLC: Tensor,
        cond: Tensor,
        *,
        mask_LL: Tensor | None = None,
        cache: EquilibriumCache | None = None,
        iterations: int | Adaptive | None = None,
    ) -> Tensor:
        """Tokens (B, L, C) after the trunk."""


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

    def new_cache(self, kind: str, schedule: Sequence[int | Adaptive | None]) -> EquilibriumCache:
        """One set of keys and values a block."""
        check_cache_kind(kind)
        if kind == "iterate":
            raise ValueError("cache: 'iterate' needs an implicit trunk; use cache='equilibrium'")
        return EquilibriumCache(self.sides)

    def forward(
        self,
        x_BLC: Tensor,
        cond: Tensor,
        *,
        mask_LL: Tensor | None = None,
        cache: EquilibriumCache | None = None,
        iterations: int | Adaptive | None = None,
    ) -> Tensor:
        """See `Trunk.forward`."""
        if iterations is not None:
            self.schedule(iterations)  # raises
        return run_blocks("blocks", self.blocks, x_BLC, cond, mask_LL, cache)


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
        return F.linear(u_BLC, self.projection_in.weight[:, self.width :], self.projection_in.bias)

    def evaluate(
        self,
        z_BLC: Tensor,
        injection: Tensor,  # (B, L, 2C), from `inject`
        modulation: Tensor,  # (6, B, 1, C), from the block
        mask_LL: Tensor | None,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """f(z, u), and the block's keys and values at z."""
        hidden = F.linear(z_BLC, self.projection_in.weight[:, : self.width]) + injection
        x_BLC = self.projection_out(F.gelu(hidden, approximate="tanh"))
        return self.block(x_BLC, modulation, mask_LL, past)

    def forward(
        self,
        z_BLC: Tensor,
        injection: Tensor,
        modulation: Tensor,
        mask_LL: Tensor | None,
        past: KeyValue | None,
    ) -> Tensor:
        """f(z, u)."""
        return self.evaluate(z_BLC, injection, modulation, mask_LL, past)[0]


class ImplicitTrunk(Trunk):
    """Blocks, one implicit block solved for its fixed point, blocks (arXiv 2605.01220).

    Drop path rates are those the kept blocks have in the explicit trunk of the same depth: the first
    `num_pre`, the middle one, the last `num_post`.

    In training the number of iterations is drawn at every call (`StochasticJFB`) from `depth_generator`,
    which starts from one seed in every process, so that processes training together draw the same.
    """

    layer_name = "implicit"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        trunk = config.trunk
        assert isinstance(trunk, ImplicitTrunkConfig)
        rates = drop_path_rates(config)
        self.default_iterations = trunk.iterations
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

    def schedule(self, iterations: Iterations | None) -> list[int] | list[Adaptive]:
        """One count or `Adaptive` a scale."""
        return iteration_schedule(
            self.default_iterations if iterations is None else iterations, len(self.sides)
        )

    def new_cache(self, kind: str, schedule: Sequence[int | Adaptive | None]) -> EquilibriumCache:
        """See `cache.py` for the two kinds."""
        check_cache_kind(kind)
        if kind == "equilibrium":
            return EquilibriumCache(self.sides)
        counts = [n for n in schedule if isinstance(n, int)]
        if len(counts) != len(schedule):
            raise ValueError("cache: 'iterate' needs fixed counts, got Adaptive; use cache='equilibrium'")
        return IterateCache(self.sides, counts, self.layer_name)

    def forward(
        self,
        x_BLC: Tensor,
        cond: Tensor,
        *,
        mask_LL: Tensor | None = None,
        cache: EquilibriumCache | None = None,
        iterations: int | Adaptive | None = None,
    ) -> Tensor:
        """See `Trunk.forward`."""
        u_BLC = run_blocks("pre", self.pre, x_BLC, cond, mask_LL, cache)
        z_BLC = self._solve(u_BLC, cond, mask_LL, cache, iterations)
        return run_blocks("post", self.post, z_BLC, cond, mask_LL, cache)

    def _solve(
        self,
        u_BLC: Tensor,
        cond: Tensor,
        mask_LL: Tensor | None,
        cache: EquilibriumCache | None,
        iterations: int | Adaptive | None,
    ) -> Tensor:
        cell = self.layer.cell
        assert isinstance(cell, ImplicitCell)
        constant = (cell.inject(u_BLC), cell.block.modulate(cond), mask_LL)
        if cache is None:
            return self._solve_jointly(u_BLC, constant, iterations)
        count = self.default_iterations if iterations is None else iterations
        if cache.per_iteration:
            assert isinstance(count, int)
            z_BLC = u_BLC
            for i in range(count):
                z_BLC, new = cell.evaluate(z_BLC, *constant, cache.past(self.layer_name, i))
                cache.commit(self.layer_name, new, i)
            return z_BLC
        # The last evaluation gives both the result and the keys and values at the fixed point.
        past = cache.past(self.layer_name)
        before_last = count if isinstance(count, Adaptive) else count - 1
        z_BLC = self._iterate(u_BLC, constant, past, before_last)
        z_BLC, new = cell.evaluate(z_BLC, *constant, past)
        cache.commit(self.layer_name, new)
        return z_BLC

    def _solve_jointly(
        self, u_BLC: Tensor, constant: tuple[Tensor, Tensor, Tensor | None], iterations: int | Adaptive | None
    ) -> Tensor:
        """All scales at once."""
        if iterations is None:
            return self.layer.solve(*constant, None, z0=u_BLC).value
        if torch.is_grad_enabled():
            raise ValueError(
                "iterations: while gradients are recorded the trunk draws its own number, "
                f"got {iterations!r}; leave it at None or call under torch.no_grad()"
            )
        return self._iterate(u_BLC, constant, None, iterations)

    def _iterate(
        self,
        u_BLC: Tensor,
        constant: tuple[Tensor, Tensor, Tensor | None],
        past: KeyValue | None,
        iterations: int | Adaptive,
    ) -> Tensor:
        """The state after so many iterations, or at the tolerance."""
        if isinstance(iterations, Adaptive):
            how = {"solver": iterations.solver, "stopping": iterations.stopping}
        else:
            how = {"stopping": Stopping.steps(iterations)}
        return self.layer.solve(*constant, past, z0=u_BLC, **how).value


def build_trunk(config: TransformerConfig) -> Trunk:
    """The trunk `config.trunk` asks for."""
    implicit = isinstance(config.trunk, ImplicitTrunkConfig)
    return ImplicitTrunk(config) if implicit else ExplicitTrunk(config)


def drop_path_rates(config: TransformerConfig) -> list[float]:
    """Rate of each of the `depth` blocks, rising linearly from 0 to `drop_path`."""
    return [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]


def run_blocks(
    name: str,
    blocks: nn.ModuleList,
    x_BLC: Tensor,
    cond: Tensor,
    mask_LL: Tensor | None,
    cache: EquilibriumCache | None,
) -> Tensor:
    """Explicit blocks in turn; with a cache, each under its own name."""
    for i, block in enumerate(blocks):
        layer = f"{name}.{i}"
        past = None if cache is None else cache.past(layer)
        x_BLC, new = block(x_BLC, block.modulate(cond), mask_LL, past)
        if cache is not None:
            cache.commit(layer, new)
    return x_BLC


def check_cache_kind(kind: str) -> None:
    """Raise `ValueError` unless `kind` names a cache."""
    if kind not in CACHES:
        raise ValueError(f"cache: expected one of {CACHES}, got {kind!r}")
