"""GMRES for affine maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._checks import check_integer, settle_numbers
from ..state import small_dtype
from .base import Query, Solver, combination, dot, inner_products, norms, with_room, write_row

_STAGNATION = 0.1  # alpha below this share of the residual: it falls by less than half a percent


@dataclass(frozen=True)
class GMRESState:
    """Where a batch is, and the Krylov space it has seen."""

    count: int  # columns made so far, the next lies at count % memory; -1 before the first evaluation
    x: Tensor  # (B, D), the iterate of smallest residual over the space
    residual: Tensor  # (B, D), there
    directions: Tensor  # (B, slots, D), P
    images: Tensor  # (B, slots, D), Q = (I - A) P, rows orthonormal or zero
    ahead: Tensor | None = None  # (B, D), where the map is to be evaluated next; None: at the iterate


@dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    """The residual of an affine map f(z) = A z + b, made as small as the Krylov space allows.

    The method for adjoints, u = J^T u + g: `ImplicitDifferentiation(solver=GMRES())`. Whatever the spectral
    radius of A, while `memory` lasts the residual after n + 1 evaluations is the smallest in
    z0 + span(r0, A r0, ..., A^(n-1) r0), and D + 1 evaluations give the solution of any regular system of D
    unknowns. (GMRES: Saad & Schultz 1986, SIAM J. Sci. Stat. Comput. 7. In the form of generalised conjugate
    residuals: Eisenstat, Elman & Schultz 1983, SIAM J. Numer. Anal. 20.)

    Kept are directions P with orthonormal images Q = (I - A) P, and the minimiser x with its residual r.
    What is evaluated is x + r, a Picard step from the minimiser; its displacement from x is the next
    direction, and the difference of its true residual from r the image. Where r hardly fell, x + r holds
    little that is new, and x + ||r|| q with the newest q of Q extends the space instead, so a stagnating
    sample goes on where conjugate residuals break down. A full memory drops its oldest column (Orthomin;
    Vinsome 1976, SPE 5739) and r still never grows; restarts need more steps, on symmetric A several times
    as many. A fixed number of steps ends with x + r, or with x in samples where the Picard step before had
    raised the residual.

    It is meant for affine maps. On others the columns are secants and this is Anderson acceleration of type
    II in exact arithmetic (Walker & Ni 2011, SIAM J. Numer. Anal. 49(4), theorem 2.2) without its
    safeguards: no step is refused, though the driver returns the best iterate seen. Prefer `Anderson` or
    `Auto` there. Unlike their normal equations the orthonormal basis does not square the condition number.

    Costs seven passes over the history, O(memory * D), a step. Memory: 2 * `memory` states, taken as they are
    needed, and at most 12 more while a solve runs. Nothing is learnt for a later solve.

    Args:
        memory: most columns kept, at least 1; steps beyond it truncate.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_integer("GMRES", 1, memory=self.memory)

    def init(self, z0: Tensor) -> GMRESState:
        """Nothing known."""
        columns = z0.new_zeros(z0.shape[0], 0, z0.shape[1])
        return GMRESState(count=-1, x=z0, residual=z0, directions=columns, images=columns)

    def query(self, state: GMRESState) -> Query | None:
        """Where the space is extended, which may be a worse iterate than the minimiser."""
        return Query(point=state.ahead)

    def step(self, z: Tensor, fz: Tensor, state: GMRESState) -> tuple[Tensor, GMRESState]:
        """One evaluation is one direction; the first step is a Picard step."""
        residual = fz - z
        if state.count < 0:
            return fz, replace(state, count=0, x=z, residual=residual)
        size, slot = min(state.count, self.memory), state.count % self.memory
        basis, images = state.directions[:, :size], state.images[:, :size]
        image = state.residual - residual
        before, picard = norms(state.residual, residual)
        noise = 8 * torch.finfo(z.dtype).eps * torch.maximum(*norms(image, fz))
        first = inner_products(images, image)
        q = image - combination(first, images)
        second = inner_products(images, q)  # classical Gram-Schmidt loses orthogonality unless done twice
        q = q - combination(second, images)
        p = z - state.x - combination(first + second, basis)
        del image

        scale = _inverse_length(q, noise)
        q, p = scale * q, scale * p
        share = dot(q, state.residual)
        stagnates = (share.detach().abs() <= _STAGNATION * before) & (scale.detach().squeeze(1) > 0)
        # From z, whose residual was measured, rather than from x, whose residual is the result of a
        # recurrence: the same in exact arithmetic, but errors do not pile up. The oldest column still counts.
        shares, newest = inner_products(images, residual), dot(q, residual).unsqueeze(1)
        x = torch.addcmul(z + combination(shares, basis), newest, p)
        r = torch.addcmul(residual - combination(shares, images), newest, q, value=-1)
        slots = [with_room(rows, slot, self.memory) for rows in (state.directions, state.images)]
        directions, images = write_row(slots[0], slot, p), write_row(slots[1], slot, q)
        del p, residual
        ahead = torch.where(stagnates.unsqueeze(1), norms(r)[0].unsqueeze(1) * q, r)
        state = GMRESState(
            count=state.count + 1,
            x=x,
            residual=r,
            directions=directions,
            images=images,
            ahead=x + ahead,
        )
        assert state.ahead is not None
        # The iterate is the better guess of that point and the minimiser.
        coarse = (stagnates | (picard > before)).unsqueeze(1)
        return torch.where(coarse, x, state.ahead), state


def _inverse_length(
    vector: Tensor,  # (B, D)
    noise: Tensor,  # (B,), length up to which it is no more than rounding errors
) -> Tensor:
    """One over the norm, (B, 1); zero where that is noise."""
    # In float64 where there is one: squares of small or large numbers leave float32.
    length = torch.linalg.vector_norm(vector, dim=1, dtype=small_dtype(vector))
    usable = length.detach() > noise
    inverse = torch.where(usable, 1 / torch.where(usable, length, torch.ones_like(length)), 0.0)
    return inverse.to(vector.dtype).unsqueeze(1)
