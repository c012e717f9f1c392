"""The exponential average of a model's weights, which is measured, drawn and saved in their place.

After n steps, of which this one moved the weights,

    average += (1 - d) (weights - average),   d = min(decay, (1 + n) / (10 + n)),

so that the first weights are soon forgotten, however slow the decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .processes import gathered, is_shared, placed_like


class AveragedWeights:
    """The average of a model's trainable parameters, in float32, each part where the parameter has it.

    Processes that train together see the same weights, and so hold the same average, or the same shards of
    one; `state_dict` holds it whole, and all of them call it together.

    Args:
        model: on its device, and sharded if it is to be; its weights are where the average starts.
        decay: d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.to(torch.float32, copy=True) for name, p in self._weights.items()}

    @torch.no_grad()
    def update(
        self,
        num_steps: int,
        moved: Tensor,  # scalar, 1 where this step moved the weights, else 0
    ) -> None:
        """Follow the weights after a step; one that did not move them changes nothing.

        Args:
            num_steps: n, steps of the run so far, this one included.
            moved: on the device of the weights, for which the host does not wait.
        """
        share = (1 - min(self.decay, (1 + num_steps) / (10 + num_steps))) * moved.float()
        for average, weight in zip(self._average.values(), self._weights.values(), strict=True):
            _own(average).lerp_(_own(weight).float(), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average for its weights."""
        kept = [weight.clone() for weight in self._weights.values()]
        try:
            self.put()
            yield
        finally:
            for weight, before in zip(self._weights.values(), kept, strict=True):
                weight.copy_(before)

    def put(self) -> None:
        """Make the average the model's weights, for good."""
        for name, weight in self._weights.items():
            weight.copy_(self._average[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The whole average, on the CPU; for `Checkpoint`."""
        return {name: gathered(average).cpu() for name, average in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """For `Checkpoint`.

        Raises:
            ValueError: it is the average of another model.
        """
        if state.keys() != self._average.keys():
            raise ValueError("the averaged weights are those of another model")
        for name, average in self._average.items():
            saved = state[name].to(average.device)
            if is_shared(average):
                saved = placed_like(saved, average)
            average.copy_(saved)


def _own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in place."""
    return tensor.to_local() if is_shared(tensor) else tensor
