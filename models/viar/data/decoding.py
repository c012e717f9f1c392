"""Picture files as colours that a viewer shows: one decoder for training, editing and evaluation.

A file is turned upright by its orientation tag, brought to 8 bits a channel by its own range, to sRGB by
its colour profile, and what is transparent shows white. Transparency is put on white before anything is
resized, so that edges are blended with white and not with the colours that nobody sees. What has no colours
that all viewers agree on, such as 32 bit numbers, is refused by name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from ..checksums import png_chunks

# What Pillow calls each kind that is read, with the endings that files of it have. A JPEG of a phone that
# holds a depth map or a second lens is an MPO to Pillow; its first picture is the photograph.
KINDS = {
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "DIB": (),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "MPO": (),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
ENDINGS = frozenset(ending for endings in KINDS.values() for ending in endings)

_OPENED = tuple(kind for kind in KINDS if kind != "MPO")  # which is opened as a JPEG
_HEAD = 16  # bytes by which Pillow tells kinds apart
FEW_PIXELS = 2**24  # that any file may tell of
MOST_PIXELS_A_BYTE = 10_000  # of larger ones; packed to the utmost, white PNGs of one bit have 8,256
ORIENTATION = 0x0112  # of EXIF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO, _YCBCR = 258, 262, 0, 6  # of TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY_STEP = {"L;2": 85, "L;4": 17}  # a PNG of few bits: what Pillow multiplies its numbers with
_WITH_PROFILE = ("L", "RGB", "CMYK")  # modes that colour profiles are made for


def shown(name: object) -> str:
    """A path as it can be printed on one line of any terminal: characters that cannot are escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(name)
    )


def decode_picture(path: Path) -> Image.Image:
    """The picture in a file, in mode RGB; of several frames or pages the first.

    Raises:
        ValueError: the file is no picture, broken, or of a kind that is not read; it is named.
        FileNotFoundError: there is none.
        PermissionError: it must not be read.
    """
    with open_picture(path) as image:
        return to_rgb(image, path)


def decode_bytes(content: bytes, name: object, *, most_pixels: int | None = None) -> Image.Image:
    """The picture in the bytes of a file, as `decode_picture` gives it.

    Args:
        content: of the file.
        name: what it is called in errors.
        most_pixels: a larger picture is refused before it is decoded; default only what Pillow refuses.

    Raises:
        ValueError: it is no picture, broken, or too large.
    """
    image = _opened(BytesIO(content), name)
    if most_pixels is not None and image.width * image.height > most_pixels:
        raise ValueError(
            f"{shown(name)}: expected at most {most_pixels:,} pixels, got {image.width} x {image.height}; "
            "make it smaller first"
        )
    return to_rgb(image, name)


@contextmanager
def open_picture(path: Path, *, any_range: bool = False) -> Iterator[Image.Image]:
    """A picture file, its header read and found to be of a kind that is read.

    With `any_range` a file of 32 bit numbers is opened too.

    Raises:
        ValueError: the file is no picture, its header is broken, or it is of a kind that is not read.
        FileNotFoundError: there is none.
        PermissionError: it must not be read.
    """
    _check_file(path)
    with ExitStack() as open_files:
        with _named(path):
            # By the open file, not by its name: named files are mapped into memory, and then Pillow reads a
            # TIFF that lies on its side with width and height exchanged.
            file = open_files.enter_context(path.open("rb"))
        image = open_files.enter_context(_opened(file, path))
        if image.mode in ("I", "F") and not (any_range or _is_16_bit(image)):
            _refuse_range(image, path)
        yield image


def _opened(file: BinaryIO, name: object) -> Image.Image:
    """A picture of a kind that is read, its header read; no other of Pillow's many readers sees the file."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    with _named(name):
        try:
            image = Image.open(file, formats=_OPENED)
        except UnidentifiedImageError:
            file.seek(0)
            kind = _kind(file.read(_HEAD))
            if kind is None:
                raise
        else:
            _check_size(image, num_bytes)
            return image
    kinds = ", ".join(kind for kind in KINDS if KINDS[kind])
    raise ValueError(f"{shown(name)}: {kind} files are not read; save it as one of {kinds}")


def _check_size(image: Image.Image, num_bytes: int) -> None:
    """Raise `ValueError` where a large picture is told of by a file that can have next to nothing of it."""
    pixels = image.width * image.height
    if pixels > max(FEW_PIXELS, MOST_PIXELS_A_BYTE * num_bytes):
        raise ValueError(f"{image.width} x {image.height} pixels in {num_bytes:,} bytes")


def _kind(head: bytes) -> str | None:
    """What Pillow calls files of another kind that begin so."""
    Image.init()
    accepts = {kind: accept for kind, (_, accept) in Image.OPEN.items() if accept and kind not in KINDS}
    return next((kind for kind, accept in accepts.items() if accept(head) is True), None)


def has_frames(image: Image.Image, name: object) -> bool:
    """Whether an open file, called `name` in errors, holds more than one frame or page.

    Raises:
        ValueError: what follows the first is broken.
    """
    with _named(name):
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def refuse_frames(image: Image.Image, name: object) -> None:
    """Raise where an open file, called `name`, is more than one picture: which is meant cannot be known.

    Raises:
        ValueError: it has several frames or pages, or what follows the first is broken.
    """
    if has_frames(image, name):
        raise ValueError(
            f"{shown(name)}: has several frames or pages; save the one that is meant as a PNG file"
        )


def to_rgb(image: Image.Image, name: object = "picture") -> Image.Image:
    """An image of any mode as a viewer shows it on white, in mode RGB.

    Args:
        image: open or loaded.
        name: what it is called in errors.

    Raises:
        ValueError: it is broken, or its numbers have no range that is known to be white.
    """
    colour, alpha = colour_and_alpha(upright(image, name), name)
    if alpha is not None:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    colour.info = {}  # what it says of orientation, profile and transparency is done
    return colour


def upright(image: Image.Image, name: object) -> Image.Image:
    """The image loaded and turned as its orientation tag says, in the mode that it has.

    Grey of 16 bits has the mode "I;16" and goes from 0 to 65535.

    Args:
        image: open or loaded.
        name: what it is called in errors.

    Raises:
        ValueError: it is broken, or which of its colours is transparent cannot be told.
    """
    tiles: Any = getattr(image, "tile", None)
    raw = tiles[0][3] if tiles else None  # how numbers lie in the file; gone when it is loaded
    with _named(name):
        _check_sums(image)
        image = _loaded(image)
    if raw == "RGB;16B" and "transparency" in image.info:
        # Only the upper half of the numbers is decoded, and the transparent colour cannot be told by it.
        raise ValueError(
            f"{shown(name)}: a PNG of 16 bits with one transparent colour; save it with an alpha channel"
        )
    if raw in _GREY_STEP and "transparency" in image.info:
        image.info["transparency"] *= _GREY_STEP[raw]
    image = _of_16_bits(image)
    try:
        turn = _UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except (
        Exception
    ):  # Pillow's readers of EXIF raise many kinds; viewers show a picture with broken EXIF as it is
        turn = None
    return image if turn is None else image.transpose(turn)


def colour_and_alpha(image: Image.Image, name: object) -> tuple[Image.Image, Image.Image | None]:
    """Colours in mode RGB, and how opaque each is in mode L; None where the image has no transparency.

    Args:
        image: what `upright` gives.
        name: what it is called in errors, which are those of `to_rgb`.
    """
    if image.mode in ("I", "F"):
        _refuse_range(image, name)
    alpha = None
    profile, transparent = image.info.get("icc_profile"), image.info.get("transparency")
    if image.mode in ("La", "LA"):
        image, alpha = image.convert("LA").split()
    elif image.mode in ("RGBA", "RGBa", "PA") or (image.mode == "P" and image.has_transparency_data):
        image = image.convert("RGBA")
        image, alpha = image.convert("RGB"), image.getchannel("A")
    elif image.mode in ("1", "L", "I;16", "RGB") and transparent is not None:
        alpha = _keyed(image, transparent)
    if image.mode == "I;16":
        image = _image(np.asarray(image) // 257)
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in _WITH_PROFILE:
        image = _lab_to_rgb(image, name) if image.mode == "LAB" else image.convert("RGB")
    return _to_srgb(image, profile), alpha


def _check_sums(image: Image.Image) -> None:
    """Raise `ValueError` where pixels of a PNG are not as they were written: Pillow does not ask."""
    file: Any = getattr(image, "fp", None)
    if image.format != "PNG" or file is None:  # it is loaded
        return
    for kind, is_sound in png_chunks(file):
        if kind == b"IDAT" and not is_sound:
            raise ValueError("its pixels are not what their checksum says")


def _check_file(path: Path) -> None:
    """Raise unless `path` is a file with something in it; a pipe would be waited for without end."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        link = (
            f"a link to {shown(os.readlink(path))}, which is not there"
            if path.is_symlink()
            else "no such file"
        )
        raise FileNotFoundError(f"{shown(path)}: {link}") from error
    except PermissionError as error:
        raise PermissionError(f"{shown(path)}: {error.strerror}") from error
    except (OSError, ValueError) as error:  # too long a name, links in a circle, a null byte
        raise ValueError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise ValueError(f"{shown(path)}: {kind}; give a picture file")
    if not found.st_size:
        raise ValueError(f"{shown(path)}: an empty file is no picture that can be read; save it again")


@contextmanager
def _named(name: object) -> Iterator[None]:
    """Whatever goes wrong in reading ends as an error that names the file."""
    try:
        yield
    except PermissionError as error:
        raise PermissionError(f"{shown(name)}: {error.strerror}") from error
    except MemoryError:  # no fault of the picture, whose size was looked at
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{shown(name)}: is no picture that can be read; give a PNG or JPEG file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
        raise ValueError(f"{shown(name)}: more than {limit} pixels; make it smaller first") from error
    except (
        Exception
    ) as error:  # on broken files Pillow's readers raise a dozen kinds, struct.error among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{shown(name)}: is broken ({reason}); mend or remove it") from error


def _refuse_range(image: Image.Image, name: object) -> None:
    bits = "32 bit numbers" if image.mode == "F" else "32 bit or signed numbers"
    raise ValueError(
        f"{shown(name)}: {bits}, of which none is known to be white; scale it and save it as 8 or 16 bit grey"
    )


def _is_16_bit(image: Image.Image) -> bool:
    """Whether mode I stands for 16 bits, as in grey PGM, and in grey PNG of older Pillow."""
    return image.format in ("PNG", "PPM") or image.mode.startswith("I;16")


def _of_16_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits from 0, black, to 65535, white, in mode "I;16"; any other image as it is."""
    if not image.mode.startswith("I") or not _is_16_bit(image):
        return image
    values = np.asarray(image).astype(np.uint32)
    tags: Any = getattr(image, "tag_v2", {})
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    values = (values * 65535 + (1 << bits - 1)) // ((1 << bits) - 1) if bits < 16 else values
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 65535 - values
    grey = Image.fromarray(values.astype(np.uint16))
    grey.info = image.info
    return grey


def _loaded(image: Image.Image) -> Image.Image:
    """The image loaded.

    Pillow before version 13 takes the three bytes of a pixel in an uncompressed TIFF of YCbCr for the first
    of four of RGB: they are read as three here, and called what they are.
    """
    tags: Any = getattr(image, "tag_v2", {})
    tiles: Any = image.tile if tags.get(_PHOTOMETRIC) == _YCBCR else []  # type: ignore[attr-defined]
    mistaken = bool(tiles) and (tiles[0].codec_name, tiles[0].args[0]) == ("raw", "RGBX")
    if mistaken:
        image.tile = [tile._replace(args=("RGB", *tile.args[1:])) for tile in tiles]  # type: ignore[attr-defined]
    image.load()
    if not mistaken:
        return image
    colours = Image.merge("YCbCr", image.split())
    colours.info = image.info
    return colours


def _keyed(image: Image.Image, transparent: int | tuple[int, ...]) -> Image.Image:
    """Opaque everywhere but where an image without alpha has the one colour that a PNG names."""
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    same: npt.NDArray[np.bool_] = values == np.asarray(transparent)
    return _image(np.where(same.all(-1) if same.ndim == 3 else same, 0, 255))


def _image(values: npt.NDArray[np.integer[Any]]) -> Image.Image:
    """Grey of 8 bits."""
    return Image.fromarray(values.astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """From L, RGB or CMYK to RGB; by the colour profile where there is one that is whole and of this mode."""
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; None where nothing is to be done, or the profile is broken or for another mode.

    Viewers take plain values then.
    """
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if (source.profile.profile_description or "").startswith("sRGB"):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None


def _lab_to_rgb(image: Image.Image, name: object) -> Image.Image:
    try:
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise ValueError(f"{shown(name)}: LAB colours that cannot be converted; save it as RGB") from error
    assert converted is not None
    return converted
