"""Initial weights of the transformer, as published.

With std = sqrt(1 / (3 C)) and D the depth:

| tensor | initial value |
| --- | --- |
| weights of linears and embeddings, positions | normal(0, std), truncated at -2 and 2 |
| biases | 0 |
| output of attention, second layer of the MLP | the above / sqrt(2 D) |
| modulation rows of g1, g2 / of s1, s2, b1, b2 | the above x 1e-5 / x 0.5 |
| modulation of the head | the above x 0.5 |
| head | the above x 0.02 |
| logarithmic attention scale | log 4 |

D is the depth of the explicit trunk also where the trunk is implicit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import Block


@torch.no_grad()
def init_weights(
    model: nn.Module,
    *,
    positions: Sequence[Tensor],
    head_modulation: nn.Linear,
    head: nn.Linear,
    width: int,
    depth: int,
) -> None:
    """Fill every parameter of a transformer by the table above, in place, from PyTorch's generator.

    Args:
        model: all of it.
        positions: its parameters that belong to no linear layer or embedding.
        head_modulation: its layer of that name.
        head: its last layer.
        width: C.
        depth: D.
    """
    std = math.sqrt(1 / (3 * width))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            _truncated_normal(module.weight, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
    for position in positions:
        _truncated_normal(position, std)
    for module in model.modules():
        if isinstance(module, Block):
            module.attention.out.weight.div_(math.sqrt(2 * depth))
            module.fc2.weight.div_(math.sqrt(2 * depth))
            if module.shared_modulation:
                # One offset a block and vector, on top of the shared projection below.
                _truncated_normal(module.modulation_offset, std)
                rows = module.modulation_offset.view(6, width)
            else:
                rows = module.modulation.weight.view(6, width * width)
            rows[:2].mul_(1e-5)
            rows[2:].mul_(0.5)
    head_modulation.weight.mul_(0.5)
    head.weight.mul_(0.02)


def _truncated_normal(tensor: Tensor, std: float) -> None:
    nn.init.trunc_normal_(tensor, std=std, a=-2.0, b=2.0)
