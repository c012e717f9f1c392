"""The page itself, made with gradio: controls, three tabs, and the interface for programs.

What it computes is in `drawing` and how it shows it in `markup`. One picture is made at a time, whoever asks;
who comes later waits in a queue of limited length. Pictures are in the page and in what is sent: no files are
served, and none are written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from starlette.middleware import Middleware

from ..data.decoding import shown
from .calls import calls_of
from .drawing import (
    MOST_BYTES,
    MOST_GUIDANCE,
    MOST_SEED,
    Pair,
    draw,
    fitted,
    in_paint,
    presets,
    read_text,
    sampling_of,
)
from .limits import LimitedRequests
from .markup import PAINTING, PART_SIDE, STYLE, figures_panel, picture_panel, picture_url, report_panel
from .refusals import is_loopback

HERE = Path(__file__).parent
FIGURES = {
    "quality against compute and against memory": "frontier.png",
    "how fast the implicit block converges": "convergence.png",
}
LONGEST_QUEUE = 32  # who comes when so many wait is told to come later
MOST_THREADS = 8  # that serve; models take one
MOST_SENT = 3 * MOST_BYTES  # of a request: two pictures in base64, and the rest
MOST_HELD = 4 * MOST_SENT  # of all requests that are being received
MOST_SECONDS = 10  # for a request to be received
MOST_OPEN = 256  # requests at a time: each that waits has two, and a page some more
MOST_TOLD = 300  # letters of an error that nobody foresaw
MOST_SESSIONS = 8  # whose last values gradio keeps: of each call one, with its pictures
# Of its events gradio keeps notes and makes statistics, of which nobody here asks for: ten thousand, with
# which memory would grow for an hour.
STATISTICS = {"GRADIO_ANALYTICS_MAX_EVENTS": 10, "GRADIO_ANALYTICS_CACHE_FREQUENCY": 2**31}
GUIDANCE = 1.5
HEAD = "<h1>viar</h1><p>Pictures scale by scale, with compute chosen for each.</p>"
# One at a time, over all events: they share the cores and the memory of one machine.
TURNS: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
EVENT: dict[str, Any] = {**TURNS, **QUIET}
IN_BROWSER: dict[str, Any] = {"queue": False, **QUIET}  # nothing of it is sent
# In the browser, as the picture is there: that of the first model.
SHOWN = "({picture: document.querySelector('.viar-panel .whole').src})"


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


class _Page(gr.Blocks):  # type: ignore[misc]  # gradio is not typed
    """Tells who asked what was wrong with it; gradio would print it, as it came, on the terminal."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Raise unless there is a value for each argument."""
        if len(inputs) != len(block_fn.inputs):
            raise ValueError(f"{block_fn.name}: expected {len(block_fn.inputs)} values, got {len(inputs)}")

    async def preprocess_data(self, *args: Any, **settings: Any) -> Any:
        """What a function is given, of what was sent."""
        try:
            return await super().preprocess_data(*args, **settings)
        except Exception as error:
            raise gr.Error(str(error), print_exception=False) from error

    async def process_api(self, *args: Any, **settings: Any) -> Any:
        """Answer a call or an event; of what nobody foresaw, a line is printed."""
        try:
            return await super().process_api(*args, **settings)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            text = shown(f"{type(error).__name__}: {error}")[:MOST_TOLD]
            print(f"viar: a request failed: {text}", file=sys.stderr)
            raise gr.Error(text, print_exception=False) from error


def build_page(pair: Pair, beside: Pair | None = None) -> gr.Blocks:
    """The page, not yet served; its first picture is made here.

    Args:
        pair: what the controls are for.
        beside: another model, shown beside it with the same class, seed and guidance, at its own iterations.
    """
    with _Page(title="viar", analytics_enabled=False) as page:
        gr.HTML(HEAD, elem_id="viar-head")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls = _controls(pair)
            with gr.Column(scale=3, min_width=320, elem_id="viar-shown"), gr.Tabs():
                with gr.Tab("Generate"):
                    _generate_tab(pair, beside, controls)
                with gr.Tab("In-paint") as tab:
                    _in_paint_tab(tab, pair, controls)
                with gr.Tab("Figures") as tab:
                    _figures_tab(tab)
        for name, call in calls_of(pair).items():
            gr.api(_told()(call), api_name=name, **TURNS)
    for name, number in STATISTICS.items():
        os.environ.setdefault(name, str(number))
    page.queue(max_size=LONGEST_QUEUE)
    return page


def serve(page: gr.Blocks, host: str, port: int | None, *, open_browser: bool = False) -> str:
    """Serve a page by threads of this process, and return its address.

    From here on PyTorch takes one core less than it did, of several: a browser on the same machine and what
    serves it need one too, and pictures are there sooner than when all three share every core.

    Args:
        page: of `build_page`.
        host: address to listen at; 127.0.0.1 is reached from this machine alone, and by no other name.
        port: default the first free one from 7860 on.
        open_browser: open it in a browser.

    Raises:
        OSError: the port is taken.
    """
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))
    limits = Middleware(
        LimitedRequests,
        most_bytes=MOST_SENT,
        most_held=MOST_HELD,
        most_seconds=MOST_SECONDS,
        most_open=MOST_OPEN,
        here_only=is_loopback(host),
    )
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
        max_threads=MOST_THREADS,
        state_session_capacity=MOST_SESSIONS,
        run_history=False,
        show_error=True,  # which arguments a program left out
        app_kwargs={"middleware": [limits]},
        theme=theme,
        css=STYLE,
        footer_links=["api"],
    )
    return str(address)


def _controls(pair: Pair) -> _Controls:
    null = pair.model.null_class
    classes = [*((str(label), label) for label in range(null)), ("none in particular", null)]
    schedules = presets(pair)
    with gr.Row():
        label = gr.Dropdown(classes, value=min(3, null), label="class", min_width=110)
        seed = gr.Number(0, precision=0, label="seed", min_width=110)
    another = gr.Button("Another seed", size="sm")
    guidance = gr.Slider(0, MOST_GUIDANCE, GUIDANCE, step=0.1, label="guidance", buttons=[])
    preset = gr.Dropdown(
        list(schedules),
        value=next(iter(schedules), None),
        label="schedule of iterations",
        visible=bool(schedules),
    )
    with gr.Column(elem_id="viar-counts"):
        counts = [
            gr.Slider(
                1,
                pair.most_iterations,
                count,
                step=1,
                label=f"iterations at {side} x {side}",
                min_width=100,
                buttons=[],
            )
            for side, count in zip(pair.model.config.sides, pair.configured, strict=False)
        ]
    return _Controls(label, seed, another, guidance, preset, counts)


def _generate_tab(pair: Pair, beside: Pair | None, controls: _Controls) -> None:
    with gr.Row():
        for shown, inputs in ((pair, controls.all), (beside, controls.shared)):
            if shown is not None:
                with gr.Column(min_width=320):
                    panel = gr.HTML(_first_panel(shown, inputs), apply_default_css=False)
                triggers = [control.change for control in inputs]
                gr.on(triggers, _drawing(shown), inputs, panel, trigger_mode="always_last", **EVENT)
    controls.another.click(
        None, controls.seed, controls.seed, js=f"seed => (seed + 1) % {MOST_SEED + 1}", **IN_BROWSER
    )
    if controls.counts:
        schedules = presets(pair)
        controls.preset.input(lambda name: schedules[name], controls.preset, controls.counts, **EVENT)
        moved = [slider.input for slider in controls.counts]
        gr.on(moved, None, None, controls.preset, js="() => null", **IN_BROWSER)


def _first_panel(pair: Pair, inputs: list[Any]) -> str:
    """What the page shows when it is opened, made twice: the first time takes longer than all that follow."""
    for _ in range(2):
        *_, panel = _drawing(pair)(*(control.value for control in inputs))
    return panel


def _drawing(pair: Pair) -> Callable[..., Iterator[str]]:
    """The function of an event: the picture and its numbers after each scale."""
    sides = pair.model.config.sides

    def drawn(label: int, seed: int, guidance: float, *counts: int) -> Iterator[str]:
        parts: list[str] = []
        with _told():
            for image, report in draw(pair, label, sampling_of(pair, seed, guidance, counts)):
                parts.append(picture_url(image, PART_SIDE))
                yield report_panel(pair.name, picture_url(image), parts, report, sides)

    return drawn


def _in_paint_tab(tab: gr.Tab, pair: Pair, controls: _Controls) -> None:
    side = pair.tokenizer.config.image_side

    def take_file(sent: object) -> dict[str, str]:
        with _told():
            return {"picture": picture_url(fitted(read_text(_part(sent, "file"), "picture"), side))}

    gr.HTML(
        "Paint over what is to be made anew. Class, seed, guidance and iterations are those of the controls."
    )
    with gr.Row():
        with gr.Column(min_width=300):
            painting = gr.HTML(
                html_template=PAINTING,
                js_on_load=(HERE / "painting.js").read_text(),
                apply_default_css=False,
                elem_id="viar-painting",
            )
        with gr.Column(min_width=300):
            panel = gr.HTML(apply_default_css=False)
    with gr.Row():
        generated = gr.Button("Take the generated picture", min_width=250)
        start = gr.Button("Make the painted part anew", variant="primary", min_width=250)
    kept = f"value => value && value.painted ? value : {SHOWN}"
    tab.select(None, painting, painting, js=kept, **IN_BROWSER)
    generated.click(None, None, painting, js=f"() => {SHOWN}", **IN_BROWSER)
    painting.upload(take_file, painting, painting, **EVENT)
    start.click(_in_painting(pair), [painting, *controls.all], panel, **EVENT)


def _part(sent: object, name: str) -> object:
    """One of the files in base64 that the painting sends; none of what it would not send."""
    return sent.get(name) if isinstance(sent, dict) else None


def _in_painting(pair: Pair) -> Callable[..., str]:
    """The function of an event: the picture that is painted on, with its painted part made anew."""

    def made_anew(sent: object, label: int, seed: int, guidance: float, *counts: int) -> str:
        with _told():
            picture, mask = (read_text(_part(sent, name), name) for name in ("picture", "mask"))
            made, seconds = in_paint(pair, picture, mask, label, sampling_of(pair, seed, guidance, counts))
            return picture_panel(pair.name, picture_url(made), seconds)

    return made_anew


def _figures_tab(tab: gr.Tab) -> None:
    """The figures come when they are asked for: they are larger than all else."""
    gr.HTML(
        "VIAR and VAR of handwritten digits, as measured by <code>python -m benchmarks viar</code>; the "
        "documentation's page Benchmarks has the tables. First the quality of the pictures against the work "
        "for them and against memory, then how fast the implicit block converges."
    )
    panel = gr.HTML(apply_default_css=False)

    def figures() -> str:
        return figures_panel({name: (HERE / "figures" / file).read_bytes() for name, file in FIGURES.items()})

    tab.select(figures, None, panel, **QUIET)


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with what was asked is shown on the page, and told to programs."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
