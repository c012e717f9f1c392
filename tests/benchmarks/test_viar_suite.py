from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import viar
from benchmarks.__main__ import main
from benchmarks.baselines.viar import Baseline, draw, sample_tokens
from benchmarks.suites.viar import cache, depth30, digits, fidelity, identity, inpainting, knob, models, speed
from benchmarks.suites.viar.models import Case, Trained, implicit, random_tokenizer, random_transformer
from viar.demo import DemoConfig
from viar.evaluate import Classifier
from viar.presets import TOKENIZERS, TRANSFORMERS

CPU = torch.device("cpu")
SMALL = {
    "depth": 6,
    "width": 48,
    "num_heads": 3,
    "sides": (1, 2, 4, 5),
    "codebook_size": 128,
    "code_channels": 8,
    "num_classes": 10,
}


def small_case(batch: int = 3, iterations: int | tuple[int, int] = (6, 2), **changes: Any) -> Case:
    config = viar.TransformerConfig(**{**SMALL, "trunk": implicit(2, 1), **changes})
    return Case.of(config, batch, iterations, real_coder=False)


def verdicts(bars: list[Any]) -> list[str]:
    return [bar.verdict for bar in bars]


# The baseline


def test_golden_numbers_are_met_by_viar_and_by_the_baseline() -> None:
    row = fidelity.measure(CPU)
    cases = fidelity.reference().golden_config()["gen_iterations"]
    wanted = {"var.generate", "encoding", *(f"viar.generate.{a}.{b}" for a, b in cases)}
    assert set(row["tokens"]) == wanted | {f"{name}, baseline" for name in wanted - {"encoding"}}
    assert set(row["tokens"].values()) == {0}
    assert all(0 < value < fidelity.LIMIT for value in row["deviations"].values())
    assert set(verdicts(fidelity.bars(row))) == {"pass"}
    fidelity.table(row)


def test_a_single_wrong_golden_token_or_number_breaks_its_bar() -> None:
    row = {"tokens": {"a": 0.0, "b": 1.0}, "deviations": {"images": 3e-4, "logits": 1e-4}}
    tokens, images, logits = fidelity.bars(row)
    assert [tokens.verdict, images.verdict, logits.verdict] == ["FAIL", "FAIL", "pass"]
    assert tokens.note == "b"


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
    case = small_case(**changes)
    model, tokenizer = random_transformer(case.transformer, CPU), random_tokenizer(case.tokenizer, CPU)
    explicit = isinstance(case.transformer.trunk, viar.ExplicitTrunkConfig)
    iterations, kind = (None, "equilibrium") if explicit else (case.iterations, "iterate")
    ours = viar.sample_tokens(model, tokenizer, case.labels(CPU), iterations=iterations, top_k=1, cache=kind)
    baseline = Baseline.of(model)
    for _ in range(2):  # the second time it must have forgotten the first
        tokens, f_hat = sample_tokens(baseline, tokenizer, case.labels(CPU), iterations, 1.5, 1, 0.96, None)
        assert torch.cat(tokens, 1).equal(torch.cat(ours.tokens, 1))
        torch.testing.assert_close(f_hat, ours.f_hat)
        assert baseline.cache_bytes == ours.cache_bytes
    assert len(torch.cat(tokens, 1).unique()) > 10


def test_a_baseline_keeps_its_weights_when_the_model_changes() -> None:
    case = small_case()
    model, tokenizer = random_transformer(case.transformer, CPU), random_tokenizer(case.tokenizer, CPU)
    baseline = Baseline.of(model)
    settings = (case.labels(CPU), 2, 1.5, 1, 0.0, None)
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
    row = cache.measure(CPU, depth=4, num_explicit=(1, 1), sides=(1, 2), counts=(1, 3))
    token = 2 * 2 * 64 * 4 * 4  # with class and without, keys and values, width, float32
    assert row["var"] == 4 * 5 * token
    assert row["equilibrium"] == {1: 3 * 5 * token, 3: 3 * 5 * token}
    assert row["iterate"] == {1: 3 * 5 * token, 3: 5 * 5 * token}
    config = viar.TransformerConfig(**{**SMALL, "depth": 4, "width": 256, "num_heads": 4, "sides": (1, 2)})
    tokenizer = random_tokenizer(Case.of(config, 1, 1, real_coder=False).tokenizer, CPU)
    full = viar.sample_tokens(random_transformer(config, CPU), tokenizer, [0])
    assert full.cache_bytes == row["var"]
    (bar,) = cache.bars(row)
    assert (bar.value, bar.verdict) == (0.75, "FAIL")
    assert "3: 1.25" in bar.note
    cache.table(row)
    json.dumps(cache.record(row), allow_nan=False)


def test_the_published_shape_needs_37_percent_of_the_cache() -> None:
    row = cache.measure(CPU, counts=(2, 20))
    assert row["var"] == 2 * 2 * 30 * 680 * 1920 * 4
    assert row["iterate"][20] == row["var"]
    (bar,) = cache.bars(row)
    assert bar.value == pytest.approx(11 / 30)
    assert bar.verdict == "pass"


def test_every_contender_of_speed_runs_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[tuple[int, dict[str, Any]]] = []

    def prepare(model: Any, tokenizer: Any, **settings: Any) -> None:
        prepared.append((id(model), settings))

    monkeypatch.setattr(viar, "prepare_inference", prepare)
    monkeypatch.setattr(speed, "computes_in", lambda dtype, device: True)
    rows = speed.measure(small_case(batch=2), 2, CPU, decode=True)
    uncompiled = {speed.BASELINE, speed.OURS, speed.HALF_BASELINE, speed.HALF_OURS}
    assert set(rows) == uncompiled | set(speed.PREPARED)
    assert [settings for _, settings in prepared] == list(speed.PREPARED.values())
    assert len({model for model, _ in prepared}) == len(prepared)
    for row in rows.values():
        assert all(whole > tokens for tokens, whole in zip(row["tokens"], row["with images"], strict=True))
        assert len(row["tokens"]) == 2
    prepared.clear()
    assert set(speed.contenders(small_case(), CPU, compiled=False)) == uncompiled
    monkeypatch.setattr(speed, "computes_in", lambda dtype, device: False)
    assert speed.HALF_BASELINE not in speed.contenders(small_case(), CPU, compiled=False)
    assert [settings for _, settings in prepared] == [{"dtype": torch.bfloat16}] * 2  # once a call
    speed.table(rows)
    json.dumps(speed.record(rows), allow_nan=False)


def test_the_bars_of_speed_are_medians_of_ratios_within_a_round() -> None:
    rows = {
        speed.BASELINE: {"tokens": [10.0, 20.0, 40.0]},
        speed.OURS: {"tokens": [10.0, 10.0, 30.0]},
        speed.HALF_OURS: {"tokens": [5.0, 7.0, 10.0]},
    }
    single, half = speed.bars(rows)
    assert single.value == pytest.approx(0.75)
    assert half.value == pytest.approx(0.35)
    assert verdicts([single, half]) == ["pass", "pass"]
    assert single.limit == pytest.approx(1 / 1.3)
    assert half.limit == pytest.approx(0.4)
    rows[speed.OURS]["tokens"] = [8.0, 16.0, 10.0]  # 1.25 times as fast
    rows[speed.HALF_OURS]["tokens"] = [5.0, 10.0, 10.0]  # twice
    assert verdicts(speed.bars(rows)) == ["FAIL", "FAIL"]


def test_depth30_compares_models_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(viar, "prepare_inference", lambda *_, dtype: prepared.append(dtype))
    changes = {name: value for name, value in SMALL.items() if name != "depth"}
    shape = depth30.case(12, 2, num_explicit=(2, 2), **changes)
    rows = depth30.measure(shape, 1, CPU, torch.float32)
    assert prepared == []
    assert rows["VAR"]["parameters"] > 1.8 * rows["VIAR"]["parameters"]
    for row in rows.values():
        assert row["images"] == 2
        assert len(row["seconds"]) == 1
        held = row["peak_bytes"] - row["weight_bytes"]
        tokens = sum(side * side for side in SMALL["sides"])
        cached = 2 * 2 * 2 * (12 if row is rows["VAR"] else 5) * tokens * 48 * 4
        assert held > cached  # the cache, and what the last scale takes
        assert row["weight_bytes"] > 4 * row["parameters"]
    assert rows["VIAR"]["peak_bytes"] < rows["VAR"]["peak_bytes"]
    depth30.table(rows)
    depth30.measure(shape, 0, CPU, torch.bfloat16)
    assert prepared == [torch.bfloat16] * 2


def test_the_bars_of_depth30_are_time_peak_and_on_a_gpu_the_peak_itself() -> None:
    rows = {
        "VAR": {"seconds": [8.0, 9.0], "peak_bytes": 10_000_000_000},
        "VIAR": {"seconds": [3.0, 4.0], "peak_bytes": 4_600_000_000},
    }
    time, share, absolute = depth30.bars(rows, CPU)
    assert time.value == pytest.approx((3 / 8 + 4 / 9) / 2)
    assert share.value == pytest.approx(0.46)
    assert verdicts([time, share, absolute]) == ["pass", "FAIL", "not measured"]
    on_gpu = depth30.bars(rows, torch.device("cuda"))[2]
    assert on_gpu.value == pytest.approx(4.6)
    assert on_gpu.verdict == "pass"


# Trained models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves behind, with random weights."""
    path = tmp_path_factory.mktemp("demo")
    random_tokenizer(TOKENIZERS["digits"].model, CPU).save_pretrained(path / "tokenizer")
    for name in ("viar", "var"):
        random_transformer(TRANSFORMERS[f"digits-{name}"].model, CPU).save_pretrained(path / name)
    (path / "classifier").mkdir()
    torch.manual_seed(0)
    Classifier(10, 8).save(path / "classifier" / "classifier.safetensors")
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    return Trained.load(folder, CPU, Console(quiet=True))


def test_the_demo_runs_only_where_there_are_no_trained_models(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    asked: list[DemoConfig] = []

    def demo(config: DemoConfig, console: Console) -> None:
        asked.append(config)
        for part in folder.iterdir():
            (tmp_path / "new" / part.name).parent.mkdir(exist_ok=True)
            (tmp_path / "new" / part.name).symlink_to(part)

    monkeypatch.setattr(models, "run_demo", demo)
    Trained.load(folder, CPU, Console(quiet=True))
    assert asked == []
    found = Trained.load(tmp_path / "new", CPU, Console(quiet=True))
    assert [config.out for config in asked] == [tmp_path / "new"]
    assert not found.viar.training


def test_the_caches_agree_exactly_at_one_iteration_and_not_at_two(trained: Trained) -> None:
    rows = digits.measure(trained, per_class=2, counts=(1, 2), batch=7)
    assert rows[1]["images"] == 20
    assert rows[1]["differing"] == 0
    assert rows[1]["equilibrium"] == rows[1]["iterate"]
    assert rows[2]["differing"] > 0.2  # far from the fixed point with random weights
    assert rows == digits.measure(trained, per_class=2, counts=(1, 2), batch=20)
    digits.table(rows)


def test_the_bars_of_digits_judge_three_iterations_and_more() -> None:
    rows = {
        2: {"differing": 0.9, "equilibrium": 0.1, "iterate": 0.9},
        3: {"differing": 0.05, "equilibrium": 0.98, "iterate": 0.97},
        4: {"differing": 0.01, "equilibrium": 0.98, "iterate": 0.985},
    }
    images, classes = digits.bars(rows)
    assert images.value == 0.05
    assert classes.value == pytest.approx(0.01)
    rows[4] = {"differing": 0.06, "equilibrium": 0.97, "iterate": 0.99}
    assert verdicts(digits.bars(rows)) == ["FAIL", "FAIL"]


def test_images_are_compared_as_a_png_holds_them() -> None:
    pixels = torch.tensor([0.0, 0.001, 0.003, 1.0])
    assert digits.eight_bit(pixels).tolist() == [0, 0, 1, 255]


def test_inpainting_hides_the_centre_of_held_out_digits(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def perfect(model: Any, tokenizer: Any, images: Any, mask: Any, labels: Any, **_: Any) -> torch.Tensor:
        seen.extend([images, mask, labels])
        return images.where(mask.bool(), 0.25)

    real = inpainting.measure(trained, 12)
    assert real["images"] == 12
    monkeypatch.setattr(viar, "edit", perfect)
    row = inpainting.measure(trained)
    images, mask, labels = seen
    assert row["images"] == len(labels) == len(trained.data.validation)
    assert row["hidden"] == 0.25
    assert mask[2:6, 2:6].sum() == 0
    assert 0 <= images.min() <= images.max() <= 1
    assert row["kept_region_mean_error"] == 0
    inpainting.table(row)
    made_up = {"class": {"real": 1.0, "edited": 0.9, "hidden": 0.5}}
    assert inpainting.bars(made_up)[0].value == pytest.approx(0.1)
    made_up["class"]["edited"] = 0.89
    assert inpainting.bars(made_up)[0].verdict == "FAIL"


def test_the_knob_counts_evaluations_of_the_implicit_block(trained: Trained) -> None:
    settings = {
        "3": 3,
        "5 to 1": (5, 1),
        "capped": viar.Adaptive(rtol=1e-12, max_steps=4),
        "VAR": None,
    }
    rows = knob.measure(trained, rounds=1, per_class=1, settings=settings)
    assert [rows[name]["evaluations"] for name in ("3", "5 to 1", "VAR")] == [9, 9, 0]
    assert 3 * 4 < rows["capped"]["evaluations"] <= 3 * 6
    bytes_of = {name: row["cache_bytes"] for name, row in rows.items()}
    assert bytes_of["3"] == bytes_of["5 to 1"] == bytes_of["capped"] == bytes_of["VAR"] * 3 / 8
    assert bytes_of["VAR"] == 2 * 2 * 8 * 21 * 64 * 4
    assert all(row["images_per_second"] > 0 for row in rows.values())
    knob.table(rows)


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
    rows = identity.measure(tmp_path, num=40, batches=(64, 7, 1))
    assert list(rows) == [
        *("batches of 64", "batches of 7", "batches of 1"),
        *("two processes", "killed and started again"),
    ]
    assert {name for name, row in rows.items() if row["differing"]} == ({where} if where else set())
    assert rows["two processes"]["missing"] == (fault == "lost")
    assert 10 <= rows["killed and started again"]["left_when_killed"] < 40
    assert verdicts(identity.bars(rows)) == ["FAIL" if where else "pass", "pass"]
    identity.table(rows)


def test_a_command_that_fails_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = [sys.executable, "-S", "-c", "raise SystemExit('no such model')"]
    monkeypatch.setattr(identity, "series_command", lambda *_: failing)
    with pytest.raises(RuntimeError, match="no such model"):
        identity.make_series(tmp_path, 3, 2, 2, 60, tmp_path / "series")


def test_a_kill_that_came_too_late_is_no_success() -> None:
    rows = {
        "a": {"images": 10, "missing": 0, "differing": 0},
        "b": {"images": 10, "missing": 0, "differing": 0, "left_when_killed": 10},
    }
    assert verdicts(identity.bars(rows)) == ["pass", "FAIL"]


def test_the_series_is_made_by_the_command_line(folder: Path, tmp_path: Path) -> None:
    identity.make_series(folder, 3, 2, 1, 120, tmp_path / "series")
    assert list(identity.pictures(tmp_path / "series")) == ["000000.png", "000001.png", "000002.png"]


# The command


def test_the_command_writes_figures_and_pictures(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(viar, "prepare_inference", lambda *_, **__: None)
    out = tmp_path / "folder" / "viar.json"
    parts = ["cache", "speed", "depth30", "digits", "inpainting", "knob"]
    settings = ["--quick", "--rounds", "1", "--depth", "12", "--no-compile", "--demo", str(folder)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "viar", *settings, "--part", *parts, "--out", str(out)])
    main()
    saved = json.loads(out.read_text())
    assert list(saved["parts"]) == parts
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["settings"]["quick"] is True
    assert all(bar["verdict"] for bar in saved["bars"])
    assert not any(math.isnan(bar["value"] or 0) for bar in saved["bars"])
    for part in ("cache", "speed", "digits", "knob"):
        assert (tmp_path / "folder" / f"viar_{part}.png").stat().st_size > 5000
