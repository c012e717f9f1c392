"""Newton's method with a matrix-free linear solver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .._checks import check_integer, check_number
from .base import Solver, combination, norms, products, small_dtype, solve_small, write_row


@dataclass(frozen=True)
class NewtonKrylovState:
    """Where a batch is in its Newton step; all samples are at the same point of it."""

    inner: int  # products with J so far in this Newton step; -1 while a step is being tried
    tries: int  # lengths tried of this step
    base: Tensor  # (B, D), where the step starts
    residual: Tensor  # (B, D), there
    norm: Tensor  # (B,), its norm; infinity before the first step
    forcing: Tensor  # (B,), relative accuracy asked of the linear solve
    difference: Tensor  # (B,), step of the finite difference
    basis: Tensor  # (B, memory + 1, D), orthonormal
    hessenberg: Tensor  # (B, memory + 1, memory)
    change: Tensor  # (B, D), the Newton step
    length: Tensor  # (B,), the share of it that is tried
    backtracks: Tensor  # (B,), steps that were shortened
    finished: Tensor  # (B,), samples that no longer count


@dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """Inexact Newton: (I - J) d = r by GMRES, then z <- z + d, shortened until the residual falls.

    GMRES needs products J v only. "difference" gets each from one more evaluation of the cell,
    (f(z + h v) - f(z)) / h, which any cell allows and whose relative error is about the square root of the
    rounding unit (of the state: a cell that works in half precision needs "jvp"). "jvp" gets it exactly
    from forward-mode differentiation (`torch.func.jvp`), in one call of the cell that costs about two.
    Either way every product is a solver step, counted in `nfe`. The linear systems are solved as exactly
    as it pays (Eisenstat & Walker 1996, SIAM J. Sci. Comput. 17, choice 2; Knoll & Keyes 2004, J. Comput.
    Phys. 193; GMRES: Saad & Schultz 1986).

    Evaluations come in bursts: up to `memory` without progress, then a large step. Give it room:
    `Stopping.patience` counts every one of them. The samples of a batch go through these bursts together,
    so a hard one may cost the others steps (not change what they converge to). Reads one flag from the
    device a step. Memory: `memory` + 12 states while a solve runs.

    Args:
        memory: most products a Newton step.
        derivative: "difference" or "jvp".
        forcing: largest relative accuracy of a linear solve, in (0, 1).
        max_backtracks: how often a step may be halved.
    """

    memory: int = 20
    derivative: Literal["difference", "jvp"] = "difference"
    forcing: float = 0.1
    max_backtracks: int = 4

    def __post_init__(self) -> None:
        """Validate."""
        check_integer("NewtonKrylov", 1, memory=self.memory)
        check_integer("NewtonKrylov", 0, max_backtracks=self.max_backtracks)
        check_number("NewtonKrylov", 0, 1, open_minimum=True, forcing=self.forcing)
        if self.derivative not in ("difference", "jvp"):
            raise ValueError(
                f"NewtonKrylov: derivative must be 'difference' or 'jvp', got {self.derivative!r}"
            )

    def init(self, z0: Tensor) -> NewtonKrylovState:
        """The first step is to evaluate at `z0`."""
        batch, width = z0.shape
        one = z0.new_ones(batch)
        return NewtonKrylovState(
            inner=-1,
            tries=0,
            base=z0,
            residual=z0,
            norm=one * torch.inf,
            forcing=one * self.forcing,
            difference=one,
            basis=z0.new_zeros(batch, self.memory + 1, width),
            hessenberg=z0.new_zeros(batch, self.memory + 1, self.memory),
            change=torch.zeros_like(z0),
            length=one,
            backtracks=torch.zeros(batch, dtype=torch.int64, device=z0.device),
            finished=torch.zeros(batch, dtype=torch.bool, device=z0.device),
        )

    def freeze(self, state: NewtonKrylovState, finished: Tensor) -> NewtonKrylovState:
        """Do not wait for finished samples."""
        return replace(state, finished=finished)

    def rejections(self, state: NewtonKrylovState) -> dict[str, Tensor]:
        """Newton steps that were shortened because the residual had grown."""
        return {"growth": state.backtracks}

    @property
    def undoes(self) -> bool:
        """Steps that grow the residual are shortened."""
        return True

    def settle(self, z: Tensor, state: NewtonKrylovState) -> Tensor:
        """Not a point that was only looked at for its derivative."""
        return z if state.inner < 0 else state.base

    def direction(self, state: NewtonKrylovState) -> Tensor | None:
        """The basis vector whose product is wanted, with `derivative="jvp"`."""
        return state.basis[:, state.inner] if self.derivative == "jvp" and state.inner >= 0 else None

    def step(self, z: Tensor, fz: Tensor, state: NewtonKrylovState) -> tuple[Tensor, NewtonKrylovState]:
        """One evaluation: of a product with J, or of a Newton step."""
        if state.inner >= 0:
            return self._extend(fz, state)
        residual = fz - z
        norm = norms(residual)[0]
        worse = ~(norm < (1 - 1e-4 * state.length) * state.norm) & state.norm.isfinite() & ~state.finished
        if state.tries <= self.max_backtracks and not torch.compiler.is_compiling() and bool(worse.any()):
            length = torch.where(worse, 0.5 * state.length, state.length)
            change = state.change
            if state.tries == self.max_backtracks:
                # No share of the step helps: half a Picard step instead, whatever it brings.
                length = torch.where(worse, 0.5, length)
                change = torch.where(worse.unsqueeze(1), state.residual, change)
            state = replace(
                state,
                tries=state.tries + 1,
                length=length,
                change=change,
                backtracks=state.backtracks + worse,
            )
            return state.base + length.unsqueeze(1) * change, state
        return self._begin(z, fz, residual, norm, state)

    def _begin(
        self, z: Tensor, fz: Tensor, residual: Tensor, norm: Tensor, state: NewtonKrylovState
    ) -> tuple[Tensor, NewtonKrylovState]:
        """Start a Newton step from `z`."""
        # Eisenstat & Walker: as exact as the last step was good.
        forcing = (0.9 * (norm / state.norm) ** 2).clamp(1e-3, self.forcing)
        forcing = torch.where(state.norm.isfinite(), forcing, torch.full_like(norm, self.forcing))
        size = torch.maximum(*norms(z, fz))
        state = replace(
            state,
            inner=0,
            base=z,
            residual=residual,
            norm=norm,
            forcing=forcing,
            difference=torch.finfo(z.dtype).eps ** 0.5 * torch.where(size > 0, size, torch.ones_like(size)),
            basis=write_row(state.basis, 0, _unit(residual, norm)),
        )
        return self._probe(state), state

    def _probe(self, state: NewtonKrylovState) -> Tensor:
        """Where to evaluate for the next product."""
        if self.derivative == "jvp":
            return state.base
        return torch.addcmul(state.base, state.basis[:, state.inner], state.difference.unsqueeze(1))

    def _extend(self, image: Tensor, state: NewtonKrylovState) -> tuple[Tensor, NewtonKrylovState]:
        """One step of Arnoldi; the Newton step when its accuracy or the memory is reached."""
        j, basis = state.inner, state.basis
        if self.derivative == "difference":
            image = (image - state.base - state.residual) / state.difference.unsqueeze(1)
        w = basis[:, j] - image
        coefficients = products(basis[:, : j + 1], w)
        w = w - combination(coefficients, basis[:, : j + 1])
        again = products(basis[:, : j + 1], w)  # once more: classical Gram-Schmidt alone loses orthogonality
        w = w - combination(again, basis[:, : j + 1])
        length = torch.linalg.vector_norm(w, dim=1)
        column = torch.cat([coefficients + again, length.unsqueeze(1)], 1)
        column = torch.nn.functional.pad(column, (0, self.memory - j - 1))
        hessenberg = write_row(state.hessenberg.mT, j, column).mT
        state = replace(
            state, inner=j + 1, basis=write_row(basis, j + 1, _unit(w, length)), hessenberg=hessenberg
        )
        y, error, failed = self._least_squares(state)
        enough = (error <= state.forcing) | failed | state.finished
        if j + 1 < self.memory and (torch.compiler.is_compiling() or not bool(enough.all())):
            return self._probe(state), state
        change = combination(y, state.basis[:, : j + 1])
        change = torch.where(failed.unsqueeze(1), state.residual, change)
        state = replace(state, inner=-1, tries=0, change=change, length=torch.ones_like(state.length))
        return state.base + change, state

    def _least_squares(self, state: NewtonKrylovState) -> tuple[Tensor, Tensor, Tensor]:
        """argmin_y || norm e_1 - H y || (B, inner), its relative error and failure (B,)."""
        n = state.inner
        h = state.hessenberg[:, : n + 1, :n].to(small_dtype(state.base))
        gram = h.mT @ h
        usable = gram.diagonal(dim1=1, dim2=2) > 0
        # What rounding leaves of a direction that adds nothing must not be divided by.
        floor = 1e-13 * gram.diagonal(dim1=1, dim2=2).amax(1)
        gram = gram + floor[:, None, None] * torch.eye(n, dtype=h.dtype, device=h.device)
        # A difference cannot tell smaller entries of H from its own error.
        exact = self.derivative == "jvp"
        limit = torch.inf if exact else torch.finfo(state.base.dtype).eps ** -0.5
        y, failed = solve_small(gram, h[:, 0], usable, limit=limit)
        failed = ~usable.any(1) if failed is None else failed | ~usable.any(1)
        error = -(h @ y.unsqueeze(2)).squeeze(2)
        error = torch.cat([1 + error[:, :1], error[:, 1:]], 1)
        scale = state.norm.unsqueeze(1)
        return (
            y.to(scale.dtype) * scale,
            torch.linalg.vector_norm(error, dim=1).to(scale.dtype),
            failed,
        )


def _unit(vector: Tensor, length: Tensor) -> Tensor:
    """`vector` over its length; zero where that is zero."""
    usable = length > 0
    return vector * torch.where(usable, 1 / torch.where(usable, length, 1.0), 0.0).unsqueeze(1)
