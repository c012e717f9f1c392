"""Masks drawn as pictures mean what whoever drew them meant, or are refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from viar.data import read_mask

HALF = np.zeros((8, 8), bool)
HALF[:4] = True


def means(path: Path, drawn: npt.NDArray[np.bool_]) -> None:
    size = drawn.shape[1], drawn.shape[0]
    assert (read_mask(path, drawn.shape[0], size).numpy() == drawn).all()


@pytest.mark.parametrize("high", [1, 2, 17, 128, 255])
def test_zero_and_one_other_number_are_anew_and_kept(high: int, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"png": np.uint8, "bmp": np.uint8, "tif": np.uint16}
    for ending, kind in kinds.items():
        Image.fromarray((HALF * high).astype(kind)).save(tmp_path / f"a.{ending}")
        means(tmp_path / f"a.{ending}", HALF)
    for kind in (np.float32, np.int32):  # 32 bits too, whose range is not known
        Image.fromarray((HALF * high).astype(kind)).save(tmp_path / "b.tif")
        means(tmp_path / "b.tif", HALF)
    Image.fromarray(np.repeat((HALF * high).astype(np.uint8)[..., None], 3, -1)).save(tmp_path / "c.png")
    means(tmp_path / "c.png", HALF)


@given(
    drawn=st.lists(st.booleans(), min_size=16, max_size=16).filter(lambda d: len(set(d)) == 2),
    kind=st.sampled_from(["1", "L", "01", "RGB", "P", "16", "RGBA", "LA", "alpha", "grey alpha", "I", "F"]),
)
def test_every_way_to_write_a_mask_means_the_same(
    drawn: list[bool], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keep = np.array(drawn).reshape(4, 4)
    levels = keep.astype(np.uint8) * np.uint8(255)
    opaque = np.full_like(levels, 255)
    images = {
        "1": Image.fromarray(levels).convert("1"),
        "L": Image.fromarray(levels),
        "01": Image.fromarray(keep.astype(np.uint8)),
        "RGB": Image.fromarray(np.repeat(levels[..., None], 3, -1)),
        "P": Image.fromarray(levels).convert("P"),
        "16": Image.fromarray(levels.astype(np.uint16) * 257),
        "RGBA": Image.fromarray(np.stack([levels, levels, levels, opaque], -1)),
        "LA": Image.fromarray(np.stack([levels, levels], -1), "LA"),
        "alpha": Image.fromarray(np.stack([opaque, 0 * levels, opaque, levels], -1)),
        "grey alpha": Image.fromarray(np.stack([0 * levels, levels], -1), "LA"),
        "I": Image.fromarray(keep.astype(np.int32)),
        "F": Image.fromarray(keep.astype(np.float32)),
    }
    path = tmp_path_factory.mktemp("mask") / ("a.tif" if kind in ("I", "F") else "a.png")
    images[kind].save(path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        means(path, keep)
    words = [str(one.message) for one in said]
    if kind in ("alpha", "grey alpha"):
        assert words == [f"mask: {path} is of one colour; what is opaque in its alpha channel is kept"]
    else:
        assert words == []


def test_a_palette_of_black_and_white_means_its_colours_and_not_its_numbers(tmp_path: Path) -> None:
    image = Image.fromarray(HALF.astype(np.uint8), "P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "a.png")
    means(tmp_path / "a.png", ~HALF)


def test_a_mask_is_turned_by_its_own_orientation_and_compared_upright(tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    drawn = np.zeros((4, 8), np.uint8)
    drawn[:, :4] = 255
    Image.fromarray(drawn).save(tmp_path / "a.png", exif=tag)
    mask = read_mask(tmp_path / "a.png", 4, (4, 8))
    assert mask.tolist() == [[1] * 4] * 2 + [[0] * 4] * 2  # what was left is above
    with pytest.raises(ValueError, match=r"mask: .*a.png has 4 x 8 pixels, the picture 8 x 4"):
        read_mask(tmp_path / "a.png", 4, (8, 4))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((8, 8), 255), "keeps everything: its grey goes from 255 to 255 of 255"),
        (np.zeros((8, 8)), "keeps nothing: its grey goes from 0 to 0 of 255"),
        (HALF * 40 + 20, "keeps nothing: its grey goes from 20 to 60 of 255; paint white what is kept"),
        (HALF * 40 + 200, "keeps everything: its grey goes from 200 to 240"),
        (HALF * 1 + np.eye(8) * 1, "keeps nothing: its grey goes from 0 to 2 of 255"),  # numbers of classes
    ],
)
def test_a_mask_that_keeps_all_or_nothing_is_refused(
    values: npt.NDArray[Any], words: str, tmp_path: Path
) -> None:
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"mask: .*a.png {words}"):
        read_mask(tmp_path / "a.png", 8, (8, 8))


def test_a_mask_that_is_white_where_the_picture_is_cut_off_says_so(tmp_path: Path) -> None:
    values = np.zeros((8, 80), np.uint8)
    values[:, :20] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png, cut to 8 x 8, keeps nothing"):
        read_mask(tmp_path / "a.png", 8, (80, 8))


def test_two_masks_in_one_file_are_refused(tmp_path: Path) -> None:
    levels = HALF * np.uint8(255)
    both = np.stack([levels, levels, levels, levels.T], -1)
    Image.fromarray(both).save(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=r"a.png has one mask in its colours and another in its alpha channel"
    ):
        read_mask(tmp_path / "a.png", 8, (8, 8))


def test_an_alpha_channel_that_says_nothing_is_not_looked_at(tmp_path: Path) -> None:
    levels = HALF * np.uint8(255)
    Image.fromarray(np.stack([levels, levels, levels, 0 * levels], -1)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"alpha channel of .*a.png is the same everywhere; the colours"):
        means(tmp_path / "a.png", HALF)


def test_a_photograph_taken_for_a_mask_is_said(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(60, 200, (8, 8)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"mask: \d+ % of .*a.png is neither dark nor light|neither dark"):
        read_mask(tmp_path / "a.png", 8, (8, 8))


def test_a_mask_has_no_colours_that_a_profile_could_change(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    darker = profile.replace("sRGB".encode("utf-16-be"), "dark".encode("utf-16-be"))
    darker = darker.replace(b"\x00\x02\x66\x66", b"\x00\x04\xcc\xcc")  # the exponent 2.4 doubled
    assert darker[128:] != profile[128:]
    levels = HALF * np.uint8(150)
    levels[0, 0] = 255
    Image.fromarray(np.repeat(levels[..., None], 3, -1)).save(tmp_path / "a.png", icc_profile=darker)
    with pytest.warns(UserWarning, match="neither dark nor light"):
        means(tmp_path / "a.png", HALF)


@pytest.mark.parametrize("name", ["cut.png", "text.png", "gone.png", "frames.gif", "numbers.tif"])
def test_a_mask_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8))
    image.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:100])
    (tmp_path / "text.png").write_text("no picture")
    image.save(tmp_path / "frames.gif", save_all=True, append_images=[image.rotate(90)])
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "numbers.tif")
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        read_mask(tmp_path / name, 8, (8, 8))
