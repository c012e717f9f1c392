"""How blocks are computed: how many samples at a time, in which type, with weights of which width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

# What a CPU works on at a time, in numbers of a state: a block's activations then stay in its caches.
CPU_CHUNK = 400_000


def row_chunks(x_BLC: Tensor) -> Iterator[slice]:
    """Samples to compute at a time: all of them, on a CPU as many as its caches hold."""
    rows = len(x_BLC)
    if x_BLC.device.type == "cpu":
        rows = max(1, CPU_CHUNK * rows // max(1, x_BLC.numel()))
    for start in range(0, max(1, len(x_BLC)), max(1, rows)):
        yield slice(start, min(start + rows, len(x_BLC)))


def joined(parts: list[Tensor], axis: int = 0) -> Tensor:
    """The parts as one tensor, by default chunks of samples as one batch; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def in_type_of(x_BLC: Tensor, module: nn.Module) -> Callable[..., Tensor]:
    """`module`, whose weights have one type, with those of the type of `x_BLC`.

    That is the module itself, or a call with widened copies.
    """
    if next(module.parameters()).dtype == x_BLC.dtype:
        return module
    widened: Mapping[str, Tensor] = {
        name: p.to(x_BLC.dtype)
        for name, p in module.named_parameters()
        if "modulation" not in name  # a third of the weights, used once a generation
    }
    return partial(_call_with, module, widened)


def _call_with(module: nn.Module, parameters: Mapping[str, Tensor], *inputs: object) -> Tensor:
    output: Tensor = torch.func.functional_call(module, dict(parameters), inputs)
    return output


def fails_on_device(index: Tensor) -> bool:
    """Whether a lookup of what is out of range fails without the host reading the indices.

    CUDA's kernels check them; that the process ends with a device-side assertion shows at the next operation
    that waits for the device. Tensors on the meta device have no numbers.
    """
    return index.is_cuda or index.is_meta


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """A few numbers, on the device, without waiting for it where they come from the host.

    CUDA puts ordinary memory aside before the call returns. Pinned memory it would read later, when its owner
    may have written to it, and so would MPS read any. To the host they come only once it has waited.
    """
    waits = device.type in ("cpu", "mps") or numbers.is_pinned()
    return numbers.to(device, non_blocking=not waits)


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in `dtype`.

    A CPU without them takes ten times as long as in float32.
    """
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device.type != "cpu" or dtype not in names:
        return True
    ask = getattr(torch.ops.mkldnn, names[dtype], None)  # no public way to ask; not every build has it
    return ask is not None and bool(ask())
