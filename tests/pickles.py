"""Modules out of a file, as tests of copies want them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import nn


def restored(module: nn.Module, protocol: int | None) -> Any:
    """Out of a pickle of that protocol, or of `torch.save`."""
    if protocol is not None:
        return pickle.loads(pickle.dumps(module, protocol))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
