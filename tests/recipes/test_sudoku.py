"""docs/recipes/sudoku.py: puzzles have one solution, and training is the loop that one writes by hand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recipe_scripts import load

sudoku = load("sudoku")


def peers(place: int) -> set[int]:
    """Places in the row, column or block of one."""
    row, column = divmod(place, 4)
    return {
        other
        for other in range(16)
        for r, c in [divmod(other, 4)]
        if other != place and (r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2))
    }


PEERS = [peers(place) for place in range(16)]


def solutions_of(digits: list[int]) -> Iterator[list[int]]:
    """All ways to fill the empty places, 0, by trial."""
    if 0 not in digits:
        yield digits
        return
    place = digits.index(0)
    for digit in {1, 2, 3, 4} - {digits[other] for other in PEERS[place]}:
        yield from solutions_of([*digits[:place], digit, *digits[place + 1 :]])


def test_all_grids_are_there_and_renamed_digits_stay_on_one_side_of_the_split() -> None:
    grids = sudoku.all_grids()
    assert grids.shape == (12, 24, 16)
    assert {tuple(grid) for grid in grids.flatten(0, 1).tolist()} == {
        tuple(grid) for grid in solutions_of([0] * 16)
    }
    for same in grids:
        # Which places hold the same digit does not depend on the digits' names.
        assert ((same[:, :, None] == same[:, None]) == (same[0, :, None] == same[0])).all()


def relatives(grid: torch.Tensor) -> set[tuple[int, ...]]:
    """What a grid (4, 4) turns into by the symmetries of the game, digits named by the first row."""
    orders = [order for order in itertools.permutations(range(4)) if order[0] // 2 == order[1] // 2]
    found = set()
    for turned in (grid, grid.T):
        for rows, columns in itertools.product(orders, orders):
            moved = turned[list(rows)][:, list(columns)]
            found.add(tuple((moved[0].argsort() + 1)[moved.flatten() - 1].tolist()))
    return found


def test_no_symmetry_turns_a_grid_that_is_held_out_into_one_that_is_trained_on() -> None:
    first = sudoku.all_grids()[:, 0]
    held_out = {tuple(first[index].tolist()) for index in sudoku.HELD_OUT}
    assert len(held_out) == 4
    assert relatives(first[sudoku.HELD_OUT[0]].view(4, 4)) == held_out


def test_a_puzzle_has_its_clues_and_one_solution() -> None:
    grids = sudoku.all_grids()
    generator = torch.Generator().manual_seed(0)
    puzzles, solutions = sudoku.draw_puzzles(grids[10:].flatten(0, 1), grids.flatten(0, 1), 20, 5, generator)
    assert puzzles.shape == solutions.shape == (20, 16)
    assert ((puzzles != 0).sum(1) == 5).all()
    for puzzle, solution in zip(puzzles.tolist(), solutions.tolist(), strict=True):
        assert list(solutions_of(puzzle)) == [solution]


def test_what_counts_as_solved_obeys_the_rules_and_keeps_the_clues() -> None:
    grid = sudoku.all_grids()[3, 5]
    puzzle = torch.where(torch.arange(16) < 6, grid, 0)
    renamed = grid % 4 + 1
    swapped = grid.clone()
    swapped[[0, 1]] = grid[[1, 0]]
    found = sudoku.is_solved(torch.stack([grid, renamed, swapped]), puzzle)
    assert found.tolist() == [True, False, False]


def test_training_is_the_loop_that_one_would_write_by_hand() -> None:
    torch.manual_seed(0)
    solver = sudoku.Solver(width=8)
    puzzles, targets = torch.randint(5, (3, 16)), torch.randint(4, (3, 16))
    cell = solver.layer.cell

    def one_recursion(answer: torch.Tensor, pad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clues = cell.digit(puzzles) + cell.place
        for _ in range(3):
            pad = cell.network(clues + answer + pad)
        return cell.network(answer + pad), pad

    state = torch.zeros(3, 16, 8), torch.zeros(3, 16, 8)
    for logits in solver(puzzles, num_solves=3):
        with torch.no_grad():
            state = one_recursion(*one_recursion(*state))
        state = one_recursion(*state)
        by_hand = solver.read(state[0])
        torch.testing.assert_close(logits, by_hand)
        weights = list(solver.parameters())
        gradients = [
            torch.autograd.grad(F.cross_entropy(some.mT, targets), weights) for some in (logits, by_hand)
        ]
        torch.testing.assert_close(*gradients)
        state = state[0].detach(), state[1].detach()


def test_the_recipe_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sudoku.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    shares = [[float(share) for share in re.findall(r"([\d.]+)%", line)] for line in printed.splitlines()]
    assert [len(some) for some in shares] == [0, 5, 5, 0]
    assert all(some == sorted(some) for some in shares)  # what is solved stays solved
    assert (tmp_path / "sudoku.png").stat().st_size > 0
