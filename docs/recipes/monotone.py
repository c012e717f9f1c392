"""A layer with one fixed point whatever training does, and a radius in which no prediction changes."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from deqlib import ImplicitLayer, record
from deqlib.nn import MonotoneCell
from viar.data import load_data


# --8<-- [start:models]
def monotone(width):
    """A classifier of 64 pixels: x goes in, u is solved for, relu(u) comes out."""
    layer = ImplicitLayer(MonotoneCell(width), on_failure="ignore")
    return nn.Sequential(nn.Linear(64, width), layer, nn.ReLU(), nn.Linear(width, 10))


class Plain(nn.Module):
    """z -> relu(z W + x), with nothing to hold W."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z, x):
        """The next state."""
        return torch.relu(self.linear(z) + x)


def plain(width):
    """The same classifier without a guarantee."""
    layer = ImplicitLayer(Plain(width), on_failure="ignore")
    return nn.Sequential(nn.Linear(64, width), layer, nn.Linear(width, 10))


# --8<-- [end:models]


# --8<-- [start:radius]
def certified_radius(model, images):
    """How far an image, (B, 64), may move in any direction before its prediction can change: (B,)."""
    inject, layer, _, head = model
    slope = torch.linalg.matrix_norm(inject.weight, 2) / layer.cell.margin  # of relu(u) in the image
    logits, best = model(images).max(1)
    gaps = logits[:, None] - model(images)
    slopes = (head.weight[best][:, None] - head.weight).norm(dim=2) * slope  # of the gaps, (B, classes)
    return (gaps / slopes).scatter(1, best[:, None], torch.inf).amin(1)


# --8<-- [end:radius]


# --8<-- [start:train]
def train(model, images, labels, num_epochs):
    """By epoch: the share of forward and adjoint solves of samples that did not converge."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    unsolved = []
    for _ in range(num_epochs):
        with record() as solves:
            for batch in torch.randperm(len(images)).split(128):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        converged = torch.cat([solve.solution.converged for solve in solves])
        unsolved.append(1 - converged.float().mean().item())
    return unsolved


# --8<-- [end:train]


def accuracy(model, images, labels):
    """Share of the images that are given their label."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main(argv=None):
    """Train both, print and draw what became of their solves, and what the guarantee is good for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples and steps: takes seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recipes/monotone"), help="folder for the picture"
    )
    arguments = parser.parse_args(argv)
    num_epochs, width = (2, 16) if arguments.quick else (15, 64)
    data = load_data("digits", 8)
    (images, labels), (test_images, test_labels) = (
        (part.images[:, 0].flatten(1), part.labels) for part in (data.train, data.validation)
    )
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    print(f"{'cell':<12}{'test accuracy':<18}{'samples not solved, worst epoch':<34}last epoch")
    for make, color in ((plain, "#d1495b"), (monotone, "#1f6f8b")):
        torch.manual_seed(0)
        model = make(width)
        unsolved = train(model, images, labels, num_epochs)
        left.plot(range(1, num_epochs + 1), unsolved, "o-", markersize=3, color=color, label=make.__name__)
        print(
            f"{make.__name__:<12}{accuracy(model, test_images, test_labels):<18.1%}"
            f"{max(unsolved):<34.2%}{unsolved[-1]:.2%}",
            flush=True,
        )
    left.set(xlabel="epoch", ylabel="share of solves that failed")
    left.legend()
    with torch.no_grad():
        radius = certified_radius(model, test_images)
        right_ones = model(test_images).argmax(1) == test_labels
    length = test_images.norm(dim=1).median()
    print(f"no prediction changes within {radius.median():.3f} of an image of length {length:.1f} (medians)")
    radii = torch.linspace(0, float(radius.max()), 100)
    shares = [(right_ones & (radius >= r)).float().mean().item() for r in radii]
    right.plot(radii.tolist(), shares, color="#1f6f8b")
    right.set(xlabel="radius", ylabel="right, and certain within it", ylim=(0, 1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "monotone.png", dpi=110)


if __name__ == "__main__":
    main()
