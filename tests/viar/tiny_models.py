"""Models of a few thousand parameters whose every part matters to their output."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from viar import (
    ExplicitTrunkConfig,
    ImplicitTrunkConfig,
    NextScaleTransformer,
    Tokenizer,
    TokenizerConfig,
    TransformerConfig,
)

SIDES = (1, 2, 3)
TOKENIZER = TokenizerConfig(
    sides=SIDES,
    codebook_size=16,
    code_channels=4,
    base_channels=4,
    multipliers=(1, 2),
    num_residual_blocks=1,
    num_groups=2,
    num_phi=0,
)
IMPLICIT = ImplicitTrunkConfig(num_pre=1, num_post=1, no_grad=(0, 2), grad=(1, 2), iterations=3)
TRANSFORMER = TransformerConfig(
    depth=3,
    width=16,
    num_heads=2,
    sides=SIDES,
    codebook_size=16,
    code_channels=4,
    num_classes=3,
    drop_path=0.0,
    label_dropout=0.0,
)
TRUNKS = {"explicit": ExplicitTrunkConfig(), "implicit": IMPLICIT}


def tiny_tokenizer(seed: int = 0, **changes: Any) -> Tokenizer:
    """In evaluation mode, with codes as large as the features; its images are 6 x 6."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(dataclasses.replace(TOKENIZER, **changes))
    for parameter in tokenizer.parameters():
        if parameter.ndim == 4:  # some convolutions start as nothing or as the identity
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    return tokenizer.eval()


def tiny_config(kind: str = "implicit", **changes: Any) -> TransformerConfig:
    return dataclasses.replace(TRANSFORMER, **{"trunk": TRUNKS[kind], **changes})


def tiny_transformer(kind: str = "implicit", seed: int = 0, **changes: Any) -> NextScaleTransformer:
    """In evaluation mode, with weights large enough that a token feels class, place and past."""
    torch.manual_seed(seed)
    return enlarge(NextScaleTransformer(tiny_config(kind, **changes))).eval()


@torch.no_grad()
def enlarge(model: nn.Module) -> nn.Module:
    """Draw all parameters anew; published initial weights all but switch attention off."""
    for name, parameter in model.named_parameters():
        std = 0.1 if parameter.dim() == 1 or name.endswith("log_scale") else parameter.shape[-1] ** -0.5
        parameter.normal_(std=std)
    return model


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """In [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
