"""The tiny published models that the golden numbers came from, regenerated from their tensors' names.

Random tensors are drawn from a counter-based generator keyed by the name, so no weights are stored.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from viar.checkpoints.official import official_names
from viar.model.config import ExplicitTrunkConfig, ImplicitTrunkConfig, TokenizerConfig, TransformerConfig
from viar.model.scales import block_causal_mask, scale_ids
from viar.model.transformer import NextScaleTransformer
from viar.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def _golden_json(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text())


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [-1, 1), determined by `name` alone."""
    bits = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)) * (2.0 / 2**53) - 1.0).reshape(shape)


def golden_config() -> dict[str, Any]:
    """Settings of the tiny models, under the published programs' names."""
    return _golden_json("tiny.json")["config"]


def golden_grad_norms() -> dict[str, dict[str, float]]:
    """Norm of each parameter's gradient of the tiny VIAR, by "a.b" iterations."""
    return _golden_json("tiny.json")["grad_norms"]


def golden_tensors() -> dict[str, Tensor]:
    """What the published programs computed with the tiny models."""
    return load_file(GOLDEN / "tiny.safetensors")


def golden_images() -> Tensor:
    """The images they computed it on, (B, 3, H, W)."""
    side = golden_tokenizer_config().image_side
    return torch.from_numpy(uniform("image", (golden_config()["batch"], 3, side, side))).float()


def official_shapes(checkpoint: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a published checkpoint, such as "vae_ch160v4096z32.pth"."""
    return {key: tuple(shape) for key, shape in _golden_json("official_keys.json")[checkpoint].items()}


def golden_state(model: str) -> dict[str, Tensor]:
    """State dict of the tiny "vae", "var" or "viar" under its published names."""
    sides = golden_config()["patch_nums"]
    mask = torch.zeros(()).where(block_causal_mask(sides), -torch.inf)
    constants = {"lvl_1L": scale_ids(sides)[None], "attn_bias_for_masking": mask[None, None]}
    state = {}
    for key, entry in _golden_json("tiny.json")["state"][model].items():
        shape = tuple(entry["shape"])
        if "scale" in entry:
            values = entry["offset"] + entry["scale"] * uniform(f"{model}.{key}", shape)
            state[key] = torch.from_numpy(values).float()
        else:
            state[key] = constants.get(key, torch.zeros(shape))
        assert state[key].shape == shape
        assert str(state[key].dtype) == f"torch.{entry['dtype']}"
    return state


def golden_tokenizer_config() -> TokenizerConfig:
    """Settings of the tiny tokenizer."""
    config = golden_config()
    return TokenizerConfig(
        sides=tuple(config["patch_nums"]),
        codebook_size=config["vocab_size"],
        code_channels=config["z_channels"],
        base_channels=config["ch"],
        num_phi=config["share_quant_resi"],
    )


def golden_tokenizer() -> Tokenizer:
    """The tiny tokenizer with its weights, in evaluation mode."""
    tokenizer = Tokenizer(golden_tokenizer_config())
    return _with_golden_state(tokenizer, "vae")


def golden_transformer(model: str, **trunk: Any) -> NextScaleTransformer:
    """The tiny "var" or "viar" with its weights, in evaluation mode, nothing dropped in training.

    `trunk` sets fields of the implicit trunk's config.
    """
    config = golden_config()
    if model == "viar":
        trunk = {"num_pre": config["pre_depth"], "num_post": config["post_depth"], **trunk}
    transformer = NextScaleTransformer(
        TransformerConfig(
            depth=config["depth"],
            width=config["embed_dim"],
            num_heads=config["num_heads"],
            sides=tuple(config["patch_nums"]),
            codebook_size=config["vocab_size"],
            code_channels=config["z_channels"],
            num_classes=config["num_classes"],
            drop_path=0.0,
            label_dropout=0.0,
            trunk=ExplicitTrunkConfig() if model == "var" else ImplicitTrunkConfig(**trunk),
        )
    )
    return _with_golden_state(transformer, model)


def _with_golden_state(module: Any, model: str) -> Any:
    state = golden_state(model)
    module.load_state_dict({ours: state[name] for name, ours in official_names(module).items() if ours})
    return module.eval()


def golden_labels() -> Tensor:
    """The classes asked for, (B,)."""
    return torch.tensor(golden_config()["labels"])
