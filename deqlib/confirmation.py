"""What the whole batch, as it is returned, says of its samples.

A sample meets the tolerance at an evaluation of its own, while others still move. If samples do not depend on
one another that settles it. Whether they do nobody is asked, so it is found out: where samples finished at
different evaluations, the residuals of the whole batch at the value decide which of them are CONVERGED. The
last evaluation of a loop often measured just these. Where it did not, one more does, and a backward mode that
evaluates the map at the value anyway lends its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .progress import UnitNorms, measure, relative
from .solution import Solution, Status
from .state import Map
from .stopping import Stopping

Confirm = Callable[[Tensor], Solution]  # f at the value, (B, D) -> the solution that this settles

_SLACK = 1.4  # times the tolerance: rounding, also of batches of another size, must not make a failure


@dataclass(frozen=True, eq=False)
class Claim:
    """A solution, and whether an evaluation of the whole batch at its value is still to be made.

    Attributes:
        solution: what the loop found; its value is flat.
        f: the map of the whole batch.
        rule: that CONVERGED samples met.
        unit_norms: norms to judge a sample by; `None`: one, over all of its numbers.
        is_open: whether samples are CONVERGED that were not measured together at the value.
        objection: given f at the value, raises if the batch was cut in a way that changed the map; else it
            returns the solution, with its own evaluations counted.
    """

    solution: Solution
    f: Map
    rule: Stopping
    unit_norms: UnitNorms | None
    is_open: bool
    objection: Callable[[Solution, Tensor], Solution] | None = None

    def settled(self) -> Solution:
        """The solution, at the cost of an evaluation where the claim is open."""
        if not self.is_open:
            return self.solution
        with torch.no_grad():
            found = self.decided(self.f(self.solution.value.detach()))
        return replace(found, nfe=found.nfe + 1, sample_nfe=found.sample_nfe + 1)

    def decided(self, image: Tensor) -> Solution:
        """The solution by f at its value, (B, D), whose evaluation is not counted.

        Raises:
            ValueError: see `objection`.
        """
        image = image.detach()
        settled = self.by(*measure(image - self.solution.value.detach(), image, self.unit_norms))
        return settled if self.objection is None else self.objection(settled, image)

    def by(self, residual: Tensor, scale: Tensor) -> Solution:
        """The solution by norms of its residual and of its image, (B,) or (B, U) each."""
        found, at_value = self.solution, relative(residual, scale)
        # Written so that a residual that is not a number is too large.
        lost = ~(residual <= _SLACK * (self.rule.atol + (self.rule.rtol or 0.0) * scale))
        if residual.dim() == 2:
            residual, lost = residual.amax(1), lost.any(1)
        lost = lost & (found.status == Status.CONVERGED)
        # Where others of its sample moved after a place stood still, that is why.
        status = Status.EXITED if self.rule.hold_places else Status.COUPLED
        trace = found.trace
        if trace is not None:
            steps = torch.arange(len(trace), device=trace.device).unsqueeze(1)
            trace = torch.where(steps > found.num_steps, at_value, trace)
        return replace(
            found,
            residual=residual,
            relative_residual=at_value,
            status=found.status.masked_fill(lost, int(status)),
            trace=trace,
        )
