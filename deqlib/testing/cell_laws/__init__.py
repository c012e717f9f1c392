"""A test suite that the cell of a layer can inherit (needs pytest).

```python
from deqlib.testing import CellConformance

class TestMyCell(CellConformance):
    cell = MyCell(width=16)

    def make_inputs(self, batch, dtype, generator):
        x = torch.randn(batch, 16, dtype=dtype, generator=generator)
        return torch.zeros_like(x), (x,)
```

The laws are what solvers and backward modes take for granted. Class attributes say what a cell does not
promise; a law that does not apply at all can be overridden. A law is skipped where the cell breaks another
one that it rests on, so that a fault is reported once.
"""

from __future__ import annotations

from .layer import LayerLaws
from .samples import SampleLaws


class CellConformance(SampleLaws, LayerLaws):
    """What a cell must do. Subclass it under a name that starts with `Test`; set `cell`, write `make_inputs`.

    Laws that compare values are checked in the widest of `dtypes`, under `torch.no_grad`; all evaluations of
    one law belong to one solve, as in `deqlib.nn.one_solve`.

    Attributes:
        cell: `cell(z, *inputs) -> z`. A module is copied and converted to the dtype of the law, in the mode
            (`train()` or `eval()`) that it is in. A function is used as it is, or as a method if its
            first parameter is `self`. A property may build a new cell each time.
        dtypes: of the states that it is made for.
        batch: samples, at least 2.
        axes: the batch axis of the tensors in each input, `None` for an input that samples share. `None` in
            place of the tuple: the first axis, wherever it is as long as the batch.
        independent: whether samples do not depend on one another.
        bitwise: whether the same point gives the same bits; else it is the same within `tolerances`.
        tolerances: relative difference of a sample's values up to which they are the same, by dtype.
        may_change: patterns (as in `fnmatch`) of the names of buffers that an evaluation may write to.
        contraction: bound on `||f(a) - f(b)|| / ||a - b||` of each sample, measured at random points near the
            path of a solve. Sampling finds a lower bound of the true constant. `None`: not promised.
        differentiable: whether gradients reach the state, floating-point inputs and trainable parameters.
        stopping: the rule by which an `ImplicitLayer` of otherwise default settings must solve it. `None`:
            not promised.
        gradient_rtol: relative difference allowed between its gradient and that through an unrolled solve.
        empty: whether it must take a batch of no samples.
    """


__all__ = ["CellConformance"]
