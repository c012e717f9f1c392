"""What the images of a series depend on: sampling settings, weights, machine; and where rounding decides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from deqlib._torch import is_compiled

from ...model.schedule import Adaptive
from ...model.transformer import NextScaleTransformer
from ...precision import below_float32
from ...pretrained import fingerprint
from ...tokenizer import Tokenizer
from ..settings import Sampling

# By which MKL and oneDNN are asked for other kernels than they would take.
OF_KERNELS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_MATMUL = {"tf32": "high", "bf16": "medium"}  # in the words of `torch.set_float32_matmul_precision`


def provenance(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    sampling: Sampling,
    schedule: Sequence[int | Adaptive | None],
    classes: list[int],
    batch_size: str,
    *,
    graphs: bool = False,
) -> dict[str, Any]:
    """All that decides the images of a series, in plain values, as series.json holds it.

    Whatever is added here, or changes its form, makes existing series end: their folders are refused.

    Args:
        model: its weights and whether it is compiled count.
        tokenizer: its weights count.
        sampling: settings of the sampler.
        schedule: its iterations of each scale, so that one schedule in other words is the same.
        classes: labels that the images get in turn.
        batch_size: in words, see `why_inexact`.
        graphs: whether a batch is sampled by CUDA graphs and rounding may decide: the batch may be filled up.
    """
    return {
        "cfg": sampling.cfg,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "cache": sampling.cache,
        "warm_start": sampling.warm_start,
        "guidance_reuse": sampling.guidance_reuse,
        "iterations": repr(schedule[0]) if isinstance(schedule[0], Adaptive) else schedule,
        "labels": classes,
        "batch_size": batch_size,
        # Only where it is asked for: series that were begun before there was this setting go on.
        **({"more_smooth": True} if sampling.more_smooth else {}),
        **({"graphs": True} if graphs else {}),
        "compiled": _is_compiled(model),
        "model": fingerprint(model),
        "tokenizer": fingerprint(tokenizer),
        "machine": _machine(model.pos_embed.device),
        "torch": torch.__version__,
    }


def why_inexact(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    sampling: Sampling,
    schedule: Sequence[int | Adaptive | None],
) -> str | None:
    """What keeps `Sample.certain` from holding, all of it in words; `None` where it holds."""
    reasons = []
    if sampling.more_smooth:
        reasons.append("mixtures of codes")
    if any(isinstance(part, Adaptive) for part in schedule):
        reasons.append("adaptive iterations")
    dtypes = {p.dtype for module in (model, tokenizer) for p in module.parameters()}
    if low := sorted(str(dtype) for dtype in dtypes - {torch.float32, torch.float64}):
        reasons.append(f"weights in {', '.join(low)}")
    kind = model.pos_embed.device.type
    if torch.is_autocast_enabled(kind):
        reasons.append(f"autocast to {torch.get_autocast_dtype(kind)}")
    if lower := below_float32(kind, "matmul"):
        reasons.append(f"float32 matmul precision {_MATMUL[lower]}")
    return " and ".join(reasons) or None


def _is_compiled(model: NextScaleTransformer) -> bool:
    """Whether the blocks are: other kernels round differently."""
    return any(is_compiled(module) for module in model.modules())


def _machine(device: torch.device) -> str:
    """What kernels are chosen by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    asked = [f"{name}={os.environ[name]}" for name in OF_KERNELS if os.environ.get(name)]
    return " ".join([device.type, torch.backends.cpu.get_cpu_capability(), *asked])
