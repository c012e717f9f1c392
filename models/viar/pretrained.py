"""Saving, loading and telling apart, shared by tokenizer and transformer."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stdout
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


class Pretrained(PyTorchModelHubMixin):
    """`save_pretrained(path)` and `from_pretrained(path_or_hub_id)`: config.json and model.safetensors.

    Missing or unexpected weights are an error unless `strict=False` is given: the mixin's default would
    leave missing weights at their random start.
    """

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Self:
        with redirect_stdout(io.StringIO()):  # the mixin prints a line for every local folder
            loaded: Self = super()._from_pretrained(strict=strict, **kwargs)
        return loaded


def fingerprint(module: nn.Module) -> str:
    """Hash of config and weights, whatever device they are on.

    Args:
        module: a tokenizer or a transformer.
    """
    digest = hashlib.sha256(json.dumps(module.config.to_dict(), sort_keys=True).encode())  # type: ignore[operator, union-attr]
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
