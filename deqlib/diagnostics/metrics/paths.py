"""Where solves from different starts lead."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..._torch import tree_map
from ...solvers.base import norms
from ..experiment import Experiment
from ..reports import MetricReport
from ..subject import normal


@dataclass(frozen=True, eq=False)
class PathReport(MetricReport):
    """Fixed points reached from several starts (path independence, Anil et al. 2022, arXiv 2211.09961).

    The starts are the layer's own and random ones of the solution's size. Every pair of fixed points that
    were reached counts.

    Attributes:
        distance: largest distance of a pair, relative to the larger norm of the two, float64, (B,): 0 where
            all are one, 2 where two are opposite; NaN where fewer than two were reached.
        cosine: smallest cosine of a pair, float64, (B,); NaN likewise.
        reached: from how many of the starts the solve converged, int64, (B,).
        num_starts: how many there were, the layer's own included.
    """

    distance: Tensor
    cosine: Tensor
    reached: Tensor
    num_starts: int

    def numbers(self) -> dict[str, Tensor]:
        """Distance and cosine, and how many of the starts converged."""
        return {
            "path dependence": self.distance,
            "path cosine": self.cosine,
            f"starts that converge, of {self.num_starts}": self.reached,
        }


def measure_paths(experiment: Experiment) -> PathReport | None:
    """Solve from random starts of the size of the fixed point; `None` where no start is asked for."""
    if experiment.num_starts == 0:
        return None
    subject, z = experiment.subject, experiment.z
    ends, converged = [z], [experiment.solution.converged]
    for _ in range(experiment.num_starts):
        start = tree_map(lambda leaf: _like(leaf, experiment.generator), subject.f.layout.unravel(z))
        solution = subject.solve(start, experiment.layer.solver, experiment.stopping)
        converged.append(solution.converged)
        ends.append(subject.ravel(subject.polish(solution).value))
    points = [end.detach().to("cpu", torch.float64) for end in ends]
    reached = torch.stack(converged).cpu()
    distance, cosine = _widest_apart(points, reached)
    return PathReport(distance, cosine, reached.sum(0), experiment.num_starts + 1)


def _widest_apart(
    points: list[Tensor],  # (B, D) each
    reached: Tensor,  # bool, (points, B)
) -> tuple[Tensor, Tensor]:
    """Largest relative distance and smallest cosine of two points that were both reached, (B,) each."""
    distance = torch.full((reached.shape[1],), torch.nan, dtype=torch.float64)
    cosine = distance.clone()
    tiny = torch.finfo(torch.float64).tiny
    for i, j in combinations(range(len(points)), 2):
        a, b = points[i], points[j]
        norm_a, norm_b, apart = norms(a, b, a - b)
        far = apart / torch.maximum(norm_a, norm_b).clamp_min(tiny)
        angle = torch.linalg.vecdot(a, b) / (norm_a * norm_b).clamp_min(tiny)
        angle = torch.where(apart == 0, 1, angle)
        both = reached[i] & reached[j]
        distance = torch.where(both, torch.fmax(distance, far), distance)
        cosine = torch.where(both, torch.fmin(cosine, angle), cosine)
    return distance, cosine


def _like(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of each sample's size; of size 1 where it has none."""
    rest = tuple(range(1, leaf.dim()))
    exact = leaf.to(torch.float32)
    size = exact.square().mean(rest, keepdim=True).sqrt() if rest else exact.abs()
    size = torch.where(size.isfinite() & (size > 0), size, 1)
    return (normal(exact, generator) * size).to(leaf.dtype)
