"""Float32 that is computed as float32, or below, as PyTorch is told to.

By default PyTorch has a GPU multiply matrices in float32, and convolve in TensorFloat32, whose fractions have
10 bits. There are two ways to change that. Reading by the older one, `allow_tf32` and
`get_float32_matmul_precision`, raises once the newer one was used. The newer one, `fp32_precision`, can be
read whichever way was taken, and is the only one here.
"""

from __future__ import annotations

import threading
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

# Where float32 is asked for at present: how many times, by any thread, and what was in force before.
_Place = tuple[str, Operation]
_lock = threading.Lock()
_num_asking: dict[_Place, int] = {}
_before: dict[_Place, str] = {}


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

    They are those of the process: other threads see them meanwhile. Where several are inside at a time, the
    last one to leave puts them back.

    Args:
        device_type: see `below_float32`.
        operations: "conv", "matmul".
    """
    asked: list[_Place] = []
    try:
        for operation in operations if device_type in _BACKENDS else ():
            asked.append((device_type, operation))
            _ask((device_type, operation))
        yield
    finally:
        for place in asked:
            _take_back(place)


def _ask(place: _Place) -> None:
    with _lock:
        _num_asking[place] = _num_asking.get(place, 0) + 1
        found = below_float32(*place)
        if found is not None:
            _before.setdefault(place, found)
            _backend(place).fp32_precision = "ieee"


def _take_back(place: _Place) -> None:
    with _lock:
        _num_asking[place] -= 1
        if _num_asking[place] or place not in _before:
            return
        backend, precision = _backend(place), _before.pop(place)
        # Where that of all operations is the same, it is that: else this one would stay when that changes.
        backend.fp32_precision = "none"
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision


def _backend(place: _Place) -> Any:
    return _BACKENDS[place[0]][place[1]]
