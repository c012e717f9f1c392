"""The runner: what is measured is kept, read again, compared and shown."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from rich.console import Console

from benchmarks import command, runner
from benchmarks.case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, none_of, product
from benchmarks.environment import environment, hardware
from benchmarks.measure import marked, milliseconds, peak_rss, profiled, spread, with_spread
from benchmarks.results import COMMITTED, Results, unused
from benchmarks.show import claims, compare, documents, tables
from benchmarks.show.tables import bars_markdown, markdown_table
from benchmarks.suites import scaling

CPU = torch.device("cpu")
RUN = Run(CPU, 1, False)


def build(run: Run, size: int, kind: str) -> Iterator[Row]:
    if size < 0:
        raise KeyboardInterrupt
    for contender in ("ours", "theirs"):
        yield {"contender": contender, "count": size * 2, "seconds": [0.1 * size] * run.rounds}


def table(rows: list[Row]) -> Table:
    return Table("counts", ("size", "count"), [(str(row["size"]), str(row["count"])) for row in rows])


def paint(rows: list[Row], axes: list[Axes]) -> None:
    for axis in axes:
        axis.plot([row["size"] for row in rows], [row["count"] for row in rows])


def case(**changes: Any) -> Case:
    settings: dict[str, Any] = {
        "name": "doubling",
        "about": "twice the size",
        "build": build,
        "grid": product(size=[1, 2], kind=["a", "b"]),
        "quick": product(size=[1], kind=["a"]),
        "metrics": {"count": Metric(), "seconds": SECONDS},
        "table": lambda rows: Table(
            "t", ("size", "count"), [(str(r["size"]), str(r["count"])) for r in rows]
        ),
        "bars": lambda rows: [Bar("largest count", max(row["count"] for row in rows), 4)],
        "picture": Picture(paint, lambda rows: ("left", "right")),
    }
    return Case(**settings | changes)


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def measured(path: Path, console: Console, *cases: Case, run: Run = RUN, **where: str) -> Results:
    results, file = runner.begin("made-up", run, None, path)
    texts = {name: [value] for name, value in where.items()}
    runner.measure(cases, [c.name for c in cases], texts, run, results, file, console)
    return Results.load(file)


def test_every_point_of_the_grid_is_measured_once_and_read_back(tmp_path: Path, console: Console) -> None:
    results = measured(tmp_path, console, case())
    assert [(r["size"], r["kind"], r["contender"], r["count"]) for r in results.rows("doubling")] == [
        (size, kind, who, 2 * size) for size in (1, 2) for kind in "ab" for who in ("ours", "theirs")
    ]
    assert results.bars == [Bar("largest count", 4, 4).record()]
    (file,) = tmp_path.iterdir()
    here = environment(CPU)
    assert file.name == f"made-up_{hardware(here)}_{here['date'][:10]}.json"
    assert results.environments[0]["packages"]["torch"] == torch.__version__
    assert results.environments[0]["threads"] == torch.get_num_threads()


def test_settings_pick_points_and_unknown_ones_are_refused(tmp_path: Path, console: Console) -> None:
    results = measured(tmp_path, console, case(), size="2", kind="a")
    assert {(row["size"], row["kind"]) for row in results.rows("doubling")} == {(2, "a")}
    for wrong in ({"size": "3"}, {"colour": "a"}, {"size": "2", "colour": "a"}):
        with pytest.raises(ValueError, match=r"--where: no point of doubling has .*=(3|a)"):
            measured(tmp_path, console, case(), **wrong)
    quick = measured(tmp_path, console, case(), run=replace(RUN, quick=True))
    assert [point["settings"] for point in quick.points["doubling"]] == [{"size": 1, "kind": "a"}]


def test_a_setting_that_is_named_twice_may_have_either_value(tmp_path: Path, console: Console) -> None:
    found = runner.points([case()], RUN, {"size": ["2", "1"], "kind": ["b"]})
    assert [settings for _, settings in found] == [{"size": size, "kind": "b"} for size in (1, 2)]
    assert command._settings(["a=1", "b=[10, 2]", "a=x=y"]) == {"a": ["1", "x=y"], "b": ["[10, 2]"]}


def test_no_point_is_begun_when_time_is_up_and_those_left_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))  # a second passes whenever somebody looks
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(clock)))
    console = Console(file=io.StringIO(), width=200)
    results, file = runner.begin("made-up", RUN, None, tmp_path)
    assert runner.measure([case()], ["doubling"], {}, RUN, results, file, console, seconds=4)
    assert 0 < len(Results.load(file).points["doubling"]) < 4
    assert "time is up, not measured: doubling 2, b" in console.file.getvalue()


def test_a_point_that_raises_is_left_out_and_told_where_that_is_asked_for(tmp_path: Path) -> None:
    def broken(run: Run, size: int, kind: str) -> Iterator[Row]:
        if size == 1 and kind == "a":
            raise RuntimeError("no such kernel")
        return build(run, size, kind)

    console = Console(file=io.StringIO(), width=200)
    results, file = runner.begin("made-up", RUN, None, tmp_path)
    arguments = ([case(build=broken)], ["doubling"], {}, RUN, results, file, console)
    with pytest.raises(RuntimeError, match="no such kernel"):
        runner.measure(*arguments)
    assert not runner.measure(*arguments, keep_going=True)
    assert len(Results.load(file).points["doubling"]) == 3
    assert "raised, not measured: doubling 1, a" in console.file.getvalue()
    assert "no such kernel" in console.file.getvalue()
    assert runner.measure([case()], *arguments[1:], keep_going=True)


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path: Path, console: Console) -> None:
    calls: list[int] = []

    def counted(run: Run, size: int, kind: str) -> Iterator[Row]:
        calls.append(size)
        return build(run, size, kind)

    broken = case(build=counted, grid=product(size=[1, 2, -1, 3], kind=["a"]))
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, console, broken)
    (file,) = tmp_path.iterdir()
    kept = Results.load(file)
    assert [point["settings"]["size"] for point in kept.points["doubling"]] == [1, 2]
    assert kept.bars[0]["value"] == 4

    whole = replace(broken, grid=product(size=[1, 2, 3], kind=["a"]))
    results, path = runner.begin("made-up", RUN, file, tmp_path)
    runner.measure([whole], ["doubling"], {}, RUN, results, path, console)
    assert calls == [1, 2, -1, 3]
    again = Results.load(file)
    assert [point["settings"]["size"] for point in again.points["doubling"]] == [1, 2, 3]
    assert [bar["verdict"] for bar in again.bars] == ["FAIL"]
    assert len(again.environments) == 1  # nothing changed in between
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_points_that_are_added_later_stand_where_their_grid_has_them(
    tmp_path: Path, console: Console
) -> None:
    grid = product(size=[1, 2, 3], kind=["a"])
    measured(tmp_path, console, case(grid=[*grid[1:], {"size": 9, "kind": "a"}]))
    (file,) = tmp_path.iterdir()
    results, path = runner.begin("made-up", RUN, file, tmp_path)
    runner.measure([case(grid=grid)], ["doubling"], {}, RUN, results, path, console)
    assert [row["size"] for row in Results.load(file).rows("doubling")][::2] == [1, 2, 3, 9]


def test_figures_of_another_time_are_told_apart_and_those_of_other_hardware_refused(
    tmp_path: Path, console: Console
) -> None:
    measured(tmp_path, console, case())
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    del record["sha256"]  # as files of earlier releases are
    record["environments"][0]["commit"] = "before"
    file.write_text(json.dumps(record))
    results, _ = runner.begin("made-up", RUN, file, tmp_path)
    results.add("doubling", {"size": 5, "kind": "a"}, 1.0, [])
    assert results.environments[0]["commit"] == "before"
    assert results.points["doubling"][0]["environment"] == 0
    assert results.points["doubling"][-1]["environment"] == 1

    for wrong in ({"suite": "other"}, {"run": replace(RUN, rounds=7)}):
        asked = {"suite": "made-up", "run": RUN} | wrong
        with pytest.raises(ValueError, match=r"--resume: .* holds \(.*this run is"):
            runner.begin(asked["suite"], asked["run"], file, tmp_path)
    record["environments"][0]["cpu"] = "Z80"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="z80"):
        runner.begin("made-up", RUN, file, tmp_path)


def test_a_new_run_overwrites_nothing(tmp_path: Path, console: Console) -> None:
    for _ in range(3):
        measured_in = runner.begin("made-up", RUN, None, tmp_path)
        runner.measure([case()], ["doubling"], {}, RUN, *measured_in, console)
    assert len(list(tmp_path.iterdir())) == 3
    assert unused(tmp_path / "new.json") == tmp_path / "new.json"


def test_a_row_that_json_cannot_hold_leaves_the_file_as_it_was(tmp_path: Path, console: Console) -> None:
    def infinite(run: Run, size: int, kind: str) -> Iterator[Row]:
        yield {"contender": "ours", "count": 1 if size == 1 else float("inf"), "seconds": []}

    with pytest.raises(ValueError, match="not JSON compliant"):
        measured(tmp_path, console, case(build=infinite, grid=product(size=[1, 2], kind=["a"])))
    files = [path for path in tmp_path.iterdir() if path.suffix == ".json"]
    assert [row["count"] for row in Results.load(files[0]).rows("doubling")] == [1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda record: record.pop("cases"), "at the whole: 'cases' is a required property"),
        (lambda record: record.update(format=2), "at format: 1 was expected"),
        (lambda record: record["cases"]["doubling"][0].pop("rows"), "at cases/doubling/0: 'rows'"),
        (lambda record: record["bars"][0].update(verdict="fine"), "at bars/0/verdict: 'fine'"),
    ],
)
def test_a_file_of_another_format_is_refused(
    tmp_path: Path, console: Console, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    measured(tmp_path, console, case())
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="damaged or changed"):
        Results.load(file)
    del record["sha256"]
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{re.escape(file.name)}: no figures .*{re.escape(told)}"):
        Results.load(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Results.load(file)


def results_of(*rows: Row, **environment_changes: Any) -> Results:
    here = {**environment(CPU), **environment_changes}
    results = Results("made-up", {"device": "cpu", "rounds": 1, "quick": False}, [here])
    results.add("doubling", {"size": 1}, 1.0, rows)
    return results


def test_figures_can_be_read_where_their_form_cannot_be_checked(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(tmp_path, console, case())
    (file,) = tmp_path.iterdir()
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert len(Results.load(file).points["doubling"]) == 4
    for text, told in (('{"format": 2}', "in format 1: at format"), ("[]", "expected settings by name")):
        file.write_text(text)
        with pytest.raises(ValueError, match=told):
            Results.load(file)


def test_regressions_are_exact_for_counts_and_beyond_noise_for_times() -> None:
    metrics = {"count": Metric(), "seconds": SECONDS, "score": Metric("higher"), "width": Metric(None)}
    cases = [case(metrics=metrics)]

    def row(who: str, count: int, seconds: float, score: float | None, width: int = 1) -> Row:
        times = [seconds, 100 * seconds, seconds]  # the median counts
        return {"contender": who, "count": count, "seconds": times, "score": score, "width": width}

    before = results_of(
        row("same", 5, 1, 0.5), row("worse", 5, 1, 0.5), row("better", 5, 1, 0.5), row("gone", 1, 1, 1)
    )
    after = results_of(
        row("same", 5, 1.1, 0.5, width=9), row("worse", 6, 1.3, None), row("better", 4, 0.5, 0.6)
    )
    found = compare.changes(cases, before, after, threshold=1.15)
    told = [(change.row.rpartition(" ")[2], change.metric, change.worse) for change in found]
    assert told == [
        *(("worse", metric, True) for metric in ("count", "seconds", "score")),
        *(("better", metric, False) for metric in ("count", "seconds", "score")),
    ]
    assert compare.lost(cases, before, after) == ["doubling: size 1, contender gone"]
    shown = compare.table(found)
    assert shown.title == "3 regressions, 3 improvements"
    assert [line[1] for line in shown.lines] == ["score", "seconds", "count"]  # worst first
    assert shown.lines[2] == ("doubling: size 1, contender worse", "count", "5", "6", "1.2")
    assert compare.warnings(before, after) == []
    (warning,) = compare.warnings(before, results_of(gpu="Voodoo 2"))
    assert "voodoo-2" in warning


def test_the_papers_claims_stand_beside_committed_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    table = claims.claims_table()
    assert [line[0] for line in table.lines] == [claim.said for claim in claims.CLAIMS]
    assert all(len(line) == len(table.head) and "{" not in line[2] for line in table.lines)
    made_up = replace(claims.CLAIMS[0], here="{:.3g}", bars=(("viar", "dreams"),))
    monkeypatch.setattr(claims, "CLAIMS", (made_up,))
    with pytest.raises(ValueError, match=r"dreams: no committed figures of 'viar' have a value of this bar"):
        claims.claims_table()


def test_tables_of_the_documentation_are_written_from_figures(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = {"made": SimpleNamespace(CASES=(case(),))}
    text = "before <!-- figures: made/doubling -->\nold\n<!-- end --> between\n"
    text += "<!-- figures: made/bars --><!-- end -->\n<!-- figures: made/bars -->\n<!-- end --> after"
    monkeypatch.setattr("benchmarks.results.COMMITTED", tmp_path)
    with pytest.raises(ValueError, match=r"made/doubling -->: benchmarks/results holds no figures of it"):
        documents.written(text, suites)
    results = measured(tmp_path, console, case())
    results.suite = "made"
    for day, count in (("2001-01-01", 7), ("2002-02-02", 8)):  # the newest counts
        results.environments[0]["date"] = f"{day}T00:00:00"
        results.points["doubling"][0]["rows"][0]["count"] = count
        results.save(tmp_path / results.file_name)
    new = documents.written(text, suites)
    assert new.startswith(
        "before <!-- figures: made/doubling -->\n\n| size | count |\n| --- | ---: |\n| 1 | 8 |\n"
    )
    assert "old" not in new
    assert "<!-- end --> between\n<!-- figures: made/bars --><!-- end -->" in new  # no line for a block
    assert "| largest count | 4 | 4 | pass |  |" in new
    assert documents.written(new, suites) == new
    for wrong, told in (("other/bars", "no such suite"), ("made/other", "no figures of 'other'")):
        with pytest.raises(ValueError, match=told):
            documents.written(f"<!-- figures: {wrong} -->\n<!-- end -->", suites)
    results.options["quick"] = True
    results.save(tmp_path / results.file_name)
    with pytest.raises(ValueError, match=r"_quick_.* is never shown: remove it from"):
        documents.written(text, suites)
    (tmp_path / results.file_name).unlink()
    results.options["quick"] = False
    on_gpu = "<!-- figures: made/{} gpu -->\n<!-- end -->"
    assert documents.written(on_gpu.format("bars"), suites) == on_gpu.format(
        "bars"
    )  # nothing, until there is
    results.environments[0] |= {"gpu": "Voodoo 2"}
    results.save(tmp_path / results.file_name)
    assert "| 1 | 8 |" in documents.written(on_gpu.format("doubling"), suites)
    results.points.clear()
    results.save(tmp_path / results.file_name)
    assert documents.LEFT_OUT in documents.written(on_gpu.format("doubling"), suites)
    with pytest.raises(ValueError, match="no figures of 'other'"):
        documents.written(on_gpu.format("other"), suites)


def test_a_case_is_shown_from_the_newest_file_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = {"made": SimpleNamespace(CASES=(case(), case(name="other")))}
    monkeypatch.setattr("benchmarks.results.COMMITTED", tmp_path)
    for day, name, count, value in (("01", "doubling", 7, 1.0), ("02", "other", 8, math.nan)):
        results = results_of(date=f"2001-01-{day}T00:00:00")
        results.suite, results.points = "made", {}
        results.add(name, {"size": 1}, 1.0, [{"contender": "ours", "count": count, "seconds": [1.0]}])
        results.judge([Bar("largest count", value, 4)])
        results.save(tmp_path / results.file_name)
    wanted = ("doubling", "other", "bars", "source")
    blocks = "".join(f"<!-- figures: made/{what} -->\n<!-- end -->\n" for what in wanted)
    shown = documents.written(blocks, suites)
    assert "| 1 | 7 |" in shown
    assert "| 1 | 8 |" in shown
    assert "| largest count | 1 | 4 | pass |" in shown  # the later file measured nothing of it
    assert "*doubling: measured on " in shown
    assert "*other: measured on " in shown


def test_a_missed_bar_says_by_how_much_and_long_notes_are_cut() -> None:
    found = [Bar("slow", 1.5, 1.0, "word " * 50), Bar("wrong", 2, 0), Bar("unknown", math.nan, 1.0, "why")]
    lines = bars_markdown([bar.record() for bar in found]).splitlines()[2:]
    assert lines[0].startswith("| slow | 1.5 | 1 | missed:\u00a01.5\u00a0x | word word ")
    assert lines[0].endswith(" word ... |")
    assert len(lines[0]) < 180
    assert lines[1:] == ["| wrong | 2 | 0 | FAIL |  |", "| unknown | - | 1 | not measured | why |"]


def test_the_documentation_shows_the_committed_figures() -> None:
    text = documents.PAGE.read_text()
    assert documents.written(text, command.known()) == text, "run `python -m benchmarks docs`"


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*_*.json")), ids=lambda path: path.stem)
def test_committed_figures_can_be_read_and_shown(path: Path) -> None:
    results = Results.load(path)
    assert path.name == results.file_name
    cases = {case.name: case for case in command.known()[results.suite].CASES}
    for name in results.points:
        rows = results.rows(name)
        assert cases[name].table(rows).lines
        assert set(cases[name].metrics) <= {column for row in rows for column in row}
    judged = runner.judged(list(cases.values()), results)
    assert results.bars == [bar.record() for bar in judged]


def test_markdown_cells_cannot_break_the_table() -> None:
    assert (
        markdown_table(Table("t", ("a", "b"), [("x|y", "1")])) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
    )


def test_the_command_measures_draws_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = SimpleNamespace(CASES=(case(), case(name="other")), __doc__="Doubles.\n\nMore.")
    monkeypatch.setattr(command, "SUITES", {"made": suite})
    command.main(["made", "--out", str(tmp_path), "--case", "doubling", "--where", "size=2", "--rounds", "3"])
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    assert f"figures: {file}" in printed.replace("\n", "")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{file.stem}_doubling.png"]
    assert [len(row["seconds"]) for row in Results.load(file).rows("doubling")] == [3] * 4
    command.main(["plot", str(file), "--out", str(tmp_path / "pictures")])
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [f"{file.stem}_doubling.png"]
    capsys.readouterr()
    command.main(["compare", str(file), str(file)])
    assert "0 regressions, 0 improvements" in capsys.readouterr().out
    for wrong, told in (
        (["made", "--where", "size"], "--where: expected SETTING=VALUE"),
        (["made", "--profile"], "--profile: nothing to profile here"),
        (["plot", str(tmp_path / "none.json")], "no such file"),
    ):
        with pytest.raises(SystemExit, match=told):
            command.main(wrong)
    with pytest.raises(SystemExit):
        command.main(["made", "--help"])
    assert re.search(r"cases:\n  doubling  twice the size", capsys.readouterr().out)


def test_a_stopped_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = SimpleNamespace(CASES=(case(grid=product(size=[1, -1], kind=["a"])),), __doc__="Doubles.")
    monkeypatch.setattr(command, "SUITES", {"made": suite})
    with pytest.raises(SystemExit, match=r"stopped; go on with --resume .*made_.*\.json"):
        command.main(["made", "--out", str(tmp_path)])


def test_a_profile_tells_the_cell_from_what_is_outside(tmp_path: Path) -> None:
    x = torch.randn(8)

    def solve() -> None:
        cell = marked(lambda z: torch.sin(z).cos())
        for _ in range(3):
            torch.exp(cell(x))

    shown = profiled(solve, tmp_path / "trace.json")
    found = {line[0]: line for line in shown.lines}
    assert found["the cell"][1] == "3"
    assert found["aten::exp"][1] == "3"
    assert not {"aten::sin", "aten::cos"} & set(found)
    shares = [float(found[name][3].rstrip("%")) for name in ("the cell", "all outside the cell")]
    assert sum(shares) == pytest.approx(100, abs=5)
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"cell", "aten::sin"} <= names


def hold(megabytes: int, before: int) -> Callable[[], object]:
    kept = torch.ones(before * 250_000)
    return lambda: torch.ones(megabytes * 250_000).add_(float(kept[0]))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_resident_memory_is_what_a_computation_adds_at_its_peak() -> None:
    peak = peak_rss(hold, megabytes=64, before=128)
    assert peak == pytest.approx(64e6, rel=0.1)


def broken() -> Callable[[], object]:
    raise RuntimeError("no such model")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        peak_rss(broken)


def test_spread_is_half_the_distance_of_the_quartiles() -> None:
    assert spread([5.0]) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == 1  # quartiles 2 and 4
    assert milliseconds([0.001, 0.002, 0.003, 0.004, 0.1]) == "3.00 ± 1.00"
    assert with_spread([1234.6, 1236.6]) == "1,236 ± 0"
    assert with_spread([0.0123]) == "0.0123"
    assert with_spread([0.0, 0.0]) == "0 ± 0"
    assert milliseconds([]) == "-"


def test_no_case_may_pass_by_nothing() -> None:
    assert none_of("faults", []).verdict == "pass"
    assert none_of("faults", ["one"]).verdict == "FAIL"
    assert Bar("nothing", float("nan"), 1).verdict == "not measured"
    assert Bar("nothing", float("nan"), 1).record()["value"] is None


# Scaling


def test_slopes_are_those_of_power_laws() -> None:
    rows = [{"contender": "a", "batch": n, "seconds": [7.0, n**1.5, 0.0]} for n in (1, 2, 4, 8, 16)]
    assert scaling.slope(rows[2:], "batch", "seconds", "a") == pytest.approx(
        scaling.slope(rows, "batch", "seconds", "a")
    )
    exact = [{"contender": "a", "batch": n, "peak_bytes": 3 * n**2} for n in (8, 1, 2, 4)]
    assert scaling.slope(exact, "batch", "peak_bytes", "a") == pytest.approx(2)
    assert math.isnan(scaling.slope(exact[:1], "batch", "peak_bytes", "a"))


@pytest.mark.parametrize(("name", "expected"), [("width", 1.0), ("batch", 1.0)])
def test_memory_of_a_solve_is_linear_in_the_state(name: str, expected: float) -> None:
    (chosen,) = [case for case in scaling.CASES if case.name == name]
    rows: list[Row] = []
    for value in (32, 64):  # of 16 samples one has an iterate worse than its best, which is kept beside
        settings = {"batch": 4, "width": 4096, "memory": 5, name: 256 * value if name == "width" else value}
        rows += [{**settings, **row} for row in chosen.build(RUN, **settings)]
    rows = json.loads(json.dumps(rows, allow_nan=False))
    for contender in scaling.SOLVERS:
        assert scaling.slope(rows, name, "peak_bytes", contender) == pytest.approx(expected, abs=0.02)
    assert len(chosen.table(rows).lines) == 3


def test_memory_of_anderson_grows_by_two_and_a_half_states_a_column() -> None:
    (chosen,) = [case for case in scaling.CASES if case.name == "memory"]
    states = {}
    for memory in (2, 4, 8):
        for row in chosen.build(RUN, batch=4, width=16384, memory=memory):
            states[row["contender"], memory] = row["peak_bytes"] / (4 * 16384 * 4)
    for few, many in ((2, 4), (4, 8)):
        # Half as many again for the moment in which room is made for the last half.
        assert states["Anderson", many] - states["Anderson", few] == pytest.approx(
            2.5 * (many - few), abs=0.05
        )
        assert states["Picard", many] == pytest.approx(states["Picard", few], abs=0.01)


@pytest.mark.parametrize("width", [60, 100])
def test_a_wide_table_is_shown_in_parts_without_a_broken_word(width: int) -> None:
    head = ("problem and setting", *(f"library number{i}" for i in range(14)))
    lines = [(f"unreasonably-named {i}", *(f"{100 * i} / {j}.25 ± 0.1" for j in range(14))) for i in range(3)]
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.terminal_table(Table("all of them", head, lines), width))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = set(re.split(r"[\s┃│]+", text))
    assert {word for cell in (*head, *lines[0]) for word in cell.split()} <= words
    few = tables.terminal_table(Table("few", head[:3], [line[:3] for line in lines]), width)
    assert len(few.renderables) == 1


def test_a_file_gets_lines_of_100_columns() -> None:
    assert tables.terminal().width == 100
