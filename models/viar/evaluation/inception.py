"""The published Inception network, whose features FID, sFID, KID and the Inception score are named after.

Weights and network are those of the package torch-fidelity, which took them over from the TensorFlow graph of
2015 that the published programs run; so figures are not theirs to the last digit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..files import file_digest
from ..pickles import load_pickled
from .features import NUM_SPATIAL_CHANNELS, FeatureNetwork, Features

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
INCEPTION = "inception"  # what the name of such a network begins with


def inception_network(weights: Path | None = None, device: torch.device | None = None) -> FeatureNetwork:
    """Inception's last pooling (2,048 features), 7 channels by place (2,023), and 1,008 classes.

    As in ADM's evaluation (arXiv 2105.05233), features with their place are the first 7 channels of the first
    branch of the block "mixed_6", 17 x 17 of them, and logits have no bias. Nothing is downloaded.

    Args:
        weights: file of them; default where PyTorch's hub keeps what torch-fidelity downloads.
        device: to work on; default the CPU.

    Raises:
        ValueError: the package or the weights are not there, or the file holds something else.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f"features: inception needs the package torch-fidelity ({error}); pip install 'deqlib[fid]'"
        ) from error
    path = weights or usual_weights()
    if not path.is_file():
        raise ValueError(f"features: no weights of Inception at {path}; they are to be had at {ADDRESS}")
    try:
        load_pickled(path, mapped=True)  # The package reads the file without these checks.
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    except Exception as error:  # Whatever a file that holds something else makes its reader raise.
        raise ValueError(f"features: {path} holds no weights of Inception ({error})") from error
    network = network.to(device or torch.device("cpu")).eval()
    maps: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, made: maps.append(made))

    def see(images: Tensor) -> Features:
        pixels = images.to(network.fc.weight.device).add(1).mul(127.5).round().clamp(0, 255).byte()
        maps.clear()
        pooled, logits = network(pixels)
        # Place before channel, as TensorFlow has them: published statistics are in this order.
        spatial = maps.pop()[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, logits.softmax(1))

    return FeatureNetwork(f"{INCEPTION} {file_digest(path)[:12]}", see)


def usual_weights() -> Path:
    """Where PyTorch's hub keeps the weights that torch-fidelity downloads, whether they are there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
