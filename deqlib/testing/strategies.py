"""Hypothesis strategies: contractions with known fixed points, and states of any structure.

Values come from a drawn seed, sizes and spectra from hypothesis, so that a failure shrinks to a small
problem and not to one with special numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_leaves, tree_map
from ._arguments import checked
from .problems import Problem, linear, mixed_difficulty, mlp, tanh_rnn

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ImportError(
        f"deqlib.testing.strategies needs the package hypothesis ({error}); pip install 'deqlib[testing]'"
    ) from error

_FULL = (torch.float32, torch.float64)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def contractions(
    draw: st.DrawFn,
    *,
    max_rate: float = 0.9,
    max_batch: int = 4,
    max_width: int = 9,
    dtypes: Sequence[torch.dtype] = _FULL,
) -> Problem:
    """Problems that Picard iteration solves: linear, normal or mildly not; tanh RNN; MLP with LayerNorm.

    States are (B, D), those of the MLP (B, L, C). No input that samples share is as long as the batch, so
    `compact=True` cuts the right ones.

    Args:
        draw: filled in by hypothesis.
        max_rate: bound on the spectral radius of the Jacobian at the solution, in (0, 1).
        max_batch: most samples, B.
        max_width: most numbers in the last axis, D or C; at least 2.
        dtypes: to draw from.

    Raises:
        ValueError: `max_rate`, `max_batch` or `max_width` is out of range.
    """
    if not 0 < max_rate < 1:
        raise ValueError(f"contractions: max_rate must be in (0, 1), got {max_rate}")
    if max_batch < 1 or max_width < 2:
        raise ValueError(
            "contractions: max_batch must be at least 1 and max_width at least 2, "
            f"got {max_batch} and {max_width}"
        )
    batch = draw(st.integers(1, max_batch))
    widths = [width for width in range(1, max_width + 1) if width != batch]
    wide = [width for width in widths if width >= 4]  # LayerNorm leaves too little of fewer channels
    dtype, seed = draw(st.sampled_from(list(dtypes))), draw(st.integers(0, 2**31))
    kinds = ["linear", "non-normal", "tanh", "rated"] + ["mlp"] * bool(wide)
    kind = draw(st.sampled_from(kinds))
    rate = draw(st.floats(0.05 * max_rate, max_rate))
    if kind == "mlp":
        # Weights of gain 0.5 have norms near 1, and the norm divides by about the injection.
        return mlp(
            batch=batch,
            tokens=draw(st.integers(1, 3)),
            width=draw(st.sampled_from(wide)),
            gain=0.5,
            injection=3 / rate,
            dtype=dtype,
            seed=seed,
        )
    width = draw(st.sampled_from(widths))
    if kind == "tanh":
        # W then has the norm `rate`: a contraction everywhere, not only at the solution.
        return tanh_rnn(batch=batch, width=width, rate=0.75 * rate, dtype=dtype, seed=seed)
    if kind == "rated":
        easy = draw(st.floats(0, 1)) * rate
        return mixed_difficulty(batch=batch, width=width, easy=easy, hard=rate, dtype=dtype, seed=seed)
    spectrum = draw(st.lists(st.floats(-1, 1, width=16), min_size=width, max_size=width))
    return linear(
        [rate * value for value in spectrum],
        batch=batch,
        non_normality=draw(st.floats(0.01, 0.3)) if kind == "non-normal" else 0.0,
        dtype=dtype,
        seed=seed,
    )


@checked
def states(
    *,
    min_batch: int = 0,
    max_batch: int = 4,
    max_leaves: int = 4,
    max_axes: int = 3,
    max_length: int = 3,
    dtypes: Sequence[torch.dtype] = _FLOATING,
) -> st.SearchStrategy[Any]:
    """Pytrees of tensors (B, ...) that share B: tensors, and tuples, lists and dicts of them, nested.

    Leaves are drawn from the normal distribution; they may be empty, or (B,).

    Args:
        min_batch: fewest samples.
        max_batch: most samples.
        max_leaves: most tensors; there is at least one.
        max_axes: most axes of a leaf behind the batch.
        max_length: longest such axis.
        dtypes: to draw from, for every leaf.
    """

    leaf = st.builds(
        _Leaf,
        st.lists(st.integers(0, max_length), max_size=max_axes).map(tuple),
        st.sampled_from(list(dtypes)),
        st.integers(0, 2**31),
    )
    trees = st.recursive(leaf, _containers, max_leaves=max_leaves)
    return st.builds(_fill, trees, st.integers(min_batch, max_batch))


@dataclass(frozen=True)
class _Leaf:
    """A tensor to come: all but its batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    def of(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn((batch, *self.shape), generator=generator, dtype=torch.float64).to(self.dtype)


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(children, min_size=1, max_size=3)
    return lists | lists.map(tuple) | st.dictionaries(st.sampled_from("abcd"), children, min_size=1)


def _fill(tree: Any, batch: int) -> Any:
    return tree_map(lambda leaf: leaf.of(batch), tree)


@dataclass(frozen=True)
class PytreeProblem:
    """z = cell(z, *inputs) on a pytree, with a known answer.

    Attributes:
        cell: `cell(z, *inputs) -> z`; a contraction, samples do not depend on one another.
        z0: where to start, leaves (B, ...).
        inputs: of the cell; all tensors in them have B first.
        solution: the fixed point, structured like `z0`.
        rate: Lipschitz constant of the cell in z, Euclidean norm over all leaves.
    """

    cell: Callable[..., Any]
    z0: Any
    inputs: tuple[Any, ...]
    solution: Any
    rate: float

    def f(self, z: Any) -> Any:
        """The map, inputs filled in."""
        return self.cell(z, *self.inputs)


@checked
def pytree_problems(
    *,
    max_rate: float = 0.9,
    min_batch: int = 1,
    max_batch: int = 4,
    max_leaves: int = 4,
    dtypes: Sequence[torch.dtype] = _FULL,
) -> st.SearchStrategy[PytreeProblem]:
    """Contractions whose state is one of `states`; every number of a sample depends on all of them.

    Args:
        max_rate: bound on the Lipschitz constant, in (0, 1).
        min_batch: fewest samples.
        max_batch: most samples.
        max_leaves: most tensors.
        dtypes: to draw from, for every leaf.
    """

    def make(solution: Any, rate: float) -> PytreeProblem:
        z0 = tree_map(torch.zeros_like, solution)
        return PytreeProblem(_MeanCell(rate), z0, (solution,), solution, rate)

    trees = states(min_batch=min_batch, max_batch=max_batch, max_leaves=max_leaves, dtypes=dtypes)
    return st.builds(make, trees, st.floats(0.05 * max_rate, max_rate))


@dataclass(frozen=True)
class _MeanCell:
    """With d = z - solution: solution + rate * (tanh(d) + mean of d over the sample) / 2."""

    rate: float

    def __call__(self, z: Any, solution: Any) -> Any:
        deviations = tree_map(torch.sub, z, solution)
        rows = [leaf.reshape(leaf.shape[0], leaf.shape[1:].numel()) for leaf in tree_leaves(deviations)]
        flat = torch.cat([row.double() for row in rows], 1)
        mean = flat.sum(1) / max(flat.shape[1], 1)

        def image(centre: Tensor, deviation: Tensor) -> Tensor:
            shared = mean.view(-1, *[1] * (centre.dim() - 1)).to(centre.dtype)
            return centre + 0.5 * self.rate * (torch.tanh(deviation) + shared)

        return tree_map(image, solution, deviations)
