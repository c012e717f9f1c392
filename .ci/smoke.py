"""Whether an installed wheel works: `smoke.py deqlib VERSION` and `smoke.py viar VERSION`.

The first needs PyTorch alone. The second leaves a tiny model and a tiny tokenizer in the current folder, for
the command `viar` to generate with.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import deqlib


def check_deqlib() -> None:
    """A small layer is solved, forward and backward."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    nn.init.orthogonal_(linear.weight, gain=0.5)
    layer = deqlib.ImplicitLayer(lambda z, x: torch.tanh(linear(z) + x), on_failure="raise")
    x = torch.randn(4, 8, requires_grad=True)
    z = layer(x)
    z.square().sum().backward()
    assert torch.allclose(z, torch.tanh(linear(z) + x), atol=1e-2)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()


def check_viar() -> None:
    """A tiny model is made, saved, loaded, and generates."""
    import viar

    sides = (1, 2, 3)
    tokenizer = viar.Tokenizer(
        viar.TokenizerConfig(
            sides=sides, codebook_size=16, code_channels=4, base_channels=4, multipliers=(1, 2), num_groups=2
        )
    )
    model = viar.NextScaleTransformer(
        viar.TransformerConfig(
            depth=3,
            width=16,
            num_heads=2,
            sides=sides,
            codebook_size=16,
            code_channels=4,
            num_classes=3,
            trunk=viar.ImplicitTrunkConfig(num_pre=1, num_post=1),
        )
    )
    tokenizer.save_pretrained("tokenizer")
    model.save_pretrained("model")
    images = viar.generate(
        viar.NextScaleTransformer.from_pretrained("model").eval(),
        viar.Tokenizer.from_pretrained("tokenizer").eval(),
        [0, 1, 2],
        iterations=2,
    )
    assert images.shape == (3, 3, 6, 6)
    assert 0 <= images.min() <= images.max() <= 1


if __name__ == "__main__":
    what, expected = sys.argv[1:]
    assert Path(sys.prefix) in Path(deqlib.__file__).parents, f"not the installed one: {deqlib.__file__}"
    assert deqlib.__version__ == version("deqlib") == expected, (
        deqlib.__version__,
        version("deqlib"),
        expected,
    )
    {"deqlib": check_deqlib, "viar": check_viar}[what]()
