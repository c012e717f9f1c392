"""Getting a model ready to generate: memory layout, lower precision, compilation, CUDA graphs."""

from __future__ import annotations

import torch

from ..determinism import is_deterministic
from ..kinds import checked
from ..model.execution import computes_in
from ..model.graphs import Graphs
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


@checked
def prepare_inference(
    model: NextScaleTransformer,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    compile: bool | str = False,
    graphs: bool = False,
) -> None:
    """Put model and tokenizer into evaluation mode and, if asked, lower precision; in place.

    The decoder's weights are laid out channels last, which on a CPU saves it a tenth of its time.

    Embeddings, positions, the head, the logits, the quantizer and the encoder stay float32: they cost
    little, and tokens hang on them. The trunk's weights, and with them its activations, keys and values,
    take `dtype`, and so does the decoder. A CPU without instructions for `dtype` keeps the trunk's weights in
    it and computes in float32, a block's weights widened at a time; its decoder stays float32.

    Args:
        model: VAR or VIAR, on the device it will run on.
        tokenizer: its tokenizer, if images are to be decoded.
        dtype: of the weights; default as they are.
        compile: compile the blocks with `torch.compile`, which takes minutes at the first image; a name is
            that of its backend.
        graphs: replay generations as CUDA graphs, see below; can be combined with `compile`.

    With `graphs`, generation of fixed schedules on a CUDA device is captured as CUDA graphs when a batch size
    or a setting (labels and seed are none) is met first, at the cost of two generations more, and replayed
    from then on. Weights may change in place; replaced ones cost new captures. Other attributes of modules
    stay what they were at the capture: after changing one by hand call this again. What cannot be captured
    (`Adaptive`, a report, `edit`, hooks, another device) runs as ever; the logger `viar` says why, once a
    model and reason. `model.graphs` tells how many captures there are and how many bytes they hold. Calling
    this again without `graphs` drops them; copies of the model capture their own.

    Raises:
        ValueError: another `dtype`; a backend of `compile` that captures graphs itself, with `graphs`;
            `compile` inside of `viar.determinism.deterministic`, or a name that is none of a backend.
    """
    if isinstance(compile, str) and compile not in torch.compiler.list_backends(()):
        raise ValueError(
            "compile: expected True, False or the name of a backend of torch.compiler.list_backends(), got "
            f"{compile!r}"
        )
    if compile and is_deterministic():
        raise ValueError(
            "compile: what is compiled is chosen by trials, and need not be the same in another run, got "
            f"compile={compile!r}; leave it, or deterministic"
        )
    if graphs and compile == "cudagraphs":
        raise ValueError(
            "graphs: compile='cudagraphs' captures the blocks by itself, and a capture cannot hold another; "
            "give one of the two, or compile=True"
        )
    model.eval()
    if tokenizer is not None:
        tokenizer.eval()
        # Documented, but missing from PyTorch's annotations.
        tokenizer.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype is not None:
        if dtype not in PRECISIONS:
            raise ValueError(
                f"dtype: expected one of {', '.join(map(str, PRECISIONS))}, or None to change nothing, "
                f"got {dtype}"
            )
        model.trunk.to(dtype)
        if tokenizer is not None and computes_in(dtype, tokenizer.post_quantizer.weight.device):
            tokenizer.post_quantizer.to(dtype)
            tokenizer.decoder.to(dtype)
    if compile:
        for module in model.trunk.compiled_parts():
            # One compilation for all scales: sizes differ, the code does not.
            module.compile(dynamic=True, backend="inductor" if compile is True else compile)
    if model.graphs is not None:
        model.graphs.release()
        model.graphs = None
    if graphs:
        model.graphs = Graphs()
