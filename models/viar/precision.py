"""Float32 that is computed as float32, or below, as PyTorch is told to.

By default PyTorch has a GPU multiply matrices in float32, and convolve in TensorFloat32, whose fractions have
10 bits. There are two ways to change that. Reading by the older one, `allow_tf32` and
`get_float32_matmul_precision`, raises once the newer one was used. The newer one, `fp32_precision`, can be
read whichever way was taken, and is the only one here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Operation = Literal["conv", "matmul"]

_BACKENDS: dict[str, dict[Operation, Any]] = {  # by type of device: what PyTorch's settings are attributes of
    # Documented, but missing from PyTorch's annotations.
    "cuda": {"conv": torch.backends.cudnn.conv, "matmul": torch.backends.cuda.matmul},  # type: ignore[attr-defined]
    "cpu": {"conv": torch.backends.mkldnn.conv, "matmul": torch.backends.mkldnn.matmul},  # type: ignore[attr-defined]
}


def below_float32(device_type: str, operation: Operation) -> str | None:
    """What an operation on float32 is computed in, "tf32" or "bf16"; `None`: in float32.

    Args:
        device_type: such as "cuda"; of others than this and "cpu" nothing is known.
        operation: "conv" or "matmul".
    """
    if device_type not in _BACKENDS:
        return None
    found: str = _BACKENDS[device_type][operation].fp32_precision
    return None if found in ("none", "ieee") else found


@contextmanager
def full_float32(device_type: str, *operations: Operation) -> Iterator[None]:
    """Inside of this, these operations are computed in float32; the settings before are put back at the end.

    They are those of the process: other threads see them meanwhile.

    Args:
        device_type: see `below_float32`.
        operations: "conv", "matmul".
    """
    lower = [(operation, below_float32(device_type, operation)) for operation in operations]
    before = [(_BACKENDS[device_type][operation], found) for operation, found in lower if found is not None]
    try:
        for backend, _ in before:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision
