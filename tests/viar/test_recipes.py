"""Recipes: what they promise, and how one makes another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viar import ExplicitTrunkConfig, ImplicitTrunkConfig
from viar.commands.train import _never_adversarial
from viar.training import TOKENIZERS, TRANSFORMERS, TransformerRecipe
from viar.training.adversarial import AdversarialConfig
from viar.training.recipes import PUBLISHED, explicit, imagenet256, mnist

SIDES = {"digits": 8, "mnist": 32, "emoji": 64, "imagenet256": 256, "imagenet512": 512}  # pixels


def test_every_kind_of_picture_has_tokenizer_viar_and_var() -> None:
    assert {name: recipe.model.image_side for name, recipe in TOKENIZERS.items()} == SIDES
    kinds = {ImplicitTrunkConfig: set[str](), ExplicitTrunkConfig: set[str]()}
    for name, recipe in TRANSFORMERS.items():
        kinds[type(recipe.model.trunk)].add(name.split("-")[0])
    assert list(kinds.values()) == [set(SIDES), set(SIDES)]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_fits_the_tokenizer_of_its_pictures(name: str) -> None:
    tokenizer = TOKENIZERS[name.split("-")[0]]
    recipe = TRANSFORMERS[name]
    assert recipe.data == tokenizer.data
    for size in ("sides", "codebook_size", "code_channels"):
        assert getattr(recipe.model, size) == getattr(tokenizer.model, size)


@pytest.mark.parametrize("recipes", [TOKENIZERS, TRANSFORMERS], ids=["tokenizers", "transformers"])
def test_runs_end_by_steps_on_which_no_load_of_the_machine_tells(
    recipes: dict[str, TransformerRecipe],
) -> None:
    assert all(recipe.train.steps and recipe.train.seconds is None for recipe in recipes.values())


@given(st.integers(11, 40))
def test_a_depth_decides_width_heads_and_drop_path_as_published(depth: int) -> None:
    model = imagenet256(PUBLISHED, depth=depth).model
    assert (model.depth, model.width, model.num_heads) == (depth, 64 * depth, depth)
    assert model.drop_path == pytest.approx(0.1 * depth / 24)
    assert model.trunk == PUBLISHED.model.trunk


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name.endswith("-viar")])
def test_the_var_of_a_viar_differs_in_its_trunk_alone(name: str) -> None:
    viar, var = TRANSFORMERS[name], explicit(TRANSFORMERS[name])
    assert var.model.trunk == ExplicitTrunkConfig()
    assert replace(var, model=replace(var.model, trunk=viar.model.trunk)) == viar


def test_published_learning_rates_are_those_of_a_batch_of_512() -> None:
    for name, recipe in TRANSFORMERS.items():
        if name.startswith("imagenet"):
            per_256 = 1e-4 if "-var" in name else 8e-5
            assert recipe.train.lr == pytest.approx(per_256 * recipe.train.batch_size / 256), name


def test_a_recipe_of_ones_own_edits_another() -> None:
    def mine(recipe: TransformerRecipe) -> TransformerRecipe:
        recipe = mnist(recipe)
        return replace(recipe, model=replace(recipe.model, width=128))

    assert mine(PUBLISHED) == replace(
        TRANSFORMERS["mnist-viar"], model=replace(TRANSFORMERS["mnist-viar"].model, width=128)
    )
    assert TRANSFORMERS["imagenet256-viar"] == PUBLISHED  # what is edited stays as it was


@pytest.mark.parametrize(
    ("weight", "steps", "is_said"), [(0.8, 300, True), (0.8, 301, False), (0.0, 1, False)]
)
def test_an_adversarial_loss_that_never_begins_is_said(weight: float, steps: int, is_said: bool) -> None:
    recipe = TOKENIZERS["digits"]
    adversarial = AdversarialConfig(weight=weight, start=300)
    recipe = replace(recipe, adversarial=adversarial, train=replace(recipe.train, steps=steps))
    assert bool(_never_adversarial(recipe)) == is_said
