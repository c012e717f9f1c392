"""Images to train on, as pixels and as tokens, and pictures read and written."""

from .augment import AUGMENTATIONS, AugmentedImages, augmented
from .batches import EndlessBatches, all_batches, rows_of
from .dataset import Batch, BatchedDataset, ImageData, TensorImages
from .folders import ImageFolder
from .hub import HubImages
from .masks import read_mask
from .pictures import cut_square, read_picture, save_edit, save_grid, save_picture
from .report import FolderReport, Skipped
from .shard_writer import ShardReport, write_shards
from .shards import ShardSettings, TokenShards, is_shards
from .sources import load_data
from .tokens import TokenBatch, TokenizedImages, from_rows, tokenize

__all__ = [
    "AUGMENTATIONS",
    "AugmentedImages",
    "Batch",
    "BatchedDataset",
    "EndlessBatches",
    "FolderReport",
    "HubImages",
    "ImageData",
    "ImageFolder",
    "ShardReport",
    "ShardSettings",
    "Skipped",
    "TensorImages",
    "TokenBatch",
    "TokenShards",
    "TokenizedImages",
    "all_batches",
    "augmented",
    "cut_square",
    "from_rows",
    "is_shards",
    "load_data",
    "read_mask",
    "read_picture",
    "rows_of",
    "save_edit",
    "save_grid",
    "save_picture",
    "tokenize",
    "write_shards",
]
