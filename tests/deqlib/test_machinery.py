"""Layers live with what PyTorch offers for training: everything here is a public feature of PyTorch."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import dense_gradients, problem
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from deqlib import (
    JFB,
    Anderson,
    Auto,
    Backward,
    ImplicitDifferentiation,
    ImplicitLayer,
    PhantomGradient,
    Picard,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)

DIM = 5
EXACT = Stopping(rtol=1e-12, max_steps=300)
MODES: dict[str, Callable[[], Backward]] = {
    "implicit": lambda: ImplicitDifferentiation(stopping=EXACT),
    "jfb": JFB,
    "phantom unroll": lambda: PhantomGradient(steps=3),
    "phantom neumann": lambda: PhantomGradient(steps=3, form="neumann"),
    "stochastic": lambda: StochasticJFB(
        no_grad=(2, 4), grad=(1, 3), generator=torch.Generator().manual_seed(3)
    ),
    "unroll": Unroll,
}
by_mode = pytest.mark.parametrize("mode", MODES)


class Cell(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.inner.weight, gain=0.6)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def make_layer(mode: str = "implicit", cell: nn.Module | None = None, **settings: Any) -> ImplicitLayer:
    settings = {"stopping": EXACT, "solver": Picard(), **settings}
    return ImplicitLayer(Cell() if cell is None else cell, backward=MODES[mode](), **settings).double()


def make_input(batch: int = 4, dim: int = DIM) -> Tensor:
    return torch.randn(batch, dim, dtype=torch.float64)


def gradients(model: nn.Module) -> list[Tensor]:
    """Those of the parameters, taken off."""
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def assert_same(first: list[Tensor], second: list[Tensor], rtol: float = 1e-9) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
    assert any(a.norm() > 0 for a in first)


# Mixed precision.


@by_mode
def test_scaled_training_is_unscaled_training(mode: str) -> None:
    x, found = torch.randn(4, DIM), []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**16), torch.amp.GradScaler(enabled=False)):
        torch.manual_seed(1)
        model = make_layer(mode, stopping=Stopping(rtol=1e-5, max_steps=100)).float()
        if mode == "implicit":
            model.backward = ImplicitDifferentiation(stopping=Stopping(rtol=1e-5, max_steps=100))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append([p.detach().clone() for p in model.parameters()])
    assert_same(*found, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=["bfloat16", "float16"]
)
@by_mode
def test_autocast_with_scaling_gives_the_gradient_of_full_precision(
    mode: str, dtype: torch.dtype, rtol: float
) -> None:
    torch.manual_seed(1)
    rough = Stopping(rtol=rtol)
    layer = make_layer(mode, stopping=rough).float()
    if mode == "implicit":
        layer.backward = ImplicitDifferentiation(stopping=rough)
    x = torch.randn(8, DIM)
    reference = copy.deepcopy(layer)
    reference(x).square().mean().backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    with torch.autocast("cpu", dtype=dtype):
        z = layer(x)
        loss = z.float().square().mean()
    assert z.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for ours, exact in zip(gradients(layer), gradients(reference), strict=True):
        assert (ours - exact).norm() <= 12 * rtol * exact.norm()


@by_mode
def test_a_step_whose_scaled_gradient_overflows_is_skipped(mode: str) -> None:
    layer = make_layer(mode).float()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before = [p.detach().clone() for p in layer.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    layer.on_failure = "ignore"
    for _ in range(2):  # the skipped step leaves nothing behind
        optimizer.zero_grad()
        scaler.scale(1e6 * layer(torch.randn(4, DIM)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**125


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 2.0**16, 1e30])
@given(seed=st.integers(0, 2**31), contraction=st.floats(0.1, 0.9))
def test_the_adjoint_meets_its_relative_tolerance_whatever_the_size_of_the_gradient(
    scale: float, seed: int, contraction: float
) -> None:
    for dtype in (torch.float32, torch.float64):
        base = problem("tanh", contraction=contraction, seed=seed)
        g = scale * torch.randn(base.z0.shape, generator=torch.Generator().manual_seed(seed)).double()
        expected = dense_gradients(base.requiring_grad(), g)
        tensors = tuple(t.to(dtype).requires_grad_() for t in base.inputs)
        value = fixed_point(
            lambda z, base=base, tensors=tensors: base.cell(z, *tensors),
            base.z0.to(dtype),
            stopping=Stopping(rtol=1e-6 if dtype == torch.float32 else 1e-12, max_steps=300),
            backward=ImplicitDifferentiation(stopping=Stopping(rtol=1e-5, max_steps=300)),
            on_failure="raise",
        ).value
        found = torch.autograd.grad(value, tensors, g.to(dtype))
        for ours, exact in zip(found, expected, strict=True):
            # The relative error is at most rtol / (1 - contraction); the float32 solve has its own.
            assert (ours.double() - exact).norm() <= 1e-3 * exact.norm()


# Accumulation, several forwards, several uses.


@by_mode
def test_gradients_accumulate_over_micro_batches(mode: str) -> None:
    torch.manual_seed(1)
    layer, x = make_layer(mode), make_input(6)
    if mode == "stochastic":  # the same depth for every part
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    layer(x).square().sum().backward()
    full = gradients(layer)
    for part in x.split((1, 2, 3)):
        layer(part).square().sum().backward()
    assert_same(gradients(layer), full)


@by_mode
def test_several_forwards_may_precede_their_backwards_in_any_order(mode: str) -> None:
    layer, parts = make_layer(mode), [make_input(2) for _ in range(3)]
    if mode == "stochastic":
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    apart = []
    for part in parts:
        layer(part).square().sum().backward()
        apart.append(gradients(layer))
    losses = [layer(part).square().sum() for part in parts]
    for index in (1, 0, 2):
        losses[index].backward()
        assert_same(gradients(layer), apart[index])


@by_mode
def test_a_layer_may_be_used_twice_in_a_row(mode: str) -> None:
    layer, x = make_layer(mode), make_input()
    if mode == "stochastic":
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    twin = copy.deepcopy(layer)
    twin(layer(x)).square().sum().backward()
    expected = [a + b for a, b in zip(gradients(layer), gradients(twin), strict=True)]
    layer(layer(x)).square().sum().backward()
    assert_same(gradients(layer), expected)


# Activation checkpointing.


@pytest.mark.parametrize("reentrant", [False, True])
@by_mode
def test_a_checkpoint_around_the_layer_changes_nothing(mode: str, reentrant: bool) -> None:
    if mode == "stochastic" and reentrant:
        pytest.skip("its first pass is not recorded, so it is no pass of random depth")
    torch.manual_seed(1)
    layer, x = make_layer(mode), make_input().requires_grad_()
    if mode == "stochastic":
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    layer(x).square().sum().backward()
    expected, x.grad = [x.grad.clone(), *gradients(layer)], None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert_same([x.grad, *gradients(layer)], expected)


class CheckpointedCell(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return checkpoint(super().forward, z, x, use_reentrant=False)


@by_mode
def test_a_checkpoint_inside_the_cell_changes_nothing(mode: str) -> None:
    layer, x = make_layer(mode), make_input().requires_grad_()
    inside = make_layer(mode, CheckpointedCell())
    inside.load_state_dict(layer.state_dict())
    found = []
    for model in (layer, inside):
        x.grad = None
        model(x).square().sum().backward()
        found.append([x.grad, *gradients(model)])
    assert_same(*found)


# Copies and state dicts.


@by_mode
def test_copies_of_every_kind_train_alike(mode: str) -> None:
    layer, x = make_layer(mode), make_input()
    layer(x).sum().backward()  # a used layer copies as well as a new one
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    layer.zero_grad()
    layer(x).square().sum().backward()
    expected = gradients(layer)
    for twin in copies:
        twin.zero_grad()
        twin(x).square().sum().backward()
        assert_same(gradients(twin), expected)
        assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_through_a_file_and_back(assign: bool) -> None:
    layer, other, x = make_layer(), make_layer(), make_input()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    keys = other.load_state_dict(torch.load(buffer, weights_only=True), strict=True, assign=assign)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    found = []
    for model in (layer, other):
        model(x).square().sum().backward()
        found.append(gradients(model))
    assert_same(*found)


def test_a_layer_made_on_the_meta_device_gets_its_weights_later() -> None:
    layer, x = make_layer(), make_input()
    with torch.device("meta"):
        cell = TanhCell()
        other = ImplicitLayer(cell, solver=Picard(), stopping=EXACT, backward=MODES["implicit"]()).double()
    assert all(p.is_meta for p in other.parameters())
    other.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


class TanhCell(Cell):
    """Without an initialisation that needs numbers."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inner = nn.Linear(DIM, DIM)


# Hooks.


@by_mode
def test_hooks_of_the_layer_fire_once_and_those_of_the_cell_at_every_evaluation(mode: str) -> None:
    layer, x = make_layer(mode), make_input().requires_grad_()
    plain = copy.deepcopy(layer)
    counts = dict.fromkeys(("layer", "cell", "layer backward", "cell backward", "output"), 0)

    def note(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            counts[name] += 1

        return hook

    layer.register_forward_hook(note("layer"))
    layer.register_full_backward_hook(note("layer backward"))
    layer.cell.register_forward_hook(note("cell"))
    z = layer(x)
    z.register_hook(note("output"))
    z.square().sum().backward()
    if mode != "stochastic":
        with torch.no_grad():
            free = plain.solve(x).nfe
        recorded = {"implicit": 1, "jfb": 1, "phantom unroll": 3, "phantom neumann": 1, "unroll": 0}[mode]
        assert counts["cell"] == free + recorded
    assert counts["layer"] == counts["layer backward"] == counts["output"] == 1
    expected = plain(x)
    expected.square().sum().backward()
    assert_same(gradients(layer), gradients(plain))


@by_mode
def test_backward_hooks_of_the_cell_fire_at_every_product_with_its_jacobian(mode: str) -> None:
    layer, x = make_layer(mode), make_input().requires_grad_()
    plain = copy.deepcopy(layer)
    seen: list[Tensor] = []
    layer.cell.register_full_backward_hook(lambda cell, inner, outer: seen.append(outer[0]))
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_same(gradients(layer), gradients(plain))
    assert all(g.shape == x.shape for g in seen)
    if mode == "jfb":
        assert len(seen) == 1
    if mode == "phantom neumann":
        assert len(seen) == 3  # two products for the series, one for the parameters
    if mode == "implicit":
        assert len(seen) > 3


@by_mode
def test_a_hook_on_the_output_may_change_its_gradient(mode: str) -> None:
    layer, x = make_layer(mode), make_input()
    if mode == "stochastic":
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    layer(x).square().sum().backward()
    expected = [2 * g for g in gradients(layer)]
    z = layer(x)
    z.register_hook(lambda g: 2 * g)
    z.square().sum().backward()
    assert_same(gradients(layer), expected)


# Implicit layers in the cell of another.


class NestedCell(nn.Module):
    """z = tanh(W z + x + y / 2) with y = tanh(V y + z)."""

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.outer, self.inner = Cell(), inner

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.outer(z, x + 0.3 * self.inner(z))


class JointCell(nn.Module):
    """Both unknowns of the nested problem at once, in one state."""

    def __init__(self, nested: ImplicitLayer) -> None:
        super().__init__()
        self.outer, self.inner = nested.cell.outer, nested.cell.inner.cell

    def forward(self, zy: Tensor, x: Tensor) -> Tensor:
        z, y = zy.chunk(2, 1)
        return torch.cat([self.outer(z, x + 0.3 * y), self.inner(y, z)], 1)


def nested_layer(outer: str, inner: str) -> ImplicitLayer:
    torch.manual_seed(4)
    return make_layer(outer, NestedCell(make_layer(inner)))


def joint_gradients(nested: ImplicitLayer, x: Tensor) -> list[Tensor]:
    """Exact ones of sum z^2: the joint problem, its Jacobian inverted densely."""
    joint = JointCell(nested)
    parameters = list(nested.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for row in x.split(1):
        zy = torch.zeros(1, 2 * DIM, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(500):
                zy = joint(zy, row)
        jacobian = torch.autograd.functional.jacobian(lambda s, row=row: joint(s, row)[0], zy)[:, 0]
        g = torch.cat([2 * zy[0, :DIM], torch.zeros(DIM, dtype=torch.float64)])
        u = torch.linalg.solve(torch.eye(2 * DIM, dtype=torch.float64) - jacobian.T, g)
        found = torch.autograd.grad(joint(zy, row), parameters, u.unsqueeze(0))
        total = [a + b for a, b in zip(total, found, strict=True)]
    return total


@pytest.mark.parametrize("inner", ["implicit", "unroll"])
@pytest.mark.parametrize("outer", ["implicit", "unroll"])
def test_nested_layers_have_the_gradient_of_the_joint_fixed_point(outer: str, inner: str) -> None:
    nested, x = nested_layer(outer, inner), make_input(2)
    nested(x).square().sum().backward()
    assert_same(gradients(nested), joint_gradients(nested, x), rtol=1e-7)


@by_mode
def test_a_nested_layer_of_any_mode_works_inside_one_of_the_same(mode: str) -> None:
    """Against the same outer mode around an inner solve that is written out."""
    nested, x = nested_layer(mode, mode), make_input(2)
    if mode == "stochastic":
        nested.backward = nested.cell.inner.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    written = copy.copy(nested.cell)
    written._modules = {"outer": nested.cell.outer, "inner": ByHand(mode, nested.cell.inner.cell)}
    written = ImplicitLayer(written, solver=nested.solver, stopping=nested.stopping, backward=nested.backward)
    found = []
    for model in (nested, written):
        model(x).square().sum().backward()
        found.append(gradients(nested))
    assert_same(*found, rtol=1e-6)


class ByHand(nn.Module):
    """The inner layer with the gradient that its mode stands for; where exact, by unrolling."""

    def __init__(self, mode: str, cell: nn.Module) -> None:
        super().__init__()
        self.mode, self.cell = mode, cell

    def forward(self, x: Tensor) -> Tensor:
        free, taped = {"stochastic": (2, 3), "jfb": (200, 1)}.get(self.mode, (0, 200))
        if self.mode == "stochastic" and not torch.is_grad_enabled():
            free = 200
        if self.mode.startswith("phantom"):
            free, taped = 200, 3
        y = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(free):
                y = self.cell(y, x)
        damping = 0.5 if self.mode.startswith("phantom") else 1.0
        for _ in range(taped):
            y = torch.lerp(y, self.cell(y, x), damping)
        return y


# Parameters that are frozen, shared, computed or not there yet.


@by_mode
@pytest.mark.parametrize("frozen", ["inner.weight", "inner.bias"])
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(mode: str, frozen: str) -> None:
    layer, x = make_layer(mode), make_input()
    if mode == "stochastic":
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.cell.named_parameters()}
    layer.zero_grad()
    layer.cell.get_parameter(frozen).requires_grad_(False)
    layer(x).square().sum().backward()
    for name, p in layer.cell.named_parameters():
        if name == frozen:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, expected[name])


def test_a_frozen_layer_passes_gradient_to_its_input() -> None:
    layer, x = make_layer().requires_grad_(False), make_input().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.norm() > 0
    assert not layer(x.detach()).requires_grad


class TiedCell(nn.Module):
    """Two layers that share one weight, which the head of the model uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        nn.init.orthogonal_(self.first.weight, gain=0.7)
        self.second.weight = self.first.weight

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(z))) + x)


@pytest.mark.parametrize("mode", ["implicit", "jfb", "unroll"])
def test_tied_weights_get_the_sum_of_their_gradients(mode: str) -> None:
    torch.manual_seed(1)
    x = make_input()
    tied = nn.Sequential(make_layer(mode, TiedCell()), nn.Linear(DIM, DIM, dtype=torch.float64))
    tied[1].weight = tied[0].cell.first.weight
    untied = copy.deepcopy(tied)
    for part in (untied[0].cell.second, untied[1]):
        part.weight = nn.Parameter(part.weight.detach().clone())
    for model in (tied, untied):
        model(x).square().sum().backward()
    apart = (untied[0].cell.first, untied[0].cell.second, untied[1])
    torch.testing.assert_close(tied[1].weight.grad, sum(part.weight.grad for part in apart))


@pytest.mark.parametrize("cached", [False, True])
@by_mode
def test_parametrized_weights_train_and_may_be_cached(mode: str, cached: bool) -> None:
    """Orthogonal times 0.6: computed at every evaluation, or once."""
    layer, x = make_layer(mode), make_input()
    if mode == "stochastic":
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    plain = copy.deepcopy(layer)
    parametrizations.orthogonal(layer.cell.inner, "weight")
    parametrize.register_parametrization(layer.cell.inner, "weight", Half())
    with torch.no_grad():
        plain.cell.inner.weight.copy_(layer.cell.inner.weight)
    plain(x).square().sum().backward()
    computed = layer.cell.inner.weight  # recorded
    (expected,) = torch.autograd.grad(
        computed, layer.cell.inner.parametrizations.weight.original, plain.cell.inner.weight.grad
    )
    with parametrize.cached() if cached else nullcontext():
        layer(x).square().sum().backward()
    found = layer.cell.inner.parametrizations.weight.original.grad
    assert_same([found, layer.cell.inner.bias.grad], [expected, plain.cell.inner.bias.grad], rtol=1e-7)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.6 * weight


def test_a_lazy_cell_is_made_by_the_first_solve() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LazyLinear(DIM, dtype=torch.float64)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.3 * self.inner(z) + x)

    layer = ImplicitLayer(Lazy(), backward=MODES["implicit"](), stopping=EXACT)
    for _ in range(2):
        layer.zero_grad()
        layer(make_input()).sum().backward()
        assert isinstance(layer.cell.inner, nn.Linear)
        assert layer.cell.inner.weight.grad.norm() > 0


@by_mode
def test_functional_call_reaches_the_parameters_it_is_given(mode: str) -> None:
    layer, x = make_layer(mode), make_input()
    if mode == "stochastic":
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    layer(x).square().sum().backward()
    expected = gradients(layer)
    given = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    torch.func.functional_call(layer, given, (x,)).square().sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    assert_same([p.grad for p in given.values()], expected)


@by_mode
def test_inference_mode_gives_the_value_and_leaves_training_alone(mode: str) -> None:
    layer, x = make_layer(mode), make_input()
    with torch.no_grad():
        expected = layer(x)
    with torch.inference_mode():
        found = layer(x)
        assert found.is_inference()
    assert torch.equal(found, expected)
    layer(x).sum().backward()
    assert gradients(layer)


# Export, trace, compile.


# Dynamo notes that it restores what a solve leaves as it found it.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize(
    ("solver", "strict"),
    [
        pytest.param(Picard(), False, id="picard"),
        pytest.param(Picard(), True, id="picard, strict"),
        pytest.param(Anderson(memory=2), True, id="anderson, strict"),
        pytest.param(Anderson(memory=2), False, id="anderson"),
    ],
)
def test_a_fixed_number_of_steps_exports_for_any_batch(solver: Any, strict: bool) -> None:
    layer = make_layer(solver=solver, stopping=Stopping.steps(4)).eval()
    shapes = (({0: torch.export.Dim("batch", min=2, max=64)},),)  # one tuple for `*inputs`
    with torch.no_grad():
        program = torch.export.export(layer, (make_input(4),), dynamic_shapes=shapes, strict=strict)
        for batch in (4, 7):
            x = make_input(batch)
            torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-9, atol=1e-12)


def test_a_tolerance_does_not_export_and_the_error_says_why() -> None:
    layer = make_layer().eval()
    with torch.no_grad(), pytest.raises(Exception, match=r"depends on the data|data-dependent"):
        torch.export.export(layer, (make_input(),))


def test_a_fixed_number_of_steps_can_be_traced() -> None:
    layer = make_layer(stopping=Stopping.steps(6)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own: it is told that shapes are constants
        traced = torch.jit.trace(layer, (make_input(),))
        x = make_input()
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", ["implicit", "jfb", "unroll"])
def test_a_whole_model_compiles_with_eager_gradients(mode: str, backend: str) -> None:
    torch.manual_seed(1)
    backward = ImplicitDifferentiation() if mode == "implicit" else MODES[mode]()
    layer = ImplicitLayer(Cell(), backward=backward, solver=Auto() if mode != "unroll" else Picard())
    model = nn.Sequential(nn.Linear(3, DIM), layer, nn.Linear(DIM, 1)).double()
    x = make_input(4, 3)
    torch.compiler.reset()
    found = []
    # Recorded, not turned into errors: where warnings are errors the compiler's own, which it hides from its
    # users, end it (PyTorch 2.13, at a graph break whose frame holds a tensor that is not a leaf).
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for run in (model, torch.compile(model, backend=backend)):
            run(x).square().sum().backward()
            found.append(gradients(model))
    assert_same(*found)
    assert not [
        str(w.message) for w in seen if not issubclass(w.category, FutureWarning | DeprecationWarning)
    ]


# What comes after the layer.


@pytest.mark.parametrize("mode", MODES)
def test_an_operation_in_place_may_follow_the_layer(mode: str) -> None:
    layer, x = make_layer(mode), make_input()
    if mode == "stochastic":
        layer.backward = StochasticJFB(no_grad=(2, 2), grad=(3, 3))
    found = []
    for inplace in (False, True):
        nn.Sequential(layer, nn.ReLU(inplace=inplace))(x).square().sum().backward()
        found.append(gradients(layer))
    assert_same(*found)
