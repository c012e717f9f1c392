"""Deblurring by a learned proximal iteration: the restored picture is the fixed point, trained as such.

The fixed point minimises misfit plus a learned penalty, so any solver finds it, to any accuracy.
(Gilton, Ongie and Willett 2021, arXiv 2102.07944; the convex penalty: Goujon et al. 2022, arXiv 2211.12461.)
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from deqlib import ImplicitDifferentiation, ImplicitLayer, Picard, Stopping, Unroll
from viar.data import load_data

NOISE = 0.02


# --8<-- [start:blur]
def kernel_like(z):
    """A Gaussian of standard deviation 1 pixel, (1, 1, 9, 9), whose numbers sum to 1."""
    profile = torch.softmax(-torch.arange(-4, 5, dtype=z.dtype).square() / 2, 0)
    return (profile[:, None] * profile)[None, None]


def blur(z):  # (pictures, 1, height, width)
    """What the lens does; beyond the border it is dark."""
    return F.conv2d(z, kernel_like(z), padding=4)


def blur_adjoint(r):  # (pictures, 1, height, width)
    """Its transpose."""
    return F.conv_transpose2d(r, kernel_like(r), padding=4)


# --8<-- [end:blur]


# --8<-- [start:cell]
class ProximalStep(nn.Module):
    """Towards the least |blur(z) - y|^2 / 2 + sum of gain * log cosh(filters z + offset) over z in [0, 1]."""

    def __init__(self, num_filters=8):
        super().__init__()
        self.filters = nn.Parameter(0.1 * torch.randn(num_filters, 1, 7, 7))
        self.offset = nn.Parameter(torch.zeros(num_filters))
        self.log_gain = nn.Parameter(torch.full((num_filters,), -5.0))

    def forward(self, z, y):  # (pictures, 1, height, width), both
        """Down the gradient, and back into [0, 1]."""
        gain = self.log_gain.exp()
        slope = gain[:, None, None] * F.conv2d(z, self.filters, self.offset, padding=3).tanh()
        gradient = blur_adjoint(blur(z) - y) + F.conv_transpose2d(slope, self.filters, padding=3)
        # Young's inequality bounds the norm of a convolution. A step below 2 / bound moves no two pictures
        # apart, whatever the weights, and where the minimum lies does not depend on the step.
        bound = 1 + (gain * self.filters.abs().sum((1, 2, 3)).square()).sum()
        return (z - 1.5 / bound * gradient).clamp(0, 1)


# --8<-- [end:cell]


# --8<-- [start:layers]
def equilibrium():
    """Trained at the fixed point, by implicit differentiation."""
    rule = Stopping(rtol=3e-3, max_steps=100)
    backward = ImplicitDifferentiation(stopping=rule)
    return ImplicitLayer(ProximalStep(), stopping=rule, backward=backward, init=lambda y: y)


def unrolled(num_steps):
    """Trained for a fixed number of steps, by the gradient of the iteration."""
    steps = Stopping.steps(num_steps)
    return ImplicitLayer(ProximalStep(), solver=Picard(), stopping=steps, backward=Unroll(), init=lambda y: y)


def train(layer, pictures, num_steps):
    """Mean square error on 8 pictures a step, blurred anew."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
    for _ in range(num_steps):
        truth = pictures[torch.randint(len(pictures), (8,))]
        loss = F.mse_loss(layer(measure(truth)), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# --8<-- [end:layers]


def measure(pictures):
    """What the camera sees: blurred, with noise."""
    return blur(pictures) + NOISE * torch.randn_like(pictures)


def tikhonov(y, weight):
    """The minimum of |blur(z) - y|^2 + weight |z|^2, by linear algebra."""
    side = y.shape[-1]
    matrix = blur(torch.eye(side * side).view(-1, 1, side, side)).flatten(1).T
    normal = matrix.T @ matrix + weight * torch.eye(side * side)
    return torch.linalg.solve(normal, matrix.T @ y.flatten(1).T).T.view_as(y).clamp(0, 1)


def psnr(restored, truth):
    """Decibels, the mean over pictures."""
    return -10 * F.mse_loss(restored, truth, reduction="none").mean((1, 2, 3)).log10().mean().item()


@torch.no_grad()
def after(layer, y, num_steps):
    """The pictures after so many plain steps."""
    return layer.solve(y, solver=Picard(), stopping=Stopping.steps(num_steps)).value


def draw(path, rows, counts, curves):
    """Pictures, a row for each way, and the quality by the number of steps."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    strip = torch.cat([torch.cat(list(F.pad(p[:8, 0], (1, 1, 1, 1), value=1)), 1) for p in rows.values()])
    left.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=1)
    side = strip.shape[0] / len(rows)
    left.set_yticks([(i + 0.5) * side for i in range(len(rows))], list(rows))
    left.set_xticks([])
    for name, values in curves.items():
        right.plot(counts, values, marker=".", label=name)
    right.set(xlabel="steps taken", ylabel="PSNR of held-out pictures, dB", xscale="log")
    right.legend()
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Train both, compare them with what was measured and with a penalty that is not learned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two steps of training: takes seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recipes/deblurring"), help="folder for the picture"
    )
    arguments = parser.parse_args(argv)
    num_steps, num_held_out, most = (2, 4, 10) if arguments.quick else (40, 32, 200)
    torch.manual_seed(0)
    data = load_data("mnist", 32)
    train_pictures, truth = (
        F.avg_pool2d((d.images[:, :1] + 1) / 2, 2) for d in (data.train, data.validation)
    )
    truth = truth[torch.randperm(len(truth))[:num_held_out]]
    y = measure(truth)
    rows = {"true": truth, "measured": y}
    rows["Tikhonov"] = max((tikhonov(y, w) for w in (1e-3, 3e-3, 1e-2, 3e-2)), key=lambda z: psnr(z, truth))
    counts = [n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n <= most]
    curves, trained = {}, {"10 steps": unrolled(10), "equilibrium": equilibrium()}
    untrained = psnr(after(trained["equilibrium"], y, most), truth)
    print(f"PSNR in dB of {num_held_out} held-out pictures\n{'after plain steps':<24}", end="")
    print(*(f"{n:>6}" for n in counts))
    for name, layer in trained.items():
        train(layer, train_pictures, num_steps)
        curves[f"trained: {name}"] = [psnr(after(layer, y, n), truth) for n in counts]
        print(f"{f'trained: {name}':<24}", *(f"{value:6.2f}" for value in curves[f"trained: {name}"]))
    with torch.no_grad():
        solution = trained["equilibrium"].solve(y)
    rows["equilibrium"] = solution.value
    print(f"{'not trained':<24} {untrained:6.2f}")
    for name in ("measured", "Tikhonov", "equilibrium"):
        print(f"{name:<24} {psnr(rows[name], truth):6.2f}")
    print(f"{solution.converged.sum()} of {num_held_out} converged, in {solution.nfe} evaluations at most")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(arguments.out / "deblurring.png", rows, counts, curves)


if __name__ == "__main__":
    main()
