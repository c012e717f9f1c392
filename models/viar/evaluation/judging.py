"""The judge of a data set: a classifier that is trained by one recipe, once, and kept.

Its features take the place of Inception's, which say little of small pictures. Figures are compared that one
judge gave: trained anew on another kind of machine, it is another to the last digits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from ..data import AugmentedImages, ImageData
from ..data.augment import SLIGHT, check_augmentations
from ..files import replacing_path
from ..kinds import check_fields, checked
from ..model.config import check_at_least
from .classifier import Classifier, train_classifier

SHIPPED = Path(__file__).parents[1] / "weights" / "judges"
NUM_LOOKED_AT = 256  # held-out images that tell one data set from another


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """How a judge is trained.

    Attributes:
        width: of the classifier.
        steps: of AdamW.
        batch_size: images a step.
        lr: highest learning rate.
        augmentations: that training images go through anew whenever one is drawn.
        seed: of weights, order, changes and dropout.

    Raises:
        TypeError, ValueError: a setting of another kind or out of range.
    """

    width: int = 16
    steps: int = 1500
    batch_size: int = 64
    lr: float = 3e-3
    augmentations: tuple[str, ...] = SLIGHT
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
        check_at_least("JudgeRecipe", 1, width=self.width, steps=self.steps, batch_size=self.batch_size)
        check_at_least("JudgeRecipe", 0, seed=self.seed, lr=self.lr)
        check_augmentations(self.augmentations)


JUDGE = JudgeRecipe()


@checked
def judge(
    data: ImageData,
    *,
    cache: Path | None = None,
    console: Console | None = None,
    recipe: JudgeRecipe = JUDGE,
) -> Classifier:
    """A classifier of the classes of `data`, trained on its training images, in evaluation mode on the CPU.

    That of MNIST by the usual recipe comes with the package, so that figures of two machines can be compared.
    PyTorch's own generator is left as it was.

    Args:
        data: with at least one held-out image, which is not learnt from.
        cache: folder where a judge of this recipe and this data is read from, or written to; default none.
        console: where progress is shown; default standard output.
        recipe: how it is trained; figures of different recipes cannot be compared.

    Raises:
        ValueError: `data` holds nothing out, or the file in the cache is damaged.
    """
    if not len(data.validation):
        raise ValueError("data: expected held-out images, got none; give two pictures of a class")
    image_side = data.validation.__getitems__([0])[0].shape[-1]
    name = f"judge-{judge_key(data, recipe)}.safetensors"
    path = None if cache is None else cache / name
    for kept in (path, SHIPPED / name):
        if kept is not None and kept.exists():
            return Classifier.read(kept, image_side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        classifier = Classifier(data.num_classes, image_side, recipe.width)
        train_classifier(
            classifier,
            AugmentedImages(data.train, recipe.augmentations),
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            seed=recipe.seed,
            console=console,
        )
    if path is not None:
        with replacing_path(path) as fresh:
            classifier.save(fresh)
    return classifier


def judge_key(data: ImageData, recipe: JudgeRecipe = JUDGE) -> str:
    """12 hexadecimal digits that stand for a recipe and a data set.

    Of the data, the counts, the names of classes and up to 256 held-out images are looked at, for to read all
    pictures of a folder would take long.

    Args:
        data: to learn from.
        recipe: how.
    """
    told = [asdict(recipe), len(data.train), len(data.validation), data.num_classes, data.class_names]
    digest = hashlib.sha256(json.dumps(told).encode())
    step = max(1, len(data.validation) // NUM_LOOKED_AT)
    images, labels = data.validation.__getitems__(range(0, len(data.validation), step)[:NUM_LOOKED_AT])
    digest.update(images.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()[:12]
