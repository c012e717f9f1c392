"""A test suite that every solver can inherit (needs pytest and hypothesis).

```python
from deqlib.testing import SolverConformance

class TestMySolver(SolverConformance):
    solver = MySolver()
```

The tests are those of the contract in `deqlib.Solver`. Class attributes say what a solver does not
promise; a test that does not apply at all can be overridden.
"""

from __future__ import annotations

from .finding import FindingLaws
from .gradients import GradientLaws
from .histories import HistoryLaws
from .resuming import ResumingLaws
from .samples import SampleLaws
from .state import StateLaws


class SolverConformance(FindingLaws, SampleLaws, StateLaws, HistoryLaws, GradientLaws, ResumingLaws):
    """What every solver must do. Subclass it under a name that starts with `Test` and set `solver`.

    Attributes:
        solver: the one under test.
        max_steps: steps that it may need for the hardest problem it must solve.
        contraction: spectral radius of that problem, in (0, 1).
        rtol: relative residual it must reach, for states of float32 and of float64.
        differentiable: whether `Unroll` gives its exact gradient at convergence. Gradients on the tape
            must be finite in any case.
        resume_allowance: steps that a resumed solve may take more than a fresh one.
    """


__all__ = ["SolverConformance"]
