from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.case import Row, Run
from benchmarks.suites.recipes import knob, mnist, running
from viar.training import TRANSFORMERS, TransformerRecipe

RUN = Run(torch.device("cpu"), 1, False)
QUICK = replace(RUN, quick=True)


def a_recipe(**train: Any) -> TransformerRecipe:
    recipe = TRANSFORMERS["digits-viar"]
    model = replace(recipe.model, depth=3, width=16, num_heads=2, label_dropout=0.0)
    return replace(recipe, model=model, train=replace(recipe.train, batch_size=8, **train))


def few_digits() -> running.Material:
    return running.material_of("digits", 0, quick=True)


def test_a_training_ends_with_its_best_weights_and_the_curve_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "FOLDER", tmp_path)
    monkeypatch.setattr(running, "POINTS", 4)
    recipe, material = a_recipe(lr=0.5), few_digits()  # so fast that the loss does not only fall
    outcome = running.trained(recipe, material, "viar", seed=3, steps=8, run=RUN)
    losses = dict(outcome.curve)
    assert list(losses) == [2, 4, 6, 8]
    assert losses[outcome.best_step] == min(losses.values()) < max(losses.values())
    assert material.loss(outcome.model) == pytest.approx(min(losses.values()), rel=1e-5)
    record = json.loads((tmp_path / "digits" / "viar-8-steps-seed-3" / "run.json").read_text())
    assert record["train"]["seed"] == 3

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("it has ended")

    monkeypatch.setattr(running, "train_transformer", again)
    read = running.trained(recipe, material, "viar", seed=3, steps=8, run=RUN)
    assert read.curve == outcome.curve
    assert material.loss(read.model) == material.loss(outcome.model)
    with pytest.raises(ValueError, match="expected the training of this recipe, found one of another train"):
        running.trained(a_recipe(lr=0.4), material, "viar", seed=3, steps=8, run=RUN)


def test_iterations_off_the_tape_cost_a_step_no_memory_and_those_on_it_do() -> None:
    tokens, recipe = mnist.timing_tokens(few_digits()), a_recipe()
    few, many = (mnist.deepest_step_bytes(recipe, tokens, no_grad=count) for count in (1, 100))
    assert many == few
    deeper = replace(recipe.model, trunk=replace(recipe.model.trunk, grad=(1, 8)))
    assert mnist.deepest_step_bytes(replace(recipe, model=deeper), tokens) > 1.2 * few


KNOB = {"1": 2.2, "2": 2.05, "3": 2.0, "4": 2.0, "6": 2.0, "10": 2.001}


def a_row(contender: str, seed: int, **changes: Any) -> Row:
    viar = contender == "VIAR"
    return {
        "contender": contender,
        "seed": seed,
        "steps": 100,
        "taken": 100,
        "seconds": [0.1],
        "parameters": 40 if viar else 100,
        "loss": 2.0,
        "best_step": 90,
        "curve": [[50, 2.5], [100, 2.0]],
        "knob": KNOB if viar else {},
        "step_bytes": 50 if viar else 100,
        "far_step_bytes": 50 if viar else None,
        **changes,
    }


def all_rows(**changes: Any) -> list[Row]:
    """Of two seeds; changes are those of VIAR's second."""
    names = mnist.MODELS
    return [a_row(n, s, **(changes if (n, s) == ("VIAR", 1) else {})) for s in (0, 1) for n in names]


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"loss": 2.01}, [1]),
        ({"loss": 2.03}, [0, 1]),
        ({"parameters": 46}, [2]),
        ({"step_bytes": 61, "far_step_bytes": 61}, [3]),
        ({"knob": {**KNOB, "1": 2.06}}, [4]),
        ({"knob": {**KNOB, "6": 2.1}}, [5]),
        ({"far_step_bytes": 51}, [6]),
    ],
)
def test_the_worst_seed_decides_every_bar(changes: dict[str, Any], broken: list[int]) -> None:
    bars = mnist.bars(all_rows(**changes))
    assert [i for i, bar in enumerate(bars) if bar.verdict != "pass"] == broken
    assert all(bars[i].note == "100 steps, seed 1" for i in broken)
    assert len(mnist.table(all_rows(**changes)).lines) == 6


def test_bars_of_what_was_not_trained_are_not_measured() -> None:
    rows = [a_row("VAR", 0)]
    assert all(math.isnan(bar.value) for bar in mnist.bars(rows))
    assert mnist.table(rows).lines


def test_a_penalty_and_the_ranges_of_a_training_replace_those_of_the_recipe() -> None:
    (row,) = knob.build(QUICK, "0-3, 2-5, Jacobian 1", per_class=1)
    assert list(row["knob"]) == [str(count) for count in knob.COUNTS]
    assert row["loss"] > 0
    assert row["spectral_radius"] > 0
    assert knob.table([row]).lines
