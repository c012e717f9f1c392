"""Which labels are wrong? A weight for each sample, learnt by its gradient through the training."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from deqlib import GMRES, ImplicitDifferentiation, Stopping, fixed_point
from viar.data import load_data

DECAY = 0.02


# --8<-- [start:inner]
def training_loss(weight, x, y, trust):  # weight: (features, classes), trust: (samples,)
    """Cross-entropy with a weight for each sample, and weight decay."""
    losses = F.cross_entropy(x @ weight, y, reduction="none")
    return (trust.sigmoid() * losses).mean() + DECAY * weight.square().sum()


def descent(weight, x, y, trust):  # weight: (1, features, classes), the only sample of its batch
    """A step of gradient descent: its fixed point is the trained model."""
    gradient = torch.func.grad(training_loss)(weight[0], x, y, trust)
    curvature = torch.linalg.matrix_norm(x, 2).square() / (2 * len(x)) + 2 * DECAY  # at most
    return weight - gradient[None] / curvature


def train(x, y, trust, start=None, rtol=1e-4):
    """The trained model, (1, features, classes): a function of the samples' weights, with its gradient."""
    return fixed_point(
        descent,
        x.new_zeros(1, x.shape[1], 10) if start is None else start,
        (x, y, trust),
        stopping=Stopping(rtol=rtol, max_steps=1000),
        backward=ImplicitDifferentiation(solver=GMRES(), stopping=Stopping(rtol=rtol, max_steps=200)),
        on_failure="raise",
    ).value


# --8<-- [end:inner]


# --8<-- [start:outer]
def learn_trust(x, y, x_validation, y_validation, num_steps):
    """Logits of the weights that a low validation loss asks for, and that loss before every step."""
    trust = torch.zeros(len(x), requires_grad=True)
    optimizer = torch.optim.Adam([trust], lr=0.3)
    weight, losses = None, []
    for _ in range(num_steps):
        weight = train(x, y, trust, weight)
        loss = F.cross_entropy(x_validation @ weight[0], y_validation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weight = weight.detach()  # the next training begins where this one ended
        losses.append(loss.item())
    return trust.detach(), losses


# --8<-- [end:outer]


def digits(num_train, num_validation):
    """Digits to train on, for validation, for the test; 45 % of the first are called the next digit."""
    data = load_data("digits", 8)
    images = torch.cat([data.train.images, data.validation.images])[:, 0].flatten(1)
    labels = torch.cat([data.train.labels, data.validation.labels])
    order = torch.randperm(len(labels))
    x, y = (images[order] - images.mean(0)) / images.std(), labels[order]
    x = F.pad(x, (0, 1), value=1.0)  # the bias
    wrong = torch.rand(num_train) < 0.45
    noisy = torch.where(wrong, (y[:num_train] + 1) % 10, y[:num_train])
    end = num_train + num_validation
    return (x[:num_train], noisy), (x[num_train:end], y[num_train:end]), (x[end:], y[end:]), wrong


def draw(path, losses, weights, wrong):
    """Validation loss by step, and the weights of right and of wrong labels."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses, color="#1f6f8b")
    left.set(xlabel="steps of the hyper-parameters", ylabel="validation loss")
    bins = torch.linspace(0, 1, 21).tolist()
    right.hist(weights[~wrong].tolist(), bins, alpha=0.7, color="#1f6f8b", label="right labels")
    right.hist(weights[wrong].tolist(), bins, alpha=0.7, color="#d1495b", label="wrong labels")
    right.set(xlabel="weight of the sample", ylabel="samples")
    right.legend()
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Learn which samples to trust, and compare with trainings that know it or do not ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples and steps: takes seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recipes/bilevel"), help="folder for the picture"
    )
    arguments = parser.parse_args(argv)
    num_train, num_validation, num_steps = (100, 50, 5) if arguments.quick else (1000, 100, 30)
    torch.manual_seed(0)
    (x, y), validation, (x_test, y_test), wrong = digits(num_train, num_validation)
    trust, losses = learn_trust(x, y, *validation, num_steps)

    def accuracy(x, y, trust):
        with torch.no_grad():
            return ((x_test @ train(x, y, trust)[0]).argmax(1) == y_test).float().mean().item()

    def trusted(x, y):
        return accuracy(x, y, torch.full((len(x),), 9.0))

    weights = trust.sigmoid()
    found = ((weights < 0.5) == wrong).float().mean().item()
    print(f"validation loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {num_steps} steps")
    print(f"{'trained on':<42}test accuracy")
    print(f"{f'all samples, {int(wrong.sum())} of {num_train} labels wrong':<42}{trusted(x, y):.1%}")
    print(f"{f'the {num_validation} of the validation alone':<42}{trusted(*validation):.1%}")
    print(f"{'all samples by their learned weights':<42}{accuracy(x, y, trust):.1%}")
    print(f"{'the right ones alone, if one knew them':<42}{trusted(x[~wrong], y[~wrong]):.1%}")
    print(f"weights tell right labels from wrong ones in {found:.1%} of the samples")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(arguments.out / "bilevel.png", losses, weights, wrong)


if __name__ == "__main__":
    main()
