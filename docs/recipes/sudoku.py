"""Sudoku of 4 x 4 by a tiny network that calls itself: an answer and a scratchpad, improved in turn.

The manner of Jolicoeur-Martineau 2025 (arXiv 2510.04871): all but the last recursion of a solve without gradient, and
a loss after each of several solves that go on from one another.
"""

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from deqlib import ImplicitLayer, Picard, StochasticJFB, Stopping


# --8<-- [start:cell]
class Mixer(nn.Module):
    """Cells tell one another, then every cell thinks."""

    def __init__(self, width):
        super().__init__()
        self.across = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.RMSNorm(width)

    def forward(self, h):  # (puzzles, 16, width)
        h = self.norm(h + self.across(h.mT).mT)
        return self.norm(h + self.within(h))


class Recursion(nn.Module):
    """The state is (answer, scratchpad): the scratchpad is rewritten some times, then the answer once."""

    def __init__(self, width, num_rewrites=3):
        super().__init__()
        self.network, self.num_rewrites = nn.Sequential(Mixer(width), Mixer(width)), num_rewrites

    def forward(self, state, clues):  # all (puzzles, 16, width)
        answer, scratchpad = state
        for _ in range(self.num_rewrites):
            scratchpad = self.network(clues + answer + scratchpad)
        return self.network(answer + scratchpad), scratchpad


# --8<-- [end:cell]


# --8<-- [start:solver]
class Solver(nn.Module):
    """Puzzles (puzzles, 16), 0 where a cell is empty, to logits of the four digits."""

    def __init__(self, width=64, num_recursions=3):
        super().__init__()
        self.embed, self.place = nn.Embedding(5, width), nn.Parameter(0.1 * torch.randn(16, width))
        self.layer = ImplicitLayer(
            Recursion(width),
            solver=Picard(),
            stopping=Stopping.steps(num_recursions),
            backward=StochasticJFB(no_grad=(num_recursions - 1,) * 2, grad=(1, 1)),
            init=lambda clues: (torch.zeros_like(clues), torch.zeros_like(clues)),
        )
        self.read = nn.Linear(width, 4)

    def forward(self, puzzles, state=None):
        """Logits (puzzles, 16, 4), and the state to go on from."""
        state = self.layer.solve(self.embed(puzzles) + self.place, z0=state).value
        return self.read(state[0]), tuple(part.detach() for part in state)


def train_on(solver, optimizer, puzzles, solutions, num_solves):
    """Deep supervision: a loss and a step of the optimizer after every solve."""
    state = None
    for _ in range(num_solves):
        logits, state = solver(puzzles, state)
        loss = F.cross_entropy(logits.flatten(0, 1), solutions.flatten() - 1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
        optimizer.step()
    return loss.item()


# --8<-- [end:solver]


# --8<-- [start:puzzles]
def is_valid(grids):  # (..., 16)
    """Whether every row, column and block has the four digits."""
    rows = grids.unflatten(-1, (4, 4))
    blocks = grids.unflatten(-1, (2, 2, 2, 2)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    groups = torch.cat([rows, rows.mT, blocks], -2)
    return (groups.sort(-1).values == torch.arange(1, 5)).all(-1).all(-1)


def all_grids():
    """The 288 solved grids, (12, 24, 16): every one with its digits renamed in all 24 ways."""
    rows = torch.tensor(list(itertools.permutations(range(1, 5))))
    lower = torch.cartesian_prod(*[torch.arange(24)] * 3)
    grids = torch.cat([rows[:1].expand(len(lower), 4), rows[lower].flatten(1)], 1)
    grids = grids[is_valid(grids)]
    return rows[:, grids - 1].transpose(0, 1)


def draw_puzzles(grids, num_puzzles, num_clues, every_grid, generator):
    """Puzzles with one solution and so many clues, and these solutions, (num_puzzles, 16) each."""
    found = []
    while sum(len(solutions) for _, solutions in found) < num_puzzles:
        solutions = grids[torch.randint(len(grids), (num_puzzles,), generator=generator)]
        order = torch.rand(solutions.shape, generator=generator).argsort(1)
        puzzles = solutions * (order < num_clues)
        fits = (every_grid == puzzles[:, None]) | (puzzles == 0)[:, None]
        unique = fits.all(-1).sum(-1) == 1
        found.append((puzzles[unique], solutions[unique]))
    return tuple(torch.cat(parts)[:num_puzzles] for parts in zip(*found, strict=True))


# --8<-- [end:puzzles]
