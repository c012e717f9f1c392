"""The contract of a solver, and what solvers share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._settings import Settings
from .._torch import is_fake
from ..state import small_dtype

SAFE = (1e-15, 1e15)  # norms within it lost nothing to the range of float32
_MANY = 1024  # samples from which on small systems are solved all at once
FEW = 64  # numbers that Python goes through faster than PyTorch starts an operation


@dataclass(frozen=True)
class Query:
    """What a solver wants evaluated next, where that is not simply the map at the iterate of its last step.

    Attributes:
        point: (B, D), where to evaluate instead of at the iterate.
        direction: (B, D), a vector v: the next `step` gets J v in place of f(z), J the Jacobian of the map
            at the point.
        wanted: (B,), bool, the samples that get J v; the others get f(z). `None`: all.
    """

    point: Tensor | None = None
    direction: Tensor | None = None
    wanted: Tensor | None = None


class Seen(Protocol):
    """What the driver knows after an evaluation, told to `Solver.observe` before the `step` it belongs to.

    Tensors are of the samples in the batch, off the tape, and must not be written to.
    """

    @property
    def step(self) -> int:
        """Evaluations of the solve before this one."""

    @property
    def steps_left(self) -> int:
        """Steps that the stopping rule still allows, at least one."""

    @property
    def difference(self) -> Tensor | None:
        """f(z) - z, (B, D), for a step that is not recorded by autograd; `None` if the driver has none."""

    @property
    def residual(self) -> Tensor:
        """Its norm, (B,)."""

    @property
    def goal(self) -> Tensor:
        """The residual that meets the tolerance, (B,)."""

    @property
    def blowup(self) -> float:
        """`Stopping.blowup`: a residual beyond the smallest by this factor is lost."""

    @property
    def before(self) -> Tensor:
        """Smallest residual of the evaluations before this one, (B,); infinite at the first, and minus
        infinity for samples that had finished before it."""

    @property
    def since(self) -> Tensor:
        """Evaluations since the best residual improved, int64, (B,); 0 where this one did."""

    @property
    def best(self) -> Tensor:
        """The best iterate so far, this one included, (B, D)."""

    @property
    def improved(self) -> Tensor:
        """The samples whose best iterate this one is, bool, (B,)."""

    @property
    def all_improved(self) -> bool:
        """Whether the host knows that this evaluation is the best so far of every sample at work."""

    @property
    def finished(self) -> Tensor | None:
        """The samples that are finished and will not move again, bool, (B,); `None`: nobody."""

    @property
    def may_look(self) -> bool:
        """Whether the host may read from the device now: it waits for it at this step anyway."""

    def of(self, rows: Tensor) -> Seen:
        """The same of these samples alone; `rows` (b,) are their places in the batch."""

    def note(self, cause: str, which: Tensor) -> None:
        """Count a refused step of the samples in `which`, bool, (B,), by cause in `Solution.rejections`."""

    def counts(self, *causes: str) -> tuple[Tensor, ...] | None:
        """What `note` has counted for these causes, int64, (B,) each, to be added to in place by what notes
        without it; `None` where this is of some samples alone."""

    def assign(self, methods: tuple[str, ...], method: Tensor, new: Tensor | None = None) -> None:
        """Say which of several methods works on each sample of the batch.

        Args:
            methods: their names.
            method: the place of each sample's, int64, (B,), for `Solution.method`.
            new: samples that begin again with another method, bool, (B,): `Stopping.patience` counts anew.
        """


class Solver(Settings, ABC):
    """A rule that turns `z` and `f(z)` into the next iterate.

    Subclasses are frozen, keyword-only dataclasses of settings. All that changes during a solve lives in
    the state they return: any nest of dataclasses, tuples, lists and dicts whose tensors have the batch as
    their first axis. A solver never calls `f`, never decides to stop, never sees a pytree; the values of a
    sample depend on nothing but that sample, so one that is not finite stays the only one.

    `init` and `step` are all a solver needs. The three other methods are for those that can do more.
    """

    @abstractmethod
    def init(
        self,
        z0: Tensor,  # (B, D)
    ) -> Any:
        """State before the first step, for a solve from `z0`, (B, D)."""

    @abstractmethod
    def step(
        self,
        z: Tensor,  # (B, D), where the map was evaluated
        fz: Tensor,  # (B, D), the map there, or what `query` asked for
        state: Any,
    ) -> tuple[Tensor, Any]:
        """Next iterate (B, D) and next state. The state passed in must not be used again.

        Args:
            z: where the map was evaluated, (B, D).
            fz: the map there, or what `query` asked for, (B, D).
            state: the solver's, brought up to date by `observe`.
        """

    def resume(
        self,
        state: Any,
        z0: Tensor,  # (B, D)
    ) -> Any:
        """State to go on with from `z0` after an earlier solve that ended with `state`.

        The map may have changed a little, and the earlier solve may have been another solver's.
        Default: nothing of it is kept.

        Raises:
            ValueError: `state` is not of a batch like `z0`, or of a solver that this one can learn from.
        """
        return self.init(z0)

    def observe(self, seen: Seen, state: Any) -> Any:
        """State that takes what the driver measured into account; called before every `step` of a solve
        to a tolerance, and in no other.

        Args:
            seen: what was measured, see `Seen`.
            state: the solver's, of the last step.

        A solver that overrides this is trusted to take back a step that blew up: a sample is DIVERGED only
        if the evaluation after that is no better. Default: nothing is noticed.
        """
        return state

    def query(self, state: Any) -> Query | None:
        """What is to be evaluated next. Default: the map at the iterate."""
        return None


def overrides(solver: Solver, method: str) -> bool:
    """Whether a solver has a method of its own in place of the default."""
    return getattr(type(solver), method) is not getattr(Solver, method)


def can_look(z: Tensor) -> bool:
    """Whether reading a number of `z` costs nothing: no device to wait for, no graph to break."""
    # A fake tensor says it is on a CPU, but has no numbers.
    return z.device.type == "cpu" and not is_fake(z) and not torch.compiler.is_compiling()


def anyone(which: Tensor | None) -> bool:
    """Whether a mask (B,) may hold for any sample: `True` where the host cannot know for free."""
    if which is None or not can_look(which):
        return which is not None
    return True in which.tolist() if which.shape[0] <= FEW else bool(which.any())


def within(values: Tensor, limits: Tensor) -> bool:
    """Whether the host knows that all values (B,) are below their limits, (B,)."""
    if not can_look(values):
        return False
    if values.shape[0] > FEW:
        return bool((values < limits).all())
    return all(value < limit for value, limit in zip(values.tolist(), limits.tolist(), strict=True))


def select(
    which: Tensor,  # (B,), bool
    new: Tensor,  # (B, ...)
    old: Tensor,  # (B, ...)
) -> Tensor:
    """`new` for the samples in `which`, `old` for the others; no copy where the host sees that one is all."""
    if can_look(which):
        found = which.tolist() if which.shape[0] <= FEW else [bool(which.any()), bool(which.all())]
        if False not in found:
            return new
        if True not in found:
            return old
    return torch.where(which.view(-1, *[1] * (new.dim() - 1)), new, old)


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is done to any of these, so that none may be written to."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def norm(
    vectors: Tensor,  # (B, D)
    *,
    exact: bool = False,
) -> Tensor:
    """Euclidean norm of each sample, (B,), off the tape.

    Squares of numbers beyond 1e19, or all below 1e-19, leave the range of float32; with `exact` they are
    added up in float64, which takes a CPU four times as long.
    """
    vectors = vectors.detach() if vectors.requires_grad else vectors
    if exact and vectors.dtype == torch.float32 and small_dtype(vectors) == torch.float64:
        found: Tensor = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
        return found.to(vectors.dtype)
    found = torch.linalg.vector_norm(vectors, dim=1)
    return found


def norms(
    *vectors: Tensor,  # (B, D) each
) -> tuple[Tensor, ...]:
    """Euclidean norms of each sample, (B,) each, off the tape, right at every scale that the type holds."""
    first = vectors[0]
    may_lose = first.dtype == torch.float32 and small_dtype(first) == torch.float64 and first.numel() > 0
    # Always exact where the host cannot tell; there the memory is the limit, not the arithmetic.
    if may_lose and not can_look(first):
        return tuple(norm(v, exact=True) for v in vectors)
    found = tuple(norm(v) for v in vectors)
    if may_lose:
        # Without tangents, which it does not take in PyTorch 2.11.
        low, high = (torch.stack(found) if len(found) > 1 else found[0]).detach().aminmax()
        if not (float(low) > SAFE[0] and float(high) < SAFE[1]):  # true for NaN
            return tuple(norm(v, exact=True) for v in vectors)
    return found


def dot(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:
    """Inner product of each sample, shape (B,)."""
    found: Tensor = torch.linalg.vecdot(a, b)
    return found


def inner_products(
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


def with_room(
    rows: Tensor,  # (B, slots, ...)
    slot: int,
    most: int,
    *,
    zero: bool = False,
) -> Tensor:
    """`rows` with at least `slot` + 1 slots; new ones are zero if asked, and while autograd may record.

    Their number doubles, up to the largest: the old and the new rows never take more than 1.5 times what
    `most` rows do.
    """
    slots = rows.shape[1]
    if slot < slots:
        return rows
    sizes = [most]
    while sizes[-1] // 2 > slots:
        sizes.append(sizes[-1] // 2)
    if is_recorded(rows):
        missing = rows.new_zeros(rows.shape[0], sizes[-1] - slots, *rows.shape[2:])
        return torch.cat([rows, missing], 1)
    make = rows.new_zeros if zero or torch.is_grad_enabled() else rows.new_empty
    more = make(rows.shape[0], sizes[-1], *rows.shape[2:])
    more[:, :slots] = rows
    return more


def solve_small(
    system: Tensor,  # (B, m, m)
    rhs: Tensor,  # (B, m)
    *,
    limit: float = math.inf,
) -> tuple[Tensor, Tensor | None]:
    """Solution (B, m), and which samples have none, bool (B,); those get zeros. `None`: all have one.

    Samples have none where an unknown is not finite or not below `limit`. Never raises: a singular system
    stays its sample's own.
    """
    # LAPACK takes a microsecond a system; a device, and a graph for any batch, does not care.
    if can_look(rhs) and len(rhs) > _MANY and rhs.shape[1] <= 2:
        found = _solve_tiny(system, rhs)
    else:
        found = torch.linalg.solve_ex(system, rhs.unsqueeze(2))[0].squeeze(2)
    values = found.detach()
    looks = can_look(values) and values.numel() > 0
    if looks and float(torch.linalg.vector_norm(values, torch.inf)) < limit:  # false for NaN
        return found, None
    solved = torch.linalg.vector_norm(values, torch.inf, dim=1) < limit
    return torch.where(solved.unsqueeze(1), found, 0), ~solved


def _solve_tiny(
    system: Tensor,  # (B, m, m), m at most 2
    rhs: Tensor,  # (B, m)
) -> Tensor:
    """By Cramer's rule."""
    if rhs.shape[1] == 1:
        return rhs / system[:, 0]
    (a, b), (c, d) = (row.unbind(1) for row in system.unbind(1))
    first, second = rhs.unbind(1)
    numerators = torch.stack([d * first - b * second, a * second - c * first], 1)
    return numerators / (a * d - b * c).unsqueeze(1)
