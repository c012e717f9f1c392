"""Generation of fixed schedules as CUDA graphs: kernels are launched once, then replayed a scale at a time.

What a scale computes depends on labels and seeds, and on nothing else that the host knows: the noise of a
token is a hash, keys and values lie in buffers of their final size. So one capture serves all labels and
seeds, and whatever else decides what is launched is its key. A graph cannot change its batch, so small
batches are filled up to one of a few sizes; an image depends on its batch by rounding at most, see
`viar.generation.choice`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqlib._torch import has_global_hooks, has_hooks, is_caching_parametrizations, namespaces
from deqlib.recording import is_recording

from ..model.graphs import Graphs, addresses
from ..model.schedule import Adaptive
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .choice import TokenNoise
from .scalewise import Generation, Sample
from .settings import Sampling

# Powers of two and what lies half way between: few captures, and little to fill up while a batch is so small
# that a device waits for its kernels to be launched. A larger batch gets a capture of its own size.
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)


def captured_batch(num_images: int) -> int:
    """How many images are generated where so many are asked for."""
    return next((size for size in BATCHES if size >= num_images), num_images)


class Parts(NamedTuple):
    """What a generation runs through; listed once, as that is most of what a replay costs the host."""

    modules: list[nn.Module]
    weights: list[Tensor]  # of the model, of any shapes; buffers too
    codes: list[Tensor]  # the same of the quantizer

    @classmethod
    def of(cls, model: NextScaleTransformer, tokenizer: Tokenizer) -> Self:
        """All of them, as they are now."""
        own, others = [*model.modules()], [*tokenizer.quantizer.modules()]
        return cls(own + others, _weights(own), _weights(others))


def why_eager(
    parts: Parts,
    schedule: Sequence[int | Adaptive | None],
    *,
    measure: bool = False,
    edits: bool = False,
) -> str | None:
    """What keeps a generation from being captured, in words; `None` where it can be.

    Args:
        parts: their hooks, and where their weights are.
        schedule: iterations of each scale.
        measure: whether scales are measured.
        edits: whether the caller changes what scales leave.
    """
    if measure:
        return "a report waits for the device at every scale"
    if edits:
        return "editing works on every scale"
    if any(isinstance(count, Adaptive) for count in schedule):
        return "adaptive iterations depend on what is computed"
    device = parts.weights[0].device
    if not can_capture(device):
        return f"the model is on {device}, and graphs need a CUDA device"
    if any(type(t) not in (Tensor, nn.Parameter) or t.device != device for t in parts.weights + parts.codes):
        return f"the weights are not all plain tensors on {device}, but sharded, quantised or offloaded"
    if has_global_hooks() or any(map(has_hooks, parts.modules)):
        return "hooks of modules would not be called in a replay"
    if is_recording():
        return "deqlib.record would see no solves in a replay"
    if is_caching_parametrizations():
        return "weights that parametrize.cached() keeps would be freed while a graph still reads them"
    if is_captured(device):
        return "the caller captures a graph of its own"
    return None


def replayed(
    graphs: Graphs,
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    parts: Parts,
    sampling: Sampling,
    schedule: Sequence[int | Adaptive | None],
    labels: Tensor,
    noise: TokenNoise,
) -> Sample:
    """What the sampler makes, from graphs; they are captured where there are none yet.

    Args:
        graphs: those of the model.
        model: VAR or VIAR, in evaluation mode, with nothing in the way of a capture, see `why_eager`.
        tokenizer: whose quantizer sums the scales up.
        parts: of the two.
        sampling: how to sample.
        schedule: its iterations of each scale, fixed.
        labels: (B,) classes, on the model's device.
        noise: of the images.
    """

    def work(labels: Tensor, keys_B: Tensor) -> Iterator[tuple[int, Tensor, Tensor, *tuple[Tensor, ...]]]:
        generation = Generation(model, tokenizer, sampling, schedule, labels, TokenNoise(keys_B))
        for scale in range(len(model.config.sides)):
            generation.run(scale)
            yield generation.cache_bytes, generation.f_hat, generation.certain, *generation.tokens

    batch, kind = captured_batch(len(labels)), labels.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    key = (
        batch,
        replace(sampling, seed=0, iterations=None),  # the schedule is that
        tuple(schedule),
        tokenizer.config,
        addresses(parts.codes),
        tuple(part.training for part in parts.modules),  # those inside may differ from the model
        autocast,
        _arithmetic(),
    )
    filled = (0, batch - len(labels))
    inputs = F.pad(labels, filled, value=model.null_class), F.pad(noise.keys_B, filled)
    # What autocast keeps of a weight would be freed while a graph still reads it.
    with torch.autocast(kind, enabled=autocast[0], dtype=autocast[1], cache_enabled=False):
        cache_bytes, *tensors = graphs.run(key, parts.weights, inputs, work)
    f_hat, certain, *tokens = (tensor[: len(labels)] for tensor in tensors)
    return Sample(tokens, f_hat, certain, cache_bytes)


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs of its work."""
    return device.type == "cuda"


def is_captured(device: torch.device) -> bool:
    """Whether what is launched at present goes into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _weights(modules: list[nn.Module]) -> list[Tensor]:
    held = (own.values() for module in modules for own in namespaces(module)[:2])
    return [tensor for tensors in held for tensor in tensors if tensor is not None]


def _arithmetic() -> Hashable:
    """Settings of the process by which kernels are chosen."""
    backends = torch.backends
    return (
        backends.cuda.matmul.fp32_precision,
        backends.cuda.matmul.allow_fp16_accumulation,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cuda.preferred_blas_library(),
        backends.cudnn.enabled,
        backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        backends.cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),  # type: ignore[no-untyped-call]
    )
