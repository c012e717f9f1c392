"""Images to train on, as pixels and as tokens, and pictures read and written."""

from .augment import augmented
from .batches import EndlessBatches, all_batches
from .dataset import Batch, BatchedDataset, ImageData, TensorImages
from .folders import ImageFolder
from .masks import read_mask
from .pictures import cut_square, read_picture, save_edit, save_grid, save_picture
from .report import FolderReport, Skipped
from .sources import load_data
from .tokens import TokenBatch, TokenizedImages, tokenize

__all__ = [
    "Batch",
    "BatchedDataset",
    "EndlessBatches",
    "FolderReport",
    "ImageData",
    "ImageFolder",
    "Skipped",
    "TensorImages",
    "TokenBatch",
    "TokenizedImages",
    "all_batches",
    "augmented",
    "cut_square",
    "load_data",
    "read_mask",
    "read_picture",
    "save_edit",
    "save_grid",
    "save_picture",
    "tokenize",
]
