"""Steps whose gradient is not finite are left out: no weight and no moment moves, and they are counted.

The host waits for no device. A loss that is not finite makes every gradient so, and the sum over processes
carries that to all of them; the norm of the gradient, which clipping needs anyway, then tells each process
the same. The optimiser's kernel takes the answer from the device, as from the gradient scaler of float16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import reduce
from torch import Tensor

from .checkpoint import TrainState


def poisoned(loss: Tensor) -> Tensor:
    """`loss` itself, scalar, but with gradients that are not finite where it is not finite itself."""
    return loss * (1 + 0 * loss.detach())


def step_if_finite(optimizer: AcceleratedOptimizer, grad_norm: Tensor) -> Tensor:
    """Step unless the norm is not finite; 1 where that was done, else 0, scalar, on the device.

    Args:
        optimizer: as prepared, a fused one.
        grad_norm: scalar, the same in all processes.
    """
    is_finite = grad_norm.isfinite()
    inner = optimizer.optimizer
    if optimizer.scaler is None:
        inner.found_inf = (~is_finite).float()  # what a scaler tells it, which finds such gradients itself
    optimizer.step()
    if optimizer.scaler is None:
        del inner.found_inf
    return is_finite.float()


class StepGuard:
    """Lets finite steps through, and counts the others on the device.

    Args:
        device: of the weights.
        state: what was counted before.
    """

    def __init__(self, device: torch.device, state: TrainState) -> None:
        counted = [state.skipped, state.rescaled, state.skipped_in_row, state.skipped_longest]
        self._counts = torch.tensor(counted, device=device)

    def step(
        self, optimizer: AcceleratedOptimizer, grad_norm: Tensor, losses: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What `step_if_finite` does, counted.

        Args:
            optimizer: as prepared, a fused one.
            grad_norm: scalar, the same in all processes.
            losses: scalars, of this process, which the gradient is of.

        Returns:
            Two scalars on the device, 1 or 0: whether the step moved the weights, and whether it did or would
            have with a lower scale of float16's gradients, which the scaler sees to.
        """
        moved = step_if_finite(optimizer, grad_norm)
        sound = moved
        if optimizer.scaler is not None:
            are_finite = torch.stack(list(losses)).detach().isfinite().all().float()
            sound = torch.maximum(moved, (reduce(are_finite, reduction="mean") == 1).float())
        skipped, rescaled, in_row, longest = self._counts.unbind()
        in_row = (in_row + 1) * (1 - moved).to(self._counts.dtype)
        left_out = [1 - sound, sound - moved]
        skipped, rescaled = (
            count + more.to(count.dtype) for count, more in zip((skipped, rescaled), left_out, strict=True)
        )
        self._counts = torch.stack([skipped, rescaled, in_row, torch.maximum(longest, in_row)])
        return moved, sound

    def note(self, state: TrainState) -> None:
        """Write into `state` what was counted; the host waits for the device here."""
        counted = self._counts.tolist()
        state.skipped, state.rescaled, state.skipped_in_row, state.skipped_longest = counted
