"""Sudoku of 4 x 4 by a tiny network that calls itself: an answer and a scratchpad, improved in turn.

All but the last recursion of a solve go without gradient, and a loss follows each of several solves that go
on from one another. (Tiny recursive models: Jolicoeur-Martineau 2025, arXiv 2510.04871.)
"""

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from deqlib import ImplicitLayer, Picard, StochasticJFB, Stopping
from deqlib.loops import deep_supervision

SHOWN = (1, 2, 4, 8, 16)  # solves
# Of the twelve grids of `all_grids`, those that swaps of rows, of columns and of pairs of these, and
# transposing, turn into one another and into none of the other eight.
HELD_OUT = (0, 3, 8, 11)


# --8<-- [start:cell]
class Mixer(nn.Module):
    """Places tell one another what they know, then each thinks."""

    def __init__(self, width):
        super().__init__()
        self.across = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.RMSNorm(width)

    def forward(self, h):  # (puzzles, 16, width)
        """The same shape."""
        h = self.norm(h + self.across(h.mT).mT)
        return self.norm(h + self.within(h))


class Recursion(nn.Module):
    """The state is (answer, scratchpad): the scratchpad is rewritten three times, then the answer once."""

    def __init__(self, width):
        super().__init__()
        self.digit, self.place = nn.Embedding(5, width), nn.Parameter(0.1 * torch.randn(16, width))
        self.network = nn.Sequential(Mixer(width), Mixer(width))

    def forward(self, state, puzzles):  # two of (puzzles, 16, width); digits (puzzles, 16), 0 where empty
        """The next answer and scratchpad."""
        answer, scratchpad = state
        clues = self.digit(puzzles) + self.place
        for _ in range(3):
            scratchpad = self.network(clues + answer + scratchpad)
        return self.network(answer + scratchpad), scratchpad


# --8<-- [end:cell]


# --8<-- [start:layer]
class Solver(nn.Module):
    """A solve is three recursions, the last of them with gradient."""

    def __init__(self, width=64):
        super().__init__()
        self.width, self.read = width, nn.Linear(width, 4)
        self.layer = ImplicitLayer(
            Recursion(width),
            solver=Picard(),
            stopping=Stopping.steps(3),
            backward=StochasticJFB(total=3, grad=1),
            init=self.blank,
        )

    def blank(self, puzzles):
        """No answer and an empty scratchpad."""
        return (torch.zeros(len(puzzles), 16, self.width),) * 2

    def forward(self, puzzles, num_solves):
        """Logits of the four digits, (puzzles, 16, 4), after every solve."""
        for solution in deep_supervision(self.layer, puzzles, num_solves=num_solves):
            yield self.read(solution.value[0])


def train_on(solver, optimizer, puzzles, solutions):
    """A loss and a step of the optimizer after each of four solves; the last loss."""
    for logits in solver(puzzles, num_solves=4):
        loss = F.cross_entropy(logits.mT, solutions - 1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
        optimizer.step()
    return loss.item()


# --8<-- [end:layer]


# --8<-- [start:puzzles]
def is_valid(grids):  # (..., 16)
    """Whether every row, column and block has the four digits."""
    rows = grids.unflatten(-1, (4, 4))
    blocks = grids.unflatten(-1, (2, 2, 2, 2)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    groups = torch.cat([rows, rows.mT, blocks], -2)
    return (groups.sort(-1).values == torch.arange(1, 5)).all(-1).all(-1)


def all_grids():
    """The 288 solved grids, (12, 24, 16): twelve, each with its digits renamed in all 24 ways."""
    rows = torch.tensor(list(itertools.permutations(range(1, 5))))
    others = torch.cartesian_prod(*[torch.arange(24)] * 3)
    grids = torch.cat([rows[:1].expand(len(others), 4), rows[others].flatten(1)], 1)
    grids = grids[is_valid(grids)]
    return rows[:, grids - 1].transpose(0, 1)


def draw_puzzles(grids, every_grid, num_puzzles, num_clues, generator):
    """Puzzles with so many clues and one solution, and these solutions, (num_puzzles, 16) each."""
    solutions = grids[torch.randint(len(grids), (8 * num_puzzles,), generator=generator)]
    is_clue = torch.rand(solutions.shape, generator=generator).argsort(1) < num_clues
    fits = (every_grid == solutions[:, None]) | ~is_clue[:, None]
    unique = fits.all(-1).sum(-1) == 1
    return (solutions * is_clue)[unique][:num_puzzles], solutions[unique][:num_puzzles]


# --8<-- [end:puzzles]


@torch.no_grad()
def answers(solver, puzzles, num_solves):
    """The grids that stand there after every solve, (solves, puzzles, 16)."""
    return torch.stack([logits.argmax(-1) + 1 for logits in solver(puzzles, num_solves)])


def is_solved(grids, puzzles):
    """Whether grids (..., puzzles, 16) obey the rules and keep the clues, as anyone can see."""
    return is_valid(grids) & ((grids == puzzles) | (puzzles == 0)).all(-1)


def draw_grid(axes, grid, puzzle, title):
    """Clues in black, digits that break a rule in red."""
    others = (torch.arange(16)[:, None] // 4 == torch.arange(16) // 4) | (
        torch.arange(16)[:, None] % 4 == torch.arange(16) % 4
    )
    block = torch.arange(16) // 8 * 2 + torch.arange(16) % 4 // 2
    others = (others | (block[:, None] == block)) & ~torch.eye(16, dtype=torch.bool)
    clash = ((grid[:, None] == grid) & others).any(1)
    for place, digit in enumerate(grid.tolist()):
        is_clue = bool(puzzle[place])
        colour = "black" if is_clue else "#d1495b" if clash[place] else "#1f6f8b"
        style = {"color": colour, "weight": "bold" if is_clue else "normal"}
        axes.text(
            place % 4 + 0.5, 3.5 - place // 4, str(digit), ha="center", va="center", fontsize=13, **style
        )
    for line in range(5):
        width = 1.5 if line % 2 == 0 else 0.5
        axes.plot([line, line], [0, 4], color="black", linewidth=width)
        axes.plot([0, 4], [line, line], color="black", linewidth=width)
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal")
    axes.axis("off")


def draw(path, solved, puzzle, grids):
    """Share of puzzles solved by the number of solves, and one puzzle after some of them."""
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    axes = left.subplots()
    for name, shares in solved.items():
        axes.plot(range(1, len(shares) + 1), 100 * shares, marker=".", label=name)
    axes.set(xlabel="solves", ylabel="puzzles solved, %", ylim=(0, 102), xticks=SHOWN)
    axes.legend(loc="lower right")
    places = right.subplots(1, len(grids), squeeze=False)[0]
    for axes, (count, grid) in zip(places, grids.items(), strict=True):
        draw_grid(axes, grid, puzzle, f"after {count}")
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Train on puzzles of one kind of grid, solve puzzles of the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="many clues, little training: takes seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recipes/sudoku"), help="folder for the picture"
    )
    arguments = parser.parse_args(argv)
    num_batches, num_clues, num_tested = (3, 8, 16) if arguments.quick else (60, 5, 300)
    torch.manual_seed(0)
    generator, grids = torch.Generator().manual_seed(0), all_grids()
    is_held_out = torch.isin(torch.arange(12), torch.tensor(HELD_OUT))
    trained_on, held_out, every_grid = (
        some.flatten(0, 1) for some in (grids[~is_held_out], grids[is_held_out], grids)
    )
    solver = Solver()
    optimizer = torch.optim.AdamW(solver.parameters(), lr=2e-3, weight_decay=0.1)
    for _ in range(num_batches):
        train_on(solver, optimizer, *draw_puzzles(trained_on, every_grid, 64, num_clues, generator))
    print(
        f"{f'{num_clues} clues; solved after':<24}" + "".join(f"{count:>8}" for count in SHOWN) + "  solves"
    )
    solved = {}
    for name, some in {"grids trained on": trained_on, "held-out grids": held_out}.items():
        puzzles, _ = draw_puzzles(some, every_grid, num_tested, num_clues, generator)
        found = answers(solver, puzzles, num_solves=16)
        done = is_solved(found, puzzles).cummax(0).values  # who solved it stops, and can tell
        solved[name] = done.float().mean(1)
        print(f"{name:<24}" + "".join(f"{solved[name][count - 1]:>8.1%}" for count in SHOWN))
    first = (~done).sum(0)  # the solve that solved it
    num_weights = sum(weights.numel() for weights in solver.parameters())
    mean = (first + 1).clamp(max=16).float().mean()
    print(
        f"{num_weights} weights; a held-out puzzle took {mean:.2f} solves on average, 16 if it was not solved"
    )
    hardest = first.masked_fill(~done[-1], -1).argmax()
    end = min(int(first[hardest]), 15)
    shown = {count + 1: found[count, hardest] for count in sorted({0, end // 2, end})}
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(arguments.out / "sudoku.png", solved, puzzles[hardest], shown)


if __name__ == "__main__":
    main()
