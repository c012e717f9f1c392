"""How iterations behave: the rate of plain ones, and where different starts lead."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..solution import Solution
from ..solvers import Solver
from ..solvers.base import norms
from ..stopping import Stopping
from .report import PathReport
from .subject import Subject, normal

_RATIOS = 10  # last ratios of residuals that the contraction factor is the median of


def contraction(subject: Subject, max_steps: int) -> Tensor:
    """Median of the last ratios of successive residuals of plain iteration, float64 (B,)."""
    sizes, floors = [], []
    with torch.no_grad():
        z = subject.ravel(subject.z0)
        for _ in range(max_steps + 1):
            z, before = subject.f(z), z
            size, scale = norms(z - before, z)
            sizes.append(size)
            floors.append(10 * subject.eps * scale)  # below, residuals are rounding
            if not bool(((size > floors[-1]) & size.isfinite()).any()):
                break
    residual, floor = (torch.stack(rows).to("cpu", torch.float64) for rows in (sizes, floors))
    usable = residual.isfinite() & (residual > floor)
    ratios = residual[1:] / residual[:-1]
    found = torch.full((residual.shape[1],), torch.nan, dtype=torch.float64)
    for sample in range(len(found)):
        known = ratios[usable[1:, sample] & usable[:-1, sample], sample]
        if not bool(residual[-1, sample].isfinite()) and bool(residual[0, sample].isfinite()):
            found[sample] = torch.inf
        elif known.numel():
            found[sample] = known[-_RATIOS:].median()
    return found


def paths(
    solver: Solver,
    subject: Subject,
    stopping: Stopping,
    own: Solution,
    z: Tensor,
    num_starts: int,
    generator: torch.Generator,
) -> PathReport | None:
    """Solves from random starts of the size of `z`, which the layer's own start led to."""
    if num_starts == 0:
        return None
    ends, converged = [z], [own.converged]
    for _ in range(num_starts):
        start = tree_map(lambda leaf: _like(leaf, generator), subject.f.layout.unravel(z))
        solution = subject.solve(start, solver, stopping)
        converged.append(solution.converged)
        ends.append(subject.ravel(subject.polish(solution).value))
    points = [end.detach().to("cpu", torch.float64) for end in ends]
    reached = torch.stack(converged).cpu()
    distance = torch.full((len(z),), torch.nan, dtype=torch.float64)
    cosine = distance.clone()
    for i, j in combinations(range(len(points)), 2):
        a, b = points[i], points[j]
        of_a, of_b, apart = norms(a, b, a - b)
        far = apart / torch.maximum(of_a, of_b).clamp_min(torch.finfo(torch.float64).tiny)
        angle = torch.linalg.vecdot(a, b) / (of_a * of_b).clamp_min(torch.finfo(torch.float64).tiny)
        angle = torch.where(apart == 0, 1, angle)
        both = reached[i] & reached[j]
        distance = torch.where(both, torch.fmax(distance, far), distance)
        cosine = torch.where(both, torch.fmin(cosine, angle), cosine)
    return PathReport(distance, cosine, reached.sum(0), num_starts + 1)


def is_deterministic(subject: Subject, z: Tensor) -> bool:
    """Whether two evaluations at one point agree, up to the order in which a device sums."""
    with torch.no_grad():
        one, two = subject.f(z), subject.f(z)
    room = 10 * subject.eps * float(one.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(one, two, rtol=0, atol=room, equal_nan=True)


def _like(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of each sample's size; of size 1 where it has none."""
    rest = tuple(range(1, leaf.dim()))
    exact = leaf.to(torch.float32)
    size = exact.square().mean(rest, keepdim=True).sqrt() if rest else exact.abs()
    size = torch.where(size.isfinite() & (size > 0), size, 1)
    return (normal(exact, generator) * size).to(leaf.dtype)
