"""The recipe "looped language model": loops written by hand are its reference."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from recipe_scripts import RECIPES, load
from torch import Tensor

from deqlib import EquilibriumCache, StepCache, Stopping

NUM_CHARACTERS = 20


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load("looped_language_model")


@pytest.fixture
def model(recipe: ModuleType):
    return recipe.LoopedLanguageModel(NUM_CHARACTERS, 16, 2)


@pytest.fixture
def characters() -> Tensor:
    return torch.randint(NUM_CHARACTERS, (3, 12))


def by_hand(recipe: ModuleType, model, **settings: float):
    return recipe.LoopByHand(model.loop.cell, model.head, **settings)


def test_it_runs_and_texts_are_the_same_with_a_cache_and_without(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert (tmp_path / "looped_language_model.png").stat().st_size > 0
    assert re.findall(r"without cache, (\w+): 2 of 2 the same", printed) == ["greedy", "sampled"]


def test_no_paragraph_that_is_held_out_was_trained_on(recipe: ModuleType) -> None:
    train, held_out, alphabet = recipe.corpus()
    seen, unseen = ("".join(alphabet[i] for i in text.tolist()) for text in (train, held_out))
    assert not set(seen.split("\n\n")) & set(unseen.split("\n\n"))
    assert 0.05 < len(unseen) / len(seen) < 0.5


def test_a_prediction_knows_nothing_of_what_comes_later(
    recipe: ModuleType, model, characters: Tensor
) -> None:
    other = characters.clone()
    other[:, 8:] = (other[:, 8:] + 1) % NUM_CHARACTERS
    with torch.no_grad():
        one, two = (model(text, stopping=Stopping.steps(6)) for text in (characters, other))
    torch.testing.assert_close(one[:, :8], two[:, :8])
    assert not torch.allclose(one[:, 8:], two[:, 8:])


@pytest.mark.parametrize("seed", range(3))
def test_training_is_that_of_the_loop_by_hand(
    recipe: ModuleType, model, characters: Tensor, seed: int
) -> None:
    found = []
    for run in (lambda x: model.loop.solve(x).aux, by_hand(recipe, model).train):
        torch.manual_seed(seed)
        model.zero_grad()
        model.head(run(model.embed(characters))).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("threshold", "differ"), [(1.0, False), (1e-3, True), (1e-5, True)])
def test_tokens_leave_where_the_loop_by_hand_leaves_them(
    recipe: ModuleType, model, characters: Tensor, threshold: float, differ: bool
) -> None:
    state, evaluations = by_hand(recipe, model, threshold=threshold).infer(model.embed(characters))
    with torch.no_grad():
        solution = model.solve(characters, stopping=recipe.exit_by(model.head, threshold))
    assert (evaluations.unique().numel() > 1) == differ
    assert (solution.place_steps + 1).equal(evaluations)
    assert solution.nfe == evaluations.max()
    torch.testing.assert_close(solution.aux, state)


def test_a_set_for_each_step_is_the_cache_by_hand_and_takes_as_many_times_the_bytes(
    recipe: ModuleType, model, characters: Tensor
) -> None:
    num_steps, length = 5, characters.shape[1]
    loop = by_hand(recipe, model, threshold=-1.0, most=num_steps)
    cache, cache_by_hand = StepCache(length, num_steps), recipe.StepsByHand(length, num_steps)
    with torch.no_grad():
        for piece in characters.split([4, 1, 1, 6], 1):
            cache_by_hand.open(piece.shape[1])
            state, _ = loop.infer(model.embed(piece), cache_by_hand)
            solution = model.solve(piece, cache, Stopping.steps(num_steps - 1))
            torch.testing.assert_close(solution.aux, state)
        at_once = model.solve(characters, stopping=Stopping.steps(num_steps - 1)).aux
    torch.testing.assert_close(state, at_once[:, -6:])
    at_fixed_point, by_step = recipe.cache_bytes(model, characters, 8)
    assert by_step == 8 * at_fixed_point == 8 * 2 * characters.numel() * 16 * 4  # keys and values, float32


def test_converged_characters_are_those_of_the_whole_text_at_once(
    recipe: ModuleType, model, characters: Tensor
) -> None:
    model.double()
    characters = characters[:, :6]
    tight = Stopping(rtol=1e-11, max_steps=500, norm_axes=(-1,))
    cache = EquilibriumCache(characters.shape[1])
    with torch.no_grad():
        pieces = [model.solve(piece, cache, tight).value for piece in characters.split(1, 1)]
        z, x = torch.zeros(*characters.shape, 16, dtype=torch.float64), model.embed(characters)
        for _ in range(200):
            z, _ = model.loop.cell(z, x)
    torch.testing.assert_close(torch.cat(pieces, 1), z, rtol=1e-8, atol=1e-9)


def lines_of(section: str) -> int:
    """Of a section of the script: neither blank, nor a comment, nor a docstring."""
    script = (RECIPES / "looped_language_model.py").read_text()
    (text,) = re.findall(rf"\[start:{section}\]\n(.*?)# --8<-- \[end:{section}\]", script, re.S)
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_with_deqlib_it_takes_at_most_half_the_lines() -> None:
    block, with_deqlib, hand_written = (lines_of(section) for section in ("block", "deqlib", "by_hand"))
    assert block > 10  # the same for both
    assert block + with_deqlib <= (block + hand_written) / 2
