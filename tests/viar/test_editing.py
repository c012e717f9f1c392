"""Editing: published numbers, what is kept, masks and errors."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from golden_reference import (
    golden_images,
    golden_labels,
    golden_tensors,
    golden_tokenizer,
    golden_transformer,
)
from hypothesis import strategies as st
from PIL import Image
from tiny_models import SIDES, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor, nn

import viar.commands.cli
import viar.evaluation.metrics
import viar.generation.editing
from viar import Sample, Sampling, edit, generate, sample_tokens
from viar.data import TensorImages, read_mask, read_picture, save_picture
from viar.evaluation import inpainting_consistency
from viar.generation.editing import box_mask

BOX = torch.ones(4, 4)
BOX[1:3, 1:3] = 0  # from 0.25 to 0.75


@pytest.mark.parametrize(("name", "mask"), [("inpaint", BOX), ("outpaint", 1 - BOX)])
def test_edits_match_the_published_program(name: str, mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, samples = golden_tensors(), []

    def noted(*args: Any, **settings: Any) -> Sample:
        samples.append(sample_tokens(*args, **settings))
        return samples[-1]

    monkeypatch.setattr(viar.generation.editing, "sample_tokens", noted)
    images = (golden_images() + 1) / 2
    edited = edit(
        golden_transformer("var"),
        golden_tokenizer(),
        images,
        mask,
        golden_labels(),
        keep="codes",
        sampling=Sampling(top_k=1),
    )
    torch.testing.assert_close(edited, golden[f"var.edit.{name}.image"], atol=2e-4, rtol=0)
    tokens = torch.cat(samples[0].tokens, 1)
    assert tokens.equal(golden[f"var.edit.{name}.sampled_tokens"].long())


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return uniform(3, 3, 6, 6)


LABELS = [0, 1, 2]


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_with_codes_a_mask_of_ones_gives_the_reconstruction(kind: str, pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    edited = edit(model, tokenizer, pictures, torch.ones(3, 3), LABELS, keep="codes")
    reconstruction = (tokenizer.decode(tokenizer.encode(pictures * 2 - 1)) + 1) / 2
    torch.testing.assert_close(edited, reconstruction)
    assert 0 <= edited.min() < edited.max() <= 1


def test_with_codes_a_mask_of_zeros_keeps_the_coarsest_scale_alone(pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    first = tokenizer.encode(pictures * 2 - 1)[0]

    def keep_first(scale: int, sampled: Tensor) -> Tensor:
        return tokenizer.quantizer.embed(first) if scale == 0 else sampled

    expected = sample_tokens(model, tokenizer, LABELS, Sampling(seed=3), replace=keep_first).f_hat
    edited = edit(
        model, tokenizer, pictures, torch.zeros(3, 3), LABELS, sampling=Sampling(seed=3), keep="codes"
    )
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
    monkeypatch.setattr(viar.generation.editing, "sample_tokens", noted)
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]])
    edit(model, tokenizer, pictures, mask, LABELS, keep="codes")
    assert kept[0] == [[[1]]] * 3
    assert kept[1] == [[[1, 0], [0, 0]]] * 3  # bilinear: 1, 0.25 and 0.0625 of the corners
    assert kept[2] == [mask.int().tolist()] * 3
    edit(model, tokenizer, pictures, torch.full((3, 3), 0.5), LABELS, keep="codes")
    assert kept[1] == [[[0, 0], [0, 0]]] * 3  # a half is not above a half


@pytest.mark.parametrize("keep", viar.generation.editing.KEEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.float64])
def test_masks_of_any_type_and_resolution_mean_the_same(
    dtype: torch.dtype, keep: str, pictures: Tensor
) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    left = torch.zeros(6, 6)
    left[:, :2] = 1
    coarse = torch.tensor([[1.0, 0, 0]] * 3)
    expected = edit(model, tokenizer, pictures, coarse, LABELS, keep=keep)
    assert edit(model, tokenizer, pictures, coarse.to(dtype), LABELS, keep=keep).equal(expected)
    assert edit(model, tokenizer, pictures, left.to(dtype), LABELS, keep=keep).equal(expected)


@pytest.mark.parametrize("keep", viar.generation.editing.KEEPS)
def test_every_image_may_have_a_mask_of_its_own(keep: str, pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    masks = torch.stack([torch.ones(3, 3), torch.zeros(3, 3), torch.eye(3)])
    together = edit(model, tokenizer, pictures, masks, LABELS, sampling=Sampling(seed=4), keep=keep)
    for i in range(3):
        one = slice(i, i + 1)
        settings = {"sampling": Sampling(seed=4), "first_index": i, "keep": keep}
        alone = edit(model, tokenizer, pictures[one], masks[i], LABELS[one], **settings)
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-5)
        again = edit(model, tokenizer, pictures[one], masks[one], LABELS[one], **settings)
        assert again.equal(alone)


def test_settings_reach_the_sampler(pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    nothing = torch.zeros(3, 3)

    def edited(first_index: int = 0, **settings: Any) -> Tensor:
        sampling = Sampling(**settings)
        return edit(model, tokenizer, pictures, nothing, LABELS, sampling=sampling, first_index=first_index)

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
        ({"keep": "pixels"}, r"keep: expected one of \['features', 'codes'\], got 'pixels'"),
        ({"border": -1}, "border: expected at least 0 pixels, got -1"),
        ({"border": 1, "keep": "codes"}, "border: keep='codes' blends nothing, so expected None, got 1"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str, pictures: Tensor) -> None:
    arguments = {"images": pictures, "mask": torch.ones(3, 3), "labels": LABELS, **changes}
    with pytest.raises(ValueError, match=message):
        edit(tiny_transformer(), tiny_tokenizer(), **arguments)


def test_the_ladder_of_these_tests_has_one_coarse_scale() -> None:
    assert [side for side in SIDES if side * side <= viar.generation.editing.COARSE_TOKENS] == [1]


# Features held, pixels put back: laws


def far_from(hidden: Tensor, border: int) -> Tensor:
    """Pixels with no hidden one within `border` rows and columns, (B, H, W)."""
    side = hidden.shape[-1]
    far = torch.ones_like(hidden, dtype=torch.bool)
    for b, y, x in hidden.nonzero().tolist():
        rows = slice(max(0, y - border), min(side, y + border + 1))
        far[b, rows, max(0, x - border) : x + border + 1] = False
    return far


MASKS = st.lists(st.booleans(), min_size=108, max_size=108).map(
    lambda bits: torch.tensor(bits).view(3, 6, 6).float()
)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(mask=MASKS, border=st.sampled_from([0, 1, 2, 7]), seed=st.integers(0, 99))
def test_kept_pixels_beyond_the_border_stay_and_hidden_ones_do_not_matter(
    mask: Tensor, border: int, seed: int
) -> None:
    model, tokenizer, images = tiny_transformer(), tiny_tokenizer(), uniform(3, 3, 6, 6, seed=seed)
    edited = edit(
        model, tokenizer, images, mask, LABELS, border=border, sampling=Sampling(seed=seed, iterations=1)
    )
    far = far_from(1 - mask, border).unsqueeze(1).expand_as(images)
    assert edited[far].equal(images[far])
    assert edited.min() >= 0
    assert edited.max() <= 1
    others = torch.where(mask.unsqueeze(1) > 0, images, uniform(3, 3, 6, 6, seed=seed + 100))
    assert edit(
        model, tokenizer, others, mask, LABELS, border=border, sampling=Sampling(seed=seed, iterations=1)
    ).equal(edited)


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_of_ones_gives_the_image_and_one_of_zeros_what_is_generated(
    kind: str, dtype: torch.dtype, pictures: Tensor
) -> None:
    model, tokenizer, images = tiny_transformer(kind), tiny_tokenizer(), pictures.to(dtype)
    assert edit(model, tokenizer, images, torch.ones(3, 3), LABELS).equal(images)
    generated = generate(model, tokenizer, LABELS, seed=3, first_index=2).to(dtype)
    assert edit(
        model, tokenizer, images, torch.zeros(2, 2), LABELS, sampling=Sampling(seed=3), first_index=2
    ).equal(generated)


def test_what_is_held_is_the_encoding_of_the_picture_so_far_with_the_kept_pixels_in_it(
    pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    mask = torch.ones(6, 6)
    mask[:, :3] = 0  # the first column of positions is hidden, half of the second
    seen = []

    def noted(*args: Any, hold: Any, **settings: Any) -> Sample:
        def wrapped(scale: int, f_hat: Tensor) -> Tensor:
            seen.append((f_hat, hold(scale, f_hat)))
            return seen[-1][1]

        return sample_tokens(*args, hold=wrapped, **settings)

    monkeypatch.setattr(viar.generation.editing, "sample_tokens", noted)
    edit(model, tokenizer, pictures, mask, LABELS)
    assert len(seen) == len(SIDES)
    for scale, (before, after) in enumerate(seen):
        picture = torch.where(mask > 0, pictures * 2 - 1, tokenizer.decode_f_hat(before))
        own = tokenizer.features(picture)  # at the last scale as they are, not quantized
        if scale < 2:
            own = tokenizer.quantizer.decode_tokens(tokenizer.encode(picture)[: scale + 1])
        assert after[..., 0].equal(before[..., 0])
        torch.testing.assert_close(after[..., 1], (before[..., 1] + own[..., 1]) / 2)
        assert after[..., 2].equal(own[..., 2])


def test_kept_pixels_reach_the_regenerated_part_and_so_does_the_label(pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    mask = box_mask((0.2, 0.2, 0.8, 0.8), 6)
    hidden = (mask == 0).expand(3, 3, 6, 6)
    expected = edit(model, tokenizer, pictures, mask, LABELS)[hidden]
    assert not edit(model, tokenizer, 1 - pictures, mask, LABELS)[hidden].equal(expected)
    assert not edit(model, tokenizer, pictures, mask, [1, 2, 0])[hidden].equal(expected)
    made = generate(model, tokenizer, LABELS)[hidden]
    assert not expected.equal(made)


def test_the_border_falls_linearly_over_the_kept_side() -> None:
    kept = torch.arange(8).gt(2).expand(1, 1, 8, 8)
    share = viar.generation.editing.made_share(kept, 3)[0, 0]
    assert share.tolist() == [[1, 1, 1, 0.75, 0.5, 0.25, 0, 0]] * 8
    assert viar.generation.editing.made_share(kept, 0)[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_the_default_border_is_half_a_token(pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer(multipliers=(1, 1, 2))  # tokens of 4 pixels
    images, mask = uniform(3, 3, 12, 12), torch.tensor([[1.0, 0]])
    assert edit(model, tokenizer, images, mask, LABELS).equal(
        edit(model, tokenizer, images, mask, LABELS, border=2)
    )
    small = tiny_tokenizer(multipliers=(1,))  # of 1 pixel
    images = uniform(3, 3, 3, 3)
    expected = edit(model, small, images, torch.eye(3), LABELS, border=1)
    assert edit(model, small, images, torch.eye(3), LABELS).equal(expected)
    assert not edit(model, small, images, torch.eye(3), LABELS, border=0).equal(expected)


def test_a_pixel_is_kept_where_more_than_half_of_it_is(pictures: Tensor) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    quarter = torch.zeros(12, 12)
    quarter[::2, ::2] = 1
    assert edit(model, tokenizer, pictures, 1 - quarter, LABELS).equal(pictures)
    made = generate(model, tokenizer, LABELS)
    assert edit(model, tokenizer, pictures, quarter, LABELS).equal(made)
    assert edit(model, tokenizer, pictures, quarter + quarter.roll(1, 1), LABELS).equal(made)


# Masks from boxes and files


def test_a_box_hides_the_pixels_whose_centres_it_holds() -> None:
    assert box_mask((0.25, 0.25, 0.75, 0.75), 4).equal(BOX)
    assert box_mask((0, 0.5, 0.5, 1), 2).tolist() == [[1, 0], [1, 1]]
    assert box_mask((0, 0, 1, 1), 3).sum() == 0
    assert box_mask((0.4, 0, 0.6, 1), 3).tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.5, 0, 0.5, 1), r"box: expected fractions .* got \(0.5, 0, 0.5, 1\)"),
        ((0, 0.6, 1, 0.5), "box: expected fractions"),
        ((-0.1, 0, 1, 1), "box: expected fractions"),
        ((0, 0, 1, 1.5), "box: expected fractions"),
        ((0, 0, 1), "box: expected fractions"),
        ((0, 0, float("nan"), 1), "box: expected fractions"),
        ((0.32, 0.32, 0.36, 0.36), "holds no pixel of a picture of side 8; make it larger"),
    ],
)
def test_a_box_that_is_none_is_refused(box: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        box_mask(box, 8)


def test_a_saved_picture_is_read_back_to_the_same_eight_bits(tmp_path: Path) -> None:
    pixels = torch.arange(192).mul(255 / 191).round()
    image = pixels.view(3, 8, 8) / 255
    save_picture(image, tmp_path / "a.png")
    again, size = read_picture(tmp_path / "a.png", 8)
    assert size == (8, 8)
    assert again.equal(image)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png"]


def test_a_mask_is_cut_as_its_picture_is(tmp_path: Path) -> None:
    shades = np.full((40, 20, 3), 255, dtype=np.uint8)
    shades[:, :10] = 0
    Image.fromarray(shades).save(tmp_path / "a.png")
    mask = read_mask(tmp_path / "a.png", 8, (20, 40))
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 8
    image, size = read_picture(tmp_path / "a.png", 8)
    assert (size, image.shape) == ((20, 40), (3, 8, 8))
    assert image.mean(0).gt(0.5).float().equal(mask)
    with pytest.raises(ValueError, match="has 20 x 40 pixels, the picture 8 x 8; they must be of one size"):
        read_mask(tmp_path / "a.png", 8, (8, 8))
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"b.png: is no picture that can be read"):
        read_picture(tmp_path / "b.png", 8)


# The command, and the measure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With models, a picture of 6 x 6 and a mask."""
    folder = tmp_path_factory.mktemp("edit")
    tiny_transformer().save_pretrained(folder / "viar")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    save_picture(uniform(3, 6, 6), folder / "image.png")
    mask = torch.ones(3, 6, 6)
    mask[:, :3] = 0
    save_picture(mask, folder / "mask.png")
    return folder


def command(folder: Path, *flags: object) -> tuple[int, str]:
    """Exit code, and output and errors on one line."""
    said = io.StringIO()
    models = ("--model", folder / "viar", "--tokenizer", folder / "tokenizer")
    arguments = ["viar", "edit", *map(str, (*models, "--device", "cpu", *flags))]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", arguments)
        try:
            viar.commands.cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), " ".join(said.getvalue().split())
    return 0, " ".join(said.getvalue().split())


def test_the_command_writes_the_edits_and_a_strip(folder: Path, tmp_path: Path) -> None:
    image, _ = read_picture(folder / "image.png", 6)
    flags = ("--image", folder / "image.png", "--label", 2, "--seed", 5)
    box = ("--box", 0, 0, 0.5, 1)
    assert command(folder, *flags, *box, "--num", 3, "--out", tmp_path / "new" / "a.png")[0] == 0
    names = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert names == ["a-0.png", "a-1.png", "a-2.png", "a-strip.png"]
    expected = edit(
        tiny_transformer(),
        tiny_tokenizer(),
        image.expand(3, -1, -1, -1),
        torch.tensor([[0.0], [1.0]]),
        [2] * 3,
        sampling=Sampling(seed=5),
    )
    results = [read_picture(tmp_path / "new" / f"a-{i}.png", 6)[0] for i in range(3)]
    torch.testing.assert_close(torch.stack(results), expected, atol=0.5001 / 255, rtol=0)
    assert all(result[:, 4:].equal(image[:, 4:]) for result in results)  # beyond the border of one pixel
    assert not results[0].equal(results[1])
    with Image.open(tmp_path / "new" / "a-strip.png") as strip:
        assert strip.size == (5 * 50, 50)
        shades = [strip.getpixel((75, y)) for y in (5, 45)]
        assert shades == [(0, 0, 0), (255, 255, 255)]
    masked = ("--mask", folder / "mask.png", "--batch-size", 2, "--num", 3)
    assert command(folder, *flags, *masked, "--out", tmp_path / "b.png")[0] == 0
    for index in range(3):
        assert (tmp_path / f"b-{index}.png").read_bytes() == (
            tmp_path / "new" / f"a-{index}.png"
        ).read_bytes()
    assert command(folder, *flags, "--box", 0.5, 0, 1, 1, "--invert", "--out", tmp_path / "c.png")[0] == 0
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "b-0.png").read_bytes()
    assert command(folder, *flags, *box, "--keep", "codes", "--out", tmp_path / "d.png")[0] == 0
    assert not read_picture(tmp_path / "d.png", 6)[0][:, 4:].equal(image[:, 4:])


def test_a_picture_of_another_size_is_cut_and_the_command_says_so(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "white").save(tmp_path / "wide.png")
    flags = ("--image", tmp_path / "wide.png", "--label", 0, "--box", 0, 0, 0.5, 1)
    code, said = command(folder, *flags, "--out", tmp_path / "a.png")
    assert (code, "wide.png is 40 x 20: resized, and the centre of 6 x 6 cut out" in said) == (0, True)
    assert read_picture(tmp_path / "a.png", 6)[1] == (6, 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "expected one of --box and --mask, got none"),
        (("--box", 0, 0, 1, 1, "--mask", "x.png"), "expected one of --box and --mask, got both"),
        (("--box", 1, 0, 0, 1), "box: expected fractions"),
        (("--mask", "no.png"), "no.png"),
        (("--box", 0, 0, 1, 1, "--num", 0), "num must be at least 1, got 0"),
        (("--box", 0, 0, 1, 1, "--label", 4), "--label: expected classes 0 to 2"),
        (("--box", 0, 0, 1, 1, "--keep", "codes", "--border", 1), "border: keep='codes' blends nothing"),
        (("--box", 0, 0, 1, 1, "--image", "none.png"), "none.png"),
    ],
)
def test_wrong_flags_end_with_a_message(
    flags: tuple[object, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    given = () if "--image" in flags else ("--image", folder / "image.png")
    given += () if "--label" in flags else ("--label", 0)
    code, said = command(folder, *given, *flags, "--out", tmp_path / "a.png")
    assert code == 2
    assert message in said
    assert not list(tmp_path.iterdir())


def test_inpainting_consistency_is_the_share_that_keeps_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    images, labels = uniform(5, 3, 6, 6), torch.tensor([0, 1, 2, 0, 1])

    class Colour(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    def share(mask: Tensor, **changes: Any) -> float:
        data = TensorImages(images * 2 - 1, labels)
        return inpainting_consistency(Colour(), model, tokenizer, data, mask, **changes)

    real = images.mean((2, 3)).argmax(1).eq(labels).float().mean()
    assert share(torch.ones(3, 3)) == pytest.approx(float(real))
    generated = generate(model, tokenizer, labels, seed=1).mean((2, 3)).argmax(1).eq(labels).float().mean()
    made = []
    monkeypatch.setattr(
        viar.evaluation.metrics, "edit", lambda *a, **k: made.append(edit(*a, **k)) or made[-1]
    )
    assert share(torch.zeros(3, 3), sampling=Sampling(seed=1), batch_size=2) == pytest.approx(
        float(generated)
    )
    torch.testing.assert_close(torch.cat(made), generate(model, tokenizer, labels, seed=1))
