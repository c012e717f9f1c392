# ruff: noqa: D102  # the name of a test says what it is about
"""What a cell returns: a state like the one given, the same every time, and nothing changed in place."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import tree_flatten, tree_leaves, tree_unflatten
from .base import CellLaws, Evaluation, demand
from .trees import difference, is_finite, named_tensors


class OutputLaws(CellLaws):
    """What a cell returns. Other laws rest on these."""

    def test_the_output_is_a_finite_state_like_the_one_given(self) -> None:
        for dtype in self.dtypes:
            demand(self._output_fault(dtype))

    def test_the_same_point_gives_the_same_bits(self) -> None:
        self._require(self._output_fault)
        demand(self._repetition_fault())

    def test_nothing_is_changed_in_place(self) -> None:
        self._require(self._output_fault)
        demand(self._writing_fault())
        demand(self._buffer_fault())

    def _output_fault(self, dtype: torch.dtype | None = None) -> str | None:
        """What is wrong with the structure, shapes, dtypes, device or numbers of the output."""
        dtype = self._dtype() if dtype is None else dtype
        for batch in (self.batch, 1, 0)[: 3 if self.empty else 1]:
            which = f"a state of {batch} samples of {dtype}"
            knob = "if the cell is not made for it, change `dtypes` on the test class"
            if batch == 0:
                knob = "set `empty = False` on the test class if that is not promised"
            setup = self._setup(dtype=dtype, batch=batch, at_start=True)
            try:
                image = setup.image()
            except Exception as error:
                return f"the cell should take {which}, but it raised {error!r}; {knob}"
            fault = _unlike(image, setup.z0)
            if fault is not None:
                return f"the output should be like the state that was given, {which}: {fault}; {knob}"
            if not is_finite(image):
                return f"the output at z0 should be finite, {which}: got numbers that are not; {knob}"
        return None

    def _repetition_fault(self) -> str | None:
        """Whether the same point gives something else another time."""
        setup, other = self._setup(), self._setup(seed=1)
        first = setup.image()
        again = setup.image()
        setup.image((other.z, other.inputs))
        later = setup.image()
        for found, when in ((again, "a second time"), (later, "after another point")):
            leaves = zip(tree_leaves(found), tree_leaves(first), strict=True)
            if all(torch.equal(a, b) for a, b in leaves):
                continue
            apart, allowed = difference(found, first), self._tolerance()
            if not self.bitwise and apart <= allowed:
                continue
            bits = "the same bits" if self.bitwise else f"the same within {allowed:g}"
            return (
                f"the same point should give {bits}, but {when} it differs by {apart:.1e} (relative); "
                "nothing may be drawn or counted from one evaluation to the next: call eval() on the cell, "
                "or use deqlib.nn.Dropout, which draws once a solve; where only the order of additions "
                "differs set `bitwise = False` on the test class"
            )
        return None

    def _writing_fault(self) -> str | None:
        """Whether the state, an input or a parameter is written to."""

        def given(setup: Evaluation) -> dict[str, Tensor]:
            return named_tensors("z", setup.z) | named_tensors("inputs", setup.inputs)

        return self._changed(given, "input")

    def _buffer_fault(self) -> str | None:
        """Whether a parameter or buffer of the module is written to."""
        return self._changed(lambda setup: self._own(setup.cell), "buffer")

    def _changed(self, watch: Callable[[Evaluation], dict[str, Tensor]], kind: str) -> str | None:
        setup = self._setup()
        setup.image()  # what a module draws or updates once a solve is allowed
        watched = watch(setup)
        before = {name: tensor.detach().clone() for name, tensor in watched.items()}
        setup.image(copied=False)
        changed = [
            name for name, tensor in watched.items() if not torch.equal(*_comparable(tensor, before[name]))
        ]
        if not changed:
            return None
        advice = (
            "use z = z * a instead of z.mul_(a); no knob allows it, for solvers keep what they passed in"
            if kind == "input"
            else "call eval() on the cell or replace the module that keeps statistics, or name them in "
            "`may_change` on the test class"
        )
        return f"an evaluation should change nothing in place, but {', '.join(changed)} changed; {advice}"

    def _own(self, cell: Any) -> dict[str, Tensor]:
        if not isinstance(cell, nn.Module):
            return {}
        named = {**dict(cell.named_parameters()), **dict(cell.named_buffers())}
        return {n: t for n, t in named.items() if not any(fnmatch(n, pattern) for pattern in self.may_change)}


def _comparable(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors with what is not a number replaced, which is not equal to itself."""
    if not a.is_floating_point():
        return a, b
    return a.detach().nan_to_num(nan=0.5, posinf=None, neginf=None), b.nan_to_num(nan=0.5)


def _unlike(image: Any, z: Any) -> str | None:
    """In what an output differs from the state."""
    leaves, spec = tree_flatten(image)
    expected, known = tree_flatten(z)
    if spec != known:
        shown = [repr(tree_unflatten(["tensor"] * s.num_leaves, s)).replace("'", "") for s in (known, spec)]
        return f"expected the structure {shown[0]}, got {shown[1]}"
    for index, (leaf, state) in enumerate(zip(leaves, expected, strict=True)):
        place = f"leaf {index}: " if len(expected) > 1 else ""
        if not isinstance(leaf, Tensor):
            return f"{place}expected a tensor, got {type(leaf).__name__}"
        for what in ("shape", "dtype", "device"):
            got, wanted = getattr(leaf, what), getattr(state, what)
            if got != wanted:
                shown = [str(tuple(x)) if what == "shape" else str(x) for x in (wanted, got)]
                return f"{place}expected the {what} {shown[0]}, got {shown[1]}"
    return None
