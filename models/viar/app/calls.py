"""What programs may ask the page for, by name; pictures go as text, so that no files are left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .drawing import Pair, draw, in_paint, read_text, sampling_of
from .markup import picture_url

Call = Callable[..., dict[str, Any]]


def calls_of(pair: Pair) -> dict[str, Call]:
    """The calls by name, for one model.

    Args:
        pair: answers them.
    """

    def generate(
        label: int, seed: int = 0, guidance: float = 1.5, iterations: list[int] | None = None
    ) -> dict[str, Any]:
        """One picture, and what each scale took.

        Args:
            label: class in [0, N]; N asks for no class in particular.
            seed: of the picture.
            guidance: 0 switches it off.
            iterations: one count a scale; default the model's own.

        Returns:
            `picture`, a PNG as "data:image/png;base64,...", and `report`: `scales`, each with side,
            evaluations, residual, seconds and cache_bytes, and `decode_seconds`.
        """
        *_, (image, report) = draw(pair, label, sampling_of(pair, seed, guidance, iterations))
        return {"picture": picture_url(image), "report": asdict(report)}

    def in_paint_picture(
        picture: str,
        mask: str,
        label: int,
        seed: int = 0,
        guidance: float = 1.5,
        iterations: list[int] | None = None,
    ) -> dict[str, Any]:
        """A picture with a part of it made anew.

        Args:
            picture: PNG or JPEG in base64, with or without "data:image/png;base64," before it.
            mask: the same, of the same size: white is kept, black is made anew.
            label: class in [0, N] that guides the new part; N asks for no class in particular.
            seed: of the new part.
            guidance: 0 switches it off.
            iterations: one count a scale; default the model's own.

        Returns:
            `picture`, a PNG as "data:image/png;base64,...", and `seconds`.
        """
        sampling = sampling_of(pair, seed, guidance, iterations)
        made, seconds = in_paint(
            pair, read_text(picture, "picture"), read_text(mask, "mask"), label, sampling
        )
        return {"picture": picture_url(made), "seconds": seconds}

    return {"generate": generate, "in_paint": in_paint_picture}
