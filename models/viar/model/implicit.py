"""The implicit trunk of VIAR: blocks, one implicit block solved for its fixed point, blocks.

With u the tokens after the first blocks, the implicit block's output is z* = f(z*, u),

    f(z, u) = block(W2 gelu(W1 [z, u])),

found by `deqlib`, in training and generation alike: the driver calls the cell, counts, measures and stops.
(VIAR, arXiv 2605.01220.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deqlib import EquilibriumCache, ImplicitLayer, KeyValueCache, Picard, StochasticJFB, Stopping
from deqlib.regularizers import jacobian_penalty

from .attention import KeyValue
from .blocks import Block, gelu
from .cache import IterateCache, check_cache_name, check_iterate_schedule, tokens_of
from .config import ImplicitTrunkConfig, TransformerConfig, filled
from .execution import in_type_of, joined, row_chunks
from .scales import BlockCausal, resize_tokens
from .schedule import Adaptive, Iterations, iteration_schedule, solve
from .trunk import Call, ScaleSolve, Trunk, TrunkOutput, drop_path_rates, evaluated, named

LAYER = "implicit"  # name of the implicit block's modulation and of its keys and values
STATE_SHARE = 0.3  # of what a projection that starts as the identity passes on; the rest is of the input


class SlowLinear(nn.Linear):
    """A linear layer whose initial weights mean something, and which leaves them slowly."""

    lr_factor = 0.3  # of the learning rate, see `viar.training.optim.build_optimizer`


class ImplicitCell(nn.Module):
    """f(z, u) = block(projection(concat(z, u))), with a two-layer projection 2C -> 2C -> C.

    The first projection splits into a half for z and a half for u; u's half does not change over
    iterations, so `inject` computes it once and the cell takes the result.

    No path leads around the projection, so a random one hides z and u from the block until it has learnt to
    pass them on. One that starts as the identity gives the block 0.3 z + 0.7 u, by C pairs of hidden numbers
    of opposite sign, as gelu(x) - gelu(-x) = x. It has 0.3 of the published random weights beside, and learns
    at 0.3 of the rate. Not part of the published recipe.

    Args:
        config: of the whole transformer.
        drop_path: rate of the block.
    """

    def __init__(self, config: TransformerConfig, drop_path: float) -> None:
        super().__init__()
        C = filled(config.width)
        self.width = C
        assert isinstance(config.trunk, ImplicitTrunkConfig)
        linear = SlowLinear if config.trunk.projection == "identity" else nn.Linear
        self.projection_in = linear(2 * C, 2 * C)
        self.projection_out = linear(2 * C, C)
        self.block = Block(config, drop_path)

    @torch.no_grad()
    def init_projection(self) -> None:
        """Let a projection that is to start as the identity do so; others stay as they are."""
        if not isinstance(self.projection_in, SlowLinear):
            return
        eye = torch.eye(self.width)
        through = torch.cat([STATE_SHARE * eye, (1 - STATE_SHARE) * eye], 1)
        self.projection_in.weight.mul_(SlowLinear.lr_factor).add_(torch.cat([through, -through]))
        self.projection_out.weight.mul_(SlowLinear.lr_factor).add_(torch.cat([eye, -eye], 1))

    def inject(self, u_BLC: Tensor) -> Tensor:
        """u's half of the first projection with its bias, (B, L, 2C)."""
        weight, bias = self.projection_in.weight[:, self.width :], self.projection_in.bias
        return F.linear(u_BLC, weight.to(u_BLC.dtype), bias.to(u_BLC.dtype))

    def forward(
        self,
        z_BLC: Tensor,
        injection: Tensor,  # (B, L, 2C), from `inject`
        modulation: Tensor,  # (6, B, 1, C), from the block
        causal: BlockCausal | None = None,  # see `Attention.forward`
        slot: KeyValue | None = None,  # likewise
    ) -> Tensor:
        """f(z, u), (B, L, C); leaves the block's keys and values at z in the slot."""
        weight = self.projection_in.weight[:, : self.width]
        hidden = torch.addmm(injection.flatten(0, 1), z_BLC.flatten(0, 1), weight.t())
        x_BLC = self.projection_out(gelu(hidden)).view_as(z_BLC)
        output: Tensor = self.block(x_BLC, modulation, causal, slot)
        return output


class ScaleCell:
    """z -> f(z, u) for some samples at one scale; every evaluation has its slot in a cache.

    Args:
        cell: f, with weights of the type of `u_BLC`.
        injection: of all samples, a function of the samples to inject.
        u_BLC: what is injected, of all samples.
        modulation: of the block, (6, B, 1, C).
        cache: where keys and values go.
        rows: the samples that are solved for, as many at a time as `row_chunks` says.

    Attributes:
        image: f(z, u) at the last evaluation, (rows, l, C); there once it was evaluated.
    """

    def __init__(
        self,
        cell: Callable[..., Tensor],
        injection: Callable[[Tensor], Tensor],
        u_BLC: Tensor,
        modulation: Tensor,
        cache: KeyValueCache,
        rows: slice,
    ) -> None:
        self.image: Tensor
        self._cell, self._cache, self._num_evaluations = cell, cache, 0
        self._chunks = []
        for part in row_chunks(u_BLC[rows]):
            own = slice(rows.start + part.start, rows.start + part.stop)
            self._chunks.append((part, own, injection(u_BLC[own]), modulation[:, own]))

    def __call__(self, z_BLC: Tensor) -> Tensor:
        """f(z, u); its keys and values take the place of those of the evaluation before in the same set."""
        self.image = joined(
            [
                self._cell(
                    z_BLC[part],
                    injection,
                    modulation,
                    None,
                    self._cache.slot(LAYER, own, self._num_evaluations),
                )
                for part, own, injection, modulation in self._chunks
            ]
        )
        self._num_evaluations += 1
        return self.image


class ImplicitTrunk(Trunk):
    """Blocks, one implicit block solved for its fixed point, blocks (arXiv 2605.01220).

    Drop path rates are those the kept blocks have in the explicit trunk of the same depth: the first
    `num_pre`, the middle one, the last `num_post`.

    In training the number of iterations is drawn at every call (`deqlib.StochasticJFB`) from the `generator`
    that the call is given. Processes that train one model together should draw the same, or some wait for
    others: give each a generator of the same seed.

    With a `residual_weight` w the block is also asked to stand still where those iterations end: one more
    evaluation there gives the penalty w mean ||f(z) - z||^2 / ||f(z)||^2 over tokens, the denominator held
    constant, in `TrunkOutput.penalty`. Few iterations are enough then, and both caches soon agree. Not part
    of the published recipe. Drop path of the block counts as movement.

    With a `jacobian_weight` w the penalty has w ||J||_F^2 / (L C) besides, J the block's Jacobian with
    respect to the state where those iterations end: one more evaluation there and two backward passes of it,
    attention by PyTorch's plain implementation, which alone can be differentiated twice. It is estimated with
    one vector of random signs a sample, of a seed that is drawn from the `generator` after the numbers of
    iterations (`deqlib.regularizers.jacobian_penalty`, arXiv 2106.14342). Not part of the published recipe
    either.

    Args:
        config: of the whole transformer; its `trunk` is an `ImplicitTrunkConfig`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        trunk = config.trunk
        assert isinstance(trunk, ImplicitTrunkConfig)
        rates = drop_path_rates(config)
        self.default_iterations = trunk.iterations
        self.residual_weight, self.jacobian_weight = trunk.residual_weight, trunk.jacobian_weight
        self.random_depth = StochasticJFB(no_grad=trunk.no_grad, grad=trunk.grad)
        self.pre = nn.ModuleList(Block(config, rate) for rate in rates[: trunk.num_pre])
        self.layer = ImplicitLayer(
            ImplicitCell(config, rates[config.depth // 2]),
            solver=Picard(),
            backward=self.random_depth,
            stopping=Stopping.steps(trunk.iterations),
            # Only Adaptive can miss a tolerance, and then by the cap its caller chose.
            on_failure="ignore",
        )
        self.post = nn.ModuleList(Block(config, rate) for rate in rates[config.depth - trunk.num_post :])

    def schedule(
        self, iterations: Iterations | None, *, cache: str = "equilibrium", warm_start: bool = False
    ) -> list[int] | list[Adaptive]:
        """One count or `Adaptive` a scale; see `Trunk.schedule`.

        Raises:
            ValueError, TypeError: see `iteration_schedule`; with a cache of iterates: counts that rise,
                `Adaptive`, a warm start.
        """
        schedule = iteration_schedule(
            self.default_iterations if iterations is None else iterations, len(self.sides)
        )
        check_cache_name(cache)
        if cache == "iterate":
            if warm_start:
                raise ValueError(
                    "warm_start: needs cache='equilibrium', which keeps one state; got 'iterate'"
                )
            check_iterate_schedule(schedule)
        return schedule

    def new_cache(self, kind: str, schedule: Sequence[int | Adaptive | None]) -> KeyValueCache:
        """Of the kind "equilibrium" or "iterate"; see `Trunk.new_cache` and `viar.model.cache`."""
        check_cache_name(kind)
        if kind == "equilibrium":
            return EquilibriumCache(tokens_of(self.sides))
        check_iterate_schedule(schedule)
        return IterateCache(self.sides, [n for n in schedule if isinstance(n, int)])

    def init_own(self) -> None:
        """See `Trunk.init_own`."""
        self._cell.init_projection()

    def blocks_before(self) -> Iterator[tuple[str, Block]]:
        """See `Trunk.blocks_before`."""
        yield from named(self.pre, "pre")

    def blocks_after(self) -> Iterator[tuple[str, Block]]:
        """See `Trunk.blocks_after`."""
        yield from named(self.post, "post")

    def named_blocks(self) -> Iterator[tuple[str, Block]]:
        """See `Trunk.named_blocks`."""
        yield from self.blocks_before()
        yield LAYER, self._cell.block
        yield from self.blocks_after()

    def compiled_parts(self) -> Iterator[nn.Module]:
        """See `Trunk.compiled_parts`."""
        yield from (*self.pre, self._cell, *self.post)

    @property
    def _cell(self) -> ImplicitCell:
        cell = self.layer.cell
        assert isinstance(cell, ImplicitCell)
        return cell

    def _middle(self, u_BLC: Tensor, call: Call) -> TrunkOutput:
        if call.cache is None:
            return self._all_scales(u_BLC, call)
        return self._one_scale(u_BLC, call, call.cache)

    def _all_scales(self, u_BLC: Tensor, call: Call) -> TrunkOutput:
        """At the depth drawn where gradients are recorded, else as the call says."""
        inputs = (self._cell.inject(u_BLC), call.modulations[LAYER], call.causal)
        if call.iterations is None:
            depth = replace(self.random_depth, generator=call.generator, checkpoint=call.recompute)
            z_BLC: Tensor = self.layer.solve(*inputs, z0=u_BLC, backward=depth).value
            return TrunkOutput(z_BLC, self._penalty(z_BLC, inputs, call))
        if torch.is_grad_enabled():
            raise ValueError(
                "iterations: while gradients are recorded the trunk draws its own number, "
                f"got {call.iterations!r}; leave it at None or call under torch.no_grad()"
            )
        return TrunkOutput(solve(lambda z_BLC: self._cell(z_BLC, *inputs), u_BLC, call.iterations).value)

    def _penalty(self, z_BLC: Tensor, inputs: tuple[Any, ...], call: Call) -> Tensor | None:
        """What training adds to the loss where the drawn iterations end, at z."""
        if not torch.is_grad_enabled():
            return None
        parts = []
        if self.residual_weight:
            image_BLC = evaluated(self._cell, z_BLC, *inputs, recompute=call.recompute)
            parts.append(self.residual_weight * squared_residual(image_BLC, z_BLC))
        if self.jacobian_weight:
            # Drawn where z is: signs from the CPU would have to be waited for.
            signs = torch.Generator(z_BLC.device).manual_seed(_drawn_seed(call.generator))
            with sdpa_kernel(SDPBackend.MATH):
                size = jacobian_penalty(self._cell, z_BLC.detach(), *inputs, generator=signs)
            parts.append(self.jacobian_weight * size)
        return sum(parts[1:], start=parts[0]) if parts else None

    def _one_scale(self, u_BLC: Tensor, call: Call, cache: KeyValueCache) -> TrunkOutput:
        """The scale that the cache has open."""
        count = self.default_iterations if call.iterations is None else call.iterations
        run, modulation = in_type_of(u_BLC, self._cell), call.modulations[LAYER].to(u_BLC.dtype)
        z0_BLC = u_BLC
        if call.displacement is not None:
            z0_BLC = u_BLC + resize_tokens(call.displacement[: len(u_BLC)], math.isqrt(u_BLC.shape[1]))
        # A few samples stop when they are through. Where a scale stops as a whole, all are solved together.
        whole = isinstance(count, Adaptive) and not count.per_sample
        solves = []
        for rows in [slice(0, len(u_BLC))] if whole else row_chunks(u_BLC):
            f = ScaleCell(run, self._cell.inject, u_BLC, modulation, cache, rows)
            solves.append(solve_scale(f, z0_BLC[rows], count, call.measure))
        z_BLC = joined([z for z, _, _ in solves])
        evaluations = joined([number for _, number, _ in solves])
        residuals = [residual for _, _, residual in solves if residual is not None]
        solved = ScaleSolve(evaluations, joined(residuals) if residuals else None, u_BLC, z_BLC)
        return TrunkOutput(z_BLC, solve=solved)


def solve_scale(
    f: ScaleCell, z0_BLC: Tensor, iterations: int | Adaptive, measure: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The implicit block at one scale, its keys and values those of the evaluation that gave its output.

    A solve ends at a state z that was evaluated somewhere along the way. The output is f(z), from an
    evaluation of its own, whose keys and values the scales to come will see; n iterations are n - 1 steps and
    this evaluation.

    Returns:
        The output (B, l, C), evaluations of each sample (B,), each sample's residual at z (B,) if `measure`.
    """
    steps = iterations if isinstance(iterations, Adaptive) else iterations - 1
    solution = solve(f, z0_BLC, steps)
    if not measure:
        return f(solution.value), solution.sample_nfe + 1, None
    last = solve(f, solution.value, 0, measure=True)  # no step: the evaluation that measures is all it does
    return f.image, solution.sample_nfe + last.sample_nfe, last.relative_residual


def _drawn_seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**62, (), generator=generator, device="cpu"))


def squared_residual(new_BLC: Tensor, old_BLC: Tensor) -> Tensor:
    """Mean over tokens of ||new - old||^2 / ||new||^2, scalar; no gradient through the denominator."""
    new, old = new_BLC.float(), old_BLC.float()
    size_BL = new.detach().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((new - old).square().sum(-1) / size_BL).mean()
