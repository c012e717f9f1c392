"""Losses that keep fixed points easy to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_callable, check_generator, check_instance, check_integer, check_number, plain
from ._scope import one_solve
from ._torch import tree_map
from .fixed_point import fixed_point
from .layer import ImplicitLayer
from .starting import starting_point
from .state import flatten


def jacobian_penalty(
    cell: Callable[..., Any],
    z: Any,
    *inputs: Any,
    num_probes: int = 1,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Tensor:
    """Mean square size of the cell's Jacobian: an estimate of ||J||_F^2 / D, averaged over the batch.

    J = d cell / d z at z, (D, D) for each sample. With random signs v, E ||v^T J||^2 = tr(J J^T) = ||J||_F^2
    (Hutchinson's estimator); random signs have the smallest variance of all independent probes. The square
    root of the result is the factor by which the cell changes the length of a random direction, on average.
    (Bai et al. 2021, arXiv 2106.14342.)

    `loss + weight * jacobian_penalty(layer.cell, z.detach(), x)` with `z = layer(x)` changes the cell where
    it stands. With `z` as it is, the gradient also goes through the fixed point, at the price of one more
    backward pass of the layer. Under `no_grad` it only measures. Cost: one evaluation of the cell and
    `num_probes` vector-Jacobian products, all on the tape where gradients are recorded.

    Args:
        cell: `cell(z, *inputs) -> z`, differentiable twice. `F.scaled_dot_product_attention` is so only
            with `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
        z: where, a tensor or pytree of tensors whose first axis is the batch.
        *inputs: of the cell, after the state.
        num_probes: random vectors to average over; the variance falls as one over their number.
        generator: draws them, on any device; `None` uses PyTorch's default generator.
        **keywords: of the cell, by name.

    Returns:
        A scalar in the common type of the state, at least float32. Gradient reaches all that the cell uses,
        and `z` where it requires gradient.

    Raises:
        TypeError, ValueError: `num_probes` is no positive integer, `z` no state, or the cell changes its
            structure, shape, dtype or device.
        RuntimeError: under `torch.inference_mode`, where nothing can be differentiated.
    """
    check_callable("jacobian_penalty", cell=cell)
    check_integer("jacobian_penalty", 1, num_probes=num_probes)
    check_generator("jacobian_penalty", generator)
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "jacobian_penalty: nothing can be differentiated under inference_mode; use no_grad instead"
        )
    f, flat = flatten(cell, z, inputs, keywords=keywords)
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # A point of its own: inputs may depend on z too, and J is with respect to the state alone.
        point = flat.view_as(flat) if recorded and flat.requires_grad else flat.detach().requires_grad_()
        image = f(point)
    if not image.requires_grad:  # a constant cell
        return flat.new_zeros(())
    total = flat.new_zeros(())
    for i in range(num_probes):
        keep = recorded or i + 1 < num_probes
        (product,) = torch.autograd.grad(
            image, point, _signs(flat, generator), create_graph=recorded, retain_graph=keep, allow_unused=True
        )
        if product is not None:
            total = total + product.square().sum()
    return total / max(num_probes * flat.numel(), 1)


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    signs = torch.empty(like.shape, dtype=like.dtype, device=device).bernoulli_(0.5, generator=generator)
    return (2 * signs - 1).to(like.device)


def trajectory(
    layer: ImplicitLayer,
    *inputs: Any,
    steps: Sequence[int] = (2, 4),
    z0: Any = None,
    **keywords: Any,
) -> list[Any]:
    """States on the way to the fixed point, each with a gradient, and the fixed point last.

    One solve, by the layer's own settings. Each iterate z_k that is asked for is evaluated once more:
    the state returned is its image cell(z_k, *inputs), with the gradient of that one step and z_k held
    constant. Value and gradient belong together so, however far z_k is from the fixed point. The last state
    is the layer's output, with the gradient of its backward mode. (Bai et al. 2022, 'Deep Equilibrium
    Optical Flow Estimation', arXiv 2204.08442.)

    Cost: that of the layer, and one evaluation for each of `steps`; memory: the tape of those evaluations.
    Iterates are those of the batch, finished samples at rest; `compact` is off. Those of `NewtonKrylov` may
    be points at which it takes a finite difference.

    Args:
        layer: the layer.
        *inputs: its inputs.
        steps: numbers of solver steps, increasing. One that the solve does not get to, because all samples
            converged before, gives the image of the fixed point.
        z0: starting point; default the layer's.
        **keywords: its inputs by name.

    Returns:
        `len(steps) + 1` states, structure of the starting point.

    Raises:
        TypeError, ValueError: `steps` are not increasing integers of at least 0, or see
            `deqlib.fixed_point`.
        NonConvergenceError: as the layer.
    """
    check_instance("trajectory", ImplicitLayer, "a deqlib.ImplicitLayer", layer=layer)
    check_instance("trajectory", Sequence, "a sequence of numbers of steps", steps=steps)
    check_integer("trajectory", 0, **{f"steps[{i}]": step for i, step in enumerate(steps)})
    if sorted(set(steps)) != list(steps):
        raise ValueError(f"trajectory: steps must be increasing, got {tuple(steps)}")
    with one_solve():
        recorder = _Recorder(layer.cell, frozenset(steps))
        solution = fixed_point(
            recorder,
            starting_point(layer.init, inputs, keywords) if z0 is None else z0,
            inputs,
            keywords,
            solver=layer.solver,
            stopping=layer.stopping,
            backward=layer.backward,
            on_failure=layer.on_failure,
            has_aux=layer.has_aux,
            with_step=layer.with_step,
        )
        # Evaluations after the last step are those of the backward mode.
        taken = int(solution.num_steps.max()) if solution.num_steps.numel() else 0
        end = tree_map(torch.Tensor.detach, solution.value)
        at_end = recorder.given
        if layer.with_step:
            at_end = {**at_end, "step": at_end["step"]._replace(number=solution.num_steps)}
        images = []
        for step in steps:
            state, given = recorder.states[step] if step < taken else (end, at_end)
            f, flat = flatten(layer.cell, state, inputs, keywords=given, has_aux=layer.has_aux)
            images.append(f.layout.unravel(f(flat)))
    return [*images, solution.value]


class _Recorder(nn.Module):
    """A cell that keeps the states it is given at some of its evaluations. A module, as the cell may be."""

    def __init__(self, cell: Callable[..., Any], steps: frozenset[int]) -> None:
        super().__init__()
        self.cell, self.steps = cell, steps
        self.count = 0
        self.states: dict[int, tuple[Any, dict[str, Any]]] = {}  # with the keywords that came with them
        self.given: dict[str, Any] = {}  # the keywords of the last evaluation

    def forward(self, z: Any, *inputs: Any, **keywords: Any) -> Any:
        """The cell's."""
        if self.count in self.steps:
            # A copy: the solver may write to its iterates.
            self.states[self.count] = tree_map(lambda leaf: leaf.detach().clone(), z), keywords
        self.count, self.given = self.count + 1, keywords
        return self.cell(z, *inputs, **keywords)


def correction_loss(
    states: Sequence[Any], criterion: Callable[[Any], Tensor], *, decay: float = 0.8
) -> Tensor:
    """A criterion on several states on the way to the fixed point, later ones weighing more.

    sum_i decay^(n - 1 - i) criterion(states[i]), i = 0 ... n - 1: the last state has weight 1. It draws
    early iterates to where the loss wants the fixed point, so that fewer steps do.
    (Fixed-point correction, Bai et al. 2022, arXiv 2204.08442.)

    Args:
        states: in order, as from `deqlib.regularizers.trajectory`.
        criterion: `criterion(state) -> scalar`.
        decay: in (0, 1]; 1 weighs all alike.

    Raises:
        TypeError, ValueError: `decay` is out of range, there are no states, or the criterion does not give
            a scalar.
    """
    check_number("correction_loss", 0, 1, open_minimum=True, decay=decay)
    decay = plain(decay)
    check_callable("correction_loss", criterion=criterion)
    check_instance("correction_loss", Sequence, "a sequence of states", states=states)
    if not len(states):
        raise ValueError("correction_loss: states must hold at least one state, got none")
    losses = [criterion(state) for state in states]
    for loss in losses:
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"correction_loss: criterion must return a scalar tensor, got {got}")
    total = losses[-1]
    for i, loss in enumerate(reversed(losses[:-1]), start=1):
        total = total + decay**i * loss
    return total
