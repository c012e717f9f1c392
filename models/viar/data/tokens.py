"""Images as a transformer trains on them: token maps, and what each map is predicted from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..kinds import check_tensor, checked
from ..tokenizer import Tokenizer
from .batches import all_batches
from .dataset import Batch, BatchedDataset

# teacher-forcing inputs (B, L - p_1^2, Z), targets (B, L) int64, labels (B,) int64
TokenBatch = tuple[Tensor, Tensor, Tensor]


@checked
@torch.no_grad()
def tokenize(tokenizer: Tokenizer, images: Tensor, labels: Tensor) -> TokenBatch:
    """Teacher-forcing inputs (B, L - p_1^2, Z), targets (B, L) and labels (B,) of images.

    Always in float32, under autocast too: features in lower precision have other codes.

    Args:
        tokenizer: on the device of `images`, in evaluation mode.
        images: (B, 3, H, W) in [-1, 1].
        labels: (B,), passed through.

    Raises:
        ValueError: `images` have another size than the tokenizer's.
    """
    check_tensor("images", images, has_numbers=True)
    with torch.autocast(images.device.type, enabled=False):
        tokens = tokenizer.encode(images)
        return tokenizer.next_scale_inputs(tokens), torch.cat(tokens, 1), labels


@checked
def from_rows(tokenizer: Tokenizer, tokens_BL: Tensor, labels: Tensor) -> TokenBatch:
    """The same from tokens that are known, such as rows of `TokenShards`; needs no encoder.

    Args:
        tokenizer: on the device of the tokens, in evaluation mode.
        tokens_BL: of all scales, int64.
        labels: (B,), passed through.

    Raises:
        ValueError: a token is none of the codebook's, or there are too many or too few.
    """
    check_tensor("tokens", tokens_BL, has_numbers=True)
    num_tokens = sum(side * side for side in tokenizer.config.sides)
    if tokens_BL.shape[1:] != (num_tokens,):
        raise ValueError(f"tokens: expected shape (B, {num_tokens}), got {tuple(tokens_BL.shape)}")
    with torch.autocast(tokens_BL.device.type, enabled=False):
        tokens = list(torch.split(tokens_BL, [side * side for side in tokenizer.config.sides], dim=1))
        return tokenizer.next_scale_inputs(tokens), tokens_BL, labels


class TokenizedImages(Dataset[TokenBatch]):
    """What `tokenize` gives of all images of `data`, computed once and held in memory on the CPU.

    Args:
        tokenizer: in evaluation mode, on any device.
        data: images.
        batch_size: images tokenized at a time.

    Raises:
        ValueError: `data` is empty, or its images have another size than the tokenizer's.
    """

    at_random = False

    @checked
    def __init__(self, tokenizer: Tokenizer, data: BatchedDataset[Batch], batch_size: int = 256) -> None:
        if not len(data):
            raise ValueError("data: expected at least 1 image to tokenize, got 0")
        device = next(tokenizer.parameters()).device
        parts = [
            [part.cpu() for part in tokenize(tokenizer, images.to(device), labels)]
            for images, labels in all_batches(data, batch_size)
        ]
        self.inputs, self.targets, self.labels = (torch.cat(part) for part in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> TokenBatch:
        """A whole batch."""
        where = torch.as_tensor(indices)
        return self.inputs[where], self.targets[where], self.labels[where]
