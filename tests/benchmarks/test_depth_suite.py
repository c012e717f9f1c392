from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.case import Bar, Case, Row, Run
from benchmarks.measure import peak_rss
from benchmarks.suites import depth as suite
from benchmarks.suites.depth import digits, memory, parity
from benchmarks.suites.depth.cells import Block, LocalCell
from benchmarks.suites.depth.contenders import CONTENDERS, EXPLICIT, IMPLICIT
from deqlib import ImplicitLayer

CPU = Run(torch.device("cpu"), 1, True)
CASES = {case.name: case for case in suite.CASES}
TINY = {"batch": 2, "tokens": 4, "width": 8}
SMALL: dict[str, list[dict[str, Any]]] = {
    "memory": [{"depth": depth, **TINY, "resident": False} for depth in (1, 2, 3, 6)],
    "time": [{"depth": depth, **TINY} for depth in (1, 3)],
    "digits": [{"depth": depth, "updates": 2, "seeds": 2} for depth in (1, 2)],
    "parity": [{"depth": depth, "length": 4, "updates": 2, "seeds": 2} for depth in (2, 3, None)],
}


def measured(case: Case) -> list[Row]:
    """Rows of the small points as they come back from a file."""
    rows = [{**point, **row} for point in SMALL[case.name] for row in case.build(CPU, **point)]
    return json.loads(json.dumps(rows, allow_nan=False))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    torch.manual_seed(0)
    return {case.name: measured(case) for case in suite.CASES}


def sizes(rows: list[Row], contender: str, metric: str) -> dict[int, int]:
    return {row["depth"]: row[metric] for row in rows if row["contender"] == contender}


def test_what_an_implicit_layer_saves_does_not_depend_on_the_depth(rows: dict[str, list[Row]]) -> None:
    for name in IMPLICIT:
        saved, peak = (sizes(rows["memory"], name, metric) for metric in ("saved_bytes", "peak_bytes"))
        assert sorted(saved) == [1, 2, 3, 6]
        assert len(set(saved.values())) == 1
        del peak[1]
        assert len(set(peak.values())) == 1


def test_what_explicit_depth_saves_is_proportional_to_the_depth(rows: dict[str, list[Row]]) -> None:
    state = 2 * 4 * 8 * 4  # bytes of float32
    for name in EXPLICIT:
        saved = sizes(rows["memory"], name, "saved_bytes")
        assert [size / saved[1] for size in saved.values()] == [1, 2, 3, 6]
        assert (saved[1] == state) == (name == "explicit, tied, checkpointed")
    peak = sizes(rows["memory"], "explicit, tied", "peak_bytes")
    assert peak[6] > 4 * peak[1]


def test_parameters_are_those_of_one_cell_unless_untied(rows: dict[str, list[Row]]) -> None:
    block = 3 * 8 * 9 + 8 * 9 + 32 * 9 + 8 * 33 + 4 * 8
    for name in CONTENDERS:
        for case in ("memory", "time"):
            for depth, count in sizes(rows[case], name, "parameters").items():
                assert count == block * (depth if name == "explicit, untied" else 1)
    local = 64 * 65 + 32 * 65 + 2 * 32
    for row in rows["parity"]:
        stacked = row["depth"] if row["contender"] == "explicit, untied" else 1
        assert row["parameters"] == 2 * 32 + stacked * local + 2 * 33


def models(make_cell: Callable[[], nn.Module], depth: int) -> dict[str, nn.Module]:
    """All contenders of the same weights."""
    found = {}
    for name, make in CONTENDERS.items():
        torch.manual_seed(1)
        found[name] = make(make_cell, depth).double()
    return found


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    return list(torch.autograd.grad((model(x) * weights).sum(), [x, *model.parameters()]))


@pytest.mark.parametrize("make_cell", [partial(Block, 8), partial(LocalCell, 8)], ids=["block", "local"])
def test_checkpointing_changes_no_gradient(make_cell: Callable[[], nn.Module]) -> None:
    found = models(make_cell, 5)
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    plain = gradients(found["explicit, tied"], x)
    again = gradients(found["explicit, tied, checkpointed"], x)
    assert all(gradient.norm() > 1e-3 for gradient in plain[:2])
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 4])
def test_all_that_share_weights_give_what_a_plain_loop_gives(depth: int) -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    torch.manual_seed(1)
    cell, expected = Block(8).double(), torch.zeros_like(x)
    for _ in range(depth):
        expected = cell(expected, x)
    for name, model in models(partial(Block, 8), depth).items():
        same = torch.equal(model(x), expected) or torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)
        assert same == (name != "explicit, untied" or depth == 1), name
        assert isinstance(model, ImplicitLayer) == name.startswith("implicit")


def test_a_step_of_the_local_cell_reaches_one_place_further() -> None:
    cell = LocalCell(6).double()
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    other = x.clone()
    other[:, 2] += 1
    for depth in (1, 2, 4):
        model = CONTENDERS["explicit, tied"](lambda: cell, depth)
        changed = ((model(x) - model(other)).abs().amax((0, 2)) > 1e-9).tolist()
        assert changed == [2 <= place <= 2 + depth for place in range(8)]


def test_a_place_of_the_block_sees_all_places() -> None:
    x = torch.randn(1, 5, 8)
    other = x.clone()
    other[:, 3] += torch.randn(8)
    cell, z = Block(8), torch.randn(1, 5, 8)
    assert ((cell(z, x) - cell(z, other)).abs().amax(-1) > 1e-6).all()


def test_labels_are_the_running_parity() -> None:
    x, y = parity.sequences(torch.Generator().manual_seed(3), 50, 9)
    for signs, labels in zip(x.squeeze(-1).tolist(), y.tolist(), strict=True):
        odd = False
        for sign, label in zip(signs, labels, strict=True):
            assert sign in (-1, 1)
            odd ^= sign == 1
            assert label == odd
    assert 0.3 < y[:, -1].float().mean() < 0.7


def test_digits_to_test_on_were_not_trained_on() -> None:
    from sklearn.datasets import load_digits

    (images, labels), (unseen, truth) = digits.data()
    found = load_digits()
    assert images.shape == (1437, 8, 8)
    assert unseen.shape == (360, 8, 8)
    assert torch.cat((truth, labels)).tolist() == found.target.tolist()
    pixels = torch.cat((unseen, images))
    assert pixels.min() == -1
    assert pixels.max() == 1
    for index in (0, 359, 360, 1796):
        rows = (pixels[index] * 8 + 8).int().tolist()  # of the image, top to bottom
        assert rows == found.images[index].astype(int).tolist()


def test_depth_at_which_news_arrives_decides_what_can_be_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = cheap = parity.TO_TOLERANCE[1:2]  # one contender of a kind
    monkeypatch.setattr(parity, "FIXED", ("explicit, tied",))
    monkeypatch.setattr(parity, "TO_TOLERANCE", cheap)
    monkeypatch.setattr(parity, "BACKWARD", dict([*parity.BACKWARD.items()][1:2]))
    settings = {"length": 4, "updates": 150, "seeds": 1}
    found = {
        (row["contender"], depth, row["tested"]): row["accuracy"][0]
        for depth in (2, 4, None)
        for row in parity.build(CPU, depth=depth, **settings)
    }
    assert found["explicit, tied", 2, 4] < 0.65  # 0.5 by chance
    assert found["explicit, tied", 4, 4] > 0.9
    assert found["explicit, tied", 4, 16] < 0.65
    assert found[name, None, 16] > 0.9


def test_longer_lines_are_solved_with_more_steps_or_not_as_asked(rows: dict[str, list[Row]]) -> None:
    for row in rows["parity"]:
        factor = row["tested"] // row["length"]
        assert len(row["accuracy"]) == len(row["seconds"]) == 2
        if row["depth"] is None:
            assert all(1 <= steps <= 4 * row["tested"] for steps in row["steps"])
        else:
            deeper = row["contender"].endswith(parity.DEEPER)
            assert row["steps"] == [row["depth"] * (factor if deeper else 1)] * 2
    names = {row["contender"] for row in rows["parity"]}
    assert "explicit, untied" in names
    assert "explicit, untied" + parity.DEEPER not in names


def by_name(bars: list[Bar], part: str) -> Bar:
    (bar,) = [bar for bar in bars if part in bar.name]
    return bar


def test_bars_of_memory_are_met_and_fail_on_rows_that_grow(rows: dict[str, list[Row]]) -> None:
    real = rows["memory"]
    assert [bar.verdict for bar in memory.bars(real)] == ["pass"] * 3
    assert "depth 1 to 6" in by_name(memory.bars(real), "implicit layers, saved").name
    assert "depth 2 to 6" in by_name(memory.bars(real), "implicit layers, peak").name
    for metric, part in (("saved_bytes", "layers, saved"), ("peak_bytes", "layers, peak")):
        grown = [dict(row) for row in real]
        for row in grown:
            if row["contender"] == IMPLICIT[1] and row["depth"] == 6:
                row[metric] = math.ceil(row[metric] * 1.03)
        bars = memory.bars(grown)
        assert by_name(bars, part).verdict == "FAIL"
        assert by_name(bars, part).value == pytest.approx(1.03, rel=1e-3)
        assert [bar.verdict for bar in bars].count("FAIL") == 1
    bent = [dict(row) for row in real]
    for row in bent:
        if row["contender"] == EXPLICIT[0]:
            row["saved_bytes"] = 1000 * row["depth"] ** 2
    assert [bar.verdict for bar in memory.bars(bent)] == ["pass", "pass", "FAIL"]


def test_bars_of_too_few_depths_are_not_measured(rows: dict[str, list[Row]]) -> None:
    few = [row for row in rows["memory"] if row["depth"] == 1]
    assert [bar.verdict for bar in memory.bars(few)] == ["not measured"] * 3


@pytest.mark.parametrize("name", CASES)
def test_a_table_has_a_line_a_contender_and_a_column_a_depth(name: str, rows: dict[str, list[Row]]) -> None:
    case = CASES[name]
    table = case.table(rows[name])
    assert [line[0] for line in table.lines] == list(dict.fromkeys(row["contender"] for row in rows[name]))
    assert all(len(line) == len(table.head) for line in table.lines)
    for point in SMALL[name]:
        assert table.head.count("to tolerance" if point["depth"] is None else f"depth {point['depth']}") == 1


def test_a_cell_of_the_table_of_memory_holds_its_row(rows: dict[str, list[Row]]) -> None:
    table = memory.CASE.table(rows["memory"])
    row = next(r for r in rows["memory"] if r["contender"] == "implicit, JFB" and r["depth"] == 3)
    line = next(line for line in table.lines if line[0] == "implicit, JFB")
    figures = [float(part) for part in line[table.head.index("depth 3")].split(" / ")]
    assert figures == pytest.approx([row["saved_bytes"] / 1e6, row["peak_bytes"] / 1e6], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_pictures_show_every_contender(name: str, rows: dict[str, list[Row]]) -> None:
    from matplotlib.figure import Figure

    picture = CASES[name].picture
    assert picture is not None
    titles = picture.panels(rows[name])
    axes = list(Figure().subplots(1, len(titles), squeeze=False).flat)
    picture.paint(rows[name], axes)
    labels = {line.get_label() for axis in axes for line in axis.get_lines()}
    assert labels >= {row["contender"] for row in rows[name]}


def test_the_profiled_solve_takes_as_many_evaluations_as_the_depth() -> None:
    from torch.profiler import ProfilerActivity, profile

    case = CASES["time"]
    assert case.solve is not None
    solve = case.solve(CPU, depth=3, **TINY)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        solve()
    assert sum(event.name == "cell" for event in profiler.events()) == 3


@pytest.mark.slow
def test_a_process_of_its_own_holds_at_least_what_is_saved() -> None:
    point = {"contender": "explicit, tied", "depth": 8, "batch": 16, "tokens": 64, "width": 64}
    resident = peak_rss(memory.make, **point)
    if resident is None:
        pytest.skip("the system does not tell")
    model, x = memory.model_and_input(point.pop("contender"), torch.device("cpu"), **point)
    saved = memory.saved_bytes(partial(model, x), exclude=[*model.parameters(), x])
    assert saved > 3e7
    assert 0.8 * saved < resident < 3 * saved


def test_grids_have_the_depths_that_were_promised() -> None:
    for name in ("memory", "time"):
        assert [point["depth"] for point in CASES[name].grid] == [1, 2, 4, 8, 16, 32, 64]
    assert [p["depth"] for p in CASES["memory"].grid if p["resident"]] == [1, 16, 64]
    for case in suite.CASES:
        assert all(point.keys() == case.grid[0].keys() for point in [*case.grid, *case.quick])
        assert len(case.quick) <= 3
