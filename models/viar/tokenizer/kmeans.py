"""Codes by Lloyd's algorithm (S. P. Lloyd 1982, IEEE Trans. Inf. Theory 28(2)), vectors weighted.

Shape letters: N vectors, V codes, Z channels. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.execution import sent

ITERATIONS = 10
AT_ONCE = 1 << 26  # distances between vectors and codes that are held in memory


@torch.no_grad()
def kmeans(
    vectors_NZ: Tensor,
    weights_N: Tensor,  # positive
    num_codes: int,
    *,
    generator: torch.Generator,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Codes that lower the weighted mean squared distance from each vector to its nearest code.

    They start as different vectors, drawn by weight. In every iteration a code becomes the weighted mean of
    the vectors that it is nearest to; one that is nearest to none becomes a vector that is far from its code,
    drawn by weight times squared distance.

    Args:
        vectors_NZ: at least `num_codes`.
        weights_N: of the vectors.
        num_codes: V.
        generator: source of the draws.
        iterations: of Lloyd's algorithm; 0 gives the vectors that were drawn first.

    Returns:
        (V, Z), on the device of the vectors.
    """
    codes_VZ = vectors_NZ[drawn_order(weights_N, generator)[:num_codes]]
    for _ in range(iterations):
        squares_N, nearest_N = nearest(vectors_NZ, codes_VZ)
        mass_V = weights_N.new_zeros(num_codes).index_add_(0, nearest_N, weights_N)
        sums_VZ = torch.zeros_like(codes_VZ).index_add_(0, nearest_N, vectors_NZ * weights_N.unsqueeze(1))
        means_VZ = sums_VZ / mass_V.where(mass_V > 0, 1.0).unsqueeze(1)
        far_N = drawn_order(weights_N * squares_N, generator)
        codes_VZ, _ = replaced(means_VZ, mass_V == 0, vectors_NZ[far_N])
    return codes_VZ


def replaced(
    codes_VZ: Tensor,
    which_V: Tensor,  # bool
    vectors_NZ: Tensor,
) -> tuple[Tensor, Tensor]:
    """Codes of which those of `which_V` are vectors, the first of them the first vector and so on.

    With fewer vectors than such codes the rest stay as they are. How many there are the host would have to
    wait for.

    Returns:
        Codes (V, Z), and which are new, bool (V,).
    """
    place_V = which_V.cumsum(0) - 1
    new_V = which_V & (place_V < len(vectors_NZ))
    new_VZ = vectors_NZ[place_V.clamp(0, len(vectors_NZ) - 1)].to(codes_VZ)
    return torch.where(new_V.unsqueeze(1), new_VZ, codes_VZ), new_V


def nearest(vectors_NZ: Tensor, codes_VZ: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance from each vector to the nearest code, and that code's index, both (N,)."""
    codes_V = codes_VZ.square().sum(1)
    squares, indices = [], []
    for part_NZ in torch.split(vectors_NZ, max(1, AT_ONCE // len(codes_VZ))):
        # |v - c|^2 less |v|^2, which is the same for every code.
        least_N, index_N = torch.addmm(codes_V, part_NZ, codes_VZ.T, alpha=-2).min(1)
        squares.append((least_N + part_NZ.square().sum(1)).clamp(min=0))
        indices.append(index_N)
    return torch.cat(squares), torch.cat(indices)


def drawn_order(
    weights_N: Tensor,  # at least 0
    generator: torch.Generator,
) -> Tensor:
    """Indices (N,) in an order drawn at random: which comes next is by weight among those that are left.

    Those of weight 0 come last. A vector waits for an exponential time of its weight's rate (P. S.
    Efraimidis, P. G. Spirakis 2006, Inf. Process. Lett. 97(5)).
    """
    waits_N = -torch.rand(len(weights_N), generator=generator, device=generator.device).log()
    return (sent(waits_N, weights_N.device) / weights_N).argsort(stable=True)
