"""docs/recipes/implicit_graph_network.py: messages reach every node, as by dense algebra."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipe_scripts import load
from torch import Tensor

from deqlib import ImplicitDifferentiation, Stopping

graphs = load("implicit_graph_network")
EXACT = Stopping(rtol=1e-12, max_steps=2000)


def by_dense_algebra(weight: Tensor, bound: float, x: Tensor, adjacency: Tensor) -> Tensor:
    """The fixed point of one graph, x (nodes, channels), by so many rounds that nothing moves any more."""
    scaled = torch.stack([column * (bound / column.abs().sum().clamp_min(bound)) for column in weight.T], 1)
    z = torch.zeros_like(x)
    for _ in range(600):
        z = torch.tanh(adjacency @ z @ scaled + x)
    return z


def test_a_graph_of_a_batch_is_solved_as_by_dense_algebra_with_its_gradient() -> None:
    torch.manual_seed(0)
    _, _, adjacency = graphs.chains(2, 7, torch.Generator().manual_seed(0))
    adjacency, x = adjacency.double(), torch.randn(2, 7, 4, dtype=torch.float64)
    network = graphs.implicit(4).double()
    cell, layer = network.layer.cell, network.layer
    torch.nn.init.normal_(cell.weight)
    z = layer.solve(x, adjacency, stopping=EXACT, backward=ImplicitDifferentiation(stopping=EXACT)).value
    dense = adjacency.to_dense()
    assert not dense[:7, 7:].any()
    blocks = dense[:7, :7], dense[7:, 7:]
    weight = cell.weight.detach().clone().requires_grad_()
    expected = torch.stack(
        [by_dense_algebra(weight, cell.bound, *pair) for pair in zip(x, blocks, strict=True)]
    )
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(z.square().sum(), cell.weight)
    (along_the_rounds,) = torch.autograd.grad(expected.square().sum(), weight)
    torch.testing.assert_close(gradient, along_the_rounds, rtol=1e-8, atol=1e-10)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_whatever_the_weights_two_states_come_closer_by_the_bound(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    cell = graphs.GraphCell(3).double()
    torch.nn.init.normal_(cell.weight, std=scale)
    _, _, adjacency = graphs.chains(2, 5, torch.Generator().manual_seed(seed))
    zero = torch.zeros(2, 5, 3, dtype=torch.float64)
    # Around zero tanh has its largest slope, and this direction is the one that a column makes most of.
    for worst in 1e-3 * cell.weight.detach().sign().T:
        moved = cell(worst.expand_as(zero), zero, adjacency.double()) - cell(zero, zero, adjacency.double())
        assert moved.abs().max() <= cell.bound * 1e-3 * (1 + 1e-9)


def test_the_first_node_reaches_as_many_nodes_as_there_are_rounds_or_all_of_them() -> None:
    features, _, adjacency = graphs.chains(1, 12, torch.Generator().manual_seed(0))
    without = torch.zeros_like(features)
    for network, reached in ((graphs.explicit(4), 4), (graphs.implicit(), 12)):
        told, untold = network(features, adjacency), network(without, adjacency)
        assert int((told != untold).any(-1).sum()) == reached


def test_the_faintest_message_has_arrived_when_a_solve_ends() -> None:
    features, _, adjacency = graphs.chains(1, 12, torch.Generator().manual_seed(0))
    network, adjacency = graphs.implicit().double(), adjacency.double()
    x = network.encode(features.double())
    exact = network.layer.solve(x, adjacency, stopping=EXACT).value
    error = (network.layer(x, adjacency) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 0.2  # the tolerance, over 1 - bound


def test_the_recipe_runs_and_the_implicit_network_is_right_beyond_its_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs.main(["--quick", "--out", str(tmp_path)])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["network", "6", "nodes", "12", "nodes", "rounds"]
    accuracy = {row[:19].strip(): float(row[19:].split()[1].rstrip("%")) for row in rows}
    assert accuracy["implicit"] > 95 > accuracy["8 rounds"] > accuracy["2 rounds"]
    assert (tmp_path / "implicit_graph_network.png").stat().st_size > 0
