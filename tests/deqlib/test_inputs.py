"""Inputs of a layer: by name too, and what is said where a state cannot begin from them."""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deqlib import (
    GMRES,
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    FailurePolicy,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.nn import Dropout, StableInjection, spectral_norm
from deqlib.regularizers import jacobian_penalty, trajectory

DIM = 4
TIGHT = Stopping(rtol=1e-6, max_steps=200)
Pair = namedtuple("Pair", "a b")


class Masked(nn.Module):
    """A cell with an input by position and two by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        nn.init.orthogonal_(self.inner.weight, gain=0.6)

    def forward(self, z: Tensor, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        image = torch.tanh(self.inner(z) + scale * x)
        return image if mask is None else mask * image


# Inputs by name -----------------------------------------------------------------------------------------

MODES: list[Backward] = [ImplicitDifferentiation(), JFB(), PhantomGradient(), Unroll(), SharedInverse()]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: type(mode).__name__)
def test_an_input_by_name_is_the_one_by_position(mode: Backward, compact: bool) -> None:
    layer = ImplicitLayer(Masked(), backward=mode, stopping=TIGHT, solver=Broyden(), compact=compact)
    found = []
    for by_name in (False, True):
        layer.zero_grad()
        x = torch.linspace(-2, 2, 5 * DIM).view(5, DIM).requires_grad_()
        mask = torch.linspace(0.0, 1, 5).view(5, 1).requires_grad_()  # solved in different numbers of steps
        value = layer(x, mask=mask) if by_name else layer(x, mask)
        value.square().sum().backward()
        found.append((value, x.grad, mask.grad, layer.cell.inner.weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert found[0][2].abs().sum() > 0


def test_samples_that_leave_the_batch_take_their_part_of_inputs_by_name() -> None:
    layer = ImplicitLayer(Masked(), stopping=TIGHT, solver=Picard(), compact=True, backward=JFB())
    x, mask = torch.randn(8, DIM), torch.cat([torch.zeros(7, 1), torch.ones(1, 1)])
    solution = layer.solve(x, mask=mask)
    assert solution.sample_nfe[:7].max() < solution.sample_nfe[7]
    torch.testing.assert_close(solution.value, layer(x, mask), rtol=0, atol=0)


def test_transforms_go_through_inputs_by_name() -> None:
    layer = ImplicitLayer(Masked().double(), stopping=Stopping(rtol=1e-10, max_steps=200))
    x, mask = torch.randn(3, DIM).double(), torch.rand(3, 1).double()
    by_name = torch.func.grad(lambda m: layer(x, mask=m).sum())(mask)
    torch.testing.assert_close(by_name, torch.func.grad(lambda m: layer(x, m).sum())(mask))
    tangents = torch.func.jvp(lambda m: layer(x, mask=m), (mask,), (mask,))[1]
    torch.testing.assert_close(tangents, torch.func.jvp(lambda m: layer(x, m), (mask,), (mask,))[1])
    rows = torch.vmap(lambda x, m: layer(x.unsqueeze(0), mask=m.unsqueeze(0)))(x, mask)
    torch.testing.assert_close(rows.squeeze(1), layer(x, mask), rtol=1e-6, atol=1e-8)
    leaf = mask.clone().requires_grad_()
    (g,) = torch.autograd.grad(layer(x, mask=leaf).square().sum(), leaf, create_graph=True)
    (twice,) = torch.autograd.grad(g.sum(), leaf)
    hessian = torch.func.hessian(lambda m: layer(x, m).square().sum())(mask).sum((0, 1))
    torch.testing.assert_close(twice, hessian, rtol=1e-6, atol=1e-8)


def test_parameters_of_a_module_given_by_name_may_be_swapped() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.1, 0.5, DIM, dtype=torch.float64))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()
            stopping = Stopping(rtol=1e-10, max_steps=200)
            self.layer = ImplicitLayer(
                lambda z, x, scale: torch.tanh(scale.weight * z + x), stopping=stopping
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, scale=self.scale).square().sum()

    net, x = Net(), torch.randn(3, DIM, dtype=torch.float64)
    net(x).backward()
    expected = net.scale.weight.grad
    weight = net.scale.weight.detach().clone()
    call = lambda w: torch.func.functional_call(net, {"scale.weight": w}, (x,))  # noqa: E731
    torch.testing.assert_close(torch.func.grad(call)(weight), expected)
    many = torch.vmap(torch.func.grad(call))(weight.expand(2, DIM))
    torch.testing.assert_close(many, expected.expand(2, DIM))


# The compiler warns of states that are recorded, and of what stands in for tensors on the way back.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:Dynamo does not know")
def test_a_tensor_by_name_that_was_computed_reaches_a_compiled_cell_that_is_walked_back() -> None:
    def cell(z: Tensor, x: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh(0.4 * z.roll(1, 1) + x + shift)

    x, found = torch.randn(3, DIM, dtype=torch.float64), []
    for run in (cell, torch.compile(cell, backend="eager")):
        leaf = torch.ones(DIM, dtype=torch.float64).requires_grad_()
        stopping = Stopping(rtol=1e-9, max_steps=100)
        layer = ImplicitLayer(run, solver=ReversiblePicard(), backward=Reversible(), stopping=stopping)
        layer(x, shift=leaf.sin() * 2).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0])


def test_what_does_not_fit_in_a_layer_inside_a_cell_is_told_once() -> None:
    inner = ImplicitLayer(lambda z, x: torch.tanh(z @ torch.eye(DIM + 1) + x), stopping=TIGHT)
    outer = ImplicitLayer(lambda z, x: inner(z) + x, stopping=TIGHT)
    with pytest.raises(RuntimeError, match=r"^init: the state does not go with the cell") as caught:
        outer(torch.randn(3, DIM))
    assert str(caught.value).count("the cell failed with") == 1


def test_parameters_swapped_around_a_call_reach_a_cell_with_inputs_by_name() -> None:
    layer, x = ImplicitLayer(Masked(), stopping=TIGHT), torch.randn(3, DIM)
    params = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    call = lambda p: torch.func.functional_call(layer, p, (x,), {"scale": 0.5}).sum()  # noqa: E731
    found = torch.func.grad(call)(params)
    layer(x, scale=0.5).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_init_gets_inputs_by_name_and_says_where_it_takes_none() -> None:
    x = torch.randn(3, DIM)
    layer = ImplicitLayer(Masked(), init=lambda x, mask: x * mask)
    assert layer(x, mask=torch.ones(3, 1)).shape == (3, DIM)
    layer.init = lambda x: torch.zeros_like(x)
    with pytest.raises(TypeError, match=r"^init: it is given all inputs .*\(mask\).*unexpected keyword"):
        layer(x, mask=torch.ones(3, 1))

    def broken(x: Tensor, mask: Tensor) -> Tensor:
        raise TypeError("of its own")

    layer.init = broken
    with pytest.raises(TypeError, match=r"^of its own$"):
        layer(x, mask=torch.ones(3, 1))


def test_the_function_takes_inputs_by_name() -> None:
    x, mask = torch.randn(3, DIM), torch.rand(3, 1)
    cell = Masked()
    by_name = fixed_point(cell, torch.zeros(3, DIM), (x,), {"mask": mask, "scale": 0.5})
    same = fixed_point(lambda z: cell(z, x, mask, scale=0.5), torch.zeros(3, DIM))
    assert torch.equal(by_name.value, same.value)
    for wrong in ([("mask", mask)], {1: mask}, mask):
        with pytest.raises(TypeError, match="kwargs must be a dict with names as its keys"):
            fixed_point(cell, torch.zeros(3, DIM), (x,), wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["z0", "solver", "stopping", "backward", "on_failure", "compact", "state"])
def test_a_setting_of_one_solve_is_no_input_of_the_cell(name: str) -> None:
    layer = ImplicitLayer(Masked())
    with pytest.raises(TypeError, match=rf"{name} is a setting of one solve.*layer\.solve\(\.\.\., {name}="):
        layer(torch.randn(3, DIM), **{name: None})


def test_a_name_that_the_cell_does_not_know_is_an_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'slover'"):
        ImplicitLayer(Masked()).solve(torch.randn(3, DIM), slover=Picard())


def test_axes_are_those_of_inputs_by_position() -> None:
    layer, x = ImplicitLayer(Masked(), compact=(0,)), torch.randn(3, DIM)
    assert layer(x, scale=0.5).shape == x.shape
    with pytest.raises(ValueError, match=r"compact: a tuple .*keyword inputs mask; pass these by position"):
        layer(x, mask=torch.ones(3, 1))
    layer.compact = (np.int64(0), None)  # type: ignore[assignment]
    assert layer(x, torch.tensor(0.5)).shape == x.shape


def test_regularizers_take_inputs_by_name() -> None:
    layer, x, mask = ImplicitLayer(Masked()), torch.randn(3, DIM), torch.rand(3, 1)
    z = layer(x, mask=mask).detach()
    penalty = [
        jacobian_penalty(layer.cell, z, x, *args, generator=torch.Generator().manual_seed(0), **named)
        for args, named in (((mask,), {}), ((), {"mask": mask}))
    ]
    assert torch.equal(*penalty)
    for a, b in zip(trajectory(layer, x, mask), trajectory(layer, x, mask=mask), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_layer_of_fixed_steps_takes_inputs_by_name() -> None:
    layer = ImplicitLayer(Masked(), solver=Picard(), stopping=Stopping.steps(3), backward=Unroll())
    x, mask = torch.randn(3, DIM), torch.rand(3, 1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask))


# Where a state cannot begin -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (None, "is None"),
        (torch.ones(3, 4, dtype=torch.int64), "is a tensor of torch.int64"),
        (torch.ones(3, 4, dtype=torch.bool), "is a tensor of torch.bool"),
        (torch.ones(3, 4, dtype=torch.complex64), "is a tensor of torch.complex64"),
        (np.zeros((3, 4), np.float32), "is ndarray"),
        (2.0, "is float"),
        ([1.0, 2.0], "is float in a list"),
        ((torch.zeros(3, 4), None), "is None in a tuple"),
        ({"ids": torch.zeros(3, 4, dtype=torch.int32)}, "is a tensor of torch.int32 in a dict"),
        (torch.eye(3).to_sparse(), "is a tensor of layout torch.sparse_coo"),
        (torch.tensor(1.0), "is a tensor without axes"),
        ((), "is tuple"),
    ],
    ids=lambda case: case if isinstance(case, str) else type(case).__name__,
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_first_input_that_is_no_state_names_init(first: Any, words: str) -> None:
    layer = ImplicitLayer(lambda z, *_: 0.5 * z)
    with pytest.raises(TypeError, match=f"^ImplicitLayer: the first input {re.escape(words)}, .*pass init="):
        layer(first)
    layer.init = lambda *_: torch.zeros(3, 4)
    assert layer(first).shape == (3, 4)
    assert layer.solve(first, z0=torch.ones(3, 4)).value.shape == (3, 4)


@dataclass
class Unknown:
    a: Tensor


@pytest.mark.parametrize(
    ("z0", "words"),
    [
        (np.zeros((3, 4)), "got ndarray; make it a tensor by torch.as_tensor"),
        ({"a": 1.0}, "got float; make it a tensor"),
        (Unknown(torch.zeros(3)), r"got Unknown; make its class known by torch\.export\.register_dataclass"),
        (["a"], "got str; pass a tensor"),
        (
            torch.zeros(3, 4, dtype=torch.int64),
            "floating-point dtype of 16 bits or more, got torch.int64; pass init=",
        ),
        (torch.eye(3).to_sparse(), "must be dense, got a tensor of layout torch.sparse_coo; pass init="),
        (
            torch.nested.nested_tensor([torch.ones(2)] * 2, layout=torch.jagged),
            "dense, got a tensor that is nested",
        ),
        (
            torch.ones(2, 3).to(torch.float8_e4m3fn),
            "floating-point dtype of 16 bits or more, got torch.float8",
        ),
        (torch.tensor(1.0), "the first axis of the state is the batch, got a tensor without axes"),
    ],
)
def test_a_start_that_is_no_state_says_what_to_pass(z0: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^z0: .*{words}"):
        fixed_point(lambda z: z, z0)


@dataclass
class Known:
    a: Tensor
    b: Tensor


torch.export.register_dataclass(Known)


@pytest.mark.parametrize("make", [Pair, Known, lambda a, b: [a, (b,)], lambda a, b: {"x": {"y": a}, "z": b}])
def test_named_tuples_dataclasses_and_nests_are_states(make: Any) -> None:
    def cell(z: Any) -> Any:
        a, b = torch.utils._pytree.tree_leaves(z)
        return make(0.5 * a + 1, 0.5 * b)

    found = fixed_point(cell, make(torch.zeros(2, 3), torch.zeros(2)), stopping=TIGHT).value
    assert type(found) is type(make(0, 0))
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(found)[0], torch.full((2, 3), 2.0))


@given(
    order=st.permutations(["a", "b", "c"]),
    inner=st.permutations(["p", "q"]),
    kind=st.sampled_from([dict, OrderedDict, lambda items: defaultdict(list, items)]),
)
def test_a_state_is_matched_by_key_whatever_the_order(order: list[str], inner: list[str], kind: Any) -> None:
    goals = {"a": 1.0, "b": 2.0, "p": 3.0, "q": 4.0}

    def step(z: Tensor, name: str) -> Tensor:
        return 0.5 * z + 0.5 * goals[name]

    def cell(z: Any) -> Any:
        parts = {name: step(z[name], name) for name in "ab"}
        parts["c"] = [kind({name: step(z["c"][0][name], name) for name in inner})]
        return kind({name: parts[name] for name in order})

    one = torch.zeros(2, 1)
    start = kind({"a": one, "b": one, "c": [kind({"p": one, "q": one})]})
    found = fixed_point(cell, start, stopping=TIGHT).value
    assert list(found) == ["a", "b", "c"]
    assert type(found) is type(start)
    flat = {**{k: found[k] for k in "ab"}, **found["c"][0]}
    for name, goal in goals.items():
        torch.testing.assert_close(flat[name], torch.full((2, 1), goal), rtol=1e-4, atol=1e-4)
    other = lambda z: kind({"a": z["a"], "b": z["b"], "d": z["c"]})  # noqa: E731
    with pytest.raises(ValueError, match="must have the structure of the state"):
        fixed_point(other, start)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_start_of_another_batch_than_the_inputs_is_named(batch: int) -> None:
    layer = ImplicitLayer(Masked())
    words = (
        rf"^z0: the state has {batch} samples, and no input has {batch} along its first axis but 3; pass z0= "
    )
    with pytest.raises((RuntimeError, ValueError), match=words if batch != 1 else words[1:]):
        layer.solve(torch.randn(3, DIM), z0=torch.zeros(batch, DIM))


def test_a_state_of_another_shape_than_the_first_input_names_init() -> None:
    wide = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match=r"^init: .*pass init=.*state \(3, 4\) float32 on cpu, the inputs"):
        ImplicitLayer(lambda z, x: wide(z))(torch.randn(3, DIM))
    with pytest.raises(ValueError, match=r"^cell: .*expected \(3, 4\), got \(3, 8\); init: .*pass init="):
        ImplicitLayer(lambda z, x: torch.zeros(3, 8))(torch.randn(3, DIM))
    with pytest.raises(RuntimeError, match=r"^init: .*float64.*pass init=|^init: .*float64") as caught:
        ImplicitLayer(nn.Linear(DIM, DIM)).solve(z0=torch.zeros(3, DIM).double())
    assert isinstance(caught.value.__cause__, RuntimeError)  # PyTorch's own words


def test_a_cell_that_holds_the_whole_batch_is_told_of_compact() -> None:
    settings: dict[str, Any] = {"solver": Picard(), "stopping": TIGHT, "backward": JFB(), "compact": True}
    for slow, words in (
        (
            2,
            r"^compact: the cell .* fails on 2 of them alone .*The size of.*in args",
        ),
        (
            1,
            r"^compact: the cell .* fails on 1 of them alone .*the shape of the state",
        ),  # broadcast
    ):
        gains = torch.tensor([0.1, 0.1, 0.1])
        gains[:slow] = 0.9
        with pytest.raises(ValueError, match=words):
            fixed_point(lambda z, g=gains: g.unsqueeze(1) * z + 1, torch.zeros(3, 2), **settings)  # type: ignore[misc]


def test_other_errors_of_a_cell_stay_what_they_are() -> None:
    def fails(error: Exception) -> None:
        def cell(z: Tensor) -> Tensor:
            raise error

        with pytest.raises(type(error)) as caught:
            fixed_point(cell, torch.zeros(2, 2))
        assert caught.value is error

    for error in (
        RuntimeError("of its own"),
        ValueError("bad shape"),
        torch.OutOfMemoryError("size"),
        KeyError("a"),
    ):
        fails(error)


def test_states_on_the_meta_device_take_fixed_steps() -> None:
    x = torch.zeros(3, DIM, device="meta")
    for solver in (Picard(), Anderson(), Broyden(), Auto()):
        for mode in (JFB(), Unroll(), ImplicitDifferentiation(), SharedInverse(refine=1)):
            if isinstance(mode, SharedInverse) and not isinstance(solver, Anderson | Broyden):
                continue
            layer = ImplicitLayer(
                lambda z, x: 0.5 * z + x, solver=solver, stopping=Stopping.steps(3), backward=mode
            )
            assert layer(x).shape == x.shape
            assert layer(x.requires_grad_()).device.type == "meta"
    with pytest.raises(ValueError, match=r"meta device has no numbers .*Stopping.steps"):
        ImplicitLayer(lambda z, x: 0.5 * z + x)(x)
    with pytest.raises(ValueError, match="adjoint solve: a state on the meta device"):
        ImplicitLayer(lambda z, x: 0.5 * z + x, stopping=Stopping.steps(3))(x).sum().backward()


# Settings -----------------------------------------------------------------------------------------------

SETTINGS = (
    *(Stopping, FailurePolicy),
    *(Picard, ReversiblePicard, Anderson, Broyden, GMRES, NewtonKrylov, Auto),
    *(ImplicitDifferentiation, JFB, PhantomGradient, SharedInverse, StochasticJFB, Reversible, Unroll),
)


def test_numbers_of_other_libraries_are_numbers() -> None:
    i, f = np.int64, np.float32
    given_: list[Any] = [
        Stopping(max_steps=i(20), rtol=f(0.5), atol=np.float64(0), check_every=np.int8(2), patience=i(3)),
        Stopping(norm_axes=(i(-1),), blowup=i(10)),
        Stopping.steps(i(3)),
        Picard(damping=f(0.5)),
        ReversiblePicard(damping=f(0.5)),
        Anderson(memory=i(3), ridge=f(0.5), damping=f(0.5), budget=i(100), restart=i(2), growth=f(2)),
        Broyden(memory=i(3)),
        GMRES(memory=i(3)),
        NewtonKrylov(memory=i(3), max_backtracks=i(1), forcing=f(0.5)),
        Auto(plain_steps=i(3), patience=i(3)),
        PhantomGradient(steps=i(2), damping=f(0.5)),
        SharedInverse(refine=i(1), fallback_ratio=f(2)),
        StochasticJFB(no_grad=(i(0), i(2)), grad=(i(1), i(2))),
        Reversible(rtol=f(0.5)),
        FailurePolicy(tolerated=f(0.25)),
    ]
    for one in given_:
        for field in fields(one):
            value = getattr(one, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                assert type(part).__module__ != "numpy", f"{one}: {field.name}"
    assert Stopping(max_steps=i(20)) == Stopping(max_steps=20)
    x = torch.randn(3, DIM)
    layer = ImplicitLayer(Masked(), solver=given_[5], stopping=given_[0])
    assert layer(x).shape == x.shape
    assert type(Dropout(f(0.5)).p) is float
    assert type(StableInjection(i(4), axis=i(1)).width) is int
    spectral_norm(nn.Linear(3, 3), norm=f(0.5), num_iterations=i(2))


WRONG = {
    "object": object(),
    "text": "yes",
    "list": [1],
    "nan": float("nan"),
    "negative": -1,
    "dict": {},
    "tensor": torch.tensor(1),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_no_field_of_any_settings_takes_what_it_cannot_mean(kind: Any, wrong: Any) -> None:
    for field in fields(kind):
        with pytest.raises((TypeError, ValueError), match=rf"{kind.__name__}: .*{field.name}"):
            kind(**{field.name: wrong})


@pytest.mark.parametrize("wrong", [True, np.bool_(True), "3", None, 1j, np.array([1, 2]), torch.tensor(3)])
def test_what_is_no_number_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(TypeError, match="Anderson: memory must be an int, got"):
        Anderson(memory=wrong)
    with pytest.raises(TypeError, match="Picard: damping must be a number, got"):
        Picard(damping=wrong)


@pytest.mark.parametrize(
    ("name", "wrong", "error", "words"),
    [
        ("backward", "jfb", TypeError, "backward must be a backward mode"),
        ("backward", JFB, TypeError, "backward must be a backward mode"),
        ("solver", None, TypeError, "solver must be a solver"),
        ("stopping", 5, TypeError, "stopping must be a deqlib.Stopping"),
        ("on_failure", "explode", ValueError, "on_failure must be one of"),
        ("compact", 1, TypeError, "compact must be True, False"),
        ("cell", 1, TypeError, "cell must be callable, got int"),
        ("init", 1, TypeError, "init must be callable or None, got int"),
        ("backward_mode", JFB(), AttributeError, r"backward_mode is called backward; assign layer\.backward"),
    ],
)
def test_a_setting_that_is_assigned_is_looked_at(
    name: str, wrong: Any, error: type[Exception], words: str
) -> None:
    layer = ImplicitLayer(Masked())
    before = dict(vars(layer))
    with pytest.raises(error, match=words):
        setattr(layer, name, wrong)
    assert vars(layer) == before


def test_settings_that_are_assigned_hold_and_must_go_together() -> None:
    layer, x = ImplicitLayer(Masked()), torch.randn(3, DIM)
    layer.backward, layer.solver = Unroll(), Picard()
    layer.stopping = Stopping.steps(3)
    assert layer.solve(x).methods == ("Picard",)
    assert "Unroll" in repr(layer)
    layer(x).sum().backward()
    unrolled = layer.cell.inner.weight.grad
    layer.zero_grad()
    layer.backward = JFB()
    layer(x).sum().backward()
    assert not torch.equal(unrolled, layer.cell.inner.weight.grad)
    layer.compact = True
    with pytest.raises(ValueError, match="ImplicitLayer: compact has no effect with a fixed number of steps"):
        layer(x)
    layer.compact, layer.backward = False, Reversible()
    with pytest.raises(ValueError, match="pass solver=ReversiblePicard"):
        layer(x)
    layer.init = lambda x: torch.ones_like(x)
    layer.backward = JFB()
    assert layer(x).shape == x.shape


def test_a_state_that_is_to_be_negated_when_it_is_read_is_a_state() -> None:
    z0 = torch.complex(torch.zeros(2, 3), torch.ones(2, 3)).conj().imag
    assert z0.is_neg()
    solution = fixed_point(lambda z: 0.5 * z, z0, stopping=Stopping(max_steps=60, rtol=0, atol=1e-6))
    assert bool(solution.converged.all())
    assert bool(solution.value.lt(0).all())
