"""Images to train on, as pixels and as tokens, and pictures read and written."""

from .augment import augmented
from .batches import EndlessBatches, all_batches
from .dataset import Batch, BatchedDataset, ImageData, TensorImages
from .folders import ImageFolder
from .pictures import read_mask, read_picture, save_edit, save_grid, save_picture
from .sources import load_data
from .tokens import TokenBatch, TokenizedImages, tokenize

__all__ = [
    "Batch",
    "BatchedDataset",
    "EndlessBatches",
    "ImageData",
    "ImageFolder",
    "TensorImages",
    "TokenBatch",
    "TokenizedImages",
    "all_batches",
    "augmented",
    "load_data",
    "read_mask",
    "read_picture",
    "save_edit",
    "save_grid",
    "save_picture",
    "tokenize",
]
