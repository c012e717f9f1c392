"""`viar edit`."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from ..data import read_mask, read_picture, save_edit, save_picture
from ..data.decoding import shown
from ..generation.editing import box_mask, edit
from ..memory import BatchSize
from ..model.config import check_at_least
from ..screen import tracked
from .checks import check_picture, check_sampling
from .flags import DEFAULTS_OF_EDITING, FlagsOfEditing, PartOfPair, without
from .loading import load_pair
from .output import report

OneOfTwo = tyro.conf.arg(help_behavior_hint="(one of --box and --mask is required)")


def edit_command(
    model: PartOfPair = None,
    tokenizer: PartOfPair = None,
    *,
    image: Path,
    label: int,
    box: Annotated[tuple[float, float, float, float] | None, OneOfTwo] = None,
    mask: Annotated[Path | None, OneOfTwo] = None,
    invert: bool = False,
    keep: Literal["features", "codes"] = "features",
    border: Annotated[int | None, without("half a token")] = None,
    num: int = 1,
    out: Path = Path("edited.png"),
    flags: FlagsOfEditing = DEFAULTS_OF_EDITING,
) -> None:
    """Make a part of a picture anew: in-painting, out-painting with --invert, or into another class.

    Writes the result, and beside it a strip of the picture, the mask and every result.

    Args:
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VAR or VIAR; not without
            --tokenizer. A VIAR of handwritten digits comes with the package.
        tokenizer: The same, of its tokenizer.
        image: Picture to edit; one of another size than the model's is resized and its centre cut out.
        label: Class that guides the new part.
        box: The part to make anew: top, left, bottom, right as fractions of the picture.
        mask: Instead of a box, a picture of the same size: white keeps, black is made anew. So does what is
            opaque in one of a single colour.
        invert: Turn box or mask round, for out-painting.
        keep: Hold the kept part's features and pixels, or its codes alone, as published.
        border: Pixels over which kept passes into new. With features only.
        num: Results to make; they differ in their random numbers.
        out: PNG to write. Several are numbered: edited-0.png, edited-1.png. The strip is edited-strip.png.
        flags: How to sample.
    """
    check_at_least("viar edit", 1, num=num)
    check_picture(out)
    check_picture(max(_results(out, num), key=lambda path: len(path.name)))
    _check_pictures(image, box, mask)
    _check_kept(out, num, {"--image": image, "--mask": mask})
    console, sampling = Console(), flags.sampling
    transformer, codec = load_pair(model, tokenizer, flags.execution)
    check_sampling(transformer, sampling, [label], "--label")
    side = codec.config.image_side
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        picture, size = read_picture(image, side)
        kept = _kept_part(box, mask, side, size)
    for note in notes:
        console.print(escape(f"note: {note.message}"), highlight=False, soft_wrap=True)
    if size != (side, side):
        cut = f"{shown(image)} is {size[0]} x {size[1]}: resized, and the centre of {side} x {side} cut out"
        console.print(escape(cut))
    kept = 1 - kept if invert else kept
    before = picture.to(transformer.pos_embed.device)

    def make(part: range) -> Tensor:
        return edit(
            transformer,
            codec,
            before.expand(len(part), -1, -1, -1),
            kept,
            [label] * len(part),
            sampling=sampling,
            keep=keep,
            border=border,
            first_index=part.start,
        ).cpu()

    edited = _in_parts(num, flags.execution.batch_size, make, console)
    _save(picture, kept, edited, out, console)


def _in_parts(num: int, batch_size: int, make: Callable[[range], Tensor], console: Console) -> Tensor:
    """All results, half as many at a time from where memory does not suffice for a batch on."""

    def tell(most: int) -> None:
        text = f"memory did not suffice: from here on {most} are edited at a time"
        console.print(text, style="yellow", highlight=False, soft_wrap=True)

    parts = BatchSize(batch_size, tell).parts(range(num), make)
    return torch.cat(list(tracked(parts, "edit", total=math.ceil(num / batch_size), console=console)))


def _check_pictures(image: Path, box: tuple[float, float, float, float] | None, mask: Path | None) -> None:
    """Raise unless the picture is there, and one of a box and a mask."""
    if (box is None) == (mask is None):
        raise ValueError("expected one of --box and --mask, got " + ("none" if box is None else "both"))
    for flag, path in (("--image", image), ("--mask", mask)):
        if path is not None and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else "not there"
            raise ValueError(f"{flag}: expected a picture, {shown(path)} is {kind}")


def _check_kept(out: Path, num: int, read: dict[str, Path | None]) -> None:
    """Raise where a result would take the place of a picture that is read."""
    for written in _results(out, num):
        for flag, path in read.items():
            if path is not None and written.exists() and written.samefile(path):
                raise ValueError(f"--out: {shown(written)} would take the place of {flag}; give another name")


def _results(out: Path, num: int) -> list[Path]:
    """Where the results go, and after them the strip."""
    names = [out] if num == 1 else [out.with_stem(f"{out.stem}-{index}") for index in range(num)]
    return [*names, out.with_stem(f"{out.stem}-strip")]


def _kept_part(
    box: tuple[float, float, float, float] | None, mask: Path | None, side: int, size: tuple[int, int]
) -> Tensor:
    """Mask (side, side) of the one that is given: 1 keeps, 0 is made anew."""
    if box is not None:
        return box_mask(box, side)
    assert mask is not None  # `_check_pictures` was passed
    return read_mask(mask, side, size)


def _save(picture: Tensor, kept: Tensor, edited: Tensor, out: Path, console: Console) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    *names, strip = _results(out, len(edited))
    for name, result in zip(names, edited, strict=True):
        save_picture(result, Path(os.path.realpath(name)) if name == out else name)
    save_edit(picture, kept, edited, strip)
    report({"images": names, "strip": strip})
    text = f"{len(edited)} edited in {shown(out.parent)}, side by side in {shown(strip)}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
