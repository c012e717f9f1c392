"""Convolutional encoder and decoder of the tokenizer (arXiv 2404.02905; the VQGAN of arXiv 2012.09841).

Both are built from the same residual blocks and levels. Level 0 has a position a patch of P x P pixels, a
pixel where P = 1; every other level has half the resolution of the one before, so the decoder runs its levels
from the last to the first.

Shape letters: B batch, C channels of a level, Z code channels, H W pixels, P pixels a side of a patch, h w
positions of a feature map.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import TokenizerConfig


def _norm(channels: int, config: TokenizerConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.num_groups, channels, eps=1e-6)


def _conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """With weights and bias of zero: the last of a branch, which then adds nothing at the start.

    Encoder and decoder begin as a few linear convolutions, which learn in a fraction of the steps.
    """
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, norm, SiLU, dropout, conv, plus the input.

    (B, `in_channels`, h, w) to (B, `out_channels`, h, w). Where the channels change, the input is
    brought to size by a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = _conv3(in_channels, out_channels)
        self.norm2 = _norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _zeroed(_conv3(out_channels, out_channels))
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Apply the block."""
        h_BChw = self.conv1(F.silu(self.norm1(x_BChw)))
        h_BChw = self.conv2(self.dropout(F.silu(self.norm2(h_BChw))))
        y_BChw: Tensor = self.shortcut(x_BChw) + h_BChw
        return y_BChw


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of a (B, C, h, w) feature map, plus the input."""

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Apply the block."""
        qkv_B3Chw = self.qkv(self.norm(x_BChw))
        # A head axis of size 1 lets scaled_dot_product_attention pick a fused kernel; its default
        # scale, C ** -0.5, is the one wanted.
        q, k, v = qkv_B3Chw.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        h_BCL = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        y_BChw: Tensor = x_BChw + self.project(h_BCL.reshape(x_BChw.shape))
        return y_BChw


class Downsample(nn.Module):
    """Halve the resolution of a (B, C, h, w) feature map with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Pad right and bottom only, then convolve: symmetric padding would shift the picture."""
        half_BChw: Tensor = self.conv(F.pad(x_BChw, (0, 1, 0, 1)))
        return half_BChw


class Upsample(nn.Module):
    """Double the resolution of a (B, C, h, w) feature map: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Apply the block."""
        double_BChw: Tensor = self.conv(F.interpolate(x_BChw, scale_factor=2.0, mode="nearest"))
        return double_BChw


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if asked, then `resample`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        config: TokenizerConfig,
        *,
        attention: bool,
        resample: nn.Module,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if index == 0 else out_channels, out_channels, config)
            for index in range(num_blocks)
        )
        self.attentions = nn.ModuleList(
            AttentionBlock(out_channels, config) if attention else nn.Identity() for _ in range(num_blocks)
        )
        self.resample = resample

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Apply the level."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x_BChw = attention(block(x_BChw))
        y_BChw: Tensor = self.resample(x_BChw)
        return y_BChw


class Middle(nn.Module):
    """Two residual blocks with attention between them, at the lowest resolution."""

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, config)
        self.attention = AttentionBlock(channels, config)
        self.block2 = ResidualBlock(channels, channels, config)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Apply the blocks."""
        y_BChw: Tensor = self.block2(self.attention(self.block1(x_BChw)))
        return y_BChw


class Encoder(nn.Module):
    """Images (B, 3, H, W) to feature maps (B, Z, h, w), of which h = H / (P * 2^(n-1)) for n levels.

    The pixels of a patch are the channels of one position from the start (pixel unshuffle), so that no
    convolution runs at full resolution where P > 1.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in config.multipliers]
        last = len(channels) - 1
        self.patch = config.patch
        self.conv_in = _conv3(3 * config.patch**2, config.base_channels)
        self.levels = nn.ModuleList(
            Level(
                config.base_channels if index == 0 else channels[index - 1],
                channels[index],
                config.num_residual_blocks,
                config,
                attention=index == last,
                resample=nn.Identity() if index == last else Downsample(channels[index]),
            )
            for index in range(len(channels))
        )
        self.middle = Middle(channels[-1], config)
        self.norm_out = _norm(channels[-1], config)
        self.conv_out = _conv3(channels[-1], config.code_channels)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode."""
        x_BChw = self.conv_in(F.pixel_unshuffle(images_B3HW, self.patch))
        for level in self.levels:
            x_BChw = level(x_BChw)
        features_BZhw: Tensor = self.conv_out(F.silu(self.norm_out(self.middle(x_BChw))))
        return features_BZhw


class Decoder(nn.Module):
    """Feature maps (B, Z, h, w) to images (B, 3, H, W) of H = h * P * 2^(n-1), not clamped.

    Mirrors the encoder with one residual block more a level. `levels` is indexed by resolution like the
    encoder's (0 is the finest) and runs from the last to the first.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in config.multipliers]
        last = len(channels) - 1
        self.patch = config.patch
        self.conv_in = _conv3(config.code_channels, channels[-1])
        self.middle = Middle(channels[-1], config)
        self.levels = nn.ModuleList(
            Level(
                channels[min(index + 1, last)],
                channels[index],
                config.num_residual_blocks + 1,
                config,
                attention=index == last,
                resample=nn.Identity() if index == 0 else Upsample(channels[index]),
            )
            for index in range(len(channels))
        )
        self.norm_out = _norm(channels[0], config)
        self.conv_out = _conv3(channels[0], 3 * config.patch**2)

    def forward(self, f_hat_BZhw: Tensor) -> Tensor:
        """Decode."""
        x_BChw = self.middle(self.conv_in(f_hat_BZhw))
        for level in reversed(self.levels):
            x_BChw = level(x_BChw)
        patches_BChw = self.conv_out(F.silu(self.norm_out(x_BChw)))
        return F.pixel_shuffle(patches_BChw, self.patch)
