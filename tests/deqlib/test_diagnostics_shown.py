"""What reports look like: text within 100 columns, and figures in which nothing is cut off or overlaps."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deqlib import (
    JFB,
    Anderson,
    ImplicitDifferentiation,
    ImplicitLayer,
    PhantomGradient,
    Picard,
    Stopping,
)
from deqlib.diagnostics import Ablation, Diagnosis, ablate, diagnose
from deqlib.diagnostics.tables import aligned, broken, lines

LONG = ImplicitDifferentiation(
    solver=Anderson(memory=5, damping=0.7), stopping=Stopping(rtol=1e-6, max_steps=77, patience=None)
)
MANY = [Anderson(memory=m, damping=d) for m in (3, 5, 7, 9) for d in (0.5, 0.7, 0.9)]
MANY_MODES = [
    PhantomGradient(steps=steps, damping=damping, form=form)
    for steps in (2, 3, 8)
    for damping in (0.5, 0.8)
    for form in ("unroll", "neumann")
]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.orthogonal_(self.linear.weight, gain=0.6)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def running_away(z: Tensor, x: Tensor) -> Tensor:
    return 5 * z + x


@cache
def reports(kind: str) -> tuple[Diagnosis, Ablation]:
    torch.manual_seed(0)
    layer, x, chosen, modes = ImplicitLayer(Cell()), torch.randn(3, 4), None, None
    if kind == "long":
        layer = ImplicitLayer(Cell(), stopping=Stopping(rtol=1e-6), backward=LONG)
    elif kind == "one":
        layer, x = ImplicitLayer(Cell(), solver=Picard()), x[:1]
        chosen, modes = [Picard()], [JFB()]
    elif kind == "many":
        layer = ImplicitLayer(Cell(), backward=LONG, stopping=Stopping.steps(3))
        x, chosen, modes = torch.randn(100, 4), MANY, MANY_MODES
    elif kind == "nan":
        x = torch.full((3, 4), float("nan"))
    elif kind == "away":
        layer = ImplicitLayer(running_away, solver=Picard())
    found = diagnose(layer, x, solvers=chosen, modes=modes, rounds=1)
    return found, ablate(layer, x, solvers=chosen, backwards=modes, rounds=1)


KINDS = ["plain", "long", "one", "many", "nan", "away"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_report_is_wider_than_100_columns(kind: str) -> None:
    for found in reports(kind):
        assert max(map(len, str(found).splitlines())) <= 100
        assert repr(found) == str(found)
        rows = (*found.solvers, *(found.gradients if isinstance(found, Diagnosis) else found.backwards))
        assert max(len(repr(row)) for row in rows) <= 100
    for report in (*reports(kind)[0].reports, reports(kind)[0].precision):
        assert len(repr(report)) <= 100


def test_what_the_layer_itself_uses_is_marked_and_nothing_else() -> None:
    found, table = reports("long")
    parts = {part.split()[0]: part for part in str(found).split("\n\n")}
    for head in ("solve", "gradient", "training"):
        assert parts[head].count("(layer)") == 1, head
    assert parts["solve"].splitlines()[1].startswith("Auto (layer)")
    assert [part.count("(layer)") for part in str(table).split("\n\n")] == [0, 1, 1]
    elsewhere = ablate(ImplicitLayer(Cell()), torch.randn(2, 4), solvers=[Picard()], backwards=[JFB()])
    assert "(layer)" not in str(elsewhere)
    by_steps, _ = reports("many")
    assert "\nAuto, 3 steps (layer) " in str(by_steps)


@given(
    names=st.lists(st.text("abc_(=, .1)'", max_size=160), min_size=1, max_size=4),
    cells=st.lists(st.text("abc 12,", max_size=90), min_size=1, max_size=8),
)
def test_a_table_fits_and_loses_nothing(names: list[str], cells: list[str]) -> None:
    head = ("name", *("column" for _ in cells))
    text = aligned(head, [(name, *cells) for name in names])
    assert max(map(len, text.splitlines())) <= 100
    for letter in "abc12=":
        assert text.count(letter) == sum(
            "".join((*head, *(name + "".join(cells) for name in names))).count(letter) for _ in [0]
        )


@given(text=st.text("ab(=, .1)'", max_size=200), width=st.integers(8, 40))
def test_a_broken_name_is_whole(text: str, width: int) -> None:
    found = broken(text, width)
    assert max(map(len, found)) <= width
    assert "".join("".join(found).split()) == "".join(text.split())


@given(st.lists(st.text("ab -\n", min_size=1, max_size=300), max_size=3))
def test_paragraphs_fit(items: list[str]) -> None:
    text = lines("- ", items)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "".join(text.replace("- ", "", 1).split()).count("a") == "".join(items).count("a")


def test_a_long_note_of_pytorchs_is_shown_in_lines() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        if torch.autograd.forward_ad.unpack_dual(z).tangent is not None:
            raise NotImplementedError("a word " * 400)
        return z / 2 + x

    found = diagnose(ImplicitLayer(cell), torch.randn(2, 3), rounds=0, modes=())
    assert "a word" in found.notes[0]
    assert len(found.notes[0]) < 300
    assert max(map(len, str(found).splitlines())) <= 100


# Figures ------------------------------------------------------------------------------------------------


def boxes(figure: Any) -> tuple[dict[str, Any], list[tuple[str, Any]], Any]:
    """Panels, the texts and legends of each with its name, and the page: all as they are drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "constrained_layout not applied" is one
        figure.canvas.draw()
    panels = {f"panel {i}": axes.get_window_extent() for i, axes in enumerate(figure.axes)}
    parts = []
    for name, axes in zip(panels, figure.axes, strict=True):
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, axes.get_legend()]
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
        frames = [(axes.get_xticklabels(), axes.get_xlim(), 0), (axes.get_yticklabels(), axes.get_ylim(), 1)]
        # A tick outside of the frame is not drawn.
        outside = [
            label
            for labels, limits, axis in frames
            for label in labels
            if not min(limits) <= label.get_position()[axis] <= max(limits)
        ]
        for text in [t for t in texts if t is not None and t.get_visible() and t not in outside]:
            box = text.get_window_extent()
            if box.width > 0 and box.height > 0:
                parts.append((name, box))
    return panels, parts, figure.bbox


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1], ids=["diagnosis", "ablation"])
def test_in_a_figure_nothing_is_cut_off_and_nothing_lies_over_a_panel(kind: str, which: int) -> None:
    pytest.importorskip("matplotlib")
    figure = reports(kind)[which].plot()
    panels, parts, page = boxes(figure)
    for panel in panels.values():
        assert panel.width > 150
        assert panel.height > 150
    for owner, box in parts:
        assert box.x0 >= page.x0 - 1
        assert box.y0 >= page.y0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
        for name, panel in panels.items():
            shared = min(box.x1, panel.x1) - max(box.x0, panel.x0)
            depth = min(box.y1, panel.y1) - max(box.y0, panel.y0)
            assert shared <= 1 or depth <= 1, f"{owner} has something over {name}"


@pytest.mark.parametrize("kind", ["long", "many"])
def test_names_beside_bars_do_not_touch(kind: str) -> None:
    pytest.importorskip("matplotlib")
    figure = reports(kind)[0].plot()
    boxes(figure)
    labels = [label.get_window_extent() for label in figure.axes[2].get_yticklabels()]
    assert len(labels) == len(reports(kind)[0].gradients)
    for upper, lower in pairwise(labels):
        assert upper.y0 >= lower.y1


def test_curves_of_many_solvers_have_colours_of_their_own_and_all_ends_are_in_the_frame() -> None:
    pytest.importorskip("matplotlib")
    found, table = reports("many")
    shown = [line for line in found.plot().axes[0].get_lines() if not line.get_label().startswith("_")]
    assert len({line.get_color() for line in shown}) == len(shown) == 14
    marks = [
        (line.get_marker(), line.get_color())
        for line in table.plot().axes[2].get_lines()
        if not line.get_label().startswith("_")
    ]
    assert len(set(marks)) == len(marks) == 12
    for axes in (found.plot().axes[0], table.plot().axes[0]):
        low, high = axes.get_ylim()
        for line in axes.get_lines()[:-1]:
            assert low < line.get_ydata()[-1] < high


def test_a_curve_that_is_not_there_is_told_in_the_legend() -> None:
    pytest.importorskip("matplotlib")
    found, table = reports("nan")
    for report in (found, table):
        legend = report.plot().axes[0].get_legend() or report.plot().axes[1].get_legend()
        assert all("not finite" in text.get_text() for text in legend.get_texts())


def test_a_mode_without_any_error_does_not_spread_the_axis() -> None:
    pytest.importorskip("matplotlib")
    _, table = reports("plain")
    exact = replace(table.backwards[0], error=0.0, input_error=0.0)
    figure = replace(table, backwards=(exact, *table.backwards[1:])).plot()
    low, high = figure.axes[2].get_ylim()
    assert high / low < 1e8
    names = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
    assert "no error" in names[0]


def test_figures_show_solves_whose_last_evaluation_is_in_no_trace() -> None:
    # What is returned of a sample that runs away is where it began: the batch is evaluated there once more.
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.cat([0.5 * z[:1], 3 * z[1:]]) + x

    layer = ImplicitLayer(cell, solver=Picard(), stopping=Stopping(max_steps=12))
    compared = ablate(layer, torch.ones(2, 4), solvers=[Picard()], backwards=[], rounds=1)
    (solve,) = compared.solvers
    assert solve.nfe == len(solve.trace) + 1
    assert len(compared.plot().axes[0].get_lines()[0].get_xdata()) == len(solve.trace)  # type: ignore[arg-type]
    diagnose(layer, torch.ones(2, 4), solvers=[], modes=[], rounds=0, num_starts=0).plot()
