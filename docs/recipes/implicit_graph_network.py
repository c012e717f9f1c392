"""An implicit graph network on chains: every node learns what stands at the far end of its graph.

Only the first node of a chain has its class in its features, and all nodes are to name it.
(Task and network: Gu et al. 2020, arXiv 2009.06211.)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from deqlib import ImplicitLayer, Picard, Stopping, Unroll

NUM_CLASSES = 3


# --8<-- [start:cell]
class GraphCell(nn.Module):
    """z -> tanh(A z W + x), a contraction by `bound` where the rows of A are averages."""

    def __init__(self, channels: int, bound: float = 0.95) -> None:
        super().__init__()
        self.weight, self.bound = nn.Parameter(torch.eye(channels)), bound

    def forward(
        self,
        z: Tensor,  # (graphs, nodes, channels)
        x: Tensor,  # (graphs, nodes, channels)
        adjacency: Tensor,  # sparse (graphs * nodes, graphs * nodes)
    ) -> Tensor:
        """A round of messages."""
        # No column sums to more than the bound: then no number of z W differs by more than that share.
        weight = self.weight * (self.bound / self.weight.abs().sum(0).clamp_min(self.bound))
        return torch.tanh((adjacency @ (z @ weight).flatten(0, 1)).view_as(z) + x)


# --8<-- [end:cell]


# --8<-- [start:network]
class GraphNetwork(nn.Module):
    """Features of nodes (graphs, nodes, classes) to logits of the same shape."""

    def __init__(self, layer: ImplicitLayer, channels: int) -> None:
        super().__init__()
        self.encode, self.layer = nn.Linear(NUM_CLASSES, channels, bias=False), layer
        self.decode = nn.Linear(channels, NUM_CLASSES)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        """What every node thinks its class is."""
        z = self.layer(self.encode(features), adjacency)
        # A contraction makes messages fainter with every edge. What they say is in their direction.
        return self.decode(F.normalize(z, dim=-1))


def implicit(channels: int = 8) -> GraphNetwork:
    """As many rounds of messages as it takes until every node stands still."""
    every_node = Stopping(rtol=1e-2, max_steps=300, norm_axes=(-1,))
    return GraphNetwork(ImplicitLayer(GraphCell(channels), solver=Picard(), stopping=every_node), channels)


def explicit(num_rounds: int, channels: int = 8) -> GraphNetwork:
    """The same cell, a fixed number of rounds."""
    rounds = Stopping.steps(num_rounds)
    layer = ImplicitLayer(GraphCell(channels), solver=Picard(), stopping=rounds, backward=Unroll())
    return GraphNetwork(layer, channels)


# --8<-- [end:network]


# --8<-- [start:chains]
def chains(num_graphs: int, num_nodes: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Features (graphs, nodes, classes), classes (graphs,), and an adjacency with a block for every graph."""
    classes = torch.randint(NUM_CLASSES, (num_graphs,), generator=generator)
    features = torch.zeros(num_graphs, num_nodes, NUM_CLASSES)
    features[:, 0] = F.one_hot(classes, NUM_CLASSES).float()
    nodes = torch.arange(num_graphs * num_nodes).view(num_graphs, num_nodes)
    left, right, own = nodes[:, :-1].flatten(), nodes[:, 1:].flatten(), nodes.flatten()
    edges = torch.stack([torch.cat([left, right, own]), torch.cat([right, left, own])])
    share = 1 / torch.bincount(edges[0])[edges[0]]
    size = (nodes.numel(), nodes.numel())
    return features, classes, torch.sparse_coo_tensor(edges, share, size, check_invariants=True).coalesce()


# --8<-- [end:chains]


def train(network: GraphNetwork, num_steps: int, num_nodes: int, generator: torch.Generator) -> None:
    """Cross entropy of all nodes, 16 new graphs a step."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
    for _ in range(num_steps):
        features, classes, adjacency = chains(16, num_nodes, generator)
        logits = network(features, adjacency)
        loss = F.cross_entropy(logits.flatten(0, 1), classes.repeat_interleave(num_nodes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(network: GraphNetwork, num_nodes: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Accuracy by distance to the first node, (nodes,), and the most rounds that one of 128 graphs took."""
    features, classes, adjacency = chains(128, num_nodes, generator)
    right = network(features, adjacency).argmax(-1) == classes[:, None]
    rounds = network.layer.solve(network.encode(features), adjacency).num_steps.max()
    return right.float().mean(0), int(rounds)


def draw(by_distance: dict[str, Tensor], num_trained: int, path: Path) -> None:
    """Accuracy by distance, a line for each network."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, accuracy in by_distance.items():
        axes.plot(100 * accuracy, label=name)
    axes.axvline(num_trained - 1, color="grey", linestyle=":")
    axes.text(num_trained - 0.7, 66, "longer than\nin training", color="grey")
    axes.set(xlabel="edges to the node with the class", ylabel="nodes that name it, %", ylim=(0, 104))
    axes.legend(loc="lower left", ncols=3)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the networks, print and write the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds: short chains, few steps")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes/implicit_graph_network"))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    num_steps, num_nodes = (30, 6) if arguments.quick else (100, 16)
    by_distance = {}
    print(f"{'network':<19} {num_nodes} nodes  {2 * num_nodes} nodes  rounds")
    for name, make in {
        "2 rounds": lambda: explicit(2),
        "8 rounds": lambda: explicit(8),
        "implicit": implicit,
    }.items():
        torch.manual_seed(0)
        network, generator = make(), torch.Generator().manual_seed(0)
        train(network, num_steps, num_nodes, generator)
        (short, few), (long, many) = (evaluate(network, n, generator) for n in (num_nodes, 2 * num_nodes))
        by_distance[name] = long
        print(f"{name:<19} {short.mean():>8.1%}  {long.mean():>8.1%}  {few}, {many}")
    draw(by_distance, num_nodes, arguments.out / "implicit_graph_network.png")


if __name__ == "__main__":
    main()
