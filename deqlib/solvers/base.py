"""The contract of a solver, and what solvers share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Solver(ABC):
    """A rule that turns `z` and `f(z)` into the next iterate.

    Subclasses are frozen, keyword-only dataclasses of settings. All that changes during a solve lives in
    the state they return: any nest of dataclasses, tuples, lists and dicts whose tensors have the batch as
    their first axis. A solver never calls `f`, never decides to stop, never sees a pytree; the values of a
    sample depend on nothing but that sample, so one that is not finite stays the only one.

    `init` and `step` are all a solver needs. The other methods are hooks for those that can do more.
    """

    @abstractmethod
    def init(
        self,
        z0: Tensor,  # (B, D)
    ) -> Any:
        """State before the first step."""

    @abstractmethod
    def step(
        self,
        z: Tensor,  # (B, D)
        fz: Tensor,  # (B, D), the map at z
        state: Any,
    ) -> tuple[Tensor, Any]:
        """Next iterate (B, D) and next state. The state passed in must not be used again."""

    def resume(
        self,
        state: Any,
        z0: Tensor,  # (B, D)
    ) -> Any:
        """State to go on with from `z0` after the map changed a little. Default: none of it is kept.

        Raises:
            ValueError: `state` is not of this solver and a batch like `z0`.
        """
        return self.init(z0)

    def adopt(
        self,
        state: Any,
        z0: Tensor,  # (B, D)
    ) -> Any:
        """State to go on with from `z0`, where another method gave up with `state`. Default: as `init`."""
        return self.init(z0)

    def freeze(
        self,
        state: Any,
        finished: Tensor,  # (B,), bool
    ) -> Any:
        """Told when samples are finished, so that what was learnt of them is not overwritten."""
        return state

    def direction(self, state: Any) -> Tensor | None:
        """Direction v (B, D) if the next `step` wants the product J v in place of `fz`."""
        return None

    def settle(
        self,
        z: Tensor,  # (B, D), from the last `step`
        state: Any,
    ) -> Tensor:
        """What to return when a fixed number of steps ends with `z`."""
        return z

    def rejections(self, state: Any) -> dict[str, Tensor]:
        """How often a step of each sample was refused, by cause, int64 (B,)."""
        return {}

    def gives_up(
        self,
        since: Tensor,  # (B,), steps since the best residual improved
    ) -> Tensor:
        """Which samples go on with the next of several `stages`, bool (B,); called if there are several."""
        return torch.zeros_like(since, dtype=torch.bool)

    @property
    def undoes(self) -> bool:
        """Whether a step that blew up is taken back by the next one; then the driver waits for that."""
        return False

    @property
    def stages(self) -> tuple[Solver, ...]:
        """Solvers to try in turn; a sample that one gives up goes on with the next."""
        return (self,)


def can_look(z: Tensor) -> bool:
    """Whether reading a number of `z` costs nothing: no device to wait for, no graph to break."""
    return z.device.type == "cpu" and not torch.compiler.is_compiling()


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is done to any of these, so that none may be written to."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def small_dtype(z: Tensor) -> torch.dtype:
    """The type for systems of a few unknowns: float64 where the device has it."""
    return z.dtype if z.device.type == "mps" else torch.float64


def norms(
    *vectors: Tensor,  # (B, D) each
) -> tuple[Tensor, ...]:
    """Euclidean norms of each sample, (B,) each, off the tape, right at every scale that the type holds."""
    found = [torch.linalg.vector_norm(v.detach() if v.requires_grad else v, dim=1) for v in vectors]
    first = vectors[0]
    if first.dtype != torch.float32 or small_dtype(first) != torch.float64 or not first.numel():
        return tuple(found)
    # Squares of numbers beyond 1e19, or all below 1e-19, leave the range of float32: then in float64.
    # Always where the host cannot tell; there the memory is the limit, not the arithmetic.
    if can_look(first):
        low, high = (torch.stack(found) if len(found) > 1 else found[0]).aminmax()
        if float(low) > 1e-15 and float(high) < 1e15:
            return tuple(found)
    exact = (torch.linalg.vector_norm(v.detach(), dim=1, dtype=torch.float64) for v in vectors)
    return tuple(norm.to(first.dtype) for norm in exact)


def dot(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:
    """Inner product of each sample, shape (B,)."""
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def products(
    rows: Tensor,  # (B, m, D)
    vector: Tensor,  # (B, D)
) -> Tensor:
    """Inner products of each sample's rows with its vector, shape (B, m)."""
    # Vector times matrix: on the CPU ten times as fast as matrix times vector.
    return torch.bmm(vector.unsqueeze(1), rows.mT).squeeze(1)


def combination(
    coefficients: Tensor,  # (B, m)
    rows: Tensor,  # (B, m, D)
) -> Tensor:
    """Sum of each sample's rows weighted by its coefficients, shape (B, D)."""
    return torch.bmm(coefficients.unsqueeze(1), rows).squeeze(1)


def write_row(
    rows: Tensor,  # (B, m, ...)
    slot: int,
    row: Tensor,  # (B, ...)
) -> Tensor:
    """`rows` with one row replaced: in place, or in a copy while autograd records."""
    if is_recorded(rows, row):
        return torch.cat([rows[:, :slot], row.unsqueeze(1), rows[:, slot + 1 :]], 1)
    rows[:, slot] = row
    return rows


def solve_small(
    system: Tensor,  # (B, m, m)
    rhs: Tensor,  # (B, m)
    usable: Tensor | None = None,  # (B, m), bool; None: all
    *,
    limit: float = math.inf,
) -> tuple[Tensor, Tensor | None]:
    """Solution (B, m) over the usable unknowns, the others 0; and which samples have none, bool (B,).

    Those samples get zeros; `None` says that there are none. Samples have none where an unknown is not
    finite or not below `limit`. Never raises: a singular system stays its sample's own.
    """
    if usable is not None:
        identity = torch.eye(system.shape[1], dtype=system.dtype, device=system.device)
        system = torch.where(usable.unsqueeze(1) & usable.unsqueeze(2), system, identity)
        rhs = torch.where(usable, rhs, torch.zeros_like(rhs))
    found = torch.linalg.solve_ex(system, rhs.unsqueeze(2))[0].squeeze(2)
    size = found.detach().abs()
    if can_look(found) and size.numel() and float(size.max()) < limit:  # false for NaN
        return found, None
    failed = ~(size.amax(1) < limit)
    return torch.where(failed.unsqueeze(1), torch.zeros_like(found), found), failed
