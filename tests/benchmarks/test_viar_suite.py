from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import viar
from benchmarks.baselines.viar import Baseline, draw, sample_tokens
from benchmarks.case import Case, Row, Run
from benchmarks.measure import profiled
from benchmarks.show import draw as draw_picture
from benchmarks.suites import viar as suite
from benchmarks.suites.viar import (
    app,
    attention,
    cache,
    digits,
    executions,
    fidelity,
    identity,
    knob,
    models,
    paper,
    shards,
    speed,
    tokenizer,
    training,
    trunks,
)
from benchmarks.suites.viar.models import Shape, implicit, random_tokenizer, random_transformer
from viar.data import ImageData, TensorImages
from viar.model.execution import computes_in

CPU = torch.device("cpu")
QUICK = Run(CPU, 1, True)
SMALL = {
    "depth": 6,
    "width": 48,
    "num_heads": 3,
    "sides": (1, 2, 4, 5),
    "codebook_size": 128,
    "code_channels": 8,
    "num_classes": 10,
}


def small_shape(batch: int = 3, iterations: int | tuple[int, int] = (6, 2), **changes: Any) -> Shape:
    config = viar.TransformerConfig(**{**SMALL, "trunk": implicit(2, 1), **changes})
    return Shape.of(config, batch, iterations, real_coder=False)


def verdicts(bars: list[Any]) -> list[str]:
    return [bar.verdict for bar in bars]


def rows_of(case: Case, *points: dict[str, Any], run: Run = QUICK) -> list[Row]:
    """Measured, and as they come back from a file."""
    found = [{**point, **row} for point in points for row in case.build(run, **point)]
    rows = json.loads(json.dumps(found, allow_nan=False))
    table = case.table(rows)
    assert {len(line) for line in table.lines} == {len(table.head)}
    assert all(isinstance(cell, str) for line in table.lines for cell in line)
    for name in case.metrics:
        assert any(name in row for row in rows) or name in OPTIONAL
    return rows


OPTIONAL = {"image_seconds", "left_when_killed", "differing", "deviation"}


# The baseline


def test_golden_numbers_are_met_by_viar_and_by_the_baseline() -> None:
    rows = rows_of(fidelity.CASE, *fidelity.CASE.grid)
    schedules = fidelity.reference().golden_config()["gen_iterations"]
    generated = {"tokens, var.generate", *(f"tokens, viar.generate.{a}.{b}" for a, b in schedules)}
    tokens = {(row["contender"], row["what"]): row["differing"] for row in rows if "differing" in row}
    assert set(tokens) == {
        ("viar", "tokens, encoding"),
        *(("viar", name) for name in generated),
        *(("baseline", name) for name in generated),
    }
    assert set(tokens.values()) == {0}
    deviations = fidelity.deviations(rows)
    assert set(deviations) == {"images", "logits", "gradients"}
    assert all(0 < value < fidelity.LIMIT for value in deviations.values())
    assert verdicts(fidelity.bars(rows)) == ["pass"] * 4


def test_a_single_wrong_golden_token_or_number_breaks_its_bar() -> None:
    rows = [
        {"contender": "viar", "what": "tokens, a", "differing": 0},
        {"contender": "baseline", "what": "tokens, b", "differing": 1},
        {"contender": "viar", "what": "images", "deviation": 3e-4},
        {"contender": "viar", "what": "images", "deviation": 1e-5},
        {"contender": "viar", "what": "logits", "deviation": 1e-4},
    ]
    tokens, images, logits = fidelity.bars(rows)
    assert [tokens.verdict, images.verdict, logits.verdict] == ["FAIL", "FAIL", "pass"]
    assert tokens.note == "baseline: tokens, b"
    assert verdicts(fidelity.bars(rows[2:]))[0] == "not measured"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trunk": viar.ExplicitTrunkConfig()},
        {"shared_modulation": True, "qk_norm": False},
        {"sides": (2, 3, 5)},
    ],
)
def test_the_baseline_takes_the_tokens_that_viar_takes(changes: dict[str, Any]) -> None:
    shape = small_shape(**changes)
    model, tokenizer = random_transformer(shape.transformer, CPU), random_tokenizer(shape.tokenizer, CPU)
    explicit = isinstance(shape.transformer.trunk, viar.ExplicitTrunkConfig)
    iterations, kind = (None, "equilibrium") if explicit else (shape.iterations, "iterate")
    ours = viar.sample_tokens(
        model, tokenizer, shape.labels(CPU), viar.Sampling(iterations=iterations, top_k=1, cache=kind)
    )
    baseline = Baseline.of(model)
    for _ in range(2):  # the second time it must have forgotten the first
        tokens, f_hat = sample_tokens(baseline, tokenizer, shape.labels(CPU), iterations, 1.5, 1, 0.96, None)
        assert torch.cat(tokens, 1).equal(torch.cat(ours.tokens, 1))
        torch.testing.assert_close(f_hat, ours.f_hat)
        assert baseline.cache_bytes == ours.cache_bytes
    assert len(torch.cat(tokens, 1).unique()) > 10


def test_a_baseline_keeps_its_weights_when_the_model_changes() -> None:
    shape = small_shape()
    model, tokenizer = random_transformer(shape.transformer, CPU), random_tokenizer(shape.tokenizer, CPU)
    baseline = Baseline.of(model)
    settings = (shape.labels(CPU), 2, 1.5, 1, 0.0, None)
    before = sample_tokens(baseline, tokenizer, *settings)[1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert sample_tokens(baseline, tokenizer, *settings)[1].equal(before)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, 0.0, 4), (2, 0.0, 2), (0, 0.75, 3), (0, 0.65, 2), (2, 0.5, 1), (9, 1e-6, 1)],
)
def test_the_baseline_draws_from_the_top_k_and_top_p_tokens(top_k: int, top_p: float, kept: int) -> None:
    probability = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probability.log().expand(2, 2000, 4)
    tokens = draw(logits, top_k, top_p, torch.Generator().manual_seed(0))
    assert tokens.shape == (2, 2000)
    assert tokens.equal(draw(logits, top_k, top_p, torch.Generator().manual_seed(0)))
    share = tokens.flatten().bincount(minlength=4) / tokens.numel()
    likely = probability.topk(kept).indices
    expected = torch.zeros(4).index_put((likely,), probability[likely] / probability[likely].sum())
    assert share.gt(0).equal(expected > 0)
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)


# What is measured


@pytest.mark.parametrize("trunk", [implicit(1, 2), viar.ExplicitTrunkConfig()])
def test_a_random_model_is_a_usual_one_with_other_weights(trunk: Any) -> None:
    config = viar.TransformerConfig(**{**SMALL, "trunk": trunk})
    model, usual = random_transformer(config, CPU), viar.NextScaleTransformer(config).eval()
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    usual.load_state_dict(model.state_dict())
    inputs = torch.randn(2, sum(s * s for s in SMALL["sides"]) - 1, 8)
    with torch.no_grad():
        logits = model(torch.tensor([1, 2]), inputs)
        assert logits.equal(usual(torch.tensor([1, 2]), inputs))
        assert not logits.allclose(model(torch.tensor([1, 3]), inputs), atol=1e-2)
    again = random_transformer(config, CPU).state_dict()
    assert all(tensor.equal(again[name]) for name, tensor in model.state_dict().items())


def test_cache_bytes_are_those_of_the_full_width() -> None:
    small = {"depth": 4, "num_explicit": (1, 1), "sides": [1, 2]}
    rows = rows_of(cache.CASE, {**small, "iterations": 1}, {**small, "iterations": 3})
    token = 2 * 2 * 64 * 4 * 4  # with class and without, keys and values, width, float32
    found = {(row["iterations"], row["contender"]): row["cache_bytes"] for row in rows}
    assert found[1, "VAR"] == found[3, "VAR"] == 4 * 5 * token
    assert found[1, "equilibrium"] == found[3, "equilibrium"] == 3 * 5 * token
    assert found[1, "iterate"] == 3 * 5 * token
    assert found[3, "iterate"] == 5 * 5 * token
    config = viar.TransformerConfig(**{**SMALL, "depth": 4, "width": 256, "num_heads": 4, "sides": (1, 2)})
    tokenizer = random_tokenizer(Shape.of(config, 1, 1, real_coder=False).tokenizer, CPU)
    full = viar.sample_tokens(random_transformer(config, CPU), tokenizer, [0])
    assert full.cache_bytes == found[1, "VAR"]
    (bar,) = cache.bars(rows)
    assert (bar.value, bar.verdict) == (0.75, "FAIL")
    assert "3: 1.25" in bar.note


def test_the_published_shape_needs_37_percent_of_the_cache() -> None:
    rows = rows_of(cache.CASE, {"depth": 30, "iterations": 2}, {"depth": 30, "iterations": 20})
    assert rows[0]["cache_bytes"] == 2 * 2 * 30 * 680 * 1920 * 4
    assert cache.shares(rows, "iterate") == {2: pytest.approx(12 / 30), 20: 1}
    (bar,) = cache.bars(rows)
    assert bar.value == pytest.approx(11 / 30)
    assert bar.verdict == "pass"


def test_every_contender_of_speed_runs_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[tuple[int, dict[str, Any]]] = []

    def prepare(model: Any, tokenizer: Any, **settings: Any) -> None:
        prepared.append((id(model), settings))

    monkeypatch.setattr(viar, "prepare_inference", prepare)
    monkeypatch.setattr(speed, "computes_in", lambda dtype, device: True)
    uncompiled = {speed.BASELINE, speed.OURS, speed.HALF_BASELINE, speed.HALF_OURS}
    assert set(speed.contenders(small_shape(), CPU, compiled=True)) == uncompiled | set(speed.PREPARED)
    assert [settings for _, settings in prepared] == list(speed.PREPARED.values())
    assert len({model for model, _ in prepared}) == len(prepared)
    prepared.clear()
    assert set(speed.contenders(small_shape(), CPU, compiled=False)) == uncompiled
    monkeypatch.setattr(speed, "computes_in", lambda dtype, device: False)
    assert speed.HALF_BASELINE not in speed.contenders(small_shape(), CPU, compiled=False)
    assert [settings for _, settings in prepared] == [{"dtype": torch.bfloat16}] * 2  # once a call


def test_speed_times_tokens_and_with_decode_images() -> None:
    points = [{"batch": 2, "decode": decode, "compile": False} for decode in (False, True)]
    rows = rows_of(speed.CASE, *points, run=Run(CPU, 2, True))
    assert {speed.BASELINE, speed.OURS, speed.HALF_OURS} <= {row["contender"] for row in rows}
    assert {("image_seconds" in row) == row["decode"] for row in rows} == {True}
    for row in rows:
        assert len(row["seconds"]) == 2
        for tokens, whole in zip(row["seconds"], row.get("image_seconds", row["seconds"]), strict=True):
            assert whole > tokens or not row["decode"]
    assert verdicts(speed.bars(rows)) == ["not measured"] * 2  # batch 8 is judged
    assert list(speed.build(QUICK, 2, False, compile=True)) == []  # no GPU


def test_the_profiled_solve_marks_every_evaluation_of_the_implicit_block() -> None:
    solve = speed.profiled(QUICK, 2, False, False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        solve()
    num_scales = len(models.QUICK["sides"])
    assert sum(event.name == "cell" for event in profiler.events()) == speed.ITERATIONS * num_scales


def test_the_bars_of_speed_are_medians_of_ratios_within_a_round() -> None:
    point = {"batch": 8, "decode": False, "compile": False}

    def judged(ours: list[float], half: list[float]) -> list[Any]:
        times = {speed.BASELINE: [10.0, 20.0, 40.0], speed.OURS: ours, speed.HALF_OURS: half}
        rows = [{**point, "contender": name, "seconds": found} for name, found in times.items()]
        others = [{**row, "batch": 1, "seconds": [1.0, 1.0, 1.0]} for row in rows]
        return speed.bars([*others, *({**row, "compile": True} for row in others), *rows])

    single, half = judged([10.0, 10.0, 30.0], [5.0, 7.0, 10.0])
    assert single.value == pytest.approx(0.75)
    assert half.value == pytest.approx(0.35)
    assert verdicts([single, half]) == ["pass", "pass"]
    assert single.limit == pytest.approx(1 / 1.3)
    assert half.limit == pytest.approx(0.4)
    # 1.25 times as fast, and twice
    assert verdicts(judged([8.0, 16.0, 10.0], [5.0, 10.0, 10.0])) == ["FAIL", "FAIL"]


def test_trunks_compares_models_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(viar, "prepare_inference", lambda *_, dtype: prepared.append(dtype))
    config = viar.TransformerConfig(**{**SMALL, "depth": 12, "trunk": implicit(2, 2)})
    shape = Shape.of(config, 2, (10, 2), real_coder=False)
    rows = {row["contender"]: row for row in trunks.measured(shape, QUICK, torch.float32, decode=False)}
    assert list(rows) == ["VAR", "VIAR", "VAR, baseline", "VIAR, baseline"]
    for name in ("VAR", "VIAR"):
        assert rows[f"{name}, baseline"]["parameters"] == pytest.approx(rows[name]["parameters"], rel=0.01)
    found = [rows["VAR"], rows["VIAR"]]
    assert prepared == []
    assert rows["VAR"]["parameters"] > 1.8 * rows["VIAR"]["parameters"]
    for row in found:
        assert row["images"] == 2
        assert len(row["seconds"]) == 1
        held = row["peak_bytes"] - row["weight_bytes"]
        tokens = sum(side * side for side in SMALL["sides"])
        cached = 2 * 2 * 2 * (12 if row["contender"] == "VAR" else 5) * tokens * 48 * 4
        assert held > cached  # the cache, and what the last scale takes
        assert row["weight_bytes"] > 4 * row["parameters"]
    assert rows["VIAR"]["peak_bytes"] < rows["VAR"]["peak_bytes"]
    list(trunks.measured(shape, Run(CPU, 0, True), torch.bfloat16, decode=False))
    assert prepared == [torch.bfloat16] * 2


def test_trunks_leaves_what_is_for_a_gpu_to_a_gpu() -> None:
    on_cpu = {**trunks.ON_CPU, "depth": 11}
    full = Run(CPU, 1, False)
    assert list(trunks.build(full, **trunks.ON_GPU)) == []
    assert list(training.build(full, **training.CASE.grid[0])) == []
    assert list(executions.build(full, **executions.CASE.grid[0])) == []
    rows = rows_of(trunks.CASE, on_cpu, {**on_cpu, "decode": True}, {**trunks.ON_GPU, "depth": 11})
    rows = [row for row in rows if "baseline" not in row["contender"]]
    assert [(row["contender"], row["batch"], row["decode"]) for row in rows] == [
        *(("VAR", 1, False), ("VIAR", 1, False)),
        *(("VAR", 1, True), ("VIAR", 1, True)),
    ]


def test_the_bars_of_trunks_are_time_peak_and_on_a_gpu_the_peak_itself() -> None:
    figures = {
        "VAR": {"seconds": [8.0, 9.0], "peak_bytes": 10_000_000_000},
        "VIAR": {"seconds": [3.0, 4.0], "peak_bytes": 4_600_000_000},
    }
    rows = [{**trunks.ON_CPU, "contender": name, **figure} for name, figure in figures.items()]
    others = [{**row, "depth": 16, "seconds": [1.0, 1.0]} for row in rows]
    time, share, absolute = trunks.bars([*others, *rows])
    assert time.value == pytest.approx((3 / 8 + 4 / 9) / 2)
    assert share.value == pytest.approx(0.46)
    assert verdicts([time, share, absolute]) == ["pass", "FAIL", "not measured"]
    on_gpu = [{**row, **trunks.ON_GPU, "seconds": [1.0, 1.0]} for row in rows]
    time, _, absolute = trunks.bars([*rows, *on_gpu])
    assert time.value == 1  # a GPU's point counts where there is one
    assert absolute.value == pytest.approx(4.6)
    assert absolute.verdict == "pass"
    assert verdicts(trunks.bars(others)) == ["not measured"] * 3
    plain = [{**row, "contender": row["contender"] + ", baseline", "seconds": [1.6, 1.6]} for row in on_gpu]
    assert trunks.bars([*on_gpu, *plain])[-1].value == pytest.approx(1 / 1.6)
    assert verdicts(trunks.bars([*on_gpu, *plain]))[-1] == "pass"


def test_the_profile_of_a_generation_tells_the_cell(tmp_path: Path) -> None:
    settings = {**trunks.ON_CPU, "depth": 4, "dtype": "bfloat16", "decode": True}
    shown = {
        line[0]: line for line in profiled(trunks.profiled(QUICK, **settings), tmp_path / "t.json.gz").lines
    }
    assert shown["the cell"][1] == str(10 + 6 + 2)  # 10 to 2 over three scales
    with gzip.open(tmp_path / "t.json.gz") as file:
        assert "cell" in {event.get("name") for event in json.load(file)["traceEvents"]}


def test_executions_of_a_generation_are_beside_eager_and_one_that_raises_loses_itself_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def prepare(model: Any, tokenizer: Any, **settings: Any) -> None:
        asked.append(settings)
        if settings.get("graphs"):
            raise RuntimeError("cannot be captured")

    monkeypatch.setattr(viar, "prepare_inference", prepare)
    rows = rows_of(executions.CASE, *executions.CASE.quick)
    assert [(row["execution"], row["contender"]) for row in rows] == [
        *(("graphs", "eager"), ("graphs", "graphs"), ("compile", "eager"), ("compile", "compile"))
    ]
    assert [row["error"] for row in rows] == [None, "RuntimeError: cannot be captured", None, None]
    assert [len(row["seconds"]) for row in rows] == [1, 0, 1, 1]
    half = {"dtype": torch.bfloat16}
    assert asked == [half, {**half, "graphs": True}, half, {**half, "compile": "eager"}]


def test_graphs_that_were_not_captured_have_no_figures_and_no_line() -> None:
    rows = rows_of(executions.CASE, executions.CASE.quick[0])
    assert [(row["contender"], len(row["seconds"])) for row in rows] == [("eager", 1), ("graphs", 0)]
    assert rows[1]["error"] == executions.NOT_CAPTURED
    assert [line[1] for line in executions.CASE.table(rows).lines] == ["eager, beside graphs"]


def test_the_bar_of_executions_is_the_latency_with_graphs() -> None:
    point = {**executions.JUDGED, "iterations": [10, 2], "images": 1}
    rows = [
        {**point, "contender": name, "seconds": seconds, "peak_bytes": 1, "pool_bytes": None}
        for name, seconds in (("eager", [3.0, 4.0]), ("graphs", [1.0, 1.0]))
    ]
    (bar,) = executions.bars(rows)
    assert bar.value == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert verdicts(executions.bars([{**rows[0]}, {**rows[1], "seconds": []}])) == ["not measured"]
    assert verdicts(executions.bars([{**row, "batch": 25} for row in rows])) == ["not measured"]


def test_memory_of_a_training_step_grows_with_iterations_on_the_tape_alone() -> None:
    settings = {"model": "VIAR", "depth": 4, "batch": 2}
    counts = ((0, 1), (7, 1), (0, 7))
    rows = rows_of(
        training.CASE, *({**settings, "no_grad": no_grad, "grad": grad} for no_grad, grad in counts)
    )
    beside = [row["peak_bytes"] - row["state_bytes"] for row in rows]
    assert beside[1] == pytest.approx(beside[0], rel=0.02)
    assert beside[2] > 1.2 * beside[0]
    (bar,) = training.bars(rows)
    assert bar.value == pytest.approx(1, abs=0.02)
    assert bar.verdict == "pass"
    assert verdicts(training.bars([{**rows[0]}, {**rows[1], "peak_bytes": 2 * rows[0]["peak_bytes"]}])) == [
        "FAIL"
    ]
    assert verdicts(training.bars(rows[:1])) == ["not measured"]


def test_the_bar_of_shards_is_the_folder_that_gains_least() -> None:
    rows = [
        {
            "contender": name,
            "images_of": where,
            "ladder": "21 tokens",
            "model": model,
            "batch": 64,
            "seconds": [time],
        }
        for where, model, times in (
            ("a folder", "VAR", (1.0, 0.7)),
            ("a folder", "VIAR", (3.0, 1.5)),
            ("in memory", "VIAR", (1.0, 0.9)),
        )
        for name, time in zip(("images", "shards"), times, strict=True)
    ]
    (bar,) = shards.bars(rows)
    assert (bar.value, bar.verdict, bar.note) == (0.7, "FAIL", "a folder, 21 tokens, VAR")
    rows[1]["seconds"] = [0.6]
    assert verdicts(shards.bars(rows)) == ["pass"]


def test_attention_compares_the_same_numbers_and_leaves_bfloat16_to_a_gpu() -> None:
    point = attention.CASE.quick[0]
    for what in ("attention", "VAR", "VIAR"):
        rows = rows_of(attention.CASE, {**point, "what": what})
        assert [(row["contender"], row["groups"]) for row in rows] == [("masked", 1), ("by scales", 2)]
        assert rows[0]["deviation"] == 0
        assert rows[1]["deviation"] < 1e-3
    assert list(attention.build(QUICK, **{**point, "dtype": "bfloat16"})) == []


def test_the_bars_of_attention_judge_time_where_there_are_groups() -> None:
    def rows(what: str, groups: int, seconds: float) -> list[Any]:
        same = {**attention.CASE.quick[0], "what": what, "deviation": 0.0}
        masked = {**same, "contender": "masked", "groups": 1, "seconds": [2.0], "peak_bytes": 8}
        ours = {"contender": "by scales", "groups": groups, "seconds": [seconds], "peak_bytes": 6}
        return [masked, {**same, **ours}]

    several = [*rows("attention", 3, 1.5), *rows("VAR", 2, 2.1), *rows("VIAR", 1, 3.0)]
    assert [bar.value for bar in attention.bars(several)] == [0.75, 1.05, 0.75, 0.0]
    assert verdicts(attention.bars(several)) == ["pass", "FAIL", "pass", "pass"]


# Trained models


def test_digits_are_trained_only_where_there_are_no_trained_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path] = []
    made = models.digits_folder(QUICK)

    def train(folder: Path) -> None:
        asked.append(folder)
        for part in made.iterdir():
            (folder / part.name).parent.mkdir(exist_ok=True)
            (folder / part.name).symlink_to(part)

    monkeypatch.setattr(models, "train_digits", train)
    monkeypatch.setattr(models, "DIGITS", tmp_path / "digits")
    full = Run(CPU, 1, False)
    found = models.trained_digits(full)
    assert asked == [tmp_path / "digits"]
    assert models.trained_digits(full) is found  # for every point the same
    assert len(asked) == 1
    assert not found.viar.training
    (tmp_path / "digits" / "classifier").unlink()
    monkeypatch.setattr(models, "train_digits", asked.append)
    models.digits_folder(full)
    assert len(asked) == 2


def test_what_is_trained_of_digits_is_read_and_not_trained_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for recipes in (models.TOKENIZERS, models.TRANSFORMERS):
        for name in ("digits", "digits-viar", "digits-var"):
            if name in recipes:
                recipe = recipes[name]
                short = dataclasses.replace(recipe.train, steps=2, batch_size=8)
                monkeypatch.setitem(recipes, name, dataclasses.replace(recipe, train=short, augment=0))
    train = models.train_classifier
    monkeypatch.setattr(models, "train_classifier", lambda *a, **k: train(*a, **k, steps=2))
    models.train_digits(tmp_path)
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors")}
    assert {path.parent.name for path in weights} == {"tokenizer", "viar", "var"}
    models.train_digits(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    monkeypatch.setattr(models, "DIGITS", tmp_path)
    assert models.trained_digits(Run(CPU, 1, False)).data.num_classes == 10


def test_the_caches_agree_exactly_at_one_iteration_and_not_at_two(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [{"iterations": n, "per_class": 2} for n in (1, 2)]
    rows = one, two = rows_of(digits.CASE, *points)
    assert one["images"] == 20
    assert one["differing"] == 0
    assert one["equilibrium"] == one["iterate"]
    assert two["differing"] > 0.2  # far from the fixed point with random weights
    monkeypatch.setattr(models, "AT_ONCE", 7)
    assert rows_of(digits.CASE, *points) == rows


def test_the_bars_of_digits_judge_three_iterations_and_more() -> None:
    rows = [
        {"iterations": 2, "differing": 0.9, "equilibrium": 0.1, "iterate": 0.9},
        {"iterations": 3, "differing": 0.05, "equilibrium": 0.98, "iterate": 0.97},
        {"iterations": 4, "differing": 0.01, "equilibrium": 0.98, "iterate": 0.985},
    ]
    images, classes = digits.bars(rows)
    assert images.value == 0.05
    assert classes.value == pytest.approx(0.01)
    assert verdicts([images]) == ["pass"]
    rows[2] = {"iterations": 4, "differing": 0.06, "equilibrium": 0.97, "iterate": 0.99}
    assert verdicts(digits.bars(rows)) == ["FAIL", "FAIL"]
    assert verdicts(digits.bars(rows[:1])) == ["not measured"] * 2


def test_images_are_compared_as_a_png_holds_them() -> None:
    pixels = torch.tensor([0.0, 0.001, 0.003, 1.0])
    assert digits.eight_bit(pixels).tolist() == [0, 0, 1, 255]


def test_tokenizers_with_patches_and_without_see_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = TensorImages(torch.rand(12, 3, 32, 32) * 2 - 1, torch.arange(12) % 10)
    monkeypatch.setattr(tokenizer, "load_data", lambda *_: ImageData(pictures, pictures, 10))
    rows = rows_of(tokenizer.CASE, *tokenizer.CASE.quick)
    assert [row["contender"] for row in rows] == list(tokenizer.CONTENDERS)
    assert [row["trained_steps"] for row in rows] == [2, 5]
    configs = [dataclasses.replace(tokenizer.RECIPE.model, **c) for c in tokenizer.CONTENDERS.values()]
    assert {config.image_side for config in configs} == {32}
    assert configs[1] == tokenizer.RECIPE.model


def test_a_patch_is_judged_by_its_steps_and_by_what_it_loses() -> None:
    def judged(seconds: float, psnr: float) -> list[str]:
        rows = [
            {"contender": "patch 1", "steps": 9, "seconds": [2.0, 1.0], "psnr": 20.0},
            {"contender": "patch 2", "steps": 9, "seconds": [2 * seconds, seconds], "psnr": psnr},
            {"contender": "patch 1", "steps": 2, "seconds": [1.0], "psnr": 30.0},
            {"contender": "patch 2", "steps": 2, "seconds": [1.0], "psnr": 10.0},
        ]
        return verdicts(tokenizer.bars([{**row, "trained_steps": 1} for row in rows]))

    assert judged(0.4, 20.0) == ["pass", "pass"]
    assert judged(0.41, 19.9) == ["FAIL", "FAIL"]
    assert verdicts(tokenizer.bars([])) == ["not measured"] * 2


def test_the_knob_counts_evaluations_of_the_implicit_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(knob.ADAPTIVE, "capped", viar.Adaptive(rtol=1e-12, max_steps=4))
    monkeypatch.setattr(models, "AT_ONCE", 7)
    usual = {"cache": "equilibrium", "dtype": "float32", "batch": 3, "per_class": 1}
    points = [{**usual, "iterations": iterations} for iterations in (3, [5, 1], "capped")]
    points.append({**usual, "iterations": 3, "cache": "iterate", "dtype": "bfloat16"})
    rows = rows_of(knob.CASE, *points)
    ours, var = ([row for row in rows if row["contender"] == name] for name in ("VIAR", "VAR"))
    assert [row["evaluations"] for row in ours[:2]] == [9, 9]
    assert 3 * 4 < ours[2]["evaluations"] <= 3 * 6
    assert ours[3]["evaluations"] == 9
    assert {row["evaluations"] for row in var} == {0}
    full, native = 2 * 2 * 8 * 21 * 64 * 4, computes_in(torch.bfloat16, CPU)
    assert [row["cache_bytes"] for row in var] == [full, full, full, full // 2 if native else full]
    shares = [row["cache_bytes"] / of_var["cache_bytes"] for row, of_var in zip(ours, var, strict=True)]
    assert shares == [3 / 8, 3 / 8, 3 / 8, 5 / 8]
    for row in rows:
        assert len(row["seconds"]) == 1
        assert 0 <= row["class_consistency"] <= 1
        assert row["frechet"] >= 0


def test_quality_does_not_depend_on_how_many_images_are_made_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = {"iterations": 2, "cache": "equilibrium", "dtype": "float32", "batch": 1, "per_class": 2}
    quality = []
    for at_once in (20, 7):
        monkeypatch.setattr(models, "AT_ONCE", at_once)
        quality.append([row["frechet"] for row in rows_of(knob.CASE, point)])
    assert quality[0] == pytest.approx(quality[1], rel=1e-4)


# The papers


def test_our_sizes_are_the_published_ones() -> None:
    rows = rows_of(paper.CASE, *paper.CASE.grid)
    counted = {row["contender"]: row for row in rows if "our_parameters" in row}
    assert set(counted) == {"tokenizer", "VAR-d16", "VAR-d30", "VIAR"}
    assert all(row["our_parameters"] == row["parameters"] for row in counted.values())
    assert {row["contender"]: row["fid"] for row in rows if row.get("iterations") == 10} == {
        "VIAR, cfg 2.0": 2.35,
        "VIAR, cfg 1.5": 2.16,
    }
    assert all(row["source"] for row in rows)
    (fastest,) = (row for row in rows if row["contender"] == "VIAR, fastest")
    assert fastest["speed_share"] == pytest.approx(2.116, abs=1e-3)
    assert fastest["memory_share"] == pytest.approx(0.4433, abs=1e-4)


@pytest.mark.parametrize("iterations", [1, 4, [6, 2]])
def test_shares_of_the_cache_without_weights_are_those_of_generations(iterations: Any) -> None:
    shape = small_shape()
    tokenizer = random_tokenizer(shape.tokenizer, CPU)
    var = random_transformer(viar.TransformerConfig(**SMALL), CPU)
    ours = random_transformer(shape.transformer, CPU)
    whole = viar.sample_tokens(var, tokenizer, [0]).cache_bytes
    schedule = tuple(iterations) if isinstance(iterations, list) else iterations
    for kind in ("equilibrium", "iterate"):
        sample = viar.sample_tokens(ours, tokenizer, [0], viar.Sampling(iterations=schedule, cache=kind))
        assert paper.cache_share(ours, iterations, kind) == pytest.approx(sample.cache_bytes / whole)


# The series

WRITER = """
import os, sys, time
from pathlib import Path
num, batch, out, fault = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
resumed = out.exists()
out.mkdir(parents=True, exist_ok=True)
for i in range(num)[rank::world]:
    path = out / f"{i:06d}.png"
    if path.exists():
        continue
    wrong = {"batch": batch == "1", "processes": world > 1, "resumed": resumed and world == 1}
    text = f"image {i}" + " wrong" * (i == 30 and wrong.get(fault, False))
    if not (fault == "lost" and world > 1 and i == 30):
        part = path.with_suffix(f".{rank}")
        part.write_text(text)
        part.replace(path)  # whole, whenever it gets killed
    time.sleep(0.02 * (batch == "7"))  # one of its like gets killed
"""


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("none", None),
        ("batch", "batches of 1"),
        ("processes", "two processes"),
        ("resumed", "killed and started again"),
        ("lost", "two processes"),
    ],
)
def test_a_writer_with_a_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, where: str | None
) -> None:
    def command(models: Path, num: int, batch: int, out: Path) -> list[str]:
        return [sys.executable, "-S", "-c", WRITER, str(num), str(batch), str(out), fault]

    monkeypatch.setattr(identity, "series_command", command)
    monkeypatch.setattr(identity, "digits_folder", lambda run: tmp_path)
    rows = rows_of(identity.CASE, *({"way": way, "images": 40} for way in identity.WAYS))
    assert {row["way"] for row in rows if row["differing"]} == ({where} if where else set())
    found = {row["way"]: row for row in rows}
    assert found["two processes"]["missing"] == (fault == "lost")
    assert 10 <= found["killed and started again"]["left_when_killed"] < 40
    assert verdicts(identity.bars(rows)) == ["FAIL" if where else "pass", "pass"]


def test_a_command_that_fails_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = [sys.executable, "-S", "-c", "raise SystemExit('no such model')"]
    monkeypatch.setattr(identity, "series_command", lambda *_: failing)
    with pytest.raises(RuntimeError, match="no such model"):
        identity.make_series(tmp_path, 3, 2, 2, tmp_path / "series")


def test_a_kill_that_came_too_late_is_no_success() -> None:
    rows = [
        {"way": "a", "images": 10, "missing": 0, "differing": 0},
        {"way": "b", "images": 10, "missing": 0, "differing": 0, "left_when_killed": 10},
    ]
    assert verdicts(identity.bars(rows)) == ["pass", "FAIL"]


def test_the_series_is_made_by_the_command_line(tmp_path: Path) -> None:
    identity.make_series(models.digits_folder(QUICK), 3, 2, 1, tmp_path / "series")
    assert list(identity.pictures(tmp_path / "series")) == ["000000.png", "000001.png", "000002.png"]


# The suite


def test_the_points_of_every_grid_are_json() -> None:
    for case in suite.CASES:  # or a resumed run would not know them
        for grid in (case.grid, case.quick):
            assert json.loads(json.dumps(grid)) == list(grid)


@pytest.mark.parametrize(
    "case",
    # The one has no picture, the other needs a browser.
    [case for case in suite.CASES if case not in (identity.CASE, app.CASE)],
    ids=lambda case: case.name,
)
def test_every_picture_can_be_drawn_of_quick_rows(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(viar, "prepare_inference", lambda *_, **__: None)
    rows = rows_of(case, *(case.quick if case in (fidelity.CASE, paper.CASE) else case.quick[:2]))
    bars = case.bars(rows)
    assert len({bar.name for bar in bars}) == len(bars)
    draw_picture(case, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


# The web page


def test_the_page_meets_its_bars_by_medians_and_says_what_is_missing_where_it_was_not_measured() -> None:
    rows = [
        {"contender": "first load", "seconds": [1.0, 2.5, 1.5]},
        {"contender": "slider to picture", "seconds": [0.1, 0.2, 0.4, 0.3]},
    ]
    assert [(bar.value, bar.verdict) for bar in app.bars(rows)] == [
        (0.25, "pass"),
        (1.5, "pass"),
    ]
    assert app.table(rows).lines == [
        ("slider to picture", "4", "250", "385"),
        ("first load", "3", "1500", "2400"),
    ]
    assert app.table([]).lines == []
    assert {(bar.verdict, bar.note) for bar in app.bars([])} == {
        ("not measured", "needs gradio, playwright and chromium")
    }
