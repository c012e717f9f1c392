"""Autocast, also on devices that have none.

PyTorch's questions about autocast are errors for a device such as "meta", which has none to be on or off.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type that autocast computes in there now; `None` where it is off, or where there is none."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def coarsest_dtype(dtypes: tuple[torch.dtype, ...], device_type: str) -> torch.dtype:
    """The type of least resolution of these, and of autocast where that is on."""
    autocast = autocast_dtype(device_type)
    return max((*dtypes, *filter(None, [autocast])), key=lambda dtype: torch.finfo(dtype).eps)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A block in which autocast is off there."""
    if not _has_autocast(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _has_autocast(device_type: str) -> bool:
    # PyTorch 2.11 cannot trace its own question.
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)
