"""Newton's method with a matrix-free linear solver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .._checks import check_choice, check_integer, check_number, settle_numbers
from ..state import small_dtype
from .base import (
    Query,
    Seen,
    Solver,
    anyone,
    can_look,
    combination,
    inner_products,
    is_recorded,
    norms,
    select,
    solve_small,
    with_room,
)


@dataclass(frozen=True)
class NewtonKrylovState:
    """Where each sample of a batch is in its Newton step."""

    reach: int  # no sample has more products with J than this in its Newton step
    inner: Tensor  # (B,), int64, products with J so far; -1 while a step is being tried
    tries: Tensor  # (B,), int64, lengths tried of this step
    base: Tensor  # (B, D), where the step starts
    residual: Tensor  # (B, D), there
    norm: Tensor  # (B,), its norm as the driver measures it; infinity before the first step
    scale: Tensor  # (B,), its Euclidean norm
    forcing: Tensor  # (B,), relative accuracy asked of the linear solve
    difference: Tensor  # (B,), step of the finite difference
    basis: Tensor  # (B, slots, D), orthonormal rows, as many as `inner` + 1
    hessenberg: Tensor  # (B, memory, memory + 1), a row a product
    change: Tensor  # (B, D), the Newton step
    length: Tensor  # (B,), the share of it that is tried
    point: Tensor  # (B, D), where the map is to be evaluated next
    measured: Tensor | None = None  # (B,), norm of the residual at `point`, from the driver


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
    `Stopping.patience` counts every one of them. Every sample goes through these bursts in its own time.
    Memory: up to `memory` + 14 states while a solve runs, rows taken as they are needed.

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
        settle_numbers(self)
        check_integer("NewtonKrylov", 1, memory=self.memory)
        check_integer("NewtonKrylov", 0, max_backtracks=self.max_backtracks)
        check_number("NewtonKrylov", 0, 1, open_minimum=True, forcing=self.forcing)
        check_choice("NewtonKrylov", ("difference", "jvp"), derivative=self.derivative)

    def init(self, z0: Tensor) -> NewtonKrylovState:
        """The first step is to evaluate at `z0`."""
        batch, width = z0.shape
        one = z0.new_ones(batch)
        count = torch.zeros(batch, dtype=torch.int64, device=z0.device)
        return NewtonKrylovState(
            reach=-1,
            inner=count - 1,
            tries=count,
            base=z0,
            residual=z0,
            norm=one * torch.inf,
            scale=one,
            forcing=one * self.forcing,
            difference=one,
            basis=z0.new_zeros(batch, 0, width),
            hessenberg=z0.new_zeros(batch, self.memory, self.memory + 1),
            change=torch.zeros_like(z0),
            length=one,
            point=z0,
        )

    def observe(self, seen: Seen, state: NewtonKrylovState) -> NewtonKrylovState:
        """Steps are judged by what the driver measured."""
        worse = self._worse(seen.residual, state)
        if anyone(worse):
            seen.note("growth", worse)
        return replace(state, measured=seen.residual)

    def query(self, state: NewtonKrylovState) -> Query | None:
        """A point to learn a product from, or the product itself; the iterate where a step is tried."""
        if self.derivative == "difference" or state.reach < 0:
            return Query(point=state.point)
        return Query(state.point, self._newest(state), state.inner >= 0)

    def step(self, z: Tensor, fz: Tensor, state: NewtonKrylovState) -> tuple[Tensor, NewtonKrylovState]:
        """One evaluation: of a product with J, or of a Newton step that is tried."""
        measured, state = state.measured, replace(state, measured=None)
        tries = state.inner < 0
        after = state
        if state.reach >= 0:
            after = self._extend(fz, state, ~tries)
        if anyone(tries):
            after = self._judge(z, fz, after, tries, measured)
        probes = after.inner >= 0
        if can_look(z) and len(z):
            after = replace(after, reach=int(after.inner.max()))
        ahead = after.length.unsqueeze(1) * after.change
        if after.reach >= 0:
            # An exact product is taken at the iterate itself, so the map is not evaluated elsewhere.
            size = after.difference if self.derivative == "difference" else torch.zeros_like(after.difference)
            ahead = select(probes, size.unsqueeze(1) * self._newest(after), ahead)
        point = after.base + ahead
        return select(probes, after.base, point), replace(after, point=point)

    def _newest(self, state: NewtonKrylovState) -> Tensor:
        """The basis vector (B, D) whose product with J comes next."""
        slots = state.inner.clamp_min(0)
        if can_look(slots) and len(slots) and bool((slots == slots[0]).all()):
            return state.basis[:, int(slots[0])]
        return state.basis[_everyone(slots), slots]

    def _judge(
        self, z: Tensor, fz: Tensor, state: NewtonKrylovState, tries: Tensor, measured: Tensor | None
    ) -> NewtonKrylovState:
        """Accept the steps that were tried and begin the next ones there; shorten those that do not help."""
        residual = fz - z
        norm = norms(residual)[0] if measured is None else measured
        worse = tries & self._worse(norm, state)
        if anyone(worse):
            # Where no share of the step helps: half a Picard step instead, whatever it brings.
            last = worse & (state.tries == self.max_backtracks)
            length = torch.where(worse, 0.5 * state.length, state.length)
            state = replace(
                state,
                tries=state.tries + worse,
                length=torch.where(last, 0.5, length),
                change=select(last, state.residual, state.change),
            )
        begins = tries & ~worse
        return self._begin(z, fz, residual, norm, state, begins) if anyone(begins) else state

    def _worse(self, norm: Tensor, state: NewtonKrylovState) -> Tensor:
        """Which samples try a step that does not bring the residual down, and may try a shorter one."""
        fell = norm < (1 - 1e-4 * state.length) * state.norm  # false for NaN
        may = (state.inner < 0) & (state.tries <= self.max_backtracks) & state.norm.isfinite()
        return may & ~fell

    def _begin(
        self,
        z: Tensor,
        fz: Tensor,
        residual: Tensor,
        norm: Tensor,
        state: NewtonKrylovState,
        begins: Tensor,
    ) -> NewtonKrylovState:
        """Start a Newton step of some samples at `z`."""
        # Eisenstat & Walker: as exact as the last step was good.
        forcing = (0.9 * (norm / state.norm) ** 2).clamp(1e-3, self.forcing)
        forcing = torch.where(state.norm.isfinite(), forcing, torch.full_like(norm, self.forcing))
        # What was measured may be that of the worst place alone, see `Stopping.norm_axes`.
        scale, *sizes = norms(residual, z, fz)
        size = torch.maximum(*sizes)
        difference = torch.finfo(z.dtype).eps ** 0.5 * torch.where(size > 0, size, torch.ones_like(size))
        slots = torch.where(begins, 0, state.inner.clamp_min(0))
        row = select(begins, _unit(residual, scale), self._kept(state, slots))
        basis = _write(with_room(state.basis, 0, self.memory + 1, zero=True), slots, row)
        return replace(
            state,
            reach=max(state.reach, 0),
            inner=torch.where(begins, 0, state.inner),
            base=select(begins, z, state.base),
            residual=select(begins, residual, state.residual),
            norm=torch.where(begins, norm, state.norm),
            scale=torch.where(begins, scale, state.scale),
            forcing=torch.where(begins, forcing, state.forcing),
            difference=torch.where(begins, difference, state.difference),
            basis=basis,
            hessenberg=torch.where(begins.view(-1, 1, 1), 0, state.hessenberg),
        )

    def _kept(self, state: NewtonKrylovState, slots: Tensor) -> Tensor:
        """The basis vectors in these slots (B,); zeros before there are any."""
        if not state.basis.shape[1]:
            return torch.zeros_like(state.base)
        return state.basis[_everyone(slots), slots]

    def _extend(self, image: Tensor, state: NewtonKrylovState, probes: Tensor) -> NewtonKrylovState:
        """One step of Arnoldi; the Newton step when its accuracy or the memory is reached."""
        inner, size = state.inner, state.reach + 1
        if self.derivative == "difference":
            image = (image - state.base - state.residual) / state.difference.unsqueeze(1)
        rows = state.basis[:, :size]
        # A sample has `inner` + 1 rows in this step. Rows behind those belong to an earlier step.
        own = torch.arange(size, device=inner.device) <= inner.unsqueeze(1)
        w = self._newest(state) - image
        coefficients = torch.where(own, inner_products(rows, w), 0)
        w = w - combination(coefficients, rows)
        again = torch.where(
            own, inner_products(rows, w), 0
        )  # classical Gram-Schmidt alone loses orthogonality
        w = w - combination(again, rows)
        length = torch.linalg.vector_norm(w, dim=1)
        pad = torch.nn.functional.pad
        entries = pad(coefficients + again, (0, self.memory + 1 - size))
        slots = inner.clamp_min(0)
        entries = torch.where(
            torch.arange(self.memory + 1, device=inner.device) == (slots + 1).unsqueeze(1),
            length.unsqueeze(1),
            entries,
        )
        last = slots.clamp_max(self.memory - 1)
        known = state.hessenberg[_everyone(last), last]
        hessenberg = _write(state.hessenberg, last, torch.where(probes.unsqueeze(1), entries, known))
        basis = with_room(state.basis, size, self.memory + 1, zero=True)
        slots = torch.where(probes, slots + 1, slots)
        basis = _write(basis, slots, select(probes, _unit(w, length), basis[_everyone(slots), slots]))
        state = replace(
            state,
            reach=min(state.reach + 1, self.memory),
            inner=torch.where(probes, inner + 1, inner),
            basis=basis,
            hessenberg=hessenberg,
        )
        y, error, failed = self._least_squares(state)
        ends = probes & ((error <= state.forcing) | failed | (state.inner >= self.memory))
        if not anyone(ends):
            return state
        change = combination(y, state.basis[:, : y.shape[1]])
        change = torch.where(failed.unsqueeze(1), state.residual, change)
        return replace(
            state,
            inner=torch.where(ends, -1, state.inner),
            tries=torch.where(ends, 0, state.tries),
            change=select(ends, change, state.change),
            length=torch.where(ends, 1.0, state.length),
        )

    def _least_squares(self, state: NewtonKrylovState) -> tuple[Tensor, Tensor, Tensor]:
        """argmin_y || norm e_1 - H y || (B, inner), its relative error and failure (B,)."""
        n = state.reach
        h = state.hessenberg[:, :n, : n + 1].to(small_dtype(state.base)).mT
        own = torch.arange(n, device=h.device) < state.inner.unsqueeze(1)
        gram = h.mT @ h
        usable = own & (gram.diagonal(dim1=1, dim2=2) > 0)
        # What rounding leaves of a direction that adds nothing must not be divided by.
        floor = 1e-13 * gram.diagonal(dim1=1, dim2=2).amax(1)
        identity = torch.eye(n, dtype=h.dtype, device=h.device)
        gram = torch.where(usable.unsqueeze(1) & usable.unsqueeze(2), gram, identity)
        gram = gram + floor[:, None, None] * identity
        # A difference cannot tell smaller entries of H from its own error.
        exact = self.derivative == "jvp"
        limit = torch.inf if exact else torch.finfo(state.base.dtype).eps ** -0.5
        y, failed = solve_small(gram, torch.where(usable, h[:, 0], 0), limit=limit)
        failed = ~usable.any(1) if failed is None else failed | ~usable.any(1)
        error = -(h @ y.unsqueeze(2)).squeeze(2)
        error = torch.cat([1 + error[:, :1], error[:, 1:]], 1)
        scale = state.scale.unsqueeze(1)
        return (
            y.to(scale.dtype) * scale,
            torch.linalg.vector_norm(error, dim=1).to(scale.dtype),
            failed,
        )


def _everyone(slots: Tensor) -> Tensor:
    """The places of the samples in the batch, (B,)."""
    return torch.arange(len(slots), device=slots.device)


def _write(
    rows: Tensor,  # (B, m, ...)
    slots: Tensor,  # (B,), int64
    row: Tensor,  # (B, ...)
) -> Tensor:
    """`rows` with one row of each sample replaced: in place, or in a copy while autograd records."""
    where = (_everyone(slots), slots)
    if is_recorded(rows, row):
        return rows.index_put(where, row)
    return rows.index_put_(where, row)


def _unit(vector: Tensor, length: Tensor) -> Tensor:
    """`vector` over its length; zero where that is zero."""
    usable = length > 0
    return vector * torch.where(usable, 1 / torch.where(usable, length, 1.0), 0.0).unsqueeze(1)
