from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from deqlib import (
    JFB,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.nn import (
    Dropout,
    StableInjection,
    checkpoint_contexts,
    one_solve,
    remove_spectral_norm,
    spectral_norm,
)

TIGHT = Stopping(rtol=1e-12, max_steps=300)
MODES: dict[str, Any] = {
    "implicit": ImplicitDifferentiation(stopping=TIGHT),
    "jfb": JFB(),
    "phantom unroll": PhantomGradient(steps=3),
    "phantom neumann": PhantomGradient(steps=3, form="neumann"),
    "stochastic": StochasticJFB(no_grad=(3, 3), grad=(2, 2)),
    "unroll": Unroll(),
    "unroll, checkpoints": Unroll(checkpoint=True),
}
by_mode = pytest.mark.parametrize("backward", MODES.values(), ids=MODES)


class Noted(Dropout):
    """Dropout that keeps what it did to ones, at every call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(super().forward(torch.ones_like(x.detach())))
        return super().forward(x)


class Cell(nn.Module):
    """tanh(dropout(z W) + x), a contraction."""

    def __init__(self, dropout: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)
        nn.init.orthogonal_(self.linear.weight, gain=0.35)
        self.dropout = dropout

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(self.linear(z)) + x)


class Masked(nn.Module):
    """Multiplies by a given mask: what dropout should be like in one solve."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(batch: int = 3, width: int = 12) -> Tensor:
    return torch.randn(batch, width, dtype=torch.float64, generator=seeded(1))


# Dropout: one mask a solve ---------------------------------------------------------------------------------


@by_mode
def test_a_solve_and_its_backward_pass_see_one_mask(backward: Any) -> None:
    noted = Noted(0.4)
    layer = ImplicitLayer(Cell(noted), backward=backward, stopping=TIGHT, solver=Picard())
    layer(inputs()).sum().backward()
    assert len(noted.masks) > 4
    assert all(torch.equal(mask, noted.masks[0]) for mask in noted.masks)
    before = noted.masks[0]
    noted.masks.clear()
    layer(inputs())
    assert not torch.equal(noted.masks[0], before)


@by_mode
def test_the_gradient_is_that_of_the_map_with_its_mask(backward: Any) -> None:
    noted = Noted(0.4)
    cell = Cell(noted)
    x = inputs().requires_grad_()
    value = ImplicitLayer(cell, backward=backward, stopping=TIGHT, solver=Picard())(x)
    g = torch.randn_like(value)
    found = torch.autograd.grad(value, [x, *cell.parameters()], g)

    explicit = copy.copy(cell)
    explicit._modules = {**cell._modules, "dropout": Masked(noted.masks[0])}
    same = ImplicitLayer(explicit, backward=backward, stopping=TIGHT, solver=Picard())(x)
    torch.testing.assert_close(value, same)
    torch.testing.assert_close(found, torch.autograd.grad(same, [x, *cell.parameters()], g))


@by_mode
def test_two_forwards_before_one_backward_keep_their_masks_apart(backward: Any) -> None:
    layer = ImplicitLayer(Cell(Dropout(0.4)), backward=backward, stopping=TIGHT, solver=Picard())
    x = inputs()

    def gradient(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(layer.parameters())))

    alone = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        alone.append(gradient(layer(x).square().sum()))
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append(layer(x))
    assert not torch.equal(*values)
    both = gradient(values[0].square().sum() + values[1].square().sum())
    torch.testing.assert_close(both, [a + b for a, b in zip(*alone, strict=True)])


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_a_solver_that_differentiates_the_cell_sees_the_mask(derivative: Any) -> None:
    noted = Noted(0.4)
    solver = NewtonKrylov(derivative=derivative)
    layer = ImplicitLayer(Cell(noted), solver=solver, stopping=Stopping(rtol=1e-9))
    assert layer.solve(inputs()).converged.all()
    masks = [torch.func.vmap(lambda m: m)(m) for m in noted.masks]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("axis", [True, (0,)])
def test_a_sample_keeps_its_mask_when_others_leave_the_batch(axis: Any) -> None:
    x = inputs(6) * torch.tensor([0.0, 1e-3, 1.0, 2.0, 4.0, 9.0], dtype=torch.float64).unsqueeze(1)
    values, sizes = [], []
    for compact in (False, axis):
        torch.manual_seed(3)
        noted = Noted(0.4)
        cell = Cell(noted)
        with torch.no_grad():
            cell.linear.weight.copy_(0.55 * torch.eye(12))
            cell.linear.bias.zero_()
        torch.manual_seed(4)
        layer = ImplicitLayer(cell, solver=Picard(), compact=compact, stopping=TIGHT)
        values.append(layer(x).detach())
        sizes.append({len(mask) for mask in noted.masks})
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
    assert sizes[0] == {6}
    assert len(sizes[1]) > 2  # samples left more than once


def test_dropout_where_the_batch_is_not_first_cannot_be_cut() -> None:
    dropout = Dropout(0.2)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * dropout(z.T).T + x

    x = torch.tensor([0.0, 1.0, 2.0]).unsqueeze(1).repeat(1, 4)
    assert ImplicitLayer(cell)(x).shape == (3, 4)
    # The first sample is done at once and leaves.
    with pytest.raises(ValueError, match="cut to 2 samples, but its input has 4 along the first axis"):
        ImplicitLayer(cell, compact=True)(x)


@pytest.mark.parametrize("backward", [ImplicitDifferentiation(), Unroll()], ids=["implicit", "unroll"])
def test_an_inner_solve_keeps_its_mask_for_the_whole_of_the_outer_one(backward: Any) -> None:
    noted = Noted(0.4)
    inner = ImplicitLayer(Cell(noted), backward=backward, stopping=Stopping(rtol=1e-8))
    outer = ImplicitLayer(
        lambda z, x: 0.5 * inner(z) + x, backward=backward, stopping=Stopping(rtol=1e-6), solver=Picard()
    )
    solution = outer.solve(inputs())
    assert solution.converged.all()
    solution.value.sum().backward()
    assert all(torch.equal(mask, noted.masks[0]) for mask in noted.masks)


def test_layers_do_not_share_masks_and_a_module_used_twice_does() -> None:
    first, second = Noted(0.5), Noted(0.5)

    def cell(z: Tensor) -> Tensor:
        return 0.1 * (first(z) + second(z) + first(z))

    fixed_point(cell, torch.ones(4, 30), stopping=Stopping.steps(1))
    assert torch.equal(first.masks[0], first.masks[1])
    assert not torch.equal(first.masks[0], second.masks[0])


# Dropout: checkpointing, compilation, transforms -----------------------------------------------------------


@by_mode
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_checkpointed_layer_recomputes_with_its_mask(backward: Any, own_generator: bool) -> None:
    dropout = Dropout(0.4, generator=seeded() if own_generator else None)
    layer = ImplicitLayer(Cell(dropout), backward=backward, stopping=TIGHT, solver=Picard())
    context = {"context_fn": checkpoint_contexts} if own_generator else {}
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False, **context)):
        torch.manual_seed(5)
        if dropout.generator is not None:
            dropout.generator.manual_seed(5)
        x = inputs().requires_grad_()
        gradients.append(torch.autograd.grad(run(x).square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*gradients)


@by_mode
def test_a_checkpoint_inside_the_cell_recomputes_with_the_mask_of_the_solve(backward: Any) -> None:
    noted = Noted(0.4)
    block = Cell(noted)
    gradients = []
    for contexts in (None, checkpoint_contexts):

        def cell(z: Tensor, x: Tensor, contexts: Any = contexts) -> Tensor:
            if contexts is None:
                return block(z, x)
            return checkpoint(block, z, x, use_reentrant=False, context_fn=contexts)

        torch.manual_seed(5)
        value = ImplicitLayer(cell, backward=backward, stopping=TIGHT, solver=Picard())(inputs())
        loss = value.square().sum()
        if backward is not MODES["implicit"]:
            loss.backward(retain_graph=True)  # a second recomputation
            block.zero_grad()
        gradients.append(torch.autograd.grad(loss, list(block.parameters())))
    torch.testing.assert_close(*gradients)


def test_a_recomputation_that_would_draw_another_mask_is_refused() -> None:
    block = Cell(Dropout(0.4))
    layer = ImplicitLayer(lambda z, x: checkpoint(block, z, x, use_reentrant=False), backward=JFB())
    value = layer(inputs())
    with pytest.raises(RuntimeError, match=r"context_fn=deqlib\.nn\.checkpoint_contexts"):
        value.sum().backward()


def test_a_layer_with_dropout_compiles_without_a_graph_break() -> None:
    layer = ImplicitLayer(Cell(Dropout(0.4)), backward=Unroll(), solver=Picard(), stopping=Stopping.steps(30))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    values = []
    for run in (layer, compiled):
        torch.manual_seed(5)
        values.append(run(inputs()))
    torch.testing.assert_close(*values)


def test_function_transforms_see_one_mask() -> None:
    noted = Noted(0.4)
    layer = ImplicitLayer(Cell(noted), stopping=TIGHT, backward=ImplicitDifferentiation(stopping=TIGHT))
    jacobians = []
    for run in (torch.func.jacrev(layer), torch.func.jacfwd(layer, randomness="same"), dense_jacobian(layer)):
        torch.manual_seed(5)
        jacobians.append(run(inputs()).detach())
    torch.testing.assert_close(jacobians[0], jacobians[2])
    torch.testing.assert_close(jacobians[1], jacobians[2])


def dense_jacobian(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Row by row, without a function transform; the rows share one forward pass."""
    return lambda x: torch.autograd.functional.jacobian(layer, x)


# Dropout: values -------------------------------------------------------------------------------------------


@given(p=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_numbers_are_dropped_with_probability_p_and_their_mean_is_kept(p: float, dtype: torch.dtype) -> None:
    n = 20000
    with one_solve():
        out = Dropout(p, generator=seeded())(torch.ones(n, dtype=dtype))
    assert out.dtype == dtype
    dropped = float((out == 0).double().mean())
    assert abs(dropped - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-9
    kept = out[out != 0]
    if len(kept):
        assert float(kept[0]) == pytest.approx(1 / (1 - p), rel=2 * torch.finfo(dtype).eps)
        assert (kept == kept[0]).all()


@pytest.mark.parametrize(
    ("shape", "shared", "like"),
    [
        ((4, 30, 20), (1,), (4, 1, 20)),
        ((4, 30, 20), (-1,), (4, 30, 1)),
        ((4, 30, 5, 6), (2, 3), (4, 30, 1, 1)),
    ],
)
def test_shared_axes_have_one_value(
    shape: tuple[int, ...], shared: tuple[int, ...], like: tuple[int, ...]
) -> None:
    with one_solve():
        out = Dropout(0.5, shared_axes=shared)(torch.ones(shape))
    least, most = out.amin(shared, keepdim=True), out.amax(shared, keepdim=True)
    assert torch.equal(least, most)
    assert least.shape == like
    assert least.flatten(1).unique(dim=0).shape[0] == shape[0]  # samples differ
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_in_eval_and_with_p_zero_dropout_is_the_identity() -> None:
    x = torch.randn(3, 4)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_a_generator_makes_masks_reproducible_and_leaves_the_global_one_alone() -> None:
    dropout = Dropout(0.5, generator=seeded())
    before = torch.get_rng_state()
    outs = []
    for _ in range(2):
        assert dropout.generator is not None
        dropout.generator.manual_seed(7)
        with one_solve():
            outs.append(dropout(torch.ones(5, 9)))
    assert torch.equal(*outs)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropped_infinities_are_gone() -> None:
    with one_solve():
        out = Dropout(1.0)(torch.tensor([[torch.inf, torch.nan, 1.0]]))
    assert torch.equal(out, torch.zeros(1, 3))


def test_outside_a_solve_dropout_is_refused_and_one_solve_is_the_way_out() -> None:
    cell = Cell(Dropout(0.5))
    x = inputs()
    with pytest.raises(RuntimeError, match=r"with deqlib.nn.one_solve\(\)"):
        cell(x, x)
    with one_solve():
        first = cell(x, x)
        with one_solve():
            assert torch.equal(cell(x, x), first)
        layer_value = ImplicitLayer(cell, stopping=Stopping.steps(2), solver=Picard())(x)
        torch.testing.assert_close(layer_value, cell(cell(0 * x, x), x))
    with one_solve():
        assert not torch.equal(cell(x, x), first)
    with pytest.raises(RuntimeError):
        cell(x, x)


def test_a_cell_that_raises_leaves_no_solve_behind() -> None:
    def cell(z: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fixed_point(cell, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="outside a solve"):
        Dropout(0.5)(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Dropout(1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: Dropout(True), TypeError, "p must be a number"),
        (lambda: Dropout(shared_axes=1), TypeError, "shared_axes must be a tuple"),  # type: ignore[arg-type]
        (lambda: Dropout(generator=3), TypeError, "generator must be"),  # type: ignore[arg-type]
    ],
)
def test_dropout_validates(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("axis", [0, -2, 2, -3])
def test_dropout_refuses_axes_that_are_not_there_or_the_batch(axis: int) -> None:
    with one_solve(), pytest.raises(ValueError, match="not the batch"):
        Dropout(shared_axes=(axis,))(torch.ones(2, 3))


def test_dropout_prints_its_settings() -> None:
    assert repr(Dropout(0.1, shared_axes=(1,))) == "Dropout(p=0.1, shared_axes=(1,))"


# Spectral norm ---------------------------------------------------------------------------------------------


def norm_of(weight: Tensor, axis: int = 0) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().movedim(axis, 0).flatten(1).double(), 2))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], int]] = {
    "linear": (lambda: nn.Linear(7, 5), ("weight",), 0),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), ("weight",), 0),
    "conv 2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), ("weight",), 0),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2), ("weight",), 0),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), ("weight",), 1),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3), ("weight",), 1),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), ("weight",), 1),
    "attention": (lambda: nn.MultiheadAttention(6, 2), ("in_proj_weight",), 0),
    "attention, other widths": (
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=3),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
        0,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_weights_have_the_norm_asked_for(name: str, scale: float) -> None:
    make, weights, axis = LAYERS[name]
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    before = {weight: getattr(module, weight).clone() for weight in weights}
    assert spectral_norm(module, 0.8) is module
    for weight in weights:
        scaled = getattr(module, weight)
        assert norm_of(scaled, axis) == pytest.approx(0.8, rel=1e-3)
        torch.testing.assert_close(scaled / scaled.norm(), before[weight] / before[weight].norm())
    if isinstance(module, nn.MultiheadAttention):
        assert norm_of(module.out_proj.weight) == pytest.approx(0.8, rel=1e-3)


def test_at_most_scales_down_only_and_takes_a_weight_of_zeros() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    for part, gain in zip(module, (0.3, 3.0, 0.0), strict=True):
        nn.init.orthogonal_(part.weight)
        with torch.no_grad():
            part.weight.mul_(gain)
    spectral_norm(module, at_most=True)
    assert [norm_of(part.weight) for part in module] == pytest.approx([0.3, 0.9, 0.0], rel=1e-5)
    zero = module[2]
    with one_solve():
        zero(torch.ones(1, 6)).sum().backward()
    gradient = zero.parametrizations.weight.original.grad
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    with torch.no_grad():
        zero.parametrizations.weight.original.copy_(torch.eye(6) * torch.arange(6.0))
    for _ in range(30):
        with one_solve():
            zero(torch.ones(1, 6))
    assert norm_of(zero.weight) == pytest.approx(0.9, rel=1e-3)


class Watched(nn.Module):
    """A cell that keeps the weight it used at every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False, dtype=torch.float64)
        self.weights: list[Tensor] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        weight = self.linear.weight
        self.weights.append(weight.detach().clone())
        return torch.tanh(nn.functional.linear(z, weight) + x)


def scramble(cell: Watched) -> None:
    """Change the weight so much that the power iteration is far behind."""
    with torch.no_grad():
        cell.linear.parametrizations.weight.original.copy_(torch.randn(8, 8, dtype=torch.float64))


@by_mode
def test_the_weight_is_constant_in_a_solve_and_the_iteration_advances_from_one_to_the_next(
    backward: Any,
) -> None:
    cell = spectral_norm(Watched())
    scramble(cell)
    layer = ImplicitLayer(cell, backward=backward, solver=Picard(), on_failure="ignore")
    errors = []
    for _ in range(60):
        cell.weights.clear()
        layer(inputs(width=8)).sum().backward()
        assert len(cell.weights) > 2
        assert all(torch.equal(weight, cell.weights[0]) for weight in cell.weights)
        errors.append(norm_of(cell.weights[0]) - 0.9)
    assert errors[0] > 0.01  # an estimate is never above the norm
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-3


@by_mode
def test_a_later_forward_does_not_change_the_map_of_an_earlier_one(backward: Any) -> None:
    cell = spectral_norm(Watched())
    layer = ImplicitLayer(
        cell, backward=backward, solver=Picard(), stopping=Stopping(max_steps=10), on_failure="ignore"
    )
    gradients = []
    for interrupted in (False, True):
        torch.manual_seed(3)
        scramble(cell)
        with torch.no_grad():
            for buffer in cell.buffers():
                buffer.copy_(nn.functional.normalize(torch.ones_like(buffer), dim=0))
        value = layer(inputs(width=8))
        if interrupted:
            layer(inputs(width=8))
        gradients.append(torch.autograd.grad(value.sum(), list(cell.parameters())))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_gradient_is_that_of_the_normalised_weight() -> None:
    cell = spectral_norm(Watched())
    for _ in range(300):
        with one_solve():
            cell(inputs(width=8), inputs(width=8))
    exact = ImplicitDifferentiation(stopping=TIGHT)
    x = inputs(width=8)
    original = cell.linear.parametrizations.weight.original
    value = ImplicitLayer(cell, backward=exact, stopping=TIGHT)(x)
    found = torch.autograd.grad(value.square().sum(), original)

    def solve(weight: Tensor) -> Tensor:
        scaled = weight * 0.9 / torch.linalg.svdvals(weight)[0]
        z = torch.zeros_like(x)
        for _ in range(400):
            z = torch.tanh(z @ scaled.T + x)
        return z.square().sum()

    expected = torch.autograd.grad(solve(original), original)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_in_eval_and_outside_a_solve_the_iteration_does_not_advance() -> None:
    cell = spectral_norm(Watched())
    layer = ImplicitLayer(cell, on_failure="ignore")
    scramble(cell)
    buffers = {name: buffer.clone() for name, buffer in cell.named_buffers()}
    x = inputs(width=8)
    cell(x, x)
    layer.eval()
    layer(x)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in cell.named_buffers())
    layer.train()
    layer(x)
    assert not any(torch.equal(buffer, buffers[name]) for name, buffer in cell.named_buffers())


def test_more_iterations_a_solve_follow_the_weight_faster() -> None:
    errors = []
    for num_iterations in (1, 20):
        cell = spectral_norm(Watched(), num_iterations=num_iterations, generator=seeded())
        torch.manual_seed(3)
        scramble(cell)
        with one_solve():
            cell(inputs(width=8), inputs(width=8))
        errors.append(norm_of(cell.weights[-1]) - 0.9)
    assert errors[1] < 0.2 * errors[0]


def test_a_checkpointed_layer_recomputes_with_its_estimate() -> None:
    gradients = []
    for around in (False, True):
        torch.manual_seed(3)
        cell = spectral_norm(Watched(), generator=seeded())
        scramble(cell)
        layer = ImplicitLayer(cell, backward=JFB(), on_failure="ignore")
        x = inputs(width=8)
        if around:
            value = checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts)
        else:
            value = layer(x)
        gradients.append(torch.autograd.grad(value.sum(), list(cell.parameters())))
    torch.testing.assert_close(*gradients)


def test_a_normalised_cell_compiles_without_a_graph_break() -> None:
    cell = spectral_norm(nn.Linear(8, 8))
    layer = ImplicitLayer(
        lambda z, x: torch.tanh(cell(z) + x), backward=Unroll(), solver=Picard(), stopping=Stopping.steps(5)
    )
    x = torch.randn(3, 8)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-3, atol=1e-3)


def test_function_transforms_leave_the_buffers_whole() -> None:
    cell = spectral_norm(Watched(), num_iterations=300)
    exact = ImplicitDifferentiation(stopping=TIGHT)
    layer = ImplicitLayer(cell, stopping=TIGHT, backward=exact)
    layer(inputs(width=8))  # from here on the iteration stands still
    x = inputs(width=8)
    expected = dense_jacobian(layer.eval())(x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(layer.train())(x).detach(), expected, rtol=1e-5, atol=1e-8)
    layer(x).sum().backward()


def test_half_precision_weights_and_autocast_are_normalised_in_single_precision() -> None:
    module = spectral_norm(nn.Linear(64, 64).bfloat16(), 0.8)
    assert norm_of(module.weight) == pytest.approx(0.8, rel=0.01)
    module = spectral_norm(nn.Linear(64, 64), 0.8)
    outside = module.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.weight, outside)
        assert module(torch.ones(2, 64)).dtype == torch.bfloat16


def test_copies_and_checkpoints_of_weights_work_as_with_pytorchs_parametrization() -> None:
    cell = spectral_norm(nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
    stock = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
    assert list(cell[0].state_dict()) == list(stock.state_dict())
    twin = copy.deepcopy(cell)
    x = torch.randn(2, 5)
    assert torch.equal(twin(x), cell(x))
    with one_solve():
        twin(x)
    other = spectral_norm(nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
    file = io.BytesIO()
    torch.save(cell.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), cell(x))


def test_removing_leaves_plain_scaled_weights() -> None:
    cell = spectral_norm(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Conv1d(5, 5, 1)), 0.7)
    before = [cell[0].weight.detach(), cell[2].weight.detach()]
    assert remove_spectral_norm(cell) is cell
    assert not any(parametrize.is_parametrized(part) for part in cell)
    assert torch.equal(cell[0].weight, before[0])
    assert torch.equal(cell[2].weight, before[1])
    assert all(type(parameter) is nn.Parameter for parameter in cell.parameters())
    assert type(cell[0]) is nn.Linear
    spectral_norm(cell)


def test_attention_runs_normalised() -> None:
    attention = spectral_norm(nn.MultiheadAttention(6, 2, batch_first=True))
    x = torch.randn(2, 4, 6)
    with one_solve():
        trained = attention(x, x, x)[0]
    trained.sum().backward()
    attention.eval()
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], trained, rtol=1e-3, atol=1e-3)


def test_spectral_norm_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="got Tanh without any"):
        spectral_norm(nn.Tanh())
    with pytest.raises(ValueError, match="norm must be in"):
        spectral_norm(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="num_iterations must be at least 1"):
        spectral_norm(nn.Linear(2, 2), num_iterations=0)
    twice = spectral_norm(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"0\.weight is normalised already"):
        spectral_norm(twice)
    with pytest.raises(ValueError, match="no values yet"):
        spectral_norm(nn.LazyLinear(3))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(mixed[1].weight)
    with pytest.raises(ValueError, match=r"1\.weight is zero .* at_most=True"):
        spectral_norm(mixed)
    assert not parametrize.is_parametrized(mixed[0])  # all or nothing
    with pytest.raises(ValueError, match="nothing in Linear is normalised"):
        remove_spectral_norm(nn.Linear(2, 2))
    doubled = spectral_norm(nn.Linear(2, 2))
    parametrize.register_parametrization(doubled, "weight", nn.Identity())
    with pytest.raises(ValueError, match="other parametrizations"):
        remove_spectral_norm(doubled)


# Stable injection ------------------------------------------------------------------------------------------


@given(logits=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=6), dtype=st.sampled_from([32, 64, 16]))
def test_the_linear_part_is_stable_for_any_parameters(logits: list[float], dtype: int) -> None:
    kind = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}[dtype]
    module = StableInjection(len(logits)).to(kind)
    with torch.no_grad():
        module.logit.copy_(torch.tensor(logits, dtype=torch.float64))
    x = torch.randn(len(logits), dtype=kind)
    jacobian = torch.func.jacrev(lambda z: module(z, x))(torch.randn(len(logits), dtype=kind))
    radius = float(torch.linalg.eigvals(jacobian.detach().double()).abs().max())
    assert radius < 1
    assert radius <= 0.99 * (1 + torch.finfo(kind).eps)


def test_decay_starts_where_it_is_put_and_the_fixed_point_is_the_injected_input() -> None:
    module = StableInjection(4, decay=0.9, max_decay=0.95, inject=nn.Linear(3, 4))
    torch.testing.assert_close(module.decay, torch.full((4,), 0.9))
    x = torch.randn(2, 3)
    z = torch.randn(2, 4)
    injected = module.inject(x)
    torch.testing.assert_close(module(z, x), 0.9 * z + 0.1 * injected)
    torch.testing.assert_close(module(injected, x), injected)
    solution = ImplicitLayer(module, init=lambda x: x.new_zeros(2, 4), stopping=Stopping(rtol=1e-5)).solve(x)
    torch.testing.assert_close(solution.value, injected, rtol=1e-3, atol=1e-4)


def test_gradient_reaches_all_of_the_injection() -> None:
    module = StableInjection(4)
    x = torch.randn(2, 4)
    block = nn.Linear(4, 4)
    layer = ImplicitLayer(lambda z, x: torch.tanh(module(z, x) + 0.2 * block(z)))
    layer(x).square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_channels_may_lie_on_any_axis_and_the_state_keeps_its_type() -> None:
    module = StableInjection(4, axis=1, inject=nn.Conv2d(3, 4, 1))
    with torch.no_grad():
        module.logit.copy_(torch.tensor([-2.0, 0.0, 1.0, 5.0]))
    x, z = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    a = module.decay.view(1, 4, 1, 1)
    torch.testing.assert_close(module(z, x), a * z + (1 - a) * module.inject(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(z, x).dtype == torch.float32
    with pytest.raises(ValueError, match="4 channels along axis 1, got one of shape"):
        module(z.movedim(1, -1), x)


def test_a_leaky_step_of_a_contraction_is_a_contraction() -> None:
    module = StableInjection(6, inject=nn.Identity())
    weight = torch.randn(6, 6)
    weight *= 0.7 / weight.abs().sum(1).max()  # the maximum norm of the map
    for logit in (torch.randn(6) * 3, torch.ones(6)):
        with torch.no_grad():
            module.logit.copy_(logit)
        jacobian = torch.func.jacrev(lambda z: module(z, torch.tanh(weight @ z)))(torch.randn(6)).detach()
        bound = float((module.decay + (1 - module.decay) * 0.7).detach().max())
        assert float(jacobian.abs().sum(1).max()) <= bound + 1e-6


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"decay": 0.99}, ValueError, "0 < decay < max_decay < 1"),
        ({"max_decay": 1.0}, ValueError, "0 < decay < max_decay < 1"),
        ({"decay": 0.0}, ValueError, "decay must be in"),
        ({"axis": None}, TypeError, "axis must be an int"),
    ],
)
def test_stable_injection_validates(settings: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        StableInjection(**{"width": 3, **settings})
