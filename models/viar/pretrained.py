"""Saving and loading, shared by tokenizer and transformer."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin


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
