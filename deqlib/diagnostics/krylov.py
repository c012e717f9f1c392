"""Size of a Jacobian that is known by its products only, sample by sample.

Both measures come from a Krylov process of a few dozen products. A power iteration would need hundreds
where eigenvalues are close to one another, and where a complex pair leads its quotients never settle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..solvers.base import combination, inner_products, norms

Product = Callable[[Tensor], Tensor]  # (B, D) -> (B, D), every sample by its own matrix

_SETTLED = 1e-4  # relative residual of an eigenpair that need not be refined


def spectral_radius(product: Product, start: Tensor, num_products: int) -> Tensor:
    """Largest modulus of an eigenvalue of each sample's matrix, float64 (B,) on the CPU.

    Arnoldi's process, and where it did not settle once more from the leading eigenvector it found; of the
    two estimates the one with the smaller residual is taken. Exact up to rounding where `num_products` is
    at least D. Otherwise an estimate: within a few percent for most matrices; for one far from normal (an
    eigenvalue far more sensitive than its size) too large by up to its sensitivity.
    (Saad 2011, Numerical Methods for Large Eigenvalue Problems, chapter 6.)

    Args:
        product: of the matrix, or of its transpose.
        start: random, (B, D).
        num_products: most products of one process, at least 1; the cost is at most twice that.

    Returns:
        NaN where a product is not finite.
    """
    radius, error, vector = _leading(product, start, num_products)
    if not bool((error > _SETTLED).any()):
        return radius
    again, error_again, _ = _leading(product, vector, num_products)
    return torch.where(error_again < error, again, radius)


def spectral_norm(product: Product, transposed: Product, start: Tensor, num_products: int) -> Tensor:
    """Largest singular value of each sample's matrix A, float64 (B,) on the CPU.

    Lanczos' process on A^T A. A lower bound, and with a dozen products within a percent as a rule.
    (Saad 2011, Numerical Methods for Large Eigenvalue Problems, chapter 6.)

    Args:
        product: of A.
        transposed: of A^T.
        start: random, (B, D).
        num_products: most products with each of the two, at least 1.

    Returns:
        NaN where a product is not finite.
    """
    largest, _, _ = _leading(lambda v: transposed(product(v)), start, num_products)
    return largest.sqrt()


def _leading(product: Product, start: Tensor, num_products: int) -> tuple[Tensor, Tensor, Tensor]:
    """Modulus of the leading eigenvalue, relative residual of its pair, a vector of its real space."""
    basis, hessenberg = _arnoldi(product, start, min(num_products, start.shape[1]))
    system = hessenberg.to("cpu", torch.float64)
    sound = system.isfinite().flatten(1).all(1)
    system = torch.where(sound[:, None, None], system, 0)
    values, vectors = torch.linalg.eig(system[:, :-1])
    radius, index = values.abs().max(1)
    vector = vectors.gather(2, index[:, None, None].expand(-1, vectors.shape[1], 1)).squeeze(2)
    error = system[:, -1, -1] * vector[:, -1].abs() / radius
    error = error.nan_to_num(0, 0)  # a zero matrix
    # A real vector of the pair's invariant plane.
    real = (vector.real + vector.imag).to(start)
    unknown = torch.full_like(radius, torch.nan)
    return torch.where(sound, radius, unknown), error, combination(real, basis)


def _arnoldi(product: Product, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (B, size, D) and the matrix (B, size + 1, size) of `product` in it."""
    batch, width = start.shape
    basis = start.new_zeros(batch, size, width)
    hessenberg = start.new_zeros(batch, size + 1, size)
    tiny = torch.finfo(start.dtype).tiny
    vector = start / norms(start)[0].clamp_min(tiny).unsqueeze(1)
    for step in range(size):
        basis[:, step] = vector
        image = product(vector)
        before = norms(image)[0]
        known = basis[:, : step + 1]
        for _ in range(2):  # once loses orthogonality where the image nearly lies in the space
            part = inner_products(known, image)
            hessenberg[:, : step + 1, step] += part
            image = image - combination(part, known)
        length = norms(image)[0]
        # What is left of an image that lies in the space is rounding: the space is invariant, and the
        # process goes on with zeros, which add eigenvalues of zero.
        ended = length <= 10 * torch.finfo(start.dtype).eps * before
        hessenberg[:, step + 1, step] = torch.where(ended, 0, length)
        vector = torch.where(ended.unsqueeze(1), 0, image / length.clamp_min(tiny).unsqueeze(1))
    return basis, hessenberg
