# ruff: noqa: D102  # the name of a test says what it is about
"""A law that every solver can inherit: what is reported and kept of a sample is its own (needs pytest).

```python
from deqlib.testing.company import CompanyConformance

class TestMySolverInCompany(CompanyConformance):
    solver = MySolver()
```
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ..fixed_point import fixed_point
from ..solution import Solution
from ..solvers import Solver
from ..stopping import Stopping


class CompanyConformance:
    """What becomes of a sample, and what is learnt of it, is the same alone, in a batch and in a compact one.

    Subclass it under a name that starts with `Test` and set `solver`. The cell adds up every row by itself,
    so that its rounding does not depend on the batch. Some of its samples attract and some repel the plain
    iteration, so that they end at different steps and steps are refused; none need be solved.

    Attributes:
        solver: the one under test.
        max_steps: steps of every solve.
    """

    solver: ClassVar[Solver]
    max_steps: ClassVar[int] = 60

    @pytest.mark.parametrize("compact", [False, True], ids=["whole batch", "compact"])
    def test_refused_steps_of_a_sample_are_counted_as_they_are_alone(self, compact: bool) -> None:
        gain, x = self._samples()
        together = self._solve(gain, x, torch.zeros_like(x), compact=compact)
        for index in range(len(x)):
            own = slice(index, index + 1)
            alone = self._solve(gain[own], x[own], torch.zeros_like(x[own]))
            found, expected = _of_sample(together, index), _of_sample(alone, 0)
            assert found == expected, f"sample {index}: {found} in company should be {expected}, as alone"

    @pytest.mark.parametrize("compact", [False, True], ids=["whole batch", "compact"])
    def test_what_was_learnt_of_a_sample_leads_on_as_it_does_alone(self, compact: bool) -> None:
        gain, x = self._samples()
        first = self._solve(gain, x, torch.zeros_like(x), compact=compact)
        together = self._solve(gain, x + 0.05, first.value, state=first.state)
        for index in range(len(x)):
            own = slice(index, index + 1)
            state = self._solve(gain[own], x[own], torch.zeros_like(x[own])).state
            alone = self._solve(gain[own], x[own] + 0.05, first.value[own], state=state)
            found, expected = _of_sample(together, index), _of_sample(alone, 0)
            assert found == expected, f"sample {index}: {found} after company should be {expected}, as alone"
            apart = float((together.value[own] - alone.value).norm())
            assert apart <= 1e-6 * float(x[own].norm()), (
                f"sample {index} goes on to another value than alone, {apart:.1e} apart"
            )

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Gains (6, 1) and injections (6, 12)."""
        generator = torch.Generator().manual_seed(0)
        gain = torch.tensor([[1.5], [1.5], [0.2], [0.3], [2.0], [1.0]], dtype=torch.float64)
        return gain, torch.randn(6, 12, generator=generator, dtype=torch.float64)

    def _solve(self, gain: Tensor, x: Tensor, z0: Tensor, **settings: Any) -> Solution:
        """Off the tape, of f(z) = gain tanh(3 W z) + x, W orthogonal."""
        generator = torch.Generator().manual_seed(1)
        matrix = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]

        def cell(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
            image: Tensor = gain * torch.tanh(3 * (z.unsqueeze(1) * matrix).sum(-1)) + x
            return image

        with torch.no_grad():
            return fixed_point(
                cell,
                z0,
                (x, gain),
                solver=self.solver,
                stopping=Stopping(rtol=1e-6, max_steps=self.max_steps),
                on_failure="ignore",
                **settings,
            )


def _of_sample(solution: Solution, index: int) -> dict[str, int]:
    """Status, steps, method and refused steps of a sample; causes that it has none of are left out."""
    found = {
        "status": int(solution.status[index]),
        "steps": int(solution.num_steps[index]),
        "method": int(solution.method[index]),
    }
    refused = {cause: int(count[index]) for cause, count in solution.rejections.items()}
    return found | {cause: number for cause, number in refused.items() if number}
