"""A layer with one fixed point whatever training does, and a radius in which no prediction changes."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from deqlib import ImplicitDifferentiation, ImplicitLayer, Picard, Stopping
from deqlib.nn import MonotoneCell
from viar.data import load_data


# --8<-- [start:models]
def classifier(width):
    """A classifier of 64 pixels: x goes in, u is solved for, relu(u) comes out."""
    stopping = Stopping(rtol=1e-3, max_steps=1000)
    layer = ImplicitLayer(
        MonotoneCell(width),
        solver=Picard(),  # the guarantee is that of the plain iteration
        stopping=stopping,
        backward=ImplicitDifferentiation(solver=Picard(), stopping=stopping),
        on_failure="raise",
    )
    return nn.Sequential(nn.Linear(64, width), layer, nn.ReLU(), nn.Linear(width, 10))


# --8<-- [end:models]


# --8<-- [start:gain]
class Plain(nn.Module):
    """z -> relu(z W + x), with nothing to hold W."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z, x):
        """The next state."""
        return torch.relu(self.linear(z) + x)


@torch.no_grad()
def solved(make, gain, x):
    """Share of samples that converge, and their steps, with weights so many times those of the start."""
    torch.manual_seed(0)
    cell = make(x.shape[1])
    for parameter in cell.parameters():
        parameter *= gain
    stopping = Stopping(rtol=1e-3, max_steps=1000)
    solution = ImplicitLayer(cell, solver=Picard(), stopping=stopping, on_failure="ignore").solve(x)
    return solution.converged.float().mean().item(), solution.num_steps.float().mean().item()


# --8<-- [end:gain]


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


def train(model, images, labels, num_epochs):
    """Cross-entropy, as of any model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(num_epochs):
        for batch in torch.randperm(len(images)).split(128):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(argv=None):
    """Solve with ever larger weights, train, and tell what the guarantee is good for; print and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples and steps: takes seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recipes/monotone"), help="folder for the picture"
    )
    arguments = parser.parse_args(argv)
    num_epochs, width, gains = (2, 16, (1, 10)) if arguments.quick else (8, 64, (1, 2, 3, 5, 10, 20, 30))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    print(f"{'weights times':<16}{'plain: solved':<16}{'steps':<10}{'monotone: solved':<19}steps")
    rows = [(gain, *solved(Plain, gain, x), *solved(MonotoneCell, gain, x)) for gain in gains]
    for gain, *(share, steps, our_share, our_steps) in rows:
        print(f"{gain:<16}{share:<16.0%}{steps:<10.1f}{our_share:<19.0%}{our_steps:.1f}")
    for name, column, color in (("plain", 1, "#d1495b"), ("monotone", 3, "#1f6f8b")):
        left.semilogx(gains, [row[column] for row in rows], "o-", color=color, label=name)
    left.set(xlabel="size of the weights, over that at the start", ylabel="share of samples solved")
    left.legend()

    torch.manual_seed(0)
    data = load_data("digits", 8)
    images, test_images = (part.images[:, 0].flatten(1) for part in (data.train, data.validation))
    model = classifier(width)
    train(model, images, data.train.labels, num_epochs)
    with torch.no_grad():
        is_right = model(test_images).argmax(1) == data.validation.labels
        radius = certified_radius(model, test_images)
    length = test_images.norm(dim=1).median()
    print(f"trained on digits: {is_right.float().mean():.1%} of those held out are right")
    print(f"no prediction changes within {radius.median():.3f} of an image of length {length:.1f} (medians)")
    radii = torch.linspace(0, float(radius.max()), 100)
    right.plot(
        radii.tolist(), [(is_right & (radius >= r)).float().mean().item() for r in radii], color="#1f6f8b"
    )
    right.set(xlabel="radius", ylabel="right, and certain to stay so", ylim=(0, 1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "monotone.png", dpi=110)


if __name__ == "__main__":
    main()
