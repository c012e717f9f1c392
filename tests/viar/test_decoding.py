"""Picture files of all kinds are decoded as a viewer shows them, or refused by name."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

import viar.data.pictures
from viar.data import ImageFolder, cut_square, read_picture
from viar.data.decoding import decode_picture, to_rgb

Pixels = npt.NDArray[Any]
LOSSLESS: dict[str, dict[str, Any]] = {"webp": {"lossless": True, "exact": True}}


def noise(height: int, width: int, *channels: int, high: int = 256, kind: Any = np.uint8) -> Pixels:
    return np.random.default_rng(0).integers(0, high, (height, width, *channels)).astype(kind)


def decoded(path: Path) -> Pixels:
    return np.asarray(decode_picture(path)).astype(int)


def grey(values: Pixels) -> Pixels:
    return np.repeat(values[..., None].astype(int), 3, -1)


def on_white(colour: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(int)


def png(path: Path, values: Pixels, bits: int, kind: int, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG written by hand: numbers (height, width) or (height, width, channels) of 2, 4 or 16 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = values.reshape(len(values), -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        digits = [[(int(v) >> b) & 1 for v in row for b in reversed(range(bits))] for row in rows]
        lines = [np.packbits(line).tobytes() for line in digits]
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in lines))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def tiff(path: Path, values: Pixels, bits: int, *, white_is_zero: bool = False, order: str = "<") -> Path:
    """A grey TIFF written by hand: numbers (height, width) of 12 or 16 bits."""
    height, width = values.shape
    if bits == 16:
        data = values.astype(f"{order}u2").tobytes()
    else:
        digits = [[(int(v) >> b) & 1 for v in row for b in reversed(range(bits))] for row in values]
        data = b"".join(np.packbits(line).tobytes() for line in digits)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, int(not white_is_zero))]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data))]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4)
    return path


# Numbers of more or fewer bits than 8


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@given(seed=st.integers(0, 1000), height=st.integers(1, 9), width=st.integers(1, 9))
def test_grey_of_16_bits_is_divided_by_257(
    ending: str, seed: int, height: int, width: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("grey") / f"a.{ending}"
    values = np.random.default_rng(seed).integers(0, 65536, (height, width)).astype(np.uint16)
    values[0, 0] = (0, 65535)[seed % 2]
    Image.fromarray(values).save(path)
    assert (decoded(path) == grey(values // 257)).all()
    side, (image, _) = max(height, width), read_picture(path, max(height, width))
    assert image.shape == (3, side, side)
    if height == width:
        assert ((image[0] * 255).round().int().numpy() == values // 257).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_12_bits_and_of_white_at_zero_has_its_own_range(order: str, tmp_path: Path) -> None:
    wide = noise(5, 6, high=65536, kind=np.uint16)
    assert (decoded(tiff(tmp_path / "a.tif", wide, 16, order=order)) == grey(wide // 257)).all()
    if order == ">":
        return  # Pillow itself refuses the others in this order
    turned = decoded(tiff(tmp_path / "b.tif", wide, 16, white_is_zero=True))
    assert (turned == grey((65535 - wide) // 257)).all()
    narrow = noise(5, 6, high=4096, kind=np.uint16)
    narrow[0, :2] = 0, 4095
    found = decoded(tiff(tmp_path / "c.tif", narrow, 12))
    assert abs(found - grey(narrow) * 255 / 4095).max() < 1
    assert found[0, :2, 0].tolist() == [0, 255]


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_keep_their_upper_half(channels: int, tmp_path: Path) -> None:
    values = noise(4, 5, channels, high=65536, kind=np.uint16)
    kind = 2 if channels == 3 else 6
    found = decoded(png(tmp_path / "a.png", values, 16, kind))
    wanted = values / 257
    if channels == 4:
        wanted = on_white(values[..., :3] / 257, values[..., 3] / 257)
    assert abs(found - wanted).max() <= 2 if channels == 4 else abs(found - wanted).max() < 1


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_32_bits_are_refused_by_name(kind: Any, tmp_path: Path) -> None:
    Image.fromarray(noise(4, 4).astype(kind)).save(tmp_path / "scan.tif")
    with pytest.raises(ValueError, match=r"scan.tif: 32 bit .* save it as 8 or 16 bit grey"):
        read_picture(tmp_path / "scan.tif", 4)
    with pytest.raises(ValueError, match="picture: 32 bit"):
        cut_square(Image.fromarray(noise(4, 4).astype(kind)), 4, at_random=False)


# Orientation


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """What the EXIF standard says of where row 0 and column 0 of the file are seen."""
    flips: dict[int, Callable[[Pixels], Pixels]] = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p[::-1].swapaxes(0, 1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: p[:, ::-1].swapaxes(0, 1),
    }
    return flips[orientation](pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_every_orientation_is_undone(kind: str, mode: str, orientation: int, tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    pixels = noise(4, 7, 3)
    image = (
        Image.fromarray(pixels).convert(mode)
        if mode != "I;16"
        else Image.fromarray(noise(4, 7).astype(np.uint16))
    )
    if kind == "webp" and mode in ("P", "I;16"):
        mode, image = "RGB", Image.fromarray(pixels)
    path = tmp_path / f"a.{kind}"
    image.save(path, exif=tag, **({"lossless": True} if kind == "webp" else {}))
    plain = np.asarray(image.convert("RGB")) if mode != "I;16" else grey(np.asarray(image) // 257)
    assert (decoded(path) == turned(plain, orientation)).all()
    assert read_picture(path, 4)[1] == ((7, 4) if orientation < 5 else (4, 7))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_it_was_held(orientation: int, tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255  # the corner at row 0 and column 0
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=tag, quality=95)
    assert abs(decoded(tmp_path / "a.jpg") - turned(pixels.astype(int), orientation)).max() < 16
    images, _ = ImageFolder([(tmp_path / "a.jpg", 0)], 8, train=False).__getitems__([0])
    square = to_rgb(Image.fromarray(np.ascontiguousarray(turned(pixels, orientation))))
    assert (images[0] - cut_square(square, 8, at_random=False)).abs().max() < 0.15


def test_broken_exif_is_no_reason_to_refuse_a_picture(tmp_path: Path) -> None:
    image = Image.fromarray(noise(4, 4, 3))
    image.save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xffbroken")
    assert (decoded(tmp_path / "a.png") == np.asarray(image)).all()


# Transparency and palettes


@given(seed=st.integers(0, 1000), height=st.integers(1, 6), width=st.integers(1, 6))
def test_what_is_transparent_is_white(
    seed: int, height: int, width: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("alpha")
    draw = np.random.default_rng(seed)
    rgba = draw.integers(0, 256, (height, width, 4)).astype(np.uint8)
    wanted = on_white(rgba[..., :3], rgba[..., 3])
    for ending in ("png", "tif", "webp"):
        Image.fromarray(rgba).save(folder / f"a.{ending}", **LOSSLESS.get(ending, {}))
        assert abs(decoded(folder / f"a.{ending}") - wanted).max() <= 1
    both = rgba[..., [0, 3]]
    Image.fromarray(np.ascontiguousarray(both), "LA").save(folder / "la.png")
    assert abs(decoded(folder / "la.png") - on_white(grey(both[..., 0]), both[..., 1])).max() <= 1


def test_an_edge_is_blended_with_white_and_not_with_colours_that_nobody_sees(tmp_path: Path) -> None:
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[:, 20:] = (200, 100, 50, 255)  # the other half is black, and invisible
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image, _ = read_picture(tmp_path / "a.png", 10)
    shown = image * 255
    for channel, colour in enumerate((200, 100, 50)):
        assert shown[channel].min() >= colour - 20  # Lanczos overshoots a little
        assert shown[channel, :, 0].min() > 250
    assert not (image < 50 / 255 - 0.08).any()


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    indices, palette = noise(5, 6, high=4), noise(4, 3)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "plain.gif")
    image.save(tmp_path / "plain.tif")
    image.save(tmp_path / "plain.bmp")
    for ending in ("png", "gif", "tif", "bmp"):
        assert (decoded(tmp_path / f"plain.{ending}") == palette[indices]).all()
    image.save(tmp_path / "one.png", transparency=2)
    image.save(tmp_path / "one.gif", transparency=2)
    for ending in ("png", "gif"):
        wanted = np.where((indices == 2)[..., None], 255, palette[indices])
        assert (decoded(tmp_path / f"one.{ending}") == wanted).all()
    alphas = np.array([0, 100, 200, 255])
    image.save(tmp_path / "table.png", transparency=bytes(alphas.tolist()))
    assert abs(decoded(tmp_path / "table.png") - on_white(palette[indices], alphas[indices])).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_one_transparent_grey_is_meant_in_the_numbers_of_the_file(bits: int, tmp_path: Path) -> None:
    values = noise(6, 7, high=1 << bits, kind=np.uint16)
    values[0, :2] = 0, (1 << bits) - 1
    key = int(values[3, 3])
    path = png(tmp_path / "a.png", values, bits, 0, (b"tRNS", struct.pack(">H", key)))
    plain = values // 257 if bits == 16 else values.astype(int) * 255 // ((1 << bits) - 1)
    assert (decoded(path) == grey(np.where(values == key, 255, plain))).all()


def test_one_transparent_colour(tmp_path: Path) -> None:
    pixels = noise(4, 5, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=tuple(map(int, pixels[1, 1])))
    wanted = pixels.astype(int)
    wanted[1, 1] = 255
    assert (decoded(tmp_path / "a.png") == wanted).all()
    wide = png(tmp_path / "b.png", noise(4, 5, 3, high=65536), 16, 2, (b"tRNS", bytes(6)))
    with pytest.raises(ValueError, match=r"b.png: a PNG of 16 bits with one transparent colour"):
        decode_picture(wide)


# Colour spaces


def test_printing_colours_are_light_taken_away(tmp_path: Path) -> None:
    ink = noise(6, 7, 4)
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.tif")
    wanted = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
    assert abs(decoded(tmp_path / "a.tif") - wanted).max() <= 1
    flat = np.full((16, 16, 4), (200, 30, 60, 40), np.uint8)
    Image.fromarray(flat, "CMYK").save(tmp_path / "b.jpg", quality=100)  # inverted in the file, as Adobe does
    assert abs(decoded(tmp_path / "b.jpg")[0, 0] - np.array([46, 190, 164])).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "LAB", "RGBX"])
def test_other_modes_are_the_colours_that_they_were_made_from(mode: str, tmp_path: Path) -> None:
    levels = np.linspace(0, 255, 16).round().astype(np.uint8).reshape(4, 4)
    source = Image.fromarray(
        np.repeat(levels[..., None], 3, -1) if mode != "1" else (levels > 127) * np.uint8(255)
    )
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(source, *profiles, outputMode="LAB")
    else:
        image = source.convert(mode)
    assert image is not None
    image.save(tmp_path / "a.tif")
    assert abs(decoded(tmp_path / "a.tif") - np.asarray(source.convert("RGB"))).max() <= 4


def test_light_and_colour_of_each_pixel_stay_together_over_strips_of_a_file(tmp_path: Path) -> None:
    source = Image.fromarray(noise(8, 6, 3)).convert("YCbCr")
    source.save(tmp_path / "a.tif", strip_size=2 * 6 * 3)  # two rows each
    assert (decoded(tmp_path / "a.tif") == np.asarray(source.convert("RGB"))).all()
    source.save(tmp_path / "packed.tif", compression="tiff_lzw")
    assert abs(decoded(tmp_path / "packed.tif") - np.asarray(source.convert("RGB"))).max() <= 4
    tag = Image.Exif()
    tag[0x0112] = 6
    source.save(tmp_path / "b.tif", exif=tag)
    assert (decoded(tmp_path / "b.tif") == turned(np.asarray(source.convert("RGB")), 6)).all()


def swapped_profile() -> bytes:
    """sRGB with red and green exchanged, under another name."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for one, other in ((b"rXYZ", b"gXYZ"), (b"rTRC", b"gTRC")):
        data = data.replace(one, b"????").replace(other, one).replace(b"????", other)
    return data.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_a_colour_profile_is_followed(ending: str, tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(
        tmp_path / f"a.{ending}", icc_profile=swapped_profile(), **LOSSLESS.get(ending, {})
    )
    assert abs(decoded(tmp_path / f"a.{ending}") - pixels[..., [1, 0, 2]].astype(int)).max() <= 2
    # With transparency the colours are converted before they are put on white.
    rgba = np.concatenate([pixels, noise(8, 8, 1)], -1)
    if ending == "png":
        Image.fromarray(rgba).save(tmp_path / "b.png", icc_profile=swapped_profile())
        assert abs(decoded(tmp_path / "b.png") - on_white(pixels[..., [1, 0, 2]], rgba[..., 3])).max() <= 3


@pytest.mark.parametrize("profile", [b"no profile", b"", swapped_profile()[:200]])
def test_a_broken_profile_or_one_of_another_space_is_not_followed(profile: bytes, tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    assert (decoded(tmp_path / "a.png") == pixels).all()
    Image.fromarray(pixels[..., 0]).save(tmp_path / "b.png", icc_profile=swapped_profile())
    assert (decoded(tmp_path / "b.png") == grey(pixels[..., 0])).all()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "c.png", icc_profile=srgb)
    assert (decoded(tmp_path / "c.png") == pixels).all()


# Several frames


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_of_several_frames_training_takes_the_first_and_an_edit_asks_which(
    ending: str, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / f"a.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **LOSSLESS.get(ending, {}))
    images, _ = ImageFolder([(path, 0)], 8, train=True).__getitems__([0])
    assert images[0, :, 0, 0].tolist() == [1, -1, -1]
    with pytest.raises(ValueError, match=rf"a.{ending}: has several frames or pages; save the one"):
        read_picture(path, 8)


def test_the_second_picture_of_a_phone_is_no_frame(tmp_path: Path) -> None:
    photo, depth = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[depth])
    image, _ = read_picture(tmp_path / "a.jpg", 16)
    assert image[:, 8, 8].round().tolist() == [1, 0, 0]


# Shapes


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 900), (70, 4000)])
@pytest.mark.parametrize("at_random", [False, True])
def test_a_long_strip_is_cut_as_if_it_were_enlarged_whole(
    size: tuple[int, int], at_random: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp = np.add.outer(np.arange(size[1]) % 97, np.arange(size[0]) % 89).astype(np.uint8)
    image = Image.fromarray(grey(ramp).astype(np.uint8))
    torch.manual_seed(1)
    cut = cut_square(image, 8, at_random=at_random)
    monkeypatch.setattr(viar.data.pictures, "LONG_STRIP", 10**9)
    torch.manual_seed(1)
    assert (cut - cut_square(image, 8, at_random=at_random)).abs().max() < 0.05


def test_a_strip_of_a_million_pixels_takes_no_more_than_the_square() -> None:
    assert cut_square(Image.new("RGB", (1_000_000, 1), "red"), 256, at_random=True).shape == (3, 256, 256)


def test_more_pixels_than_fit_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(ValueError, match=r"huge.png: more than 8,000 pixels; make it smaller first"):
        read_picture(tmp_path / "huge.png", 8)


# Files that are no pictures


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.ico")
    wanted = {
        "empty.png": (ValueError, "empty file"),
        "text.png": (ValueError, "is no picture that can be read"),
        "folder.png": (ValueError, "a folder; give a picture file"),
        "link.png": (FileNotFoundError, "a link to .*gone.png, which is not there"),
        "circle.png": (ValueError, "symbolic links"),
        "nothing.png": (FileNotFoundError, "no such file"),
        "a.ico": (ValueError, "ICO files are not read; save it as one of AVIF, BMP"),
        "n" * 300: (ValueError, "too long"),
        "null\0.png": (ValueError, "null"),
    }
    for name, (kind, words) in wanted.items():
        with pytest.raises(kind, match=words) as caught:
            read_picture(tmp_path / name, 4)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe.png: no regular file"):
        read_picture(tmp_path / "pipe.png", 4)


def test_a_file_that_must_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def refused(path: Path, **how: Any) -> None:
        raise PermissionError(
            13, "Permission denied", str(path)
        )  # whoever runs the tests may read everything

    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(PermissionError, match=r"a.png: Permission denied"):
        read_picture(tmp_path / "a.png", 4)


def named(path: Path, read: Callable[[Path], Any]) -> Any:
    """What is read, or None where it is refused on one line that begins with the name of the file."""
    try:
        return read(path)
    except ValueError as error:
        words = str(error)
    assert words.startswith(f"{path}: ")
    assert "\n" not in words
    return None


def samples() -> dict[str, bytes]:
    """Small files of every kind, some with frames."""
    image = Image.fromarray(noise(12, 14, 3))
    found = {}
    for ending in ("png", "jpg", "gif", "webp", "bmp", "ppm", "tif"):
        for name, settings in {
            "one": {},
            "two": {"save_all": True, "append_images": [image.rotate(180)]},
        }.items():
            if name == "two" and ending in ("jpg", "bmp", "ppm"):
                continue
            file = BytesIO()
            image.save(file, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending), **settings)
            found[f"{name}.{ending}"] = file.getvalue()
    info = PngInfo()
    info.add_text("note", "x" * 40)
    file = BytesIO()
    image.convert("P").save(file, "png", pnginfo=info, transparency=1)
    found["palette.png"] = file.getvalue()
    return found


SAMPLES = samples()


@pytest.mark.parametrize("name", SAMPLES)
@given(share=st.floats(0, 1))
def test_a_cut_file_is_decoded_whole_or_refused_by_name(
    name: str, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / name
    path.write_bytes(SAMPLES[name])
    whole = decoded(path)
    path.write_bytes(SAMPLES[name][: int(share * len(SAMPLES[name]))])
    found = named(path, decoded)
    assert found is None or (found == whole).all()


@pytest.mark.parametrize("name", SAMPLES)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_file_with_wrong_bytes_is_decoded_or_refused_by_name(
    name: str, places: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("wrong") / name
    data = bytearray(SAMPLES[name])
    for place, value in places:
        data[int(place**3 * (len(data) - 1))] = value  # most of them in the header
    path.write_bytes(data)
    named(path, lambda wrong: read_picture(wrong, 8))
