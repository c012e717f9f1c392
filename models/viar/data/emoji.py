"""Emoji as pictures: every emoji of Unicode, drawn with a colour font; classes are Unicode's groups.

`emoji.txt` beside this file lists them, from Unicode's own list: a line is one emoji in all its skin tones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from .decoding import shown
from .report import Skipped

LIST = Path(__file__).with_name("emoji.txt")
FONT = "NotoColorEmoji.ttf"
# Where Debian, Fedora and Arch put it, Homebrew and a user's own fonts on macOS, and conda; ~ is a home.
PLACES = (
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/google-noto-color-emoji-fonts",
    "/usr/share/fonts/noto",
    "/usr/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
    "$CONDA_PREFIX/fonts",
)
HOW_TO_GET = (
    "on Debian and Ubuntu: apt install fonts-noto-color-emoji; on macOS: brew install --cask "
    "font-noto-color-emoji; with conda: conda install -c conda-forge font-ttf-noto-emoji; or give a file "
    "with coloured bitmaps, emoji:/path/to/NotoColorEmoji.ttf"
)
SIZE = 109  # pixels; the only one that the font's bitmaps have
SQUARE = 136  # pixels a side: what the widest bitmaps take

Emoji = tuple[str, int, int]  # text, number of its group, number of its line


def emoji_groups() -> tuple[str, ...]:
    """Names of the groups in the order of Unicode."""
    return tuple(line[3:] for line in LIST.read_text("utf-8").splitlines() if line.startswith("## "))


def all_emoji() -> Iterator[Emoji]:
    """Every emoji with its group and its line; those of one line differ by skin tones alone."""
    group = -1
    for number, line in enumerate(LIST.read_text("utf-8").splitlines()):
        if line.startswith("## "):
            group += 1
        elif not line.startswith("# "):
            yield from ((text, group, number) for text in line.split(" "))


def find_font(path: str = "") -> Path:
    """File of the font.

    Args:
        path: of it; empty to look in the usual places.

    Raises:
        ValueError: it is not there.
    """
    places = [Path(os.path.expandvars(place)).expanduser() / FONT for place in PLACES]
    found = next((file for file in ([Path(path)] if path else places) if file.is_file()), None)
    if found is None:
        where = f"at {shown(path)}" if path else "in the usual places"
        raise ValueError(f"source: 'emoji' needs the font {FONT}, which is not {where}; {HOW_TO_GET}")
    return found


def draw_emoji(font: Path, side: int) -> tuple[Tensor, Tensor, Tensor, list[Skipped]]:
    """Draw all emoji that a font has, on white. It takes some ten seconds.

    Left out, and told: what the font draws as several pictures or not at all, and what looks like an earlier
    one to the last bit, such as the flags of a country and of its islands.

    Args:
        font: file with coloured bitmaps.
        side: pixels a side, at most 136.

    Returns:
        Images (N, 3, side, side) in [-1, 1], their groups (N,), their lines in the list (N,), and what was
        left out.

    Raises:
        ValueError: `side` is larger than the bitmaps, or the font cannot be used.
    """
    if not 0 < side <= SQUARE:
        raise ValueError(
            f"image_side: emoji are bitmaps of {SQUARE} pixels, expected at most that, got {side}"
        )
    try:
        loaded = ImageFont.truetype(font, SIZE)
    except OSError as error:
        raise ValueError(
            f"source: {shown(font)} is no font with bitmaps of {SIZE} pixels ({error}); {HOW_TO_GET}"
        ) from error
    drawn = dict[bytes, Emoji]()
    skipped = list[Skipped]()
    for one in all_emoji():
        pixels = _drawn(one[0], loaded, side)
        if pixels is None:
            raqm = features.check("raqm")
            reason = "the font has no picture of" if raqm else "need a Pillow with the library raqm"
        elif pixels in drawn:
            reason = "look like an earlier one"
        else:
            drawn[pixels] = one
            continue
        skipped.append(Skipped(Path(one[0]), reason))
    images = np.frombuffer(b"".join(drawn), np.uint8).reshape(-1, side, side, 3)
    if (images[..., 0] == images[..., 1]).all():  # black letters and boxes, or nothing at all
        raise ValueError(f"source: {shown(font)} has no coloured bitmaps of emoji; {HOW_TO_GET}")
    groups, lines = (torch.tensor([one[place] for one in drawn.values()]) for place in (1, 2))
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1, groups, lines, skipped


def _drawn(text: str, font: ImageFont.FreeTypeFont, side: int) -> bytes | None:
    """Pixels (side, side, 3); None where the font draws several pictures or none."""
    if font.getlength(text) > SQUARE:
        return None
    image = Image.new("RGB", (SQUARE, SQUARE), "white")
    # Bitmaps are 136 wide and 128 high: 4 pixels above and below.
    ImageDraw.Draw(image).text((0, 4), text, font=font, embedded_color=True)
    small = image.resize((side, side), Image.Resampling.LANCZOS).tobytes()
    return None if small == b"\xff" * len(small) else small
