"""A layer that decides: a quadratic program whose costs are predicted, trained by what its decisions cost."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from deqlib import ImplicitDifferentiation, Stopping, fixed_point


# --8<-- [start:layer]
def splitting_step(s, cost, target, inverse, bounded):  # s and cost: (B, n), target: (B, m)
    """A step of Douglas-Rachford splitting, between z >= 0 and the rest of the program."""
    allowed = s.relu() if bounded else s
    right_side = torch.cat([2 * allowed - s - cost, target], dim=1)
    # What meets the equations, its cost weighed against its distance.
    nearest = right_side @ inverse[: s.shape[1]].mT
    return s + nearest - allowed


def solve_program(quadratic, cost, matrix, target, bounded=True, rtol=1e-5):
    """The z, (B, n), of least z' quadratic z / 2 + cost' z with matrix z = target, and z >= 0 if bounded."""
    m, n = matrix.shape
    identity, zeros = torch.eye(n, dtype=cost.dtype), torch.zeros(m, m, dtype=cost.dtype)
    upper = torch.cat([quadratic + identity, matrix.mT], dim=1)
    system = torch.cat([upper, torch.cat([matrix, zeros], dim=1)])
    stopping = Stopping(rtol=rtol, max_steps=1000)
    s = fixed_point(
        splitting_step,
        torch.zeros_like(cost),
        (cost, target, torch.linalg.inv(system), bounded),  # inverted once, and not at every step
        stopping=stopping,
        backward=ImplicitDifferentiation(stopping=stopping),
    ).value
    return s.relu() if bounded else s


# --8<-- [end:layer]


# --8<-- [start:decide]
class Investor(nn.Module):
    """Shares of assets, (B, assets): a linear forecast of their costs, and the program that decides."""

    def __init__(self, features, cost, risk):
        super().__init__()
        self.risk = risk
        self.forecast = nn.Linear(features.shape[1], cost.shape[1])
        with torch.no_grad():  # least squares: the best forecast that there is
            ones = torch.ones(len(features), 1)
            fit = torch.linalg.lstsq(torch.cat([features, ones], dim=1), cost).solution
            self.forecast.weight.copy_(fit[:-1].T)
            self.forecast.bias.copy_(fit[-1])

    def forward(self, features):
        """The decision for what is forecast."""
        return self.decide(self.forecast(features))

    def decide(self, cost):
        """The decision for these costs: shares that add up to one, none of them negative."""
        return solve_program(self.risk, cost, torch.ones(1, len(self.risk)), torch.ones(len(cost), 1))

    def price(self, shares, cost):
        """What a decision costs, (B,), its risk included."""
        return (shares * cost).sum(1) + (shares @ self.risk * shares).sum(1) / 2


# --8<-- [end:decide]


def market(num_samples):
    """Five features (B, 5), and the costs of eight assets (B, 8), of which they tell no linear function."""
    features = torch.randn(num_samples, 5)
    effect = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)).round()
    return features, -(((features @ effect / 5**0.5 + 3) / 3) ** 4)


def judge(model, features, cost):
    """Mean squared error of the forecast, and what its decisions cost more than the best ones."""
    with torch.no_grad():
        error = (model.forecast(features) - cost).square().mean()
        extra = model.price(model(features), cost) - model.price(model.decide(cost), cost)
    return error.item(), extra.mean().item()


def draw(path, extras, forecasts, cost):
    """What decisions cost by step, and forecasts before and after beside what came."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(range(0, 5 * len(extras), 5), extras, "o-", markersize=3, color="#1f6f8b")
    left.set(xlabel="training steps through the program", ylabel="extra cost of a decision")
    for color, (name, forecast) in zip(("#d1495b", "#1f6f8b"), forecasts.items(), strict=True):
        right.plot(
            cost.flatten().tolist(), forecast.flatten().tolist(), ".", markersize=2, color=color, label=name
        )
    right.axline((0, 0), slope=1, color="0.5", linewidth=0.8)
    right.set(xlabel="cost of an asset", ylabel="forecast")
    right.legend(markerscale=4)
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Fit the forecast, then train it by its decisions, print and draw both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples and steps: takes seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes/quadratic_program"))
    arguments = parser.parse_args(argv)
    num_samples, num_steps = (50, 10) if arguments.quick else (300, 60)
    torch.manual_seed(0)
    (features, cost), test = market(num_samples), market(num_samples)
    root = torch.randn(8, 8) / 8**0.5
    model = Investor(features, cost, risk=0.3 * root @ root.T + 0.03 * torch.eye(8))
    fitted, extras, forecasts = judge(model, *test), [], {"least squares": model.forecast(test[0]).detach()}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(num_steps):
        if step % 5 == 0:
            extras.append(judge(model, *test)[1])
        loss = model.price(model(features), cost).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained, forecasts["by decisions"] = judge(model, *test), model.forecast(test[0]).detach()
    print(f"{'forecast trained by':<24}{'its squared error':<22}extra cost of a decision")
    print(f"{'least squares':<24}{fitted[0]:<22.3f}{fitted[1]:.4f}")
    print(f"{'what decisions cost':<24}{trained[0]:<22.3f}{trained[1]:.4f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(arguments.out / "quadratic_program.png", extras, forecasts, test[1])


if __name__ == "__main__":
    main()
