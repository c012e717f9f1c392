"""Masks drawn as pictures: which pixels of a picture are kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from ..kinds import checked
from .decoding import colour_and_alpha, open_picture, refuse_frames, shown, upright
from .pictures import fit_square

_MUCH = 0.25  # the share of pixels that a blurred edge does not reach


@checked
def read_mask(path: Path, side: int, size: tuple[int, int]) -> Tensor:
    """A mask (side, side) for `viar.edit` from a picture file: 1, keep, where it is lighter than mid-grey.

    A file that holds 0 and one other number keeps that other, whatever it is: masks of 0 and 1 too. A mask in
    the alpha channel of one colour keeps what is opaque; a warning says so. It is turned upright by its own
    orientation and cut as the picture that it belongs to.

    Args:
        path: of the file.
        side: pixels a side.
        size: width and height of the picture that it belongs to, upright.

    Returns:
        (side, side) of 0 and 1. A warning says where over a quarter of the file is neither dark nor light.

    Raises:
        ValueError: the file is no picture, broken, of another size, has one mask in its colours and another
            in its alpha channel, or keeps all or nothing.
        FileNotFoundError: there is none.
        PermissionError: it must not be read.
    """
    if len(size) != 2:
        raise ValueError(f"size: expected width and height, got {size}")
    levels = _levels(path, size)
    between = float(((levels > 0.25) & (levels < 0.75)).mean())
    if between > _MUCH:
        warnings.warn(
            f"mask: {between:.0%} of {shown(path)} is neither dark nor light; what is over mid-grey is kept",
            stacklevel=2,
        )
    grey = Image.fromarray((levels * 255).round().astype(np.uint8))
    mask = (fit_square(grey, side).mean(0) > 0.5).float()
    if mask.min() == mask.max():
        found = levels.shape[1], levels.shape[0]
        kept = "everything" if mask.max() else "nothing"
        cut = "" if found == (side, side) else f", cut to {side} x {side},"
        raise ValueError(
            f"mask: {shown(path)}{cut} keeps {kept}: its grey goes from {levels.min() * 255:.0f} to "
            f"{levels.max() * 255:.0f} of 255; paint white what is kept and black what is made anew"
        )
    return mask


def _levels(path: Path, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """What a file of that size means as a mask, (height, width) upright, from 0, anew, to 1, keep."""
    with open_picture(path, any_range=True) as file:
        refuse_frames(file, path)
        if sorted(file.size) == sorted(size):  # another is not loaded, as it may be of any size
            image = upright(file, path)
        else:
            image = file
    if image.size != size:
        raise ValueError(
            f"mask: {shown(path)} has {image.width} x {image.height} pixels, the picture {size[0]} x "
            f"{size[1]}; they must be of one size"
        )
    if image.mode.startswith(("I", "F")) and _is_switch(numbers := np.asarray(image)):
        return (numbers > 0).astype(np.float64)
    image.info.pop("icc_profile", None)  # a mask's numbers are no colours
    colour, alpha = colour_and_alpha(image, path)
    grey = _spread(np.asarray(colour).mean(-1))
    if alpha is None:
        return grey
    opaque = _spread(np.asarray(alpha))
    if opaque.min() == opaque.max():
        if opaque.max() < 1:
            warnings.warn(
                f"mask: the alpha channel of {shown(path)} is the same everywhere; the colours are taken",
                stacklevel=3,
            )
        return grey
    if grey.min() == grey.max():
        warnings.warn(
            f"mask: {shown(path)} is of one colour; what is opaque in its alpha channel is kept", stacklevel=3
        )
        return opaque
    if not np.array_equal(grey > 0.5, opaque > 0.5):
        raise ValueError(
            f"mask: {shown(path)} has one mask in its colours and another in its alpha channel; "
            "save the one that is meant as grey"
        )
    return grey


def _spread(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """8 bit numbers as 0 to 1; where there are but 0 and one other, that other is 1."""
    if _is_switch(values):
        return np.asarray(values > 0, np.float64)
    return np.asarray(values, np.float64) / 255


def _is_switch(values: npt.NDArray[Any]) -> bool:
    """Whether there are two numbers, the lower of them 0."""
    numbers = np.unique(values)
    return len(numbers) == 2 and float(numbers[0]) == 0
