"""Soft codes: pictures of mixtures of codes, by the published formula, from the image's own noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SIDES, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor

from viar import Adaptive, Sampling, box_mask, edit, generate, generate_series, sample_tokens
from viar.generation.choice import TokenNoise
from viar.model.scales import scale_slices

SETTINGS = [
    ("explicit", {}),
    ("implicit", {"iterations": (4, 2), "cache": "iterate"}),
    ("implicit", {"iterations": 3, "warm_start": True, "guidance_reuse": 1}),
    ("implicit", {"iterations": Adaptive(rtol=1e-2, max_steps=8), "cfg": 0.0}),
]


def logits_and_embeddings(settings: dict[str, Any], kind: str) -> tuple[list[Tensor], list[Tensor], Any]:
    """What the model said of each scale, and what the sampler made of it."""
    model, logits, embeddings = tiny_transformer(kind), [], []
    handle = model.head.register_forward_hook(lambda _, __, output: logits.append(output))

    def replace(_: int, sampled: Tensor) -> Tensor:
        embeddings.append(sampled)
        return sampled

    sampling = Sampling(seed=4, more_smooth=True, **settings)
    sample = sample_tokens(model, tiny_tokenizer(), [0, 2], sampling, first_index=6, replace=replace)
    handle.remove()
    return logits, embeddings, sample


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_every_scale_is_the_published_mixture_of_what_the_model_says(
    kind: str, settings: dict[str, Any]
) -> None:
    logits, embeddings, sample = logits_and_embeddings({**settings, "top_k": None, "top_p": None}, kind)
    codes = tiny_tokenizer().quantizer.codebook.weight.detach().double().numpy()
    noise = TokenNoise.of_images(2, 4, 6, torch.device("cpu"))
    for scale, where in enumerate(scale_slices(SIDES)):
        side, ratio = SIDES[scale], scale / (len(SIDES) - 1)
        everything = torch.arange(16).expand(2, side * side, -1)
        gumbel = noise.gumbel(everything, where.start).double().numpy()
        scores = logits[scale].double().numpy() * (1 + ratio) + gumbel
        weights = np.exp((scores - scores.max(-1, keepdims=True)) / max(0.27 * (1 - ratio * 0.95), 0.005))
        expected = (weights / weights.sum(-1, keepdims=True)) @ codes
        made = embeddings[scale].flatten(2).transpose(1, 2).double().numpy()
        np.testing.assert_allclose(made, expected, atol=1e-4)
        assert (sample.tokens[scale].numpy() == scores.argmax(-1)).all()
    quantizer, f_hat = tiny_tokenizer().quantizer, torch.zeros(2, 4, 3, 3)
    for scale, embedding in enumerate(embeddings):
        f_hat = quantizer.accumulate(f_hat, embedding, scale)
    torch.testing.assert_close(sample.f_hat, f_hat)
    assert not sample.f_hat.allclose(quantizer.decode_tokens(sample.tokens), atol=1e-2)
    assert not sample.certain.any()


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_an_image_depends_on_its_seed_index_and_label_alone(kind: str, settings: dict[str, Any]) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    labels = [0, 1, 2, 3, 0]

    def made(start: int, stop: int, seed: int = 9) -> Tensor:
        return generate(
            model, tokenizer, labels[start:stop], seed=seed, first_index=start, more_smooth=True, **settings
        )

    together = made(0, 5)
    alone = torch.cat([made(i, i + 1) for i in range(5)])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    assert (made(0, 5, seed=10) - together).flatten(1).abs().amax(1).min() > 1e-3
    assert not together[0].allclose(together[4], atol=1e-3)  # the same label, another index


def test_one_candidate_leaves_nothing_to_mix() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    hard, soft = (generate(model, tokenizer, [0, 1], top_k=1, more_smooth=more) for more in (False, True))
    torch.testing.assert_close(soft, hard)


def test_sampling_neither_reads_nor_moves_the_global_generator() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    before = torch.get_rng_state()
    first = generate(model, tokenizer, [0, 1], more_smooth=True)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    assert generate(model, tokenizer, [0, 1], more_smooth=True).equal(first)


@pytest.mark.parametrize("keep", ["features", "codes"])
def test_an_edit_of_everything_is_a_generation_and_kept_pixels_stay(keep: str) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    images, sampling = uniform(2, 3, 6, 6), Sampling(seed=3, more_smooth=True)
    if keep == "features":
        everything = edit(model, tokenizer, images, torch.zeros(6, 6), [0, 1], sampling=sampling)
        torch.testing.assert_close(everything, generate(model, tokenizer, [0, 1], seed=3, more_smooth=True))
    mask = box_mask((0.5, 0, 1, 1), 6)
    soft = edit(model, tokenizer, images, mask, [0, 1], sampling=sampling, keep=keep)
    hard = edit(model, tokenizer, images, mask, [0, 1], sampling=Sampling(seed=3), keep=keep)
    assert not soft.allclose(hard, atol=1e-3)
    if keep == "features":
        assert soft[:, :, :2].equal(images[:, :, :2])


def test_a_series_of_mixtures_is_that_of_the_sampler_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    sampling = Sampling(seed=5, more_smooth=True)

    def make(name: str, num: int, sampling: Sampling = sampling, batch_size: int = 4) -> dict[str, bytes]:
        folder = tmp_path / name
        generate_series(
            model, tokenizer, folder, num, sampling=sampling, batch_size=batch_size, formats=["png"]
        )
        return {path.name: path.read_bytes() for path in folder.glob("*.png")}

    whole = make("whole", 10)
    make("parts", 3)
    (tmp_path / "parts" / "000001.png").unlink()
    assert make("parts", 10) == whole
    told = json.loads((tmp_path / "whole" / "series.json").read_text())
    assert told["more_smooth"] is True
    assert told["batch_size"] == "4, because of mixtures of codes"
    assert make("hard", 10, Sampling(seed=5)) != whole
    assert "more_smooth" not in json.loads((tmp_path / "hard" / "series.json").read_text())
    with pytest.raises(ValueError, match="more_smooth: true there, null now"):
        make("whole", 10, Sampling(seed=5))
    with pytest.raises(ValueError, match="more_smooth: null there, true now"):
        make("hard", 10)
    with pytest.raises(ValueError, match="batch_size"):
        make("whole", 10, batch_size=5)
    images = generate(model, tokenizer, [0, 1, 2, 0], seed=5, more_smooth=True)
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    for index in range(4):
        with Image.open(tmp_path / "whole" / f"{index:06d}.png") as image:
            assert abs(np.asarray(image).astype(int) - pixels[index].astype(int)).max() <= 1


@pytest.mark.parametrize("value", [1, "yes", None])
def test_what_is_no_choice_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="more_smooth: expected True or False"):
        Sampling(more_smooth=value)
