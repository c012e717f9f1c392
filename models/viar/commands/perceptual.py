"""What the flag `--perceptual` names."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..data.decoding import shown
from ..evaluation import Classifier
from ..training import FeatureDistance, lpips_distance

LPIPS = "lpips"
CLASSIFIER = "classifier.safetensors"
LEAST_SIDE = 16  # pixels, of what VGG can take


def load_perceptual(source: str | None, image_side: int) -> nn.Module | None:
    """The distance of that name, in evaluation mode, on the CPU.

    Args:
        source: "lpips", a file that `Classifier.save` wrote, or a folder with one; `None` for none.
        image_side: pixels a side of the images.

    Raises:
        ValueError: there is no such thing, or it cannot take such images.
    """
    if source is None:
        return None
    path = Path(source) / CLASSIFIER if Path(source).is_dir() else Path(source)
    try:
        if source == LPIPS:
            if image_side < LEAST_SIDE:
                raise ValueError(
                    f"lpips needs images of {LEAST_SIDE} pixels a side or more, got {image_side}"
                )
            return lpips_distance().eval()
        if not path.is_file():
            raise ValueError(
                f"expected lpips or the file of a classifier ({CLASSIFIER}), got {shown(source)}"
            )
        return FeatureDistance(Classifier.read(path, image_side).features()).eval()
    except (ValueError, OSError) as error:
        raise ValueError(f"--perceptual: {error}; --perceptual None trains without") from error
