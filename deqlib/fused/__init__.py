"""Steps of a solve in a few kernels, where PyTorch starts dozens.

The kernels are written in Triton, which comes with PyTorch's builds for NVIDIA devices. Nothing needs them:
where Triton is missing, where tensors are on a CPU or autograd records, and where a kernel fails, the same is
done by operations of PyTorch. With TRITON_INTERPRET=1 in the environment Triton runs kernels on a CPU, a
number at a time, which is how they are tested. With DEQLIB_FUSED=0 none is started.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .._torch import is_traced, is_transformed


def _are_wanted() -> bool:
    """Whether the environment leaves kernels switched on."""
    value = os.environ.get("DEQLIB_FUSED", "1")
    if value not in ("0", "1"):
        raise ValueError(
            f"DEQLIB_FUSED: expected 0 (no fused kernels) or 1 (where they can run), got {value!r}; "
            "set one of them in the environment, or unset it, which is 1"
        )
    return value == "1"


_ARE_WANTED = _are_wanted()
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_failures: list[Exception] = []  # of kernels in this process: after one, no other is tried


def is_available(*tensors: Tensor) -> bool:
    """Whether kernels may read and write these tensors in place of operations of PyTorch."""
    first = tensors[0]
    # What costs least and most often says no comes first: this is asked at every step.
    if first.device.type != "cuda" and not (_INTERPRETED and first.device.type == "cpu"):
        return False
    if not (_ARE_WANTED and _HAS_TRITON) or torch.version.hip is not None or _failures:
        return False
    if torch.compiler.is_compiling() or is_traced() or is_transformed():
        return False
    # A subclass may be a stand-in without numbers, or one that lies on several devices.
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device == first.device
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.is_contiguous()
        and not tensor.is_neg()  # whose numbers lie in memory with the other sign
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A block in which kernels are started on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def give_up(error: Exception) -> None:
    """Start no kernel any more in this process, since one failed to compile or to start, and say so once.

    Raises:
        torch.OutOfMemoryError: `error` is one, for which no kernel is to blame.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if not _failures:
        logging.getLogger("deqlib").warning(
            "the fused kernels of solvers failed (%s: %s); operations of PyTorch do their work from now on, "
            "with the same results",
            type(error).__name__,
            (str(error).strip().splitlines() or [""])[0],
        )
    _failures.append(error)
