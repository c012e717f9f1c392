"""How the implicit block is doing: does it stand still where its iterations end, and does it contract?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deqlib.diagnostics.krylov import spectral_radius

from ..data import TokenBatch
from ..kinds import checked
from ..model.implicit import ImplicitTrunk
from ..model.transformer import NextScaleTransformer
from .samples import undisturbed

NUM_SAMPLES = 8
NUM_PRODUCTS = 12  # vector-Jacobian products; the estimate may take twice as many


@checked
def cell_health(
    model: NextScaleTransformer, batch: TokenBatch, *, iterations: int | None = None
) -> dict[str, float]:
    """Residual and spectral radius of the implicit block at the state that its last iteration begins at.

    - `residual`: ||f(z) - z|| / ||f(z)||, mean over samples. 0: further iterations change nothing.
    - `spectral_radius`: largest modulus of an eigenvalue of df/dz, mean over samples. Below 1 the block
      contracts there, and the residual shrinks by about this factor an iteration; above 1 iterations do not
      settle.

    In evaluation mode, in the type of the weights, for the first 8 samples. The radius is an estimate by
    Arnoldi's process with a fixed starting vector. Cost: one forward pass, an evaluation of the block and up
    to 24 backward passes of it. It leaves random numbers and the model as they were.

    Args:
        model: not wrapped, with whole weights.
        batch: held-out tokens, on the model's device.
        iterations: of the block; default the config's.

    Returns:
        The two numbers by name; nothing for an explicit trunk.

    Raises:
        ValueError: no samples, or as the model.
    """
    if len(batch) != 3:
        raise ValueError(f"batch: expected (inputs, targets, labels), got {len(batch)} tensors")
    trunk = model.trunk
    if not isinstance(trunk, ImplicitTrunk):
        return {}
    inputs, _, labels = (part[:NUM_SAMPLES] for part in batch)
    if not len(labels):
        raise ValueError("batch: expected at least 1 sample to measure the block with, got 0")
    last: list[tuple[Tensor, ...]] = []

    def note(cell: nn.Module, args: tuple[Tensor, ...]) -> None:
        last[:] = [args]

    assert isinstance(trunk.layer.cell, nn.Module)
    hook = trunk.layer.cell.register_forward_pre_hook(note)
    try:
        # What is compiled would not know of the hook.
        with undisturbed(model), torch.compiler.set_stance("force_eager"):
            # Not by a call: what Accelerate puts around that runs in the precision of the training.
            NextScaleTransformer.forward(model, labels, inputs, iterations)
            z_BLC, *others = last[0]
            with torch.enable_grad():
                return _health(trunk, z_BLC.detach().requires_grad_(), others)
    finally:
        hook.remove()


def _health(trunk: ImplicitTrunk, z_BLC: Tensor, others: list[Tensor]) -> dict[str, float]:
    image_BLC = trunk.layer.cell(z_BLC, *others)
    change, size = ((image_BLC - z_BLC).detach(), image_BLC.detach())
    residual_B = change.float().flatten(1).norm(dim=1) / size.float().flatten(1).norm(dim=1)

    def product(v: Tensor) -> Tensor:
        v = v.view_as(image_BLC).to(image_BLC.dtype)
        (back,) = torch.autograd.grad(image_BLC, z_BLC, v, retain_graph=True)
        return back.flatten(1).float()

    start = torch.randn(z_BLC.shape, generator=torch.Generator().manual_seed(0))
    radius_B = spectral_radius(product, start.flatten(1).to(z_BLC.device), NUM_PRODUCTS)
    return {"residual": float(residual_B.mean()), "spectral_radius": float(radius_B.mean())}
