from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import deqlib.nn
from deqlib import Stopping
from deqlib.testing import CellConformance


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def bounded(module: nn.Module, factor: float = 0.3) -> nn.Module:
    """The module with weights so small that its map contracts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= factor
    return module


class Dense(nn.Module):
    """tanh(W z + b + x)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inner = bounded(nn.Linear(width, width), 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


class Block(nn.Module):
    """A transformer block on tokens (B, L, C), with dropout in its feed-forward part."""

    def __init__(self, width: int = 8, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.attention = bounded(nn.MultiheadAttention(width, 2, batch_first=True))
        self.norm = nn.LayerNorm(width)
        self.feed = bounded(nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width)))
        self.drop = nn.Identity() if drop is None else drop

    def forward(self, z: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(z + x)
        h = h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return 0.5 * (h + self.drop(self.feed(h)))


class Convolution(nn.Module):
    """A residual block on images (B, C, H, W), normalised by group."""

    def __init__(self, channels: int = 4, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = bounded(nn.Conv2d(channels, channels, 3, padding=1))
        self.norm = nn.GroupNorm(2, channels) if norm is None else norm

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.relu(0.4 * self.norm(x + self.conv(z)))


class Pair(nn.Module):
    """Two states that depend on one another, in a dict, with a bag of tokens (L, B) as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.to_image = bounded(nn.Linear(4, 8))

    def forward(self, z: dict[str, Any], tokens: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        (image,) = z["rest"]
        words = self.table(tokens).mean(0) * options["scale"]
        hidden = torch.tanh(0.3 * z["hidden"] + image.flatten(1)[:, :4] * 0.2 + words)
        return {"hidden": hidden, "rest": (0.5 * image + self.to_image(hidden).unflatten(1, (2, 4)),)}


class Vectors(CellConformance):
    """States and inputs (B, 6)."""

    def make_inputs(self, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
        x = torch.randn(batch, 6, dtype=dtype, generator=generator)
        return torch.zeros_like(x), (x,)


class Images(CellConformance):
    """States and inputs (B, 4, 5, 5)."""

    def make_inputs(self, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
        x = torch.randn(batch, 4, 5, 5, dtype=dtype, generator=generator)
        return torch.zeros_like(x), (x,)


class Tokens(CellConformance):
    """States and inputs (B, 3, 8), and a mask that samples share."""

    def make_inputs(self, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
        x = torch.randn(batch, 3, 8, dtype=dtype, generator=generator)
        return torch.zeros_like(x), (x, torch.ones(3, 3, dtype=torch.bool).triu(1))


# Good cells pass ----------------------------------------------------------------------------------------


class TestDense(Vectors):
    cell = seeded(Dense)
    contraction = 0.9
    empty = True


class TestFunction(Vectors):
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.cos(z / 2 + x)

    contraction = 0.5


class TestMethod(Vectors):
    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * z + x


class TestBlock(Tokens):
    cell = seeded(Block)
    dtypes = (torch.float32, torch.float64)


class TestBlockWithOneMaskASolve(Tokens):
    @property
    def cell(self) -> nn.Module:  # a new one each time
        return Block(drop=deqlib.nn.Dropout(0.5))


class TestBlockWithPyTorchsDropoutInEvalMode(Tokens):
    cell = seeded(lambda: Block(drop=nn.Dropout(0.5)).eval())


class TestHalfPrecision(Vectors):
    cell = seeded(Dense)
    dtypes = (torch.bfloat16,)
    contraction = 0.9


class TestConvolution(Images):
    cell = seeded(Convolution)


class TestConvolutionOfBoundedNorm(Images):
    @property
    def cell(self) -> nn.Module:  # in training, where the norm is estimated anew in every solve
        cell = Convolution()
        deqlib.nn.spectral_norm(cell.conv, 0.3)
        return cell


class TestBatchNormInEvalMode(Images):
    cell = seeded(lambda: Convolution(norm=nn.BatchNorm2d(4)).eval())


class TestPair(CellConformance):
    cell = seeded(Pair)
    axes = (1, None)

    def make_inputs(self, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
        z0 = {
            "hidden": torch.zeros(batch, 4, dtype=dtype),
            "rest": (torch.zeros(batch, 2, 4, dtype=dtype),),
        }
        tokens = torch.randint(11, (7, batch), generator=generator)
        return z0, (tokens, {"scale": torch.ones(4, dtype=dtype), "name": "words"})


class TestBatchNormThatIsOnPurpose(Images):
    cell = seeded(lambda: Convolution(norm=nn.BatchNorm2d(4)))
    independent = False
    may_change = ("norm.running_*", "norm.num_batches_tracked")


class TestExpandingMap(Vectors):
    cell = staticmethod(lambda z, x: x - 3 * z)
    stopping = Stopping(rtol=1e-8, max_steps=30)


class TestMapWithoutFixedPoint(Vectors):
    cell = staticmethod(lambda z, x: z + x.abs() + 1)
    stopping = None
    contraction = 1.0


class TestRoundedMap(Vectors):
    cell = staticmethod(lambda z, x: (0.5 * z + x).detach())
    differentiable = False


# The suite finds faults ---------------------------------------------------------------------------------

OUTPUT = "test_the_output_is_a_finite_state_like_the_one_given"
SAME = "test_the_same_point_gives_the_same_bits"
IN_PLACE = "test_nothing_is_changed_in_place"
MOVES = "test_a_sample_that_moves_leaves_the_others_where_they_are"
ORDER = "test_the_order_of_the_samples_does_not_matter"
ALONE = "test_a_sample_gives_the_same_alone_as_in_its_batch"
FINITE = "test_a_sample_that_is_not_finite_stays_the_only_one"
CONTRACTS = "test_it_contracts"
REACH = "test_gradients_reach_state_inputs_and_parameters_and_are_finite"
SOLVES = "test_the_default_layer_solves_it"
GRADIENT = "test_the_gradient_of_the_layer_is_that_of_an_unrolled_solve"

INDEPENDENT = "`independent = False`"


class AcrossTheBatch(Block):
    """Attention that takes the batch for the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention.batch_first = False

    def forward(self, z: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(z, x, None)


class Counts(Dense):
    """Adds how often it was called."""

    calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(z, x) + 1e-6 * self.calls


class CountsInABuffer(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(z, x)


class Unused(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


class Wrong(torch.autograd.Function):
    """The identity, whose second gradient after another is not what it was."""

    @staticmethod
    def forward(context: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.1, 0.1)  # not linear


class Coarse(torch.autograd.Function):
    """The identity but for noise that depends on the point."""

    @staticmethod
    def forward(context: Any, z: Tensor) -> Tensor:
        return z + 1e-5 * torch.sin(1e8 * z)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


def leaks_what_is_not_finite(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(0.5 * z + x) + 0 * z.mean(0)


def rises_along_the_batch(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * z + x + torch.linspace(0, 1, len(z), dtype=z.dtype).unsqueeze(1)


def first_stands_apart(z: Tensor, x: Tensor) -> Tensor:
    return torch.cat([0.25 * z[:1] + x[:1], 0.5 * z[1:] + x[1:]])


def writes_to_z(z: Tensor, x: Tensor) -> Tensor:
    return z.mul_(0.5) + x


def writes_to_x(z: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        x.clamp_(-0.1, 0.1)
    return 0.5 * z + x


def refuses_one(z: Tensor, x: Tensor) -> Tensor:
    if len(z) < 3:
        raise ValueError("too few")
    return 0.5 * z + x


FAULTS: dict[str, tuple[type[CellConformance], Any, dict[str, Any], dict[str, str]]] = {
    "BatchNorm in training": (
        Images,
        lambda: Convolution(norm=nn.BatchNorm2d(4)),
        {},
        {
            MOVES: INDEPENDENT,
            ALONE: INDEPENDENT,
            FINITE: INDEPENDENT,
            IN_PLACE: "norm.running_mean, norm.running_var, norm.num_batches_tracked changed.*`may_change`",
        },
    ),
    "attention over the batch": (
        Tokens,
        AcrossTheBatch,
        {},
        {MOVES: INDEPENDENT, ALONE: INDEPENDENT, FINITE: INDEPENDENT},
    ),
    "NaN leaks": (Vectors, lambda: leaks_what_is_not_finite, {}, {FINITE: INDEPENDENT}),
    "order": (
        Vectors,
        lambda: rises_along_the_batch,
        {},
        {ORDER: INDEPENDENT, ALONE: INDEPENDENT},
    ),
    "the first sample": (
        Vectors,
        lambda: first_stands_apart,
        {},
        {ORDER: INDEPENDENT, ALONE: INDEPENDENT},
    ),
    "a batch of its own raises": (Vectors, lambda: refuses_one, {}, {ALONE: f"too few.*{INDEPENDENT}"}),
    "axes of the inputs": (
        Vectors,
        lambda: lambda z, x: 0.5 * z + x,
        {"axes": (None,)},
        {ORDER: "`axes`", ALONE: "`axes`"},
    ),
    "dropout": (Tokens, lambda: Block(drop=nn.Dropout(0.5)), {}, {SAME: "`bitwise = False`"}),
    "a counter": (Vectors, Counts, {}, {SAME: "`bitwise = False`"}),
    "a counter, within tolerances": (
        Vectors,
        Counts,
        {"bitwise": False},
        {SAME: "the same within 1e-09, but a second time it differs by .*e-0"},
    ),
    "a counter in a buffer": (Vectors, CountsInABuffer, {}, {IN_PLACE: "calls changed.*`may_change`"}),
    "writes to z": (Vectors, lambda: writes_to_z, {}, {IN_PLACE: "z changed.*no knob"}),
    "writes to x": (Vectors, lambda: writes_to_x, {}, {IN_PLACE: r"inputs\[0\] changed.*no knob"}),
    "dtype": (
        Vectors,
        lambda: lambda z, x: (0.5 * z + x).float(),
        {},
        {OUTPUT: "expected the dtype torch.float64, got torch.float32.*`dtypes`"},
    ),
    "a layer of another dtype": (
        Vectors,
        lambda: lambda z, x: 0.5 * z @ torch.eye(6) + x,
        {},
        {OUTPUT: "raised RuntimeError.*`dtypes`"},
    ),
    "shape": (
        Vectors,
        lambda: lambda z, x: (0.5 * z + x)[:, :5],
        {},
        {OUTPUT: r"expected the shape \(5, 6\), got \(5, 5\)"},
    ),
    "structure": (
        Vectors,
        lambda: lambda z, x: (0.5 * z + x,),
        {},
        {OUTPUT: r"expected the structure tensor, got \(tensor,\)"},
    ),
    "not finite": (Vectors, lambda: lambda z, x: x / z.norm(), {}, {OUTPUT: "should be finite"}),
    "no empty batch": (
        Vectors,
        lambda: lambda z, x: 0.5 * z + x + 0 * z.max(),
        {"empty": True, "independent": False},
        {OUTPUT: "0 samples.*`empty = False`"},
    ),
    "expands": (
        Vectors,
        lambda: lambda z, x: x - 1.5 * z,
        {"contraction": 0.9},
        {CONTRACTS: "at most 0.9, measured 1.5 .*`contraction`"},
    ),
    "expands in one direction": (
        Vectors,
        lambda: lambda z, x: x + torch.cat([-1.2 * z[:, :1], 0.1 * z[:, 1:]], 1),
        {"contraction": 1.1},
        {CONTRACTS: "at most 1.1, measured 1.2 .*`contraction`"},
    ),
    "an input is detached": (
        Vectors,
        lambda: lambda z, x: 0.5 * z + x.detach(),
        {},
        {REACH: r"not inputs\[0\].*`differentiable = False`"},
    ),
    "the state is detached": (
        Vectors,
        lambda: lambda z, x: torch.tanh(0.5 * z.detach() + x),
        {},
        {REACH: r"not z.*`differentiable = False`"},
    ),
    "a parameter is not used": (
        Vectors,
        Unused,
        {},
        {REACH: "not more.weight, more.bias.*freeze.*`differentiable = False`"},
    ),
    "a gradient is not finite": (
        Vectors,
        lambda: lambda z, x: 0.5 * z + x + 0.1 * (x - x.detach()).square().sum(1, keepdim=True).sqrt(),
        {"stopping": None},
        {REACH: r"should be finite, but not those of inputs\[0\].*`differentiable = False`"},
    ),
    "a gradient that is not linear": (
        Vectors,
        lambda: lambda z, x: torch.tanh(0.5 * Wrong.apply(z) + x),
        {},
        {GRADIENT: "`gradient_rtol`"},
    ),
    "no fixed point": (
        Vectors,
        lambda: lambda z, x: z + x.abs() + 1,
        {},
        {SOLVES: "`stopping`"},
    ),
    "no accurate fixed point": (
        Vectors,
        lambda: lambda z, x: Coarse.apply(0.8 * z + x),
        {},
        {GRADIENT: "should reach rtol=1e-10.*`stopping = None`"},
    ),
}

LAWS = [name for name in dir(CellConformance) if name.startswith("test_")]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_cell_fails_the_laws_that_it_breaks_and_no_other(fault: str) -> None:
    base, make, knobs, broken = FAULTS[fault]
    cell = seeded(make)
    suite = type(
        "Suite", (base,), {"cell": cell if isinstance(cell, nn.Module) else staticmethod(cell), **knobs}
    )
    failed: dict[str, str] = {}
    for law in LAWS:
        try:
            getattr(suite(), law)()
        except AssertionError as error:
            failed[law] = str(error)
        except pytest.skip.Exception:
            continue
    assert failed.keys() == broken.keys(), failed
    for law, pattern in broken.items():
        with pytest.raises(AssertionError, match=f"(?s){pattern}"):
            raise AssertionError(failed[law])


def test_every_law_has_a_cell_that_breaks_it() -> None:
    assert {law for _, _, _, broken in FAULTS.values() for law in broken} == set(LAWS)


def test_every_knob_is_explained() -> None:
    knobs = {name for kind in CellConformance.__mro__ for name in inspect.get_annotations(kind)}
    assert {"cell", "empty"} <= knobs
    for name in knobs:
        assert f"\n        {name}: " in (CellConformance.__doc__ or ""), name


def test_a_contraction_that_is_not_promised_is_told() -> None:
    class Suite(Vectors):
        cell: ClassVar[Any] = staticmethod(lambda z, x: x - 0.75 * z)

    with pytest.raises(pytest.skip.Exception, match=r"not promised; measured 0\.75"):
        Suite().test_it_contracts()


def test_what_the_test_class_lacks_is_named() -> None:
    class NoCell(Vectors):
        pass

    class NoInputs(CellConformance):
        cell: ClassVar[Any] = staticmethod(lambda z: z)

    class NoTuple(NoInputs):
        def make_inputs(self, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
            return torch.zeros(batch, 2, dtype=dtype), torch.zeros(batch, 2, dtype=dtype)

    class OneSample(NoInputs):
        batch = 1

    class NoTolerance(TestDense):
        tolerances: ClassVar[Any] = {}

    for suite, error, message in [
        (NoCell, TypeError, "set `cell`"),
        (NoInputs, NotImplementedError, "make_inputs"),
        (NoTuple, TypeError, "tuple of inputs, got inputs of type Tensor"),
        (OneSample, ValueError, "batch must be at least 2, got 1"),
        (NoTolerance, ValueError, "`tolerances` must have an entry for torch.float64"),
    ]:
        with pytest.raises(error, match=message):
            suite().test_the_order_of_the_samples_does_not_matter()


def test_a_module_is_left_as_it_is() -> None:
    class Suite(Images):
        cell: ClassVar[Any] = seeded(lambda: Convolution(norm=nn.BatchNorm2d(4)))
        independent = False
        may_change = ("*",)

    before = {name: tensor.clone() for name, tensor in Suite.cell.state_dict().items()}
    for law in LAWS:
        try:
            getattr(Suite(), law)()
        except pytest.skip.Exception:
            continue
    after = Suite.cell.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert Suite.cell.training


WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = sys.modules["hypothesis"] = None
from deqlib.testing import *
import deqlib.testing
assert {"CellConformance", "SolverConformance"} <= set(dir(deqlib.testing))
try:
    deqlib.testing.nothing
except AttributeError as error:
    print(error)
"""


def test_the_module_needs_no_pytest_until_a_suite_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PYTEST], capture_output=True, text=True)
    assert done.stdout.strip() == "module 'deqlib.testing' has no attribute 'nothing'", done.stderr
