"""A transformer whose weights, gradients and moments are spread over the processes that train it (FSDP2).

Each explicit block is gathered while it runs and let go afterwards. Its modulation is computed outside of
it, before the first block runs, and is a unit of its own. The implicit block is evaluated many times a step:
it is gathered once, together with all that is no block.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from ..model.transformer import NextScaleTransformer
from .processes import to_main

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def prepared(model: nn.Module, accelerator: Accelerator, sharding: str) -> nn.Module:
    """The model as it is called for training, on the device, its weights those of the main process.

    All processes call it together, before an optimiser is made of the parameters.

    Args:
        model: of this process; changed in place where it is sharded.
        accelerator: of the run.
        sharding: of `TrainConfig`.
    """
    sharded = sharding == "full" and accelerator.num_processes > 1
    if sharded:
        assert isinstance(model, NextScaleTransformer)  # `train_tokenizer` refuses to
        shard(model.to(accelerator.device))
    # In its mode for evaluation Accelerate does what the precision needs, and adds no DDP.
    ready: nn.Module = accelerator.prepare_model(model, evaluation_mode=sharded)
    return ready


def shard(model: NextScaleTransformer) -> None:
    """Keep in each process its share of the weights alone, which are those of the main process.

    All processes call it together, before an optimiser is made of the parameters.

    Args:
        model: on the device that it is trained on; changed in place, under the names that it had.
    """
    # Takes a second to import, which most runs can do without.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Its last layer gives a view in some versions of PyTorch. Nobody writes to logits.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(model.pos_embed.device.type, (dist.get_world_size(),))
    for unit in _units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _is_sharded(model: nn.Module) -> TypeGuard[FSDPModule]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nothing imported it, nothing is sharded
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def _units(model: NextScaleTransformer) -> Iterator[list[nn.Module]]:
    for _, block in (*model.trunk.blocks_before(), *model.trunk.blocks_after()):
        yield [block.attention, block.fc1, block.fc2]
        if not block.shared_modulation:
            yield [block.modulation]


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be called without gradient; what it gathered for that is let go of at the end.

    Kept, it would be used instead of weights that are written to afterwards.
    """
    try:
        yield
    finally:
        if _is_sharded(model):
            model.reshard()


def whole(model: nn.Module, *, is_main: bool) -> nn.Module | None:
    """The model as others use it: itself, or of a sharded one a copy with all its weights.

    All processes call it together. The copy is the main process's alone, others get `None`.

    Args:
        model: of this process.
        is_main: whether this is the main process.
    """
    if not _is_sharded(model):
        return model
    assert isinstance(model, NextScaleTransformer)
    weights = to_main(model.state_dict(), is_main=is_main)
    if not is_main:
        return None
    with torch.device("meta"):
        fresh = NextScaleTransformer(model.config)
    fresh.to_empty(device=model.pos_embed.device).load_state_dict(weights)
    return fresh.eval()
