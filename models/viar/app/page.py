"""The page itself, made with gradio: controls, three tabs, and the interface for programs.

What it computes is in `drawing` and how it shows it in `markup`. One picture is made at a time, whoever asks;
who comes later waits in a queue of limited length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from ..data.decoding import to_rgb
from ..data.pictures import as_picture
from .calls import calls_of
from .drawing import (
    MOST_BYTES,
    MOST_GUIDANCE,
    MOST_SEED,
    Pair,
    draw,
    fitted,
    in_paint,
    kept_part,
    presets,
    read_sent,
    sampling_of,
)
from .markup import STYLE, picture_panel, picture_url, report_panel

FIGURES = Path(__file__).parent / "figures"
LONGEST_QUEUE = 32  # who comes when so many wait is told to come later
SHOWN_SIDE = 256  # pixels that a smaller picture is enlarged to for painting, by a whole factor
GUIDANCE = 1.5
# One at a time, over all events: they share the cores and the memory of one machine.
TURNS: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
EVENT: dict[str, Any] = {**TURNS, "api_visibility": "private", "show_progress": "hidden"}
IN_BROWSER: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class _Controls:
    """What one chooses, for drawing and in-painting alike."""

    label: gr.Dropdown
    seed: gr.Number
    another: gr.Button
    guidance: gr.Slider
    preset: gr.Dropdown
    counts: list[gr.Slider]

    @property
    def shared(self) -> list[Any]:
        """Those that any model has."""
        return [self.label, self.seed, self.guidance]

    @property
    def all(self) -> list[Any]:
        """Those of the model that the counts are for."""
        return [*self.shared, *self.counts]


def build_page(pair: Pair, beside: Pair | None = None) -> gr.Blocks:
    """The page, not yet served.

    Args:
        pair: what the controls are for.
        beside: another model, shown beside it with the same class, seed and guidance, at its own iterations.
    """
    # Files that a browser sent are gone after an hour.
    with gr.Blocks(title="viar", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# viar\nPictures scale by scale, with compute chosen for each.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls = _controls(pair)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Generate"):
                    _generate_tab(page, pair, beside, controls)
                with gr.Tab("In-paint"):
                    _in_paint_tab(pair, controls)
                with gr.Tab("Figures"):
                    _figures_tab()
        for name, call in calls_of(pair).items():
            gr.api(_told()(call), api_name=name, **TURNS)
    page.queue(max_size=LONGEST_QUEUE)
    return page


def serve(page: gr.Blocks, host: str, port: int | None, *, open_browser: bool = False) -> str:
    """Serve a page by threads of this process, and return its address.

    Args:
        page: of `build_page`.
        host: address to listen at; 127.0.0.1 is reached from this machine alone.
        port: default the first free one from 7860 on.
        open_browser: open it in a browser.

    Raises:
        OSError: the port is taken.
    """
    system, fixed = gr.themes.Font("system-ui"), gr.themes.Font("ui-monospace")
    theme = gr.themes.Default(
        font=[system, gr.themes.Font("sans-serif")], font_mono=[fixed, gr.themes.Font("monospace")]
    )
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        max_file_size=MOST_BYTES,
        theme=theme,
        css=STYLE,
        footer_links=["api"],
    )
    return str(address)


def _controls(pair: Pair) -> _Controls:
    null = pair.model.null_class
    classes = [*((str(label), label) for label in range(null)), ("none in particular", null)]
    schedules = presets(pair)
    return _Controls(
        label=gr.Dropdown(classes, value=min(3, null), label="class"),
        seed=gr.Number(0, precision=0, label="seed"),
        another=gr.Button("Another seed", size="sm"),
        guidance=gr.Slider(0, MOST_GUIDANCE, GUIDANCE, step=0.1, label="guidance"),
        preset=gr.Dropdown(
            list(schedules),
            value=next(iter(schedules), None),
            label="schedule of iterations",
            visible=bool(schedules),
        ),
        counts=[
            gr.Slider(1, pair.most_iterations, count, step=1, label=f"iterations at {side} x {side}")
            for side, count in zip(pair.model.config.sides, pair.configured, strict=False)
        ],
    )


def _generate_tab(page: gr.Blocks, pair: Pair, beside: Pair | None, controls: _Controls) -> None:
    for shown, inputs in ((pair, controls.all), (beside, controls.shared)):
        if shown is not None:
            panel = gr.HTML()
            triggers = [page.load, *(control.change for control in inputs)]
            gr.on(triggers, _drawing(shown), inputs, panel, trigger_mode="always_last", **EVENT)
    controls.another.click(
        None, controls.seed, controls.seed, js=f"seed => (seed + 1) % {MOST_SEED + 1}", **IN_BROWSER
    )
    if controls.counts:
        schedules = presets(pair)
        controls.preset.input(lambda name: schedules[name], controls.preset, controls.counts, **EVENT)
        moved = [slider.input for slider in controls.counts]
        gr.on(moved, None, None, controls.preset, js="() => null", **IN_BROWSER)


def _drawing(pair: Pair) -> Callable[..., Iterator[str]]:
    """The function of an event: the picture and its numbers after each scale."""
    sides = pair.model.config.sides

    def drawn(label: int, seed: int, guidance: float, *counts: int) -> Iterator[str]:
        urls: list[str] = []
        with _told():
            for image, report in draw(pair, label, sampling_of(pair, seed, guidance, counts)):
                urls.append(picture_url(image))
                yield report_panel(pair.name, urls, report, sides)

    return drawn


def _in_paint_tab(pair: Pair, controls: _Controls) -> None:
    side = pair.tokenizer.config.image_side
    shown_side = side * max(1, SHOWN_SIDE // side)

    def take_generated(label: int, seed: int, guidance: float, *counts: int) -> dict[str, Any]:
        with _told():
            *_, (image, _) = draw(pair, label, sampling_of(pair, seed, guidance, counts))
            return _to_paint(image, shown_side)

    def take_file(path: str) -> dict[str, Any]:
        with _told():
            return _to_paint(fitted(read_sent(Path(path).read_bytes(), "picture"), side), shown_side)

    gr.Markdown("Paint over what is to be made anew. Class, seed, guidance and iterations are those beside.")
    with gr.Row():
        generated = gr.Button("Take the generated picture", size="sm")
        file = gr.UploadButton("Take a picture file", file_types=["image"], size="sm")
    with gr.Row():
        editor = gr.ImageEditor(
            take_generated(*(control.value for control in controls.all)),
            type="pil",
            sources=(),
            transforms=(),
            layers=gr.LayerOptions(allow_additional_layers=False),
            brush=gr.Brush(default_size=40, colors=["#d1495b"], color_mode="fixed"),
            canvas_size=(shown_side, shown_side),
            fixed_canvas=True,
            format="png",
            label="picture",
        )
        panel = gr.HTML()
    start = gr.Button("Make the painted part anew", variant="primary")
    generated.click(take_generated, controls.all, editor, **EVENT)
    file.upload(take_file, file, editor, **EVENT)
    start.click(_in_painting(pair), [editor, *controls.all], panel, **EVENT)


def _to_paint(image: Tensor, side: int) -> dict[str, Any]:
    """A picture (3, H, W) in [0, 1] as the editor takes it, with nothing painted."""
    picture = as_picture(image).resize((side, side), Image.Resampling.NEAREST)
    return {"background": picture, "layers": [], "composite": picture}


def _in_painting(pair: Pair) -> Callable[..., str]:
    """The function of an event: the picture in the editor with its painted part made anew."""

    def made_anew(edited: dict[str, Any] | None, label: int, seed: int, guidance: float, *counts: int) -> str:
        with _told():
            if edited is None or edited["background"] is None:
                raise ValueError("picture: there is none; take the generated one or a file")
            picture = to_rgb(edited["background"])
            mask = kept_part(edited["layers"], picture.size)
            made, seconds = in_paint(pair, picture, mask, label, sampling_of(pair, seed, guidance, counts))
            return picture_panel(pair.name, picture_url(made), seconds)

    return made_anew


def _figures_tab() -> None:
    gr.Markdown(
        "VIAR and VAR of handwritten digits, as measured by `python -m benchmarks viar`; the documentation's "
        "page Benchmarks has the tables. First the quality of the pictures against the work for them and "
        "against memory, then how fast the implicit block converges."
    )
    for name in ("frontier", "convergence"):
        gr.Image(
            str(FIGURES / f"{name}.png"),
            label=name,
            show_label=False,
            interactive=False,
            buttons=["fullscreen"],
            format="png",
        )


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with what was asked is shown on the page, and told to programs."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
