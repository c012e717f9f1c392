from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_scripts import load

from deqlib import ImplicitDifferentiation, Stopping

recipe = load("deq_classifier")


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return recipe.classifier(recipe.equilibrium, channels=4).double()


def test_the_gradient_is_that_of_the_block_stacked_many_times(model: torch.nn.Module) -> None:
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    stem, layer, head = model
    tight = Stopping(rtol=1e-10, max_steps=200)
    layer.stopping, layer.backward = tight, ImplicitDifferentiation(stopping=tight)
    z = torch.zeros_like(stem(images))
    for _ in range(60):
        z = layer.cell(z, stem(images))
    stacked = head(z)
    torch.testing.assert_close(model(images), stacked, rtol=1e-6, atol=1e-6)
    found, expected = (
        torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        for logits in (model(images), stacked)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_image_takes_the_steps_and_gets_the_answer_that_it_gets_alone(model: torch.nn.Module) -> None:
    images = (
        torch.randn(4, 3, 32, 32, dtype=torch.float64) * torch.tensor([0.01, 0.1, 1, 10])[:, None, None, None]
    )
    predicted, num_steps = recipe.at_tolerance(model, images, 1e-6)
    assert num_steps.unique().numel() > 1
    for index in range(4):
        alone = recipe.at_tolerance(model, images[index : index + 1], 1e-6)
        assert (int(alone[0]), int(alone[1])) == (int(predicted[index]), int(num_steps[index]))


def test_it_runs_and_takes_more_steps_to_a_lower_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main(["--quick", "--out", str(tmp_path)])
    models, tolerances, _ = capsys.readouterr().out.split("\n\n")
    _, once, equilibrium = (line.split() for line in models.splitlines())
    assert once[1] == equilibrium[1]  # as many parameters
    steps = [float(line.split()[1]) for line in tolerances.splitlines()[1:]]
    assert len(steps) == 6
    assert steps == sorted(steps)
    assert steps[-1] > 2 * steps[0]
    assert (tmp_path / "deq_classifier.png").stat().st_size > 5_000
