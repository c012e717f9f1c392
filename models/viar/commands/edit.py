"""`viar edit`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch import Tensor

from ..data import read_mask, read_picture, save_edit, save_picture
from ..data.decoding import shown
from ..generation.editing import box_mask, edit
from ..model.config import check_at_least
from .checks import check_picture, check_sampling
from .flags import DEFAULTS, Flags
from .loading import load_pair


def edit_command(
    model: str,
    tokenizer: str,
    image: Path,
    label: int,
    box: tuple[float, float, float, float] | None = None,
    mask: Path | None = None,
    invert: bool = False,
    keep: Literal["features", "codes"] = "features",
    border: int | None = None,
    num: int = 1,
    out: Path = Path("edited.png"),
    flags: Flags = DEFAULTS,
) -> None:
    """Make a part of a picture anew: in-painting, out-painting with --invert, or into another class.

    Writes the result, and beside it a strip of the picture, the mask and every result.

    Args:
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VAR or VIAR.
        tokenizer: The same, of its tokenizer.
        image: Picture to edit; one of another size than the model's is resized and its centre cut out.
        label: Class that guides the new part.
        box: The part to make anew: top, left, bottom, right as fractions of the picture.
        mask: Instead of a box, a picture of the same size: white keeps, black is made anew. So does what is
            opaque in one of a single colour.
        invert: Turn box or mask round, for out-painting.
        keep: Hold the kept part's features and pixels, or its codes alone, as published.
        border: Pixels over which kept passes into new; default half a token. With features only.
        num: Results to make; they differ in their random numbers.
        out: PNG to write. Several are numbered: edited-0.png, edited-1.png. The strip is edited-strip.png.
        flags: How to sample.
    """
    check_at_least("viar edit", 1, num=num)
    check_picture(out)
    _check_pictures(image, box, mask)
    console, sampling = Console(), flags.sampling
    transformer, codec = load_pair(model, tokenizer, flags.execution)
    check_sampling(transformer, sampling, [label])
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
    batch_size = flags.execution.batch_size
    before = picture.to(transformer.pos_embed.device).expand(min(num, batch_size), -1, -1, -1)
    edited = torch.cat(
        [
            edit(
                transformer,
                codec,
                before[: num - start],
                kept,
                [label] * len(before[: num - start]),
                sampling=sampling,
                keep=keep,
                border=border,
                first_index=start,
            ).cpu()
            for start in track(range(0, num, batch_size), "edit", console=console)
        ]
    )
    _save(picture, kept, edited, out, console)


def _check_pictures(image: Path, box: tuple[float, float, float, float] | None, mask: Path | None) -> None:
    """Raise unless the picture is there, and one of a box and a mask."""
    if (box is None) == (mask is None):
        raise ValueError("expected one of --box and --mask, got " + ("none" if box is None else "both"))
    for flag, path in (("--image", image), ("--mask", mask)):
        if path is not None and not path.is_file():
            raise ValueError(
                f"{flag}: expected a picture, {path} is {'a folder' if path.exists() else 'not there'}"
            )


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
    for index, result in enumerate(edited):
        save_picture(result, out if len(edited) == 1 else out.with_stem(f"{out.stem}-{index}"))
    strip = out.with_stem(f"{out.stem}-strip")
    save_edit(picture, kept, edited, strip)
    console.print(f"{len(edited)} edited in {out.parent}, side by side in {strip}")
