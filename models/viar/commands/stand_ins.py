"""What takes the place of published files in a dry run: random weights, a made-up network, noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.convert import export_official
from ..evaluation.features import FeatureNetwork, Features
from ..evaluation.references import read_reference
from ..files import replacing
from ..model.config import TokenizerConfig, TransformerConfig
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer

NUM_PICTURES = 8  # of the made-up reference
SIZES = (2048, 1008)  # features and classes of Inception
SEEN = 16  # pixels a side that the made-up network looks at
PLACES = 17  # a side of Inception's features with their place


def stand_in_checkpoints(
    folder: Path, config: TransformerConfig, tokenizer_config: TokenizerConfig
) -> tuple[Path, Path]:
    """Files of a transformer and a tokenizer in the published form, with weights as training begins with.

    They are bfloat16, which halves the files, and the same whenever and in whatever process they are made.

    Args:
        folder: new, or one that has them, which are taken.
        config: sizes of the transformer.
        tokenizer_config: sizes of the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return (
        _checkpoint(folder / "transformer.pth", lambda: NextScaleTransformer(config)),
        _checkpoint(folder / "tokenizer.pth", lambda: Tokenizer(tokenizer_config)),
    )


def stand_in_network() -> FeatureNetwork:
    """Random projections of small pictures, in number and shape what Inception gives."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(3 * SEEN * SEEN, sum(SIZES), generator=generator) / SEEN
    mixing = torch.randn(3, 7, generator=generator)

    def see(images: Tensor) -> Features:
        images = images.cpu()
        seen = F.adaptive_avg_pool2d(images, SEEN).flatten(1) @ projection
        pooled, logits = seen[:, : SIZES[0]], seen[:, SIZES[0] :]
        places = F.adaptive_avg_pool2d(images, PLACES).permute(0, 2, 3, 1) @ mixing
        return Features(pooled, places.flatten(1), logits.softmax(1))

    return FeatureNetwork("stand-in", see)


def stand_in_reference(path: Path, network: FeatureNetwork, image_side: int) -> Path:
    """A file of noise in the form of ADM's reference: images, and statistics of what a network sees in them.

    Args:
        path: to write, an .npz.
        network: whose features the statistics are of.
        image_side: pixels a side.
    """
    shape = (NUM_PICTURES, image_side, image_side, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with replacing(path) as file:
        np.savez(file, arr_0=pictures)
    found = read_reference(str(path), network, image_side)
    assert found.spatial is not None
    statistics = {
        "mu": found.moments.mean,
        "sigma": found.moments.covariance,
        "mu_s": found.spatial.mean,
        "sigma_s": found.spatial.covariance,
    }
    arrays: dict[str, Any] = {name: value.numpy() for name, value in statistics.items()}
    with replacing(path) as file:
        np.savez(file, arr_0=pictures, network=np.array(network.name), **arrays)
    return path


def _checkpoint(path: Path, build: Callable[[], NextScaleTransformer | Tokenizer]) -> Path:
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build().to(torch.bfloat16)
        with replacing(path, apart=True) as file:
            torch.save(export_official(model), file)
    return path
