"""State dicts of the published tokenizer, VAR and VIAR: their names and order, and what their shapes tell.

`official_names` is the one place that knows the names: a table renames ours to theirs, and its result for a
model, inverted, renames theirs to ours.

Sources: the public code of VAR (arXiv 2404.02905) and VIAR (arXiv 2605.01220).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from ..model.config import (
    SIDES_256,
    SIDES_512,
    SIDES_1024,
    ExplicitTrunkConfig,
    ImplicitTrunkConfig,
    TokenizerConfig,
    TransformerConfig,
)
from ..model.scales import block_causal_mask, scale_ids
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer

Model = Tokenizer | NextScaleTransformer
Rules = tuple[tuple[str, str], ...]

# Our names to theirs: pattern, replacement. All that match apply, in this order.
TOKENIZER_NAMES: Rules = (
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),  # index 0 is full resolution on both sides
    (r"^(encoder.*)\.resample\.", r"\1.downsample."),
    (r"^(decoder.*)\.resample\.", r"\1.upsample."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.block", ".mid.block_"),
    (r"\.middle\.attention\.", ".mid.attn_1."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.project\.", ".proj_out."),
    (r"^quantizer\.usage$", "quantize.ema_vocab_hit_SV"),
    (r"^quantizer\.codebook\.", "quantize.embedding."),
    (r"^pre_quantizer\.", "quant_conv."),
    (r"^post_quantizer\.", "post_quant_conv."),
)
# The refinement convolutions are held in another way for each way of sharing them.
PHI_OF_EACH_SCALE: Rules = ((r"^quantizer\.phi\.", "quantize.quant_resi."),)
PHI_OF_ALL_SCALES: Rules = ((r"^quantizer\.phi\.0\.", "quantize.quant_resi.qresi."),)
PHI_SHARED: Rules = ((r"^quantizer\.phi\.", "quantize.quant_resi.qresi_ls."),)

TRANSFORMER_NAMES: Rules = (
    (r"^pos_embed$", "pos_1LC"),
    (r"^input_projection\.", "word_embed."),
    (r"^class_embed\.", "class_emb."),
    (r"^level_embed\.", "lvl_embed."),
    (r"^shared_modulation\.", "shared_ada_lin.1."),
    (r"^head_modulation\.", "head_nm.ada_lin.1."),
    (r"^trunk\.layer\.cell\.projection_in\.", "implicit_block_projection.0."),
    (r"^trunk\.layer\.cell\.projection_out\.", "implicit_block_projection.2."),
    (r"^trunk\.layer\.cell\.block\.", "implicit_block."),
    (r"^trunk\.(pre|post)\.", r"\1_blocks."),
    (r"^trunk\.blocks\.", "blocks."),
    (r"\.attention\.qkv\.", ".attn.mat_qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.attention\.log_scale$", ".attn.scale_mul_1H11"),
    (r"\.attention\.([qv]_bias)$", r".attn.\1"),
    (r"\.(fc[12])\.", r".ffn.\1."),
    (r"\.modulation\.", ".ada_lin.1."),
    (r"\.modulation_offset$", ".ada_gss"),
)

# Where a published state dict begins each part, and, in a transformer block, each tensor.
TOKENIZER_ORDER = (
    "encoder.",
    "decoder.",
    "quantize.ema_vocab_hit_SV",
    "quantize.quant_resi.",
    "quantize.embedding.",
    "quant_conv.",
    "post_quant_conv.",
)
TRANSFORMER_ORDER = (
    "pos_start",
    "pos_1LC",
    "lvl_1L",
    "attn_bias_for_masking",
    "word_embed.",
    "class_emb.",
    "lvl_embed.",
    "shared_ada_lin.",
    "implicit_block_projection.",
    "blocks.",
    "pre_blocks.",
    "implicit_block.",
    "post_blocks.",
    "head_nm.",
    "head.",
)
# The layers of a block come after these.
BLOCK_ORDER = (".ada_gss", ".scale_mul_1H11", ".q_bias", ".v_bias", ".zero_k_bias")

LADDERS = (SIDES_256, SIDES_512, SIDES_1024)
NUM_GROUPS, PHI_RATIO = 32, 0.5  # of the published tokenizer; no tensor tells them
HEAD_WIDTH = 64  # of the published transformers; also their width divided by their depth
LISTED = 8  # names an error spells out of each kind


def official_names(model: Model) -> dict[str, str | None]:
    """Published name of each tensor, in published order, to ours.

    A buffer that the published programs store and this package derives from sizes has no name here: `None`.
    """
    rules: Rules
    order: tuple[str, ...]
    if isinstance(model, Tokenizer):
        phi = {0: PHI_OF_EACH_SCALE, 1: PHI_OF_ALL_SCALES}.get(model.config.num_phi, PHI_SHARED)
        rules, order = TOKENIZER_NAMES + phi, TOKENIZER_ORDER
    else:
        rules, order = TRANSFORMER_NAMES, TRANSFORMER_ORDER
    names: dict[str, str | None] = {_rename(key, rules): key for key in model.state_dict()}
    if isinstance(model, NextScaleTransformer):
        zero_biases = [name.replace("q_bias", "zero_k_bias") for name in names if name.endswith(".q_bias")]
        names |= dict.fromkeys(("lvl_1L", "attn_bias_for_masking", *zero_biases))
    return {name: names[name] for name in sorted(names, key=lambda name: _place(name, order))}


def official_tensors(model: Model) -> dict[str, Tensor]:
    """State dict of `model` under the published names, in published order, derived buffers included.

    The tensors share memory with the model's.
    """
    ours = model.state_dict()
    names = official_names(model).items()
    return {name: _derived(name, model) if key is None else ours[key] for name, key in names}


def official_config(
    state: dict[str, Tensor],
    sides: tuple[int, ...] | None,
    num_heads: int | None,
) -> TokenizerConfig | TransformerConfig:
    """Settings of the model that `state` belongs to; tensors that play no part in them are not looked at.

    Args:
        state: tensors under their published names, without prefixes.
        sides: of a tokenizer, `None` for the 256-pixel ladder; of a transformer only to be compared, or to be
            taken where the tensors have no values.
        num_heads: of a transformer without a learned attention scale, `None` for heads 64 wide.

    Raises:
        ValueError: it is no published model, or `sides` or `num_heads` contradict it.
    """
    if _has(state, r"quantize\.|encoder\.down\."):
        if num_heads is not None:
            raise ValueError(f"num_heads: this is a tokenizer, which has no choice of heads, got {num_heads}")
        return _tokenizer_config(state, sides)
    if _has(state, r"blocks\.|pre_blocks\.|implicit_block|pos_1LC$"):
        return _transformer_config(state, sides, num_heads)
    raise ValueError(
        "expected the published names of a tokenizer, VAR or VIAR (quantize.*, blocks.*, implicit_block.*), "
        f"found {listed(list(state))}; from_pretrained reads what save_pretrained wrote"
    )


def listed(items: Iterable[str]) -> str:
    """The first `LISTED` items, and how many more there are, as text for an error."""
    every = list(items)
    rest = len(every) - LISTED
    return ", ".join(every[:LISTED]) + (f", and {rest} more" if rest > 0 else "")


def _rename(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _place(name: str, order: tuple[str, ...]) -> tuple[int, int, int]:
    """Sort key of a published name: its part in `order`, its block, its place within a block.

    Sorting is stable, so names with equal keys stay in the order of this package, which is the published one.
    """
    part = next(i for i, prefix in enumerate(order) if name.startswith(prefix))
    block = re.match(r"\w+\.(\d+)\.", name)
    last = next((i for i, ending in enumerate(BLOCK_ORDER) if name.endswith(ending)), len(BLOCK_ORDER))
    return part, int(block[1]) if block else 0, last


def _derived(name: str, model: Model) -> Tensor:
    """A buffer that the published programs store: scale of each token, mask, zero bias of the keys."""
    assert isinstance(model, NextScaleTransformer)  # every tensor of a tokenizer has a name of ours
    if name == "lvl_1L":
        return model.scale_ids[None]
    if name == "attn_bias_for_masking":
        with torch.device(model.scale_ids.device):  # whatever the default device is
            mask_LL = block_causal_mask(model.config.sides)
        zero = torch.zeros((), dtype=model.pos_embed.dtype, device=mask_LL.device)
        return zero.where(mask_LL, -torch.inf)[None, None]
    width = model.pos_embed.shape[-1]
    return torch.zeros(width, dtype=model.pos_embed.dtype, device=model.scale_ids.device)


def _tokenizer_config(state: dict[str, Tensor], sides: tuple[int, ...] | None) -> TokenizerConfig:
    num_levels = max(1, _count(state, r"encoder\.down\.(\d+)\."))
    base = _size(state, ("encoder.conv_in.weight", 0), ("encoder.conv_in.bias", 0))
    first = [f"encoder.down.{level}.block.0" for level in range(num_levels)]
    channels = [_size(state, (f"{name}.conv1.weight", 0), (f"{name}.norm2.weight", 0)) for name in first]
    if base == 0 or any(count % base for count in channels):
        raise ValueError(f"encoder.down: expected multiples of {base} channels (conv_in), found {channels}")
    usage = state.get("quantize.ema_vocab_hit_SV")
    sides = SIDES_256 if sides is None else sides
    if usage is not None and usage.ndim and len(usage) != len(sides):
        raise ValueError(
            f"sides: quantize.ema_vocab_hit_SV has {len(usage)} scales, got sides={sides}; give as many, or "
            f"put zeros of shape ({len(sides)}, V) in its place to use the weights on other scales"
        )
    return TokenizerConfig(
        sides=sides,
        codebook_size=_size(state, ("quantize.embedding.weight", 0), ("quantize.ema_vocab_hit_SV", 1)),
        code_channels=_size(state, ("quantize.embedding.weight", 1), ("quant_conv.weight", 0)),
        base_channels=base,
        multipliers=tuple(count // base for count in channels),
        num_residual_blocks=max(1, _count(state, r"encoder\.down\.0\.block\.(\d+)\.")),
        num_groups=NUM_GROUPS,
        num_phi=_num_phi(state),
        phi_ratio=PHI_RATIO,
    )


def _num_phi(state: dict[str, Tensor]) -> int:
    if _has(state, r"quantize\.quant_resi\.\d+\."):
        return 0
    if _has(state, r"quantize\.quant_resi\.qresi\."):
        return 1
    return _count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.") or 4  # none: reported as missing


def _transformer_config(
    state: dict[str, Tensor], sides: tuple[int, ...] | None, num_heads: int | None
) -> TransformerConfig:
    width = _size(state, ("pos_1LC", 2), ("class_emb.weight", 1), ("head.weight", 1))
    implicit = _has(state, r"pre_blocks\.|implicit_block|post_blocks\.")
    block = "implicit_block" if implicit else "blocks.0"
    trunk: ExplicitTrunkConfig | ImplicitTrunkConfig = ExplicitTrunkConfig()
    depth = max(1, _count(state, r"blocks\.(\d+)\."))
    if implicit:
        num_pre, num_post = (_count(state, rf"{name}_blocks\.(\d+)\.") for name in ("pre", "post"))
        trunk = ImplicitTrunkConfig(num_pre=num_pre, num_post=num_post)
        depth = max(width // HEAD_WIDTH, num_pre + 1 + num_post)
    qk_norm = _has(state, r".*\.attn\.scale_mul_1H11$")
    return TransformerConfig(
        depth=depth,
        width=width,
        num_heads=_num_heads(state, width, num_heads, qk_norm),
        sides=_transformer_sides(state, sides),
        codebook_size=_size(state, ("head.weight", 0), ("head.bias", 0)),
        code_channels=_size(state, ("word_embed.weight", 1)),
        num_classes=_size(state, ("class_emb.weight", 0)) - 1,
        mlp_ratio=_size(state, (f"{block}.ffn.fc1.weight", 0), (f"{block}.ffn.fc1.bias", 0)) / max(1, width),
        qk_norm=qk_norm,
        shared_modulation=_has(state, r"shared_ada_lin\.|.*\.ada_gss$"),
        trunk=trunk,
    )


def _num_heads(state: dict[str, Tensor], width: int, num_heads: int | None, qk_norm: bool) -> int:
    if qk_norm:
        name = next(key for key in state if key.endswith(".attn.scale_mul_1H11"))
        found = _size(state, (name, 1))
        if num_heads not in (None, found):
            raise ValueError(f"num_heads: {name} tells {found}, got {num_heads}; leave it")
        return found
    if num_heads is None:
        if width % HEAD_WIDTH:
            raise ValueError(
                "num_heads: no tensor tells the number of heads (no attn.scale_mul_1H11), and width "
                f"{width} does not divide into heads of {HEAD_WIDTH}; give num_heads"
            )
        return width // HEAD_WIDTH
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the width {width}, got {num_heads}")
    return num_heads


def _transformer_sides(state: dict[str, Tensor], sides: tuple[int, ...] | None) -> tuple[int, ...]:
    level_1L = state.get("lvl_1L")
    if level_1L is None or level_1L.is_meta:  # nothing to read: a published ladder as long as the positions
        length = _size(state, ("pos_1LC", 1))
        found = next((ladder for ladder in LADDERS if sum(p * p for p in ladder) == length), sides)
        if found is None:
            raise ValueError("lvl_1L, the scale of each token, is missing or has no values; give sides")
        return found if sides is None else sides
    level_L = level_1L.flatten().long()
    counts = [len(list(run)) for _, run in groupby(level_L.tolist())]
    found = tuple(math.isqrt(count) for count in counts)
    if not counts or not scale_ids(found).equal(level_L.cpu()):
        raise ValueError(f"lvl_1L: expected p * p tokens a scale, scales counted from 0, found runs {counts}")
    if sides not in (None, found):
        raise ValueError(f"sides: lvl_1L tells {found}, got {sides}; leave it")
    return found


def _has(state: dict[str, Tensor], pattern: str) -> bool:
    return any(re.match(pattern, key) for key in state)


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number in the names that begin with `pattern`."""
    found = (re.match(pattern, key) for key in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _size(state: dict[str, Tensor], *places: tuple[str, int]) -> int:
    """Size of the first of the named tensors and axes that is there."""
    for name, axis in places:
        if name in state and state[name].ndim > axis:
            return state[name].shape[axis]
    names = " or ".join(dict.fromkeys(name for name, _ in places))
    raise ValueError(f"{names} is missing or has too few axes; is the checkpoint complete?")
