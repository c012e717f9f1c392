"""Pictures and reports as HTML, pictures within it: the page needs no files of them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO

from torch import Tensor

from ..data.pictures import as_picture
from ..generation.report import GenerationReport, ScaleReport

STYLE = """
.viar-panel { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.viar-panel figure { margin: 0; }
.viar-panel img { image-rendering: pixelated; border: 1px solid var(--border-color-primary); display: block; }
.viar-panel .whole { width: min(256px, 80vw); aspect-ratio: 1; }
.viar-panel .part { width: 40px; height: 40px; }
.viar-panel .scroll { overflow-x: auto; max-width: 100%; }
.viar-panel table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.viar-panel th, .viar-panel td { padding: 2px 10px; text-align: right; white-space: nowrap; height: 46px; }
.viar-panel tfoot td, .viar-panel tfoot th { border-top: 1px solid var(--border-color-primary); }
"""
HEADINGS = ("so far", "scale", "evaluations", "residual", "ms", "cache, kB")


def picture_url(image: Tensor) -> str:
    """A picture as the address of a PNG that is in the address itself, `data:image/png;base64,...`.

    Args:
        image: shape (3, H, W) in [0, 1].
    """
    file = BytesIO()
    as_picture(image).save(file, "png")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def report_panel(name: str, pictures: Sequence[str], report: GenerationReport, sides: Sequence[int]) -> str:
    """A picture as far as it is, and beside it what each scale took.

    Args:
        name: of the model.
        pictures: addresses of the picture after each scale so far, at least one.
        report: of these scales.
        sides: of all scales; those to come have a row, so that nothing moves when they do.
    """
    rows = [_row(url, scale) for url, scale in zip(pictures, report.scales, strict=True)]
    empty = "<td></td>" * (len(HEADINGS) - 2)
    rows += [f"<tr><td></td><td>{side} x {side}</td>{empty}</tr>" for side in sides[len(rows) :]]
    heading = "".join(f'<th scope="col">{escape(text)}</th>' for text in HEADINGS)
    return (
        f'<div class="viar-panel">{_figure(name, pictures[-1])}<div class="scroll"><table>'
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
