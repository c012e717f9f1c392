"""The models that come with the package."""

from __future__ import annotations

from pathlib import Path

from ..kinds import checked
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer

ROOT = Path(__file__).parent
SHIPPED = ("mnist",)
TOKENIZER, TRANSFORMER = "tokenizer", "transformer"  # folders of each


def shipped_folder(name: str = "mnist") -> Path:
    """Where the models of a name lie: a folder with `tokenizer` and `transformer` in it.

    Args:
        name: one of `SHIPPED`.

    Raises:
        ValueError: no models of that name come with the package.
    """
    if name not in SHIPPED:
        raise ValueError(
            f"name: expected one of {', '.join(SHIPPED)}, got {name!r}; from_pretrained reads other models"
        )
    return ROOT / name


@checked
def load_shipped(name: str = "mnist") -> tuple[NextScaleTransformer, Tokenizer]:
    """A trained VIAR and its tokenizer that come with the package; nothing is downloaded.

    They are stored in bfloat16, and are float32 when loaded; `viar.prepare_inference` has lower precision.
    The README.md beside each says what it was trained on and how, and what it reaches.

    Args:
        name: "mnist", handwritten digits of 32 x 32 pixels in ten classes.

    Returns:
        Both in evaluation mode, on the CPU.

    Raises:
        ValueError: no models of that name come with the package.
    """
    folder = shipped_folder(name)
    return (
        NextScaleTransformer.from_pretrained(folder / TRANSFORMER),
        Tokenizer.from_pretrained(folder / TOKENIZER),
    )
