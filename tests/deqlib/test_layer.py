from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from problems import TIGHT, Cell
from torch import Tensor, nn

from deqlib import (
    JFB,
    Anderson,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceError,
    Picard,
    Solver,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)


def test_a_layer_drops_into_sequential_and_trains() -> None:
    model = nn.Sequential(nn.Linear(3, 4), ImplicitLayer(Cell(4)), nn.Linear(4, 1))
    x, y = torch.randn(32, 3), torch.randn(32, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad.norm() > 0 for p in model.parameters())


def test_the_output_is_the_fixed_point_of_the_cell() -> None:
    layer = ImplicitLayer(Cell(4).double(), stopping=Stopping(rtol=TIGHT))
    x = torch.randn(3, 4, dtype=torch.float64)
    z = layer(x)
    torch.testing.assert_close(z, layer.cell(z, x), rtol=0, atol=1e-12)
    assert torch.equal(z, layer.solve(x).value)


def test_the_default_start_is_zeros_shaped_like_the_first_input() -> None:
    starts = []

    def cell(z: Tensor, x: Tensor, extra: Tensor) -> Tensor:
        starts.append(z)
        return 0.5 * z + x + extra.sum()

    z = ImplicitLayer(cell)(torch.randn(2, 3, 4).double(), torch.ones(7))
    assert z.shape == (2, 3, 4)
    assert torch.equal(starts[0], torch.zeros(2, 3, 4).double())


def test_init_makes_the_start_from_the_inputs() -> None:
    layer = ImplicitLayer(lambda z, x: 0.5 * z + x.sum(1, keepdim=True), init=lambda x: x.new_ones(len(x), 7))
    assert layer(torch.randn(3, 2)).shape == (3, 7)


def test_an_init_module_is_registered() -> None:
    layer = ImplicitLayer(lambda z, x: 0.5 * z + 1, init=nn.Linear(2, 7), backward=Unroll())
    assert "init.weight" in layer.state_dict()
    assert layer(torch.randn(3, 2)).shape == (3, 7)


def test_a_cell_without_inputs_needs_a_start() -> None:
    layer = ImplicitLayer(lambda z: 0.5 * z + 1)
    with pytest.raises(ValueError, match="nothing to shape z0 like; pass init= or z0="):
        layer()
    assert layer.solve(z0=torch.zeros(2, 3)).converged.all()


def test_z0_of_a_call_warm_starts_it() -> None:
    layer = ImplicitLayer(Cell(4))
    x = torch.randn(3, 4)
    cold = layer.solve(x)
    warm = layer.solve(x, z0=cold.value)
    assert warm.num_steps.tolist() == [0, 0, 0]
    assert torch.equal(warm.value, cold.value)


def test_solver_and_stopping_of_a_call_replace_the_layers_for_that_call_only() -> None:
    layer = ImplicitLayer(Cell(4), solver=Picard(), stopping=Stopping.steps(9))
    x = torch.randn(3, 4)
    assert layer.solve(x, stopping=Stopping.steps(2)).num_steps.tolist() == [2] * 3
    assert layer.solve(x, solver=Broyden(memory=3)).state.history.df.shape == (3, 3, 4)
    assert layer.solve(x).state is None
    assert layer.solve(x).num_steps.tolist() == [9] * 3


def test_the_policy_of_the_layer_applies() -> None:
    layer = ImplicitLayer(Cell(4), stopping=Stopping(rtol=1e-9, max_steps=1), on_failure="raise")
    with pytest.raises(NonConvergenceError):
        layer(torch.randn(3, 4))


@pytest.mark.parametrize("container", [dict, tuple, list])
def test_the_state_may_be_a_pytree_of_tensors_of_different_shapes(container: type) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, z: Any, x: Tensor) -> Any:
            a, b = z.values() if container is dict else z
            b_new = 0.3 * torch.tanh(self.down(a)).unsqueeze(2) + 0.1 * b
            a_new = 0.3 * torch.tanh(self.up(b.mean(2))) + x
            return {"a": a_new, "b": b_new} if container is dict else container((a_new, b_new))

    def init(x: Tensor) -> Any:
        a, b = torch.zeros(len(x), 4), torch.zeros(len(x), 2, 3)
        return {"a": a, "b": b} if container is dict else container((a, b))

    layer = ImplicitLayer(Pair(), init=init, stopping=Stopping(rtol=1e-6))
    x = torch.randn(3, 4)
    solution = layer.solve(x)
    assert type(solution.value) is container
    again = layer.cell(solution.value, x)
    torch.testing.assert_close(again, solution.value, rtol=1e-4, atol=1e-5)
    assert solution.residual.shape == (3,)
    leaves = solution.value.values() if container is dict else solution.value
    sum(leaf.sum() for leaf in leaves).backward()
    assert all(p.grad.norm() > 0 for p in layer.parameters())


def test_a_pytree_input_starts_a_pytree_state() -> None:
    layer = ImplicitLayer(lambda z, x: {k: 0.5 * z[k] + x[k] for k in x}, stopping=Stopping(rtol=1e-6))
    x = {"a": torch.ones(2, 3), "b": torch.ones(2, 1, 2)}
    torch.testing.assert_close(layer(x), {k: 2 * v for k, v in x.items()})


def test_the_state_dict_holds_the_cells_parameters_and_nothing_of_a_solve() -> None:
    layer = ImplicitLayer(Cell(4))
    layer(torch.randn(3, 4))
    assert list(layer.state_dict()) == ["cell.inner.weight", "cell.inner.bias"]
    other = ImplicitLayer(Cell(4))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), other(x))


def test_a_solve_leaves_nothing_on_the_layer() -> None:
    layer = ImplicitLayer(Cell(4))
    before = dict(vars(layer))
    layer(torch.randn(3, 4)).sum().backward()
    after = dict(vars(layer))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_solves_the_same_and_is_independent(clone: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = ImplicitLayer(
        Cell(4), solver=Broyden(memory=4), backward=StochasticJFB(generator=generator), on_failure="ignore"
    )
    layer(torch.randn(3, 4)).sum().backward()
    twin = clone(layer)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), twin(x))  # the generator's state was copied too
    assert layer.stopping == twin.stopping
    assert layer.solver == twin.solver
    with torch.no_grad():
        twin.cell.inner.weight.zero_()
    assert layer.cell.inner.weight.norm() > 0


def test_the_layer_moves_with_to() -> None:
    layer = ImplicitLayer(Cell(4)).double()
    assert layer(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_print_shows_the_settings() -> None:
    text = repr(ImplicitLayer(Cell(4), solver=Anderson(memory=3), backward=JFB()))
    for words in (
        "solver=Anderson(memory=3),",
        "backward=JFB()",
        "stopping=Stopping()",
    ):
        assert words in text
    assert "on_failure" not in text
    assert "compact" not in text
    other = ImplicitLayer(Cell(4), stopping=Stopping.steps(3), on_failure="raise")
    assert "stopping=Stopping.steps(3), on_failure='raise'" in repr(other)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"solver": "anderson"}, TypeError, r"solver must be a solver such as .*got 'anderson' \(str\)"),
        ({"solver": Anderson}, TypeError, r"solver must be a solver such as .*\(ABCMeta\)"),
        ({"solver": Stopping()}, TypeError, "solver must be a solver"),
        ({"stopping": 1e-3}, TypeError, r"stopping must be a deqlib.Stopping .*got 0.001 \(float\)"),
        ({"stopping": 50}, TypeError, "stopping must be"),
        ({"backward": "jfb"}, TypeError, r"backward must be a backward mode .*got 'jfb'"),
        ({"backward": JFB}, TypeError, "backward must be a backward mode"),
        (
            {"on_failure": "explode"},
            ValueError,
            r"on_failure must be one of \('raise', 'warn', 'ignore'\) or a deqlib.FailurePolicy, got 'explo",
        ),
        ({"on_failure": None}, ValueError, "on_failure must be one of"),
        ({"tol": 1e-3}, TypeError, "tol"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ImplicitLayer(Cell(4), **settings)
    with pytest.raises(error, match=words):
        fixed_point(lambda z: z, torch.zeros(1, 1), **settings)


def test_overrides_of_the_wrong_kind_are_refused_by_name() -> None:
    layer, x = ImplicitLayer(Cell(4)), torch.randn(3, 4)
    with pytest.raises(TypeError, match="solver must be a solver"):
        layer.solve(x, solver="picard")
    with pytest.raises(TypeError, match="stopping must be"):
        layer.solve(x, stopping=5)
    with pytest.raises(TypeError, match="backward must be a backward mode"):
        layer.solve(x, backward="jfb")
    with pytest.raises(ValueError, match=r"on_failure must be one of .*got 'never'"):
        layer.solve(x, on_failure="never")


def test_cell_init_and_args_of_the_wrong_kind_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="cell must be callable, got Tensor"):
        ImplicitLayer(torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="init must be callable or None, got Tensor"):
        ImplicitLayer(Cell(4), init=torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="args must be a tuple, got Tensor"):
        fixed_point(lambda z: z, torch.zeros(1, 1), torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        ImplicitLayer(Cell(4), Anderson())  # type: ignore[misc]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (nn.Sequential(nn.Linear(4, 3)), r"expected \(2, 4\), got \(2, 3\)"),
        (lambda z: (z, z), r"expected tensor, got \(tensor, tensor\)"),
        (lambda z: z.half(), "expected torch.float32, got torch.float16"),
        (lambda z: z.to("meta"), "expected cpu, got meta"),
    ],
)
def test_a_cell_that_breaks_its_contract_is_refused(cell: Any, words: str) -> None:
    layer = ImplicitLayer(lambda z, x: cell(z))
    with pytest.raises(ValueError, match=f"^cell: .*{words}"):
        layer(torch.zeros(2, 4))


def test_errors_of_the_cell_reach_the_caller_as_they_are() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        raise LookupError("of the cell")

    with pytest.raises(LookupError, match="of the cell"):
        ImplicitLayer(cell)(torch.zeros(2, 4))


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=["picard", "anderson", "broyden"])
def test_an_image_shaped_state_is_solved_as_the_flat_one(solver: Solver) -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    with torch.no_grad():
        conv.weight *= 0.3
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    settings = {"solver": solver, "backward": ImplicitDifferentiation(), "stopping": Stopping(rtol=1e-9)}
    image = ImplicitLayer(lambda z, x: torch.tanh(conv(z)) + x, **settings).solve(x)
    flat = fixed_point(
        lambda z: (torch.tanh(conv(z.view_as(x))) + x).flatten(1), torch.zeros(3, 50).double(), **settings
    )
    assert torch.equal(image.value.flatten(1), flat.value)
    assert torch.equal(image.num_steps, flat.num_steps)
