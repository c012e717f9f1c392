"""Names of the published checkpoints in terms of this package's modules."""

from __future__ import annotations

import re

# Rewrites of the keys of `vae_ch160v4096z32`: pattern, replacement. All that match apply, in this order.
TOKENIZER_NAMES: tuple[tuple[str, str], ...] = (
    (r"^encoder\.down\.", "encoder.levels."),
    (r"^decoder\.up\.", "decoder.levels."),  # index 0 is full resolution on both sides
    (r"\.block\.", ".blocks."),
    (r"\.attn\.", ".attentions."),
    (r"\.mid\.block_", ".middle.block"),
    (r"\.mid\.attn_1\.", ".middle.attention."),
    (r"\.(down|up)sample\.", ".resample."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".project."),
    (r"^quantize\.ema_vocab_hit_SV$", "quantizer.usage"),
    (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.phi."),
    (r"^quantize\.embedding\.", "quantizer.codebook."),
    (r"^quant_conv\.", "pre_quantizer."),
    (r"^post_quant_conv\.", "post_quantizer."),
)


def tokenizer_key(published_key: str) -> str:
    """Our name of a tensor of the published tokenizer.

    A key that no rule of `TOKENIZER_NAMES` matches comes back as it is, as do the keys that are the same
    on both sides, so loading must be strict.
    """
    return _rename(published_key, TOKENIZER_NAMES)


# Rewrites of the keys of `var_d*` and `viar`.
TRANSFORMER_NAMES: tuple[tuple[str, str], ...] = (
    (r"^pos_1LC$", "pos_embed"),
    (r"^word_embed\.", "input_projection."),
    (r"^class_emb\.", "class_embed."),
    (r"^lvl_embed\.", "level_embed."),
    (r"^shared_ada_lin\.1\.", "shared_modulation."),
    (r"^head_nm\.ada_lin\.1\.", "head_modulation."),
    (r"^implicit_block_projection\.0\.", "trunk.layer.cell.projection_in."),
    (r"^implicit_block_projection\.2\.", "trunk.layer.cell.projection_out."),
    (r"^implicit_block\.", "trunk.layer.cell.block."),
    (r"^(pre|post)_blocks\.", r"trunk.\1."),
    (r"^blocks\.", "trunk.blocks."),
    (r"\.attn\.mat_qkv\.", ".attention.qkv."),
    (r"\.attn\.scale_mul_1H11$", ".attention.log_scale"),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.(q_bias|v_bias)$", r".attention.\1"),
    (r"\.ffn\.", "."),
    (r"\.ada_lin\.1\.", ".modulation."),
    (r"\.ada_gss$", ".modulation_offset"),
)

# Buffers the published transformers store and ours derive: scale of each token, mask, zero bias of keys.
DERIVED = re.compile(r"^(lvl_1L|attn_bias_for_masking)$|\.zero_k_bias$")


def transformer_key(published_key: str) -> str | None:
    """Our name of a tensor of a published transformer; `None` for a buffer that ours derives.

    Names that are the same on both sides come back as they are, so loading must be strict.
    """
    if DERIVED.search(published_key):
        return None
    return _rename(published_key, TRANSFORMER_NAMES)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
