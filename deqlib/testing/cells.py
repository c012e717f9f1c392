# ruff: noqa: D102  # the name of a test says what it is about
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

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .._scope import Scope, entered
from ..backward import Unroll
from ..fixed_point import fixed_point
from ..layer import ImplicitLayer
from ..state import AUTOMATIC, cut
from ..stopping import Stopping

_SLACK = 1e-3  # relative, between a contraction that is promised and one that is measured
_PATH = 6  # points of a solve that the contraction is measured at
_POWER = 4  # evaluations that look for the direction which grows most, at each of them


class CellConformance:
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

    cell: ClassVar[Any]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)
    batch: ClassVar[int] = 5
    axes: ClassVar[tuple[int | None, ...] | None] = None
    independent: ClassVar[bool] = True
    bitwise: ClassVar[bool] = True
    tolerances: ClassVar[dict[torch.dtype, float]] = {
        torch.float64: 1e-9,
        torch.float32: 1e-4,
        torch.float16: 2e-2,
        torch.bfloat16: 1e-1,
    }
    may_change: ClassVar[tuple[str, ...]] = ()
    contraction: ClassVar[float | None] = None
    differentiable: ClassVar[bool] = True
    stopping: ClassVar[Stopping | None] = Stopping()
    gradient_rtol: ClassVar[float] = 1e-3
    empty: ClassVar[bool] = False

    def make_inputs(
        self, batch: int, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Any, tuple[Any, ...]]:
        """Where a solve starts, and the further arguments of the cell.

        Args:
            batch: samples, the first axis of every tensor of the state.
            dtype: of the state.
            generator: on the CPU; draws from it, or from the default one, are the same every time.

        Returns:
            z0, a tensor or pytree of tensors (B, ...), and a tuple of inputs.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: write make_inputs(batch, dtype, generator), returning z0 and a tuple"
        )

    # What it returns ------------------------------------------------------------------------------------

    def test_the_output_is_a_finite_state_like_the_one_given(self) -> None:
        for dtype in self.dtypes:
            _demand(self._output_fault(dtype))

    def test_the_same_point_gives_the_same_bits(self) -> None:
        self._require(self._output_fault)
        _demand(self._repetition_fault())

    def test_nothing_is_changed_in_place(self) -> None:
        self._require(self._output_fault)
        _demand(self._writing_fault())
        _demand(self._buffer_fault())

    # Samples by themselves ------------------------------------------------------------------------------

    def test_a_sample_that_moves_leaves_the_others_where_they_are(self) -> None:
        setup = self._setup_of_independent()
        other = self._setup(seed=1)
        expected = setup.image()
        for sample in (0, self.batch - 1):
            row = torch.tensor([sample])
            others = torch.tensor([k for k in range(self.batch) if k != sample])
            found = setup.image(self._exchange(setup, other, row))
            apart = _difference(_rows(found, others), _rows(expected, others))
            _demand(
                self._compared(
                    f"another state and other inputs of sample {sample} should change no other sample", apart
                )
            )

    def test_the_order_of_the_samples_does_not_matter(self) -> None:
        setup = self._setup_of_independent()
        order = torch.randperm(self.batch, generator=setup.generator)
        found = setup.part(order)
        apart = _difference(found, _rows(setup.image(), order))
        _demand(
            self._compared(f"samples in the order {order.tolist()} should give outputs in that order", apart)
        )

    def test_a_sample_gives_the_same_alone_as_in_its_batch(self) -> None:
        setup = self._setup_of_independent()
        expected = setup.image()
        for samples in ([0], [self.batch - 1], [0, self.batch - 1]):
            rows = torch.tensor(samples)
            what = f"samples {samples} in a batch of their own should give the same as in that of all"
            try:
                found = setup.part(rows)
            except Exception as error:
                raise AssertionError(
                    f"{what}, but the cell raised {error!r}; {self._independence()}"
                ) from error
            _demand(self._compared(what, _difference(found, _rows(expected, rows))))

    def test_a_sample_that_is_not_finite_stays_the_only_one(self) -> None:
        setup = self._setup_of_independent()
        expected, row = setup.image(), torch.tensor([1])
        others = torch.tensor([k for k in range(self.batch) if k != 1])
        for value in (math.nan, math.inf):
            spoilt = self._exchange(setup, self._filled(setup, value), row)
            what = f"a sample of {value} should leave the others as they are"
            try:
                found = _rows(setup.image(spoilt), others)
            except Exception as error:
                raise AssertionError(
                    f"{what}, but the cell raised {error!r}; {self._independence()}"
                ) from error
            if not _is_finite(found):
                bad = [
                    k
                    for k, ok in zip(others.tolist(), _finite_samples(found).tolist(), strict=True)
                    if not ok
                ]
                raise AssertionError(f"{what}, but samples {bad} are not finite; {self._independence()}")
            _demand(self._compared(what, _difference(found, _rows(expected, others))))

    # The map --------------------------------------------------------------------------------------------

    def test_it_contracts(self) -> None:
        self._require(self._output_fault, self._repetition_fault, self._writing_fault)
        found, where = self._measured_contraction()
        if self.contraction is None:
            pytest.skip(f"`contraction` is not promised; measured {found:.3g} {where}")
        assert found <= self.contraction * (1 + _SLACK), (
            f"||f(a) - f(b)|| / ||a - b|| should be at most {self.contraction:g}, measured {found:.3g} "
            f"{where}; scale the weights that act on z down, or bound them by deqlib.nn.spectral_norm; or "
            "raise `contraction` on the test class (None: not promised)"
        )

    def test_gradients_reach_state_inputs_and_parameters_and_are_finite(self) -> None:
        self._require(self._output_fault, self._writing_fault)
        if not self.differentiable:
            pytest.skip("`differentiable` is False: not promised")
        _demand(self._gradient_fault())

    # The layer ------------------------------------------------------------------------------------------

    def test_the_default_layer_solves_it(self) -> None:
        self._require(self._output_fault, self._repetition_fault, self._writing_fault)
        if self.stopping is None:
            pytest.skip("`stopping` is None: not promised")
        _demand(self._solve_fault())

    def test_the_gradient_of_the_layer_is_that_of_an_unrolled_solve(self) -> None:
        if self.stopping is None or not self.differentiable:
            pytest.skip("`stopping` is None or `differentiable` is False: not promised")
        self._require(self._output_fault, self._repetition_fault, self._writing_fault)
        self._require(self._gradient_fault, self._solve_fault)
        dtype = self._dtype()
        if dtype not in (torch.float32, torch.float64):
            pytest.skip(f"{dtype} is too coarse to compare gradients; add float32 to `dtypes`")
        tight = Stopping(rtol=2e-6 if dtype == torch.float32 else 1e-10, max_steps=400, patience=None)
        setup, gradients = self._setup(), []
        for backward in (None, Unroll()):
            _, inputs, tensors = self._recorded(setup, with_state=False)
            if not tensors:
                pytest.skip("the cell has neither trainable parameters nor inputs of floating-point dtype")
            layer = ImplicitLayer(setup.cell, stopping=tight, backward=backward, on_failure="ignore")
            with torch.enable_grad(), entered(setup.scope):
                solution = layer.solve(*inputs, z0=setup.z0)
                assert solution.converged.all(), (
                    f"the layer should reach rtol={tight.rtol:g} in {tight.max_steps} steps to compare "
                    f"gradients, got {solution}; if that is not promised set `stopping = None` on the test "
                    "class"
                )
                found: tuple[Tensor | None, ...] = (None,) * len(tensors)
                loss = _weighted(solution.value)
                if loss.requires_grad:
                    found = torch.autograd.grad(loss, tuple(tensors.values()), allow_unused=True)
            gradients.append(dict(zip(tensors, found, strict=True)))
        implicit, unrolled = gradients
        # A gradient that is zero comes out as rounding errors of the others.
        total = math.hypot(*(float(g.norm()) for g in unrolled.values() if g is not None))
        for name, expected in unrolled.items():
            gradient = implicit[name]
            assert gradient is not None, f"no gradient of the layer reaches {name}"
            assert expected is not None, f"no gradient through an unrolled solve reaches {name}"
            error = float((gradient - expected).norm()) / max(float(expected.norm()), 1e-3 * total, 1e-300)
            assert error <= self.gradient_rtol, (
                f"the gradient of {name} by implicit differentiation should be that through an unrolled "
                f"solve, relative difference {error:.1e}; look for what changes gradients on their way "
                "through the cell (hooks, custom backward passes), or raise `gradient_rtol` "
                f"(now {self.gradient_rtol:g}) on the test class"
            )

    # Faults that other laws rest on not being there -----------------------------------------------------

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
            if not _is_finite(image):
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
            apart, allowed = _difference(found, first), self._tolerance()
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
        return self._changed(lambda setup: _named("z", setup.z) | _named("inputs", setup.inputs), "input")

    def _buffer_fault(self) -> str | None:
        """Whether a parameter or buffer of the module is written to."""
        return self._changed(lambda setup: self._own(setup.cell), "buffer")

    def _gradient_fault(self) -> str | None:
        """What gradients do not reach, or where they are not finite."""
        setup = self._setup()
        z, inputs, tensors = self._recorded(setup, with_state=True)
        with torch.enable_grad():
            loss = _weighted(setup.image((z, inputs)))
            found: tuple[Tensor | None, ...] = (None,) * len(tensors)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, tuple(tensors.values()), allow_unused=True)
        without = [name for name, gradient in zip(tensors, found, strict=True) if gradient is None]
        spoilt = [n for n, g in zip(tensors, found, strict=True) if g is not None and not g.isfinite().all()]
        advice = "set `differentiable = False` on the test class if that is not promised"
        if without:
            return (
                f"gradients should reach the state, inputs and parameters, but not {', '.join(without)}; "
                f"look for detach(), .data, no_grad or what is never used, freeze what is not trained, or "
                f"{advice}"
            )
        if spoilt:
            return (
                f"gradients should be finite, but not those of {', '.join(spoilt)}; look for divisions, "
                f"roots and norms at zero, or {advice}"
            )
        return None

    def _solve_fault(self) -> str | None:
        """Whether the layer does not solve it."""
        setup = self._setup()
        layer = ImplicitLayer(setup.cell, stopping=self.stopping, on_failure="ignore")
        with torch.no_grad():
            found = layer.solve(*setup.inputs, z0=setup.z0)
        if found.converged.all():
            return None
        return (
            f"ImplicitLayer(cell) should solve it with {self.stopping}, got {found}; a smaller gain on z "
            "makes it easier, and deqlib.diagnose says more; or set another `stopping` on the test class "
            "(None: not promised)"
        )

    def _changed(self, watch: Callable[[_Setup], dict[str, Tensor]], kind: str) -> str | None:
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

    # Tools ----------------------------------------------------------------------------------------------

    def _require(self, *faults: Callable[[], str | None]) -> None:
        """Skip where one is found; the first of them lets the others be looked for."""
        for find in faults:
            fault = find()
            if fault is not None:
                pytest.skip(f"rests on another law, which the cell breaks: {fault}")

    def _setup_of_independent(self) -> _Setup:
        if not self.independent:
            pytest.skip("`independent` is False: not promised")
        self._require(self._output_fault, self._repetition_fault)
        return self._setup()

    def _independence(self) -> str:
        return (
            "nothing may mix samples: use norms over a sample (LayerNorm, GroupNorm, RMSNorm), BatchNorm "
            "only in eval(), attention over tokens (batch_first=True), and sums over other axes than the "
            "first; say in `axes` which inputs samples share if one has as many rows as `batch`; or set "
            "`independent = False` on the test class"
        )

    def _compared(self, what: str, apart: float) -> str | None:
        allowed = self._tolerance()
        if apart <= allowed:
            return None
        return (
            f"{what}, but the difference is {apart:.1e} (relative, `tolerances` allow {allowed:g}); "
            f"{self._independence()}"
        )

    def _dtype(self) -> torch.dtype:
        """The widest."""
        return max(self.dtypes, key=lambda dtype: torch.finfo(dtype).bits)

    def _tolerance(self) -> float:
        dtype = self._dtype()
        if dtype not in self.tolerances:
            raise ValueError(f"CellConformance: `tolerances` must have an entry for {dtype}")
        return self.tolerances[dtype]

    def _setup(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        batch: int | None = None,
        at_start: bool = False,
    ) -> _Setup:
        """The cell, its inputs and a random point, the same for the same seed."""
        if self.batch < 2:
            raise ValueError(f"CellConformance: batch must be at least 2, got {self.batch}")
        dtype, batch = self._dtype() if dtype is None else dtype, self.batch if batch is None else batch
        generator = torch.Generator().manual_seed(seed)
        with _same_draws(0):
            cell = self._converted(dtype)
        with _same_draws(seed):
            z0, inputs = self.make_inputs(batch, dtype, generator)
        if not isinstance(inputs, tuple):
            raise TypeError(
                f"make_inputs: expected z0 and a tuple of inputs, got inputs of type {type(inputs).__name__}"
            )
        setup = _Setup(cell, z0, z0, inputs, self.axes, batch, generator)
        if not at_start:
            setup.z = tree_map(lambda fz: _moved(fz, 0.3, generator), setup.image())
        return setup

    def _converted(self, dtype: torch.dtype) -> Any:
        found = inspect.getattr_static(type(self), "cell", None)
        if found is None:
            raise TypeError(f"{type(self).__name__}: set `cell` to the cell under test")
        if inspect.isfunction(found) and next(iter(inspect.signature(found).parameters), "") != "self":
            return found  # not bound to the test
        cell = self.cell
        if not isinstance(cell, nn.Module):
            return cell
        if not isinstance(found, property):
            cell = copy.deepcopy(cell)
        return cell.to(dtype)

    def _exchange(self, setup: _Setup, other: _Setup, row: Tensor) -> tuple[Any, tuple[Any, ...]]:
        """A point and its inputs, with some samples those of another."""
        axes = self.axes if self.axes is not None else (AUTOMATIC,) * len(setup.inputs)
        inputs = tuple(
            _with_rows(a, b, axis, self.batch, row)
            for a, b, axis in zip(setup.inputs, other.inputs, axes, strict=True)
        )
        return _with_rows(setup.z, other.z, 0, self.batch, row), inputs

    def _filled(self, setup: _Setup, value: float) -> _Setup:
        def fill(leaf: Any) -> Any:
            is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return torch.full_like(leaf, value) if is_float else leaf

        z, inputs = tree_map(fill, setup.z), tree_map(fill, setup.inputs)
        return _Setup(setup.cell, z, z, inputs, self.axes, self.batch, setup.generator)

    def _recorded(self, setup: _Setup, *, with_state: bool) -> tuple[Any, tuple[Any, ...], dict[str, Tensor]]:
        """The state and the inputs as leaves of the tape, and all tensors that gradients should reach."""

        def leaf(x: Any) -> Any:
            is_float = isinstance(x, Tensor) and x.is_floating_point()
            return x.detach().clone().requires_grad_() if is_float else x

        z = tree_map(leaf, setup.z) if with_state else setup.z
        inputs = tuple(tree_map(leaf, x) for x in setup.inputs)
        named = (_named("z", z) if with_state else {}) | _named("inputs", inputs)
        if isinstance(setup.cell, nn.Module):
            named |= dict(setup.cell.named_parameters())
        return z, inputs, {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def _measured_contraction(self) -> tuple[float, str]:
        """The largest ratio found, and where."""
        setup = self._setup()
        path: list[Any] = [setup.z]

        def spied(z: Any, *inputs: Any) -> Any:
            path.append(tree_map(torch.clone, z))
            return setup.cell(z, *inputs)

        with torch.no_grad(), entered(setup.scope):
            fixed_point(spied, setup.z0, setup.inputs, stopping=Stopping(max_steps=24), on_failure="ignore")
        path = [z for z in path if _is_finite(z)]
        chosen = sorted({round(k * (len(path) - 1) / (_PATH - 1)) for k in range(_PATH)})
        images = {k: setup.image((path[k], setup.inputs)) for k in chosen}
        worst, where = 0.0, "everywhere"
        for k in chosen:
            place = f"near evaluation {k} of a solve" if k else "near a random point"
            pairs = [(path[j], images[j]) for j in chosen if j < k]
            found = [self._ratio(path[k], images[k], z, fz) for z, fz in pairs[-1:]]
            found += self._grown(setup, path[k], images[k])
            # A ratio that is not a number is one of no bound.
            largest = max(math.inf if math.isnan(ratio) else ratio for ratio in found)
            if largest > worst:
                worst, where = largest, place
        return worst, where

    def _grown(self, setup: _Setup, z: Any, fz: Any) -> list[float]:
        """Ratios at a point, at two distances, in directions that come nearer to the one that grows most."""
        small = max(1e-3, math.sqrt(torch.finfo(self._dtype()).eps))
        found = []
        for share in (small, 0.3):
            direction = tree_map(lambda leaf: _moved(torch.zeros_like(leaf), 1.0, setup.generator), z)
            for _ in range(_POWER):
                length = share * torch.maximum(self._norms(z), self._norms(fz))
                length = torch.where(length > 0, length, share) / self._norms(direction).clamp_min(1e-300)
                near = tree_map(lambda leaf, d, by=length: leaf + _scaled(d, by), z, direction)
                image = setup.image((near, setup.inputs))
                found.append(self._ratio(near, image, z, fz))
                direction = tree_map(torch.sub, image, fz)
                if not _is_finite(direction) or not (self._norms(direction) > 0).all():
                    break
        return found

    def _ratio(self, a: Any, fa: Any, b: Any, fb: Any) -> float:
        """The largest of all samples."""
        apart = self._norms(tree_map(torch.sub, a, b))
        ratio = self._norms(tree_map(torch.sub, fa, fb)) / apart
        ratio = ratio[apart > 0]
        return float(ratio.max()) if len(ratio) else 0.0

    def _norms(self, tree: Any) -> Tensor:
        """Of each sample, (B,); of all together, as often, where samples depend on one another."""
        norms: Tensor = _flat(tree).norm(dim=1)
        return norms if self.independent else norms.norm().expand(len(norms))


@dataclass
class _Setup:
    """A cell, where it is evaluated, and the solve that the evaluations belong to."""

    cell: Any
    z0: Any
    z: Any
    inputs: tuple[Any, ...]
    axes: tuple[int | None, ...] | None
    batch: int
    generator: torch.Generator
    scope: Scope = field(default_factory=Scope)

    def image(self, at: tuple[Any, tuple[Any, ...]] | None = None, *, copied: bool = True) -> Any:
        """The cell at the point, or at another with inputs of its own; on copies of both."""
        z, inputs = (self.z, self.inputs) if at is None else at
        return self._evaluate(z, inputs, self.scope, copied)

    def part(self, rows: Tensor) -> Any:
        """The cell at some samples, as the driver evaluates it when others have left the batch."""
        axes = self.axes if self.axes is not None else (AUTOMATIC,) * len(self.inputs)
        inputs = tuple(cut(x, axis, self.batch, rows) for x, axis in zip(self.inputs, axes, strict=True))
        return self._evaluate(_rows(self.z, rows), inputs, self.scope.take(rows, self.batch), True)

    def _evaluate(self, z: Any, inputs: tuple[Any, ...], scope: Scope, copied: bool) -> Any:
        if copied:
            z, inputs = tree_map(_copy, z), tuple(tree_map(_copy, x) for x in inputs)
        # A copy of a recorded tensor is on the tape: only `enable_grad` around this asks for gradients.
        recorded = torch.is_grad_enabled() and any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((z, inputs))
        )
        with torch.set_grad_enabled(recorded), entered(scope):
            return self.cell(z, *inputs)


def _demand(fault: str | None) -> None:
    assert fault is None, fault


@contextmanager
def _same_draws(seed: int) -> Iterator[None]:
    """The default generator of the CPU seeded; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _rows(tree: Any, rows: Tensor) -> Any:
    return tree_map(lambda leaf: leaf.index_select(0, rows.to(leaf.device)), tree)


def _with_rows(ours: Any, theirs: Any, axis: int | str | None, batch: int, rows: Tensor) -> Any:
    """A state or input with some samples those of another."""
    if axis is None:
        return ours

    def one(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        along = axis
        if along == AUTOMATIC:
            if a.dim() == 0 or a.shape[0] != batch:
                return a
            along = 0
        assert isinstance(along, int)
        where = rows.to(a.device)
        return a.index_copy(along, where, b.index_select(along, where))

    return tree_map(one, ours, theirs)


def _moved(leaf: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A tensor with normal noise added, in proportion to its size."""
    size = float(leaf.detach().double().square().mean().sqrt()) if leaf.numel() else 0.0
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    scale = share * size if math.isfinite(size) and size > 0 else share
    return leaf.detach() + (scale * noise).to(leaf)


def _scaled(leaf: Tensor, by: Tensor) -> Tensor:
    """Every sample of a leaf times its factor, (B,)."""
    return leaf * by.view(-1, *[1] * (leaf.dim() - 1)).to(leaf)


def _flat(tree: Any) -> Tensor:
    """All numbers of every sample, (B, D), float64."""
    rows = [leaf.detach().reshape(leaf.shape[0], leaf.shape[1:].numel()) for leaf in tree_leaves(tree)]
    return torch.cat([row.to("cpu", torch.float64) for row in rows], 1)


def _finite_samples(tree: Any) -> Tensor:
    """Which samples are finite, bool (B,)."""
    return _flat(tree).isfinite().all(1)


def _is_finite(tree: Any) -> bool:
    return bool(_finite_samples(tree).all())


def _difference(found: Any, expected: Any) -> float:
    """Relative difference of the sample that differs most; not a number is as far as can be."""
    a, b = _flat(found), _flat(expected)
    apart = (a - b).norm(dim=1)
    largest = torch.where(apart == 0, 0.0, apart / b.norm(dim=1)).nan_to_num(nan=math.inf)
    return float(largest.max()) if len(largest) else 0.0


def _named(name: str, tree: Any) -> dict[str, Tensor]:
    """The tensors of a pytree by their place in it."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(tree)
    keys = torch.utils._pytree.keystr
    return {name + keys(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _comparable(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors with what is not a number replaced, which is not equal to itself."""
    if not a.is_floating_point():
        return a, b
    return a.detach().nan_to_num(nan=0.5, posinf=None, neginf=None), b.nan_to_num(nan=0.5)


def _weighted(tree: Any) -> Tensor:
    """The sum of all numbers with random weights, a loss that depends on each."""
    generator = torch.Generator().manual_seed(7)
    parts = [
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)).sum()
        for leaf in tree_leaves(tree)
    ]
    return cast(Tensor, sum(parts))


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
