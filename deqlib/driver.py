"""The loop of every solve, forward and adjoint.

The driver alone calls the map, so evaluations are counted exactly; it measures residuals, keeps each
sample's best iterate, decides who is done and stops. It works on flat states (B, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .solution import Solution, Status
from .solvers import Solver
from .state import Map
from .stopping import Stopping


def iterate(
    f: Map,
    z0: Tensor,  # (B, D)
    solver: Solver,
    stopping: Stopping,
) -> Solution:
    """Iterate `solver` on `f` from `z0` until `stopping` says so; the solution's value is flat."""
    if stopping.is_fixed:
        return _iterate_fixed(f, z0, solver, stopping)
    z, state = z0, solver.init(z0)
    progress = _Progress(z0, stopping)
    for step in range(stopping.max_steps + 1):
        fz = f(z)
        progress.observe(step, z, fz)
        if step == stopping.max_steps or (step % stopping.check_every == 0 and progress.is_over()):
            break
        z_next, state = _step(solver, z, fz, state)
        z = progress.hold_finished(z_next)
    return progress.solution(nfe=step + 1, state=state)


def _iterate_fixed(f: Map, z0: Tensor, solver: Solver, stopping: Stopping) -> Solution:
    """A fixed number of steps: the value is the last iterate."""
    z, state = z0, solver.init(z0)
    trace = []
    for _ in range(stopping.max_steps):
        fz = f(z)
        if stopping.measure:
            trace.append(_relative(*_residual_norms(z, fz)))
        z, state = _step(solver, z, fz, state)
    residual = None
    if stopping.measure:
        residual, scale = _residual_norms(z, f(z))
        trace.append(_relative(residual, scale))
    batch = z0.shape[0]
    return Solution(
        value=z,
        residual=residual,
        relative_residual=trace[-1] if trace else None,
        num_steps=torch.full((batch,), stopping.max_steps, device=z0.device),
        status=torch.full((batch,), int(Status.COMPLETED), device=z0.device),
        nfe=stopping.max_steps + int(stopping.measure),
        trace=torch.stack(trace) if trace else None,
        state=state,
    )


def _step(solver: Solver, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One solver step, in the precision of the state: autocast is for the cell."""
    if not torch.is_autocast_enabled(z.device.type):
        return solver.step(z, fz, state)
    with torch.autocast(z.device.type, enabled=False):
        return solver.step(z, fz, state)


def _residual_norms(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """`||f(z) - z||` and `||f(z)||` of every sample, off the tape."""
    z, fz = z.detach(), fz.detach()
    return torch.linalg.vector_norm(fz - z, dim=1), torch.linalg.vector_norm(fz, dim=1)


def _relative(residual: Tensor, scale: Tensor) -> Tensor:
    """Relative residual; 0 where the residual is 0, the fixed point at the origin included."""
    return residual / torch.where(scale > 0, scale, torch.ones_like(scale))


class _Progress:
    """What the driver knows of every sample while it iterates."""

    def __init__(self, z0: Tensor, stopping: Stopping) -> None:
        batch, device = z0.shape[0], z0.device
        self.stopping = stopping
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        self.status = torch.full((batch,), int(Status.MAX_STEPS), device=device)
        self.num_steps = torch.zeros(batch, dtype=torch.int64, device=device)
        self.best_step = torch.zeros(batch, dtype=torch.int64, device=device)
        self.best = z0
        self.best_residual = torch.full((batch,), torch.inf, dtype=z0.dtype, device=device)
        self.best_relative = self.best_residual
        self.trace: list[Tensor] = []

    def observe(self, step: int, z: Tensor, fz: Tensor) -> None:
        """Record the residual at `z`, keep the better iterates, retire the samples that are done."""
        rule, active = self.stopping, self.active
        residual, scale = _residual_norms(z, fz)
        relative = _relative(residual, scale)
        self.trace.append(relative)

        assert rule.rtol is not None
        # Infinity is within any tolerance of infinity, hence the test for finiteness.
        converged = active & residual.isfinite() & (residual <= rule.atol + rule.rtol * scale)
        # Blow-up is judged before the best is updated; NaN compares false everywhere.
        diverged = active & (~residual.isfinite() | (residual > rule.blowup * self.best_residual))
        better = converged | (active & (residual < self.best_residual))
        if step == 0:  # a first iterate is the best so far, whatever it is
            better = active
        self._keep(better, z, residual, relative, step)

        self.num_steps = torch.where(active, step, self.num_steps)
        finished = [(Status.CONVERGED, converged), (Status.DIVERGED, diverged & ~converged)]
        if rule.patience is not None:
            stalled = active & (step - self.best_step >= rule.patience)
            finished.append((Status.STALLED, stalled & ~converged & ~diverged))
        for status, which in finished:
            self.status = torch.where(which, int(status), self.status)
            active = active & ~which
        self.active = active

    def _keep(self, better: Tensor, z: Tensor, residual: Tensor, relative: Tensor, step: int) -> None:
        self.best = torch.where(better.unsqueeze(1), z, self.best)
        self.best_residual = torch.where(better, residual, self.best_residual)
        self.best_relative = torch.where(better, relative, self.best_relative)
        self.best_step = torch.where(better, step, self.best_step)

    def is_over(self) -> bool:
        """Whether every sample is done. Waits for the device."""
        return not bool(self.active.any())

    def hold_finished(self, z_next: Tensor) -> Tensor:
        """The next iterate, finished samples held at their best."""
        return torch.where(self.active.unsqueeze(1), z_next, self.best)

    def solution(self, *, nfe: int, state: object) -> Solution:
        """What was found."""
        return Solution(
            value=self.best,
            residual=self.best_residual,
            relative_residual=self.best_relative,
            num_steps=self.num_steps,
            status=self.status,
            nfe=nfe,
            trace=torch.stack(self.trace),
            state=state,
        )
