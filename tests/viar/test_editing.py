"""Editing: published numbers, what is kept, masks and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_reference import (
    golden_images,
    golden_labels,
    golden_tensors,
    golden_tokenizer,
    golden_transformer,
)
from tiny_models import SIDES, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor

import viar.editing
from viar import Sample, edit, generate, sample_tokens

BOX = torch.ones(4, 4)
BOX[1:3, 1:3] = 0  # from 0.25 to 0.75


@pytest.mark.parametrize(("name", "mask"), [("inpaint", BOX), ("outpaint", 1 - BOX)])
def test_edits_match_the_published_program(name: str, mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, samples = golden_tensors(), []

    def noted(*args: Any, **settings: Any) -> Sample:
        samples.append(sample_tokens(*args, **settings))
        return samples[-1]

    monkeypatch.setattr(viar.editing, "sample_tokens", noted)
    images = (golden_images() + 1) / 2
    edited = edit(golden_transformer("var"), golden_tokenizer(), images, mask, golden_labels(), top_k=1)
    torch.testing.assert_close(edited, golden[f"var.edit.{name}.image"], atol=2e-4, rtol=0)
    tokens = torch.cat(samples[0].tokens, 1)
    assert tokens.equal(golden[f"var.edit.{name}.sampled_tokens"].long())


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return uniform(3, 3, 6, 6)


LABELS = [0, 1, 2]


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_a_mask_of_ones_gives_the_reconstruction(kind: str, pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    edited = edit(model, tokenizer, pictures, torch.ones(3, 3), LABELS)
    reconstruction = (tokenizer.decode(tokenizer.encode(pictures * 2 - 1)) + 1) / 2
    torch.testing.assert_close(edited, reconstruction)
    assert 0 <= edited.min() < edited.max() <= 1


def test_a_mask_of_zeros_keeps_the_coarsest_scale_alone(pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    first = tokenizer.encode(pictures * 2 - 1)[0]

    def keep_first(scale: int, sampled: Tensor) -> Tensor:
        return tokenizer.quantizer.embed(first) if scale == 0 else sampled

    expected = sample_tokens(model, tokenizer, LABELS, seed=3, replace=keep_first).f_hat
    edited = edit(model, tokenizer, pictures, torch.zeros(3, 3), LABELS, seed=3)
    assert edited.equal(tokenizer.decode_f_hat(expected).add(1).div(2))
    assert not edited.equal(generate(model, tokenizer, LABELS, seed=3))


def test_each_scale_keeps_its_own_codes_where_the_resized_mask_is_above_a_half(
    pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    kept = {}

    def noted(*args: Any, replace: Any, **settings: Any) -> Sample:
        def wrapped(scale: int, sampled: Tensor) -> Tensor:
            own = tokenizer.quantizer.embed(tokens[scale])
            marked = torch.full_like(sampled, 7.0)
            result = replace(scale, marked)
            assert ((result == own) | (result == 7.0)).all()
            kept[scale] = (result != 7.0)[:, 0].int().tolist()
            return result

        return sample_tokens(*args, replace=wrapped, **settings)

    tokens = tokenizer.encode(pictures * 2 - 1)
    monkeypatch.setattr(viar.editing, "sample_tokens", noted)
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]])
    edit(model, tokenizer, pictures, mask, LABELS)
    assert kept[0] == [[[1]]] * 3
    assert kept[1] == [[[1, 0], [0, 0]]] * 3  # bilinear: 1, 0.25 and 0.0625 of the corners
    assert kept[2] == [mask.int().tolist()] * 3
    edit(model, tokenizer, pictures, torch.full((3, 3), 0.5), LABELS)
    assert kept[1] == [[[0, 0], [0, 0]]] * 3  # a half is not above a half


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.float64])
def test_masks_of_any_type_and_resolution_mean_the_same(dtype: torch.dtype, pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    left = torch.zeros(6, 6)
    left[:, :2] = 1
    coarse = torch.tensor([[1.0, 0, 0]] * 3)
    expected = edit(model, tokenizer, pictures, coarse, LABELS)
    assert edit(model, tokenizer, pictures, coarse.to(dtype), LABELS).equal(expected)
    assert edit(model, tokenizer, pictures, left.to(dtype), LABELS).equal(expected)


def test_every_image_may_have_a_mask_of_its_own(pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    masks = torch.stack([torch.ones(3, 3), torch.zeros(3, 3), torch.eye(3)])
    together = edit(model, tokenizer, pictures, masks, LABELS, seed=4)
    for i in range(3):
        one = slice(i, i + 1)
        alone = edit(model, tokenizer, pictures[one], masks[i], LABELS[one], seed=4, first_index=i)
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-5)
        again = edit(model, tokenizer, pictures[one], masks[one], LABELS[one], seed=4, first_index=i)
        assert again.equal(alone)


def test_settings_reach_the_sampler(pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    nothing = torch.zeros(3, 3)

    def edited(**settings: Any) -> Tensor:
        return edit(model, tokenizer, pictures, nothing, LABELS, **settings)

    assert edited().equal(edited(seed=0, cfg=1.5, top_k=900, top_p=0.96, iterations=3, cache="equilibrium"))
    for settings in ({"seed": 1}, {"cfg": 4.0}, {"top_k": 1}, {"top_p": 0.2}, {"first_index": 5}):
        assert not edited().equal(edited(**settings)), settings
    for settings in ({"iterations": 1}, {"iterations": 2, "cache": "iterate"}):
        first, second = edited(**settings, top_k=1), edited(iterations=2, top_k=1)
        assert not first.equal(second), settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(3)}, r"mask: expected shape \(h, w\) or \(3, h, w\), got \(3,\)"),
        ({"mask": torch.ones(2, 3, 3)}, r"mask: expected shape .* got \(2, 3, 3\)"),
        ({"mask": torch.ones(3, 1, 3, 3)}, "mask: expected shape"),
        ({"mask": torch.ones(0, 3)}, "mask: expected shape"),
        ({"mask": torch.full((3, 3), 2.0)}, r"mask: expected values in \[0, 1\], got 2 to 2"),
        ({"mask": torch.full((3, 3), -1)}, r"mask: expected values in \[0, 1\]"),
        ({"mask": torch.full((3, 3), float("nan"))}, r"mask: expected values in \[0, 1\]"),
        (
            {"images": torch.full((3, 3, 6, 6), -0.5)},
            r"images: expected values in \[0, 1\], got -0.5 to -0.5",
        ),
        ({"images": torch.full((3, 3, 6, 6), float("nan"))}, r"images: expected values in \[0, 1\]"),
        ({"images": torch.ones(3, 3, 8, 8)}, r"images must be floating point of shape \(B, 3, 6, 6\)"),
        ({"images": torch.ones(3, 3, 6, 6, dtype=torch.uint8)}, "images must be floating point"),
        ({"labels": [0, 1]}, r"labels: expected shape \(3,\), one an image, got \(2,\)"),
        ({"labels": torch.tensor(0)}, r"labels: expected shape \(3,\), one an image, got \(\)"),
        ({"labels": [0, 1, 9]}, "labels: expected classes 0 to 2"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str, pictures: Tensor) -> None:
    arguments = {"images": pictures, "mask": torch.ones(3, 3), "labels": LABELS, **changes}
    with pytest.raises(ValueError, match=message):
        edit(tiny_transformer(), tiny_tokenizer(), **arguments)


def test_the_ladder_of_these_tests_has_one_coarse_scale() -> None:
    assert [side for side in SIDES if side * side <= viar.editing.COARSE_TOKENS] == [1]
