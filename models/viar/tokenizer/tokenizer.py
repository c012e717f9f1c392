"""Images to tokens of K scales and back: the multi-scale residual VQ-VAE of arXiv 2404.02905.

Shape letters: B batch, K scales of side p_1 < ... < p_K, L = sum of p_k squared, Z code channels,
H = W pixels, h = w = p_K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kinds import check_tensor, checked
from ..model.config import TokenizerConfig
from ..pretrained import Pretrained
from .autoencoder import Decoder, Encoder
from .quantizer import MultiScaleQuantizer


class TokenizerOutput(NamedTuple):
    """What a training step of the tokenizer needs."""

    reconstruction: Tensor  # (B, 3, H, W), not clamped
    loss: Tensor  # scalar: the quantizer's codebook and commitment loss
    tokens: list[Tensor]  # K of (B, p_k * p_k) int64
    vectors: Tensor  # (B * L, Z) without gradient: what was quantized, for reviving dead codes
    left: Tensor  # (K,) without gradient: share of the features' mean square that is left after each scale


class Tokenizer(nn.Module, Pretrained):
    """Encoder, multi-scale quantizer and decoder.

    Images are (B, 3, H, W) in [-1, 1], with H = W = `config.image_side`. `encode`, `decode` and
    `next_scale_inputs` run without gradient; `features`, `decode_f_hat` and the call itself carry it.

    `save_pretrained(path)` writes config.json and model.safetensors, `from_pretrained(path_or_hub_id)`
    reads them; missing or unexpected weights are an error unless `strict=False` is given.

    Convolutions have PyTorch's default initial weights, but for the last of every residual and attention
    block, which starts at zero; for codebook and refinement see `MultiScaleQuantizer`.

    Args:
        config: settings, or what their `to_dict` gives.
    """

    telling = "multipliers"

    @checked
    def __init__(self, config: TokenizerConfig | dict[str, Any]) -> None:
        super().__init__()
        if isinstance(config, dict):  # how from_pretrained hands over config.json
            config = TokenizerConfig.from_dict(config)
        self.config = config
        # What the mixin writes to config.json; left alone it would flatten the dataclass itself.
        self._hub_mixin_config = config.to_dict()
        self.encoder = Encoder(config)
        self.pre_quantizer = nn.Conv2d(config.code_channels, config.code_channels, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(config)
        self.post_quantizer = nn.Conv2d(config.code_channels, config.code_channels, 3, padding=1)
        self.decoder = Decoder(config)

    def forward(self, images_B3HW: Tensor) -> TokenizerOutput:
        """Reconstruct, for training; in training mode this also counts the use of each code.

        Raises:
            ValueError: `images` is not floating point of shape (B, 3, H, W).
        """
        quantized = self.quantizer.quantize(self.features(images_B3HW))
        return TokenizerOutput(
            reconstruction=self.decoder(
                self.post_quantizer(quantized.f_hat.to(self.post_quantizer.weight.dtype))
            ),
            loss=quantized.loss,
            tokens=quantized.tokens,
            vectors=quantized.vectors,
            left=quantized.left,
        )

    def features(self, images_B3HW: Tensor) -> Tensor:
        """What the quantizer is given: (B, Z, p_K, p_K).

        Raises:
            ValueError: `images` is not floating point of shape (B, 3, H, W).
        """
        check_tensor("images", images_B3HW)
        side = self.config.image_side
        if tuple(images_B3HW.shape[1:]) != (3, side, side) or not images_B3HW.is_floating_point():
            raise ValueError(
                f"images must be floating point of shape (B, 3, {side}, {side}), "
                f"got {images_B3HW.dtype} {tuple(images_B3HW.shape)}"
            )
        self._check_device("images", images_B3HW)
        weight_type = self.pre_quantizer.weight.dtype  # a lower precision only if asked for
        features_BZhw: Tensor = self.pre_quantizer(self.encoder(images_B3HW.to(weight_type)))
        return features_BZhw

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> list[Tensor]:
        """Tokens of images: K tensors (B, p_k * p_k) int64, each map row by row.

        Raises:
            ValueError: `images` is not floating point of shape (B, 3, H, W).
        """
        return self.quantizer.encode(self.features(images_B3HW))

    @torch.no_grad()
    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Images of tokens: (B, 3, H, W), clamped to [-1, 1].

        Args:
            tokens: (B, p_k * p_k) int64 or int32 of the first scales, at least one; fewer than K give
                the coarse picture.

        Raises:
            ValueError: `tokens` has a wrong number of scales, shape, dtype or values.
        """
        return self.decode_f_hat(self.quantizer.decode_tokens(tokens))

    def decode_f_hat(self, f_hat_BZhw: Tensor) -> Tensor:
        """Images of a sum of scales (B, Z, p_K, p_K): (B, 3, H, W), clamped to [-1, 1].

        Raises:
            ValueError: `f_hat` has another shape.
        """
        self.quantizer.check_feature_map("f_hat", f_hat_BZhw)
        self._check_device("f_hat", f_hat_BZhw)
        x_BZhw = f_hat_BZhw.to(self.post_quantizer.weight.dtype)  # a lower precision only if asked for
        images_B3HW: Tensor = self.decoder(self.post_quantizer(x_BZhw))
        return images_B3HW.to(f_hat_BZhw.dtype).clamp(-1, 1)

    def next_scale_inputs(self, tokens: Sequence[Tensor]) -> Tensor:
        """What a transformer is fed under teacher forcing: (B, L - p_1 ** 2, Z) float32.

        Args:
            tokens: (B, p_k * p_k) int64 or int32 of all K scales.

        Raises:
            ValueError: `tokens` has a wrong number of scales, shape, dtype or values.
        """
        return self.quantizer.next_scale_inputs(tokens)

    def _check_device(self, name: str, value: Tensor) -> None:
        device = self.post_quantizer.weight.device
        if value.device != device:
            raise ValueError(f"{name} must be on the tokenizer's device, {device}, got {value.device}")
