"""Pictures and reports as HTML, pictures within it: the page needs no files of them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO

from torch import Tensor

from ..data.pictures import as_picture
from ..generation.report import GenerationReport, ScaleReport

STYLE = """
#viar-head { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; }
#viar-head h1 { font-size: 1.6rem; font-weight: 600; margin: 0; }
#viar-head p { opacity: .7; margin: 0; }
#viar-shown { position: sticky; top: 1rem; align-self: flex-start; }
.viar-panel { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.viar-panel figure { margin: 0; }
.viar-panel figcaption { padding-top: .4rem; opacity: .7; }
.viar-panel img, #viar-painting img, #viar-painting canvas { image-rendering: pixelated; display: block; }
.viar-panel .whole { width: min(288px, 80vw); aspect-ratio: 1; border-radius: 4px; }
.viar-panel .part { width: 36px; height: 36px; border-radius: 2px; margin: auto; }
.viar-panel .scroll { overflow-x: auto; max-width: 100%; }
.viar-panel table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.viar-panel th, .viar-panel td { padding: 0 .7rem; text-align: right; white-space: nowrap; height: 40px; }
.viar-panel th { font-weight: 500; opacity: .7; }
.viar-panel tr { border-top: 1px solid var(--border-color-primary); }
.viar-panel thead tr { border: none; }
.viar-panel tfoot tr:last-child { font-weight: 600; }
#viar-painting .board { position: relative; width: min(288px, 80vw); aspect-ratio: 1; }
#viar-painting .board > * { position: absolute; width: 100%; height: 100%; border-radius: 4px; }
#viar-painting canvas { opacity: .75; cursor: crosshair; touch-action: none; }
#viar-painting .tools { display: flex; gap: .75rem; align-items: center; padding-top: .5rem; }
#viar-painting input[type=range] { width: 7rem; }
#viar-painting .tools * { accent-color: var(--color-accent); vertical-align: middle; }
#viar-painting button, #viar-painting .file {
  padding: .1rem .6rem; border: 1px solid var(--border-color-primary); border-radius: 4px; cursor: pointer;
}
.viar-figures img { max-width: 100%; margin-top: 1.5rem; background: white; border-radius: 4px; }
@media (max-width: 700px) {
  #viar-shown { position: static; order: -1; }
  #viar-counts .form { display: grid; grid-template-columns: 1fr 1fr; }
  .viar-panel { gap: .75rem; }
  .viar-panel .whole { width: 200px; }
  .viar-panel th, .viar-panel td { padding: 0 .16rem; height: 28px; font-size: .72rem; }
  .viar-panel .part { width: 24px; height: 24px; }
  .viar-panel .scroll { margin: 0 -12px; max-width: calc(100% + 24px); }
  #viar-painting .tools { gap: .5rem; font-size: .8rem; white-space: nowrap; }
  #viar-painting input[type=range] { width: 5rem; }
}
"""
PAINTING = """
<div class="board"><img alt="the picture to paint on"><canvas></canvas></div>
<div class="tools">
  <label>brush <input type="range" min="3" max="40" value="15"></label><button>Clear</button>
  <label class="file">Open a file<input type="file" accept="image/*" hidden></label>
</div>
"""
PART_SIDE = 72  # pixels that suffice for the picture after one scale
HEADINGS = ("so far", "scale", "evaluations", "residual", "ms", "cache, kB")


def picture_url(image: Tensor, most_side: int | None = None) -> str:
    """A picture as the address of a PNG that is in the address itself, `data:image/png;base64,...`.

    Args:
        image: shape (3, H, W) in [0, 1].
        most_side: a larger picture is made smaller, to so many pixels a side; default none is.
    """
    picture, file = as_picture(image), BytesIO()
    if most_side is not None:
        picture.thumbnail((most_side, most_side))
    picture.save(file, "png")
    return _png_url(file.getvalue())


def report_panel(
    name: str, url: str, parts: Sequence[str], report: GenerationReport, sides: Sequence[int]
) -> str:
    """A picture as far as it is, and beside it what each scale took.

    Args:
        name: of the model.
        url: address of the picture.
        parts: addresses of the picture after each scale so far, at least one.
        report: of these scales.
        sides: of all scales; those to come have a row, so that nothing moves when they do.
    """
    rows = [_row(part, scale) for part, scale in zip(parts, report.scales, strict=True)]
    empty = "<td></td>" * (len(HEADINGS) - 2)
    rows += [f"<tr><td></td><td>{side} x {side}</td>{empty}</tr>" for side in sides[len(rows) :]]
    heading = "".join(f'<th scope="col">{escape(text)}</th>' for text in HEADINGS)
    return (
        f'<div class="viar-panel">{_figure(name, url)}<div class="scroll"><table>'
        f"<thead><tr>{heading}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"<tfoot>{_decoding(report)}{_total(report)}</tfoot></table></div></div>"
    )


def picture_panel(name: str, url: str, seconds: float) -> str:
    """A picture, and below it the time that it took.

    Args:
        name: of the model.
        url: address of the picture.
        seconds: to make it.
    """
    return f'<div class="viar-panel">{_figure(f"{name}, {_milliseconds(seconds)} ms", url)}</div>'


def figures_panel(figures: Mapping[str, bytes]) -> str:
    """Drawings below one another.

    Args:
        figures: PNG files by what they show.
    """
    images = (f'<img src="{_png_url(png)}" alt="{escape(name)}">' for name, png in figures.items())
    return f'<div class="viar-figures">{"".join(images)}</div>'


def _png_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _figure(caption: str, url: str) -> str:
    text = escape(caption)
    return f'<figure><img class="whole" src="{url}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _row(url: str, scale: ScaleReport) -> str:
    size = f"{scale.side} x {scale.side}"
    picture = f'<td><img class="part" src="{url}" alt="after scale {size}"></td>'
    residual = "-" if scale.residual is None else f"{scale.residual:.1e}"
    cells = _cells(size, _count(scale), residual, _milliseconds(scale.seconds), _cache(scale))
    return f"<tr>{picture}{cells}</tr>"


def _decoding(report: GenerationReport) -> str:
    return f"<tr><td></td>{_cells('decoding', '', '', _milliseconds(report.decode_seconds), '')}</tr>"


def _total(report: GenerationReport) -> str:
    cells = _cells("all", _count(report), "", _milliseconds(report.seconds), _cache(report))
    return f"<tr><td></td>{cells}</tr>"


def _cells(*texts: str) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)


def _count(of: ScaleReport | GenerationReport) -> str:
    return "-" if of.evaluations is None else f"{of.evaluations:.1f}"


def _cache(of: ScaleReport | GenerationReport) -> str:
    return f"{of.cache_bytes / 1e3:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
