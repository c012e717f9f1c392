"""What the page asks of models: one picture scale by scale, or a part of one made anew.

Nothing here knows of the page. Whoever is on the other side of a network asks, so all that costs time or
memory is capped.
"""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ..data.decoding import decode_bytes
from ..data.pictures import fit_square
from ..generation.editing import edit
from ..generation.report import GenerationReport
from ..generation.sampling import grow_images
from ..generation.scalewise import seconds_since
from ..generation.settings import Sampling
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer

MOST_ITERATIONS = 20  # a scale
MOST_GUIDANCE = 10.0
MOST_SEED = 2**31 - 1  # what a browser's numbers hold exactly, and a field can show
MOST_BYTES = 8_000_000  # of a picture that is sent
MOST_PIXELS = 4096**2  # of it, decoded


@dataclass(frozen=True)
class Pair:
    """A model and its tokenizer, ready to generate.

    Attributes:
        model: VAR or VIAR, in evaluation mode.
        tokenizer: its tokenizer.
    """

    model: NextScaleTransformer
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """What the page calls it."""
        return "VIAR" if self.configured else "VAR"

    @property
    def configured(self) -> list[int]:
        """Iterations of each scale that are the model's own; none of an explicit trunk."""
        return [count for count in self.model.trunk.schedule(None) if isinstance(count, int)]

    @property
    def most_iterations(self) -> int:
        """Of a scale, that the page allows."""
        return max([MOST_ITERATIONS, *self.configured])


def presets(pair: Pair) -> dict[str, list[int]]:
    """Schedules to choose from, one count a scale, by what they are called; none of an explicit trunk.

    Args:
        pair: whose they are.
    """
    configured = pair.configured
    if not configured:
        return {}
    most, num_scales = max(configured), len(configured)
    falling = [most - (most - 1) * scale // max(num_scales - 1, 1) for scale in range(num_scales)]
    return {
        "the model's own": configured,
        f"{most} falling to 1": falling,
        **{f"{count} everywhere": [count] * num_scales for count in (1, 2, 4, MOST_ITERATIONS)},
    }


def sampling_of(pair: Pair, seed: int, guidance: float, iterations: Sequence[int] | None = None) -> Sampling:
    """Settings of the sampler, within what the page allows.

    Args:
        pair: whose they are.
        seed: 0 to `MOST_SEED`.
        guidance: 0, which switches it off, to `MOST_GUIDANCE`.
        iterations: one count a scale, 1 to `Pair.most_iterations`; default, and of an empty list, the model's
            own.

    Raises:
        ValueError: anything else; the argument is named.
    """
    _check_integer("seed", seed, 0, MOST_SEED)
    is_number = isinstance(guidance, int | float) and not isinstance(guidance, bool)
    if not (is_number and 0 <= guidance <= MOST_GUIDANCE):
        raise ValueError(f"guidance: expected a number from 0 to {MOST_GUIDANCE:g}, got {_short(guidance)}")
    if iterations is not None and not isinstance(iterations, list | tuple):
        raise ValueError(f"iterations: expected a list of one count a scale, got {_short(iterations)}")
    for count in iterations or ():
        _check_integer("iterations", count, 1, pair.most_iterations)
    num_scales = len(pair.configured)
    if iterations and num_scales and len(iterations) != num_scales:
        raise ValueError(
            f"iterations: expected one count a scale, {num_scales} in all, got {len(iterations)}; leave them "
            "out for the model's own"
        )
    sampling = Sampling(seed=seed, cfg=guidance, iterations=list(iterations) if iterations else None)
    sampling.schedule(pair.model.trunk)
    return sampling


def draw(pair: Pair, label: int, sampling: Sampling) -> Iterator[tuple[Tensor, GenerationReport]]:
    """One picture as it is after each scale, (3, H, W) in [0, 1], and the report so far.

    Args:
        pair: draws it.
        label: class in [0, N]; N asks for no class in particular.
        sampling: of `sampling_of`.

    Raises:
        ValueError: a class that the model does not have.
    """
    _check_integer("label", label, 0, pair.model.null_class)
    for images, report in grow_images(pair.model, pair.tokenizer, [label], sampling):
        yield images[0].cpu(), report


def in_paint(
    pair: Pair, picture: Image.Image, mask: Image.Image, label: int, sampling: Sampling
) -> tuple[Tensor, float]:
    """The picture with a part of it made anew, (3, H, W) in [0, 1], and the seconds that it took.

    Args:
        pair: makes it.
        picture: in mode RGB.
        mask: of the same size; what is lighter than mid-grey is kept, the rest is made anew.
        label: class in [0, N] that guides the new part; N asks for no class in particular.
        sampling: of `sampling_of`.

    Raises:
        ValueError: a mask of another size or one that keeps everything, a class that the model does not have.
    """
    _check_integer("label", label, 0, pair.model.null_class)
    if mask.size != picture.size:
        raise ValueError(
            f"mask: has {mask.width} x {mask.height} pixels, the picture {picture.width} x {picture.height}; "
            "they must be of one size"
        )
    side = pair.tokenizer.config.image_side
    kept = (fitted(mask.convert("RGB"), side).mean(0) > 0.5).float()
    if kept.min() == 1:
        raise ValueError("mask: leaves nothing to make anew; paint over the part that is to change")
    start = time.perf_counter()
    images = fitted(picture, side)[None].to(pair.model.pos_embed.device)
    made = edit(pair.model, pair.tokenizer, images, kept, [label], sampling=sampling)
    return made[0].cpu(), seconds_since(start, made.device)


def fitted(picture: Image.Image, side: int) -> Tensor:
    """A picture of any size at that of the model, (3, side, side) in [0, 1].

    One that was enlarged by a whole factor, as the page shows them, is what it was; of others `fit_square`
    takes the centre.

    Args:
        picture: in mode RGB.
        side: pixels a side.
    """
    if picture.width == picture.height and picture.width % side == 0:
        picture = picture.resize((side, side), Image.Resampling.BOX)
    return fit_square(picture, side)


def read_sent(content: bytes, name: str) -> Image.Image:
    """A picture that was sent, in mode RGB.

    Args:
        content: of the file.
        name: what it is called in errors.

    Raises:
        ValueError: it is too large, no picture, or broken.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"{name}: expected at most {MOST_BYTES:,} bytes, got {len(content):,}")
    return decode_bytes(content, name, most_pixels=MOST_PIXELS)


def read_text(text: object, name: str) -> Image.Image:
    """A picture that was sent as text, in mode RGB.

    Args:
        text: the file in base64, with or without "data:image/png;base64," before it.
        name: what it is called in errors.

    Raises:
        ValueError: it is none, or one that `read_sent` refuses.
    """
    try:
        if not isinstance(text, str):
            raise ValueError
        content = b64decode(text.rpartition(",")[2], validate=True)
    except ValueError as error:
        raise ValueError(f"{name}: expected a PNG or JPEG file in base64, got {_short(text)}") from error
    return read_sent(content, name)


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {_short(value)}")


def _short(value: object) -> str:
    """A value as an error may show it, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
