"""A classifier of handwritten digits whose middle is one block, solved for its fixed point."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from deqlib import FailurePolicy, ImplicitDifferentiation, ImplicitLayer, Stopping
from viar.data import load_data


# --8<-- [start:model]
class Cell(nn.Module):
    """Two convolutions of the state, the input added between them and the norm."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)  # by sample: batch normalisation would tie samples together

    def forward(self, z, x):
        """The next state, (B, channels, 8, 8)."""
        return self.norm(x + self.second(F.relu(self.first(z))))


class Once(nn.Module):
    """The same block as one layer of a stack is: as many parameters, no fixed point."""

    def __init__(self, channels):
        super().__init__()
        self.cell = Cell(channels)

    def forward(self, x):
        """One evaluation."""
        return self.cell(x, x)


def equilibrium(channels):
    """The block at its fixed point, for nearly all samples: the best iterate does for a few."""
    return ImplicitLayer(
        Cell(channels),
        stopping=Stopping(rtol=1e-2),
        backward=ImplicitDifferentiation(stopping=Stopping(rtol=1e-2)),
        on_failure=FailurePolicy(tolerated=0.1),
    )


def classifier(middle, channels):
    """Pictures (B, 3, 32, 32) to logits (B, 10)."""
    stem = nn.Sequential(nn.Conv2d(3, channels, 8, stride=4, padding=2), nn.GroupNorm(4, channels))
    head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * channels, 10))
    return nn.Sequential(stem, middle(channels), head)


# --8<-- [end:model]


# --8<-- [start:train]
def train(model, images, labels, num_epochs):
    """Cross-entropy. There is nothing to do differently from any other model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(num_epochs):
        for batch in torch.randperm(len(images)).split(100):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# --8<-- [end:train]


# --8<-- [start:depth]
@torch.no_grad()
def at_tolerance(model, images, rtol):
    """Predictions, (B,), and the steps that each image took to this tolerance, (B,)."""
    stem, layer, head = model
    solution = layer.solve(stem(images), stopping=Stopping(rtol=rtol), on_failure="ignore")
    return head(solution.value).argmax(1), solution.num_steps


# --8<-- [end:depth]


def draw(path, rows, images, num_steps):
    """Accuracy against steps, and the digits that took the fewest and the most of them."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.plot([steps for _, steps, _, _ in rows], [share for *_, share in rows], "o-", color="#1f6f8b")
    for rtol, steps, _, share in rows:
        left.annotate(f"{rtol:g}", (steps, share), textcoords="offset points", xytext=(4, -10), fontsize=8)
    left.margins(0.15)  # for the texts beside the outer points
    left.set(xlabel="steps, mean of the images", ylabel="held-out accuracy", title="by tolerance")
    order = num_steps.argsort()
    picked = images[torch.cat([order[:8], order[-8:]]), 0].unflatten(0, (2, 8))
    right.imshow(picked.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).numpy(), cmap="gray")
    right.set(yticks=(16, 48), yticklabels=("fewest steps", "most steps"), xticks=())
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Train, then choose the depth by a tolerance; print and draw what it does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples and steps: takes seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes/deq_classifier"))
    arguments = parser.parse_args(argv)
    data = load_data("mnist", 32)
    images, labels = data.train.images, data.train.labels
    test_images, test_labels = data.validation.images, data.validation.labels
    channels, num_epochs, seeds = 16, 2, range(3)
    if arguments.quick:
        images, labels, test_images, test_labels = (
            images[::20],
            labels[::20],
            test_images[::5],
            test_labels[::5],
        )
        channels, num_epochs, seeds = 8, 1, range(1)

    def right(predicted):
        return (predicted == test_labels).float().mean().item()

    print(f"{'middle':<14}{'parameters':<12}held-out accuracy, {len(seeds)} seeds")
    for middle in (Once, equilibrium):
        shares = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = classifier(middle, channels)
            train(model, images, labels, num_epochs)
            with torch.no_grad():
                shares.append(right(model(test_images).argmax(1)))
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{middle.__name__.lower():<14}{count:<12}{', '.join(f'{share:.1%}' for share in shares)}")

    print(f"\n{'rtol':<10}{'steps, mean':<14}{'most':<8}held-out accuracy of the last one")
    rows = []
    for rtol in (0.5, 0.2, 0.1, 0.05, 0.01, 0.001):
        predicted, num_steps = at_tolerance(model, test_images, rtol)
        rows.append((rtol, num_steps.float().mean().item(), int(num_steps.max()), right(predicted)))
        print(f"{rtol:<10g}{rows[-1][1]:<14.1f}{rows[-1][2]:<8}{rows[-1][3]:.1%}")
    by_digit = [num_steps[test_labels == digit].float().mean().item() for digit in range(10)]
    print(f"\nsteps by digit, 0 to 9: {' '.join(f'{steps:.1f}' for steps in by_digit)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(arguments.out / "deq_classifier.png", rows, test_images, num_steps)


if __name__ == "__main__":
    main()
