"""A small classifier of real images, the judge of generated ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checksums import load_tensors, save_tensors
from ..data import Batch, BatchedDataset, EndlessBatches
from ..kinds import check_tensor, checked, shown
from ..model.config import check_at_least
from ..screen import tracked
from ..training.optim import build_optimizer, lr_factor

NUM_FEATURES = 64
MOST = 2**20  # classes, and channels: far above what such a small network is for
SMALL_SIDE = 16  # pixels, up to which every pixel counts


class Classifier(nn.Module):
    """Small convolutional classifier of real images, the judge of generated ones.

    Images of more than 16 pixels a side are halved after the first convolution, for speed.

    Args:
        num_classes: N.
        image_side: pixels a side, a multiple of 4.
        width: channels at full resolution.

    Attributes:
        num_features: F, numbers that `embed` gives of an image.

    Raises:
        ValueError: `image_side` is no multiple of 4.
    """

    num_features = NUM_FEATURES

    @checked
    def __init__(self, num_classes: int, image_side: int, width: int = 32) -> None:
        super().__init__()
        if image_side < 4 or image_side % 4:
            raise ValueError(f"image_side: expected a multiple of 4, got {image_side}")
        for name, value in (("num_classes", num_classes), ("width", width)):
            if not 1 <= value <= MOST:
                raise ValueError(f"{name}: expected 1 to {MOST}, got {value}")
        self.image_side = image_side
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2) if image_side > SMALL_SIDE else nn.Identity(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
        )
        self.hidden = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.4),
            nn.Linear(32 * width, NUM_FEATURES),
            nn.GELU(),
        )
        self.logits = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, N) of images in [-1, 1].

        Raises:
            TypeError, ValueError: no images of its side.
        """
        self.check_images(images_B3HW)
        logits_BN: Tensor = self.logits(self.hidden(self.convolutions(images_B3HW)))
        return logits_BN

    def embed(self, images_B3HW: Tensor) -> Tensor:
        """Activations (B, F) of the hidden layer, float32, of images in [-1, 1]."""
        features_BF: Tensor = self.hidden(self.convolutions(images_B3HW))
        return features_BF.float()

    def check_images(
        self,
        images: Tensor,  # (B, 3, H, W)
    ) -> None:
        """Raise unless these are images of its side, in the type of its weights and on their device.

        Args:
            images: (B, 3, H, W).

        Raises:
            TypeError, ValueError: see above.
        """
        check_tensor("images", images)
        weight, side = self.logits.weight, self.image_side
        shape = tuple(images.shape[1:])
        if shape != (3, side, side) or (images.dtype, images.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"images: expected {weight.dtype} (B, 3, {side}, {side}) on {weight.device}, "
                f"got {shown(images)}"
            )

    def save(self, path: Path) -> None:
        """Write the weights to `path`, in safetensors' format, with a checksum."""
        save_tensors(self.state_dict(), path)

    def load(self, path: Path) -> Classifier:
        """Read what `save` wrote to `path`, and return the classifier itself.

        Raises:
            RuntimeError: the weights are those of a classifier of other sizes.
            ValueError: they are not those that were saved.
        """
        self.load_state_dict(load_tensors(path))
        return self

    @classmethod
    @checked
    def read(cls, path: Path, image_side: int) -> Classifier:
        """What `save` wrote to `path`, in evaluation mode; its sizes are those of the weights.

        Args:
            path: of the file.
            image_side: pixels a side, a multiple of 4.

        Raises:
            ValueError: the file holds something else, a classifier of an earlier version, or weights that are
                not those that were saved; or the side is no multiple of 4.
        """
        try:
            tensors = load_tensors(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected the weights of a classifier, found something else") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if "layers.11.bias" in tensors:
            raise ValueError(
                f"{path}: expected a classifier with a hidden layer, found one of an earlier "
                "version; train it anew"
            )
        try:
            width, num_classes = len(tensors["convolutions.0.weight"]), len(tensors["logits.bias"])
            classifier = cls(num_classes, image_side, width)
            classifier.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: expected the weights of a classifier, found something else") from error
        return classifier.eval()

    def features(self) -> ClassifierFeatures:
        """Its convolutions as a module of feature maps, in the mode that they are in."""
        return ClassifierFeatures(self)


class ClassifierFeatures(nn.Module):
    """What the three convolutions of a classifier see in images (B, 3, H, W).

    Args:
        classifier: its weights are shared.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.layers = classifier.convolutions

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w), of rising depth and falling resolution."""
        maps, x = [], images_B3HW
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.GELU):
                maps.append(x)
        return maps


@checked
def train_classifier(
    classifier: Classifier,
    data: BatchedDataset[Batch],
    *,
    steps: int = 600,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Train in place on images and labels; in evaluation mode afterwards.

    Args:
        classifier: on any device.
        data: images of the classifier's side.
        steps: of AdamW, with the schedule of VAR's training (`lr_factor`).
        batch_size: images a step.
        lr: highest learning rate.
        seed: of the order of the images, and of dropout through PyTorch's own generator.
        console: where progress is shown; default standard output.

    Raises:
        ValueError: a number out of range.
    """
    check_at_least("train_classifier", 1, steps=steps, batch_size=batch_size)
    check_at_least("train_classifier", 0, lr=lr, seed=seed)
    torch.manual_seed(seed)
    optimizer = build_optimizer(classifier, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    batches = iter(EndlessBatches(len(data), batch_size, seed=seed))
    device = next(classifier.parameters()).device
    classifier.train()
    for step in tracked(range(steps), "classifier", console=console):
        images, labels = data.__getitems__(next(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step / steps)
        loss = F.cross_entropy(classifier(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # as torch declares it
        optimizer.step()
    classifier.eval()
