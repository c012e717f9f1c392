"""The demo: what it writes, and what of an earlier run it uses again."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_models import tiny_tokenizer, tiny_transformer

import deqlib
import viar.commands.demo
import viar.commands.demo_measures
from viar import NextScaleTransformer, Tokenizer
from viar.commands.demo import DISTRIBUTIONS, PACKAGES, STAGES, DemoConfig, run_demo
from viar.commands.demo_tables import print_summary
from viar.commands.stages import Stages, fingerprint_of_code
from viar.evaluation import Classifier, balanced_labels

SIDES = (1, 2, 4)


def second_each(tasks: Sequence[Callable[[], Any]], *, repeats: int) -> list[float]:
    """In place of measuring: each task once, for a second in name."""
    for task in tasks:
        task()
    return [1.0] * len(tasks)


def untrained_judge(data: Any, **_: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(data.num_classes, data.train.images.shape[-1], width=4).eval()


@pytest.fixture(scope="module")
def small_demo() -> Any:
    """A demo that takes a second or two: digits of 8 x 8, tiny models, and an untrained judge."""
    patch = pytest.MonkeyPatch()
    tokenizer, model = tiny_tokenizer(sides=SIDES), tiny_transformer(sides=SIDES, num_classes=10)
    for name in ("viar", "var"):
        recipe = viar.commands.demo.TRANSFORMERS[f"mnist-{name}-d12"]
        sizes = {"sides": SIDES, "codebook_size": 16, "code_channels": 4, "width": 16}
        trunk = model.config.trunk if name == "viar" else recipe.model.trunk
        small = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **sizes, trunk=trunk))
        patch.setitem(viar.commands.demo.TRANSFORMERS, f"mnist-{name}-d12", small)
    patch.setattr(viar.commands.demo, "DEPTH", 3)
    patch.setattr(viar.commands.demo, "SOURCE", "digits")
    patch.setattr(viar.commands.demo, "load_shipped", lambda name: (model, tokenizer))
    patch.setattr(viar.commands.demo, "judge", untrained_judge)
    # Processes of their own, which test_stages.py tests, would take longer to start than to work.
    patch.setattr(
        Stages,
        "run_together",
        lambda self, stages: {name: self.run(name, stage) for name, stage in stages.items()},
    )
    # Files of the packages may change while this runs.
    patch.setattr(viar.commands.demo, "fingerprint_of_code", lambda packages, distributions: "1")
    patch.setattr(viar.commands.demo_measures, "seconds_of", second_each)
    yield
    patch.undo()


def demo(folder: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=200)
    config = {"steps": 4, "per_class": 2, "iterations": (1, 2), **changes}
    summary = run_demo(DemoConfig(out=folder, **config), console)
    return summary, console.file.getvalue()


def stamps(folder: Path) -> dict[str, int]:
    return {stage: (folder / stage / "done.json").stat().st_mtime_ns for stage in STAGES}


@pytest.fixture(scope="module")
def finished_demo(small_demo: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    _, shown = demo(folder)
    return folder, shown


def test_the_demo_writes_pictures_and_a_summary_of_all_models(finished_demo: tuple[Path, str]) -> None:
    folder, shown = finished_demo
    for name, (columns, rows) in {"shipped": (10, 10), "samples": (2, 10)}.items():
        with Image.open(folder / f"{name}.png") as image:
            assert image.size == (50 * columns, 50 * rows), name
    for name in ("shipped_knob", "knob"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 100
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["models"]) == {"viar", "var", "shipped"}
    for name, model in summary["models"].items():
        assert set(model) >= {
            "parameters",
            "validation_loss",
            "class_consistency",
            "fid",
            "memorisation",
            "images_per_second",
            "cache_bytes",
            "training_peak_bytes",
        }
        assert ("training" in model) == (name != "shipped")
    results = [summary["models"][name] for name in ("viar", "var")]
    assert [result["iterations"] for result in results] == [3, None]
    for result in results:
        assert result["training"]["steps"] == 4  # of both, whichever is faster
        assert result["training"]["last_over_best"] >= 1
        assert result["memorisation"] > 0
    assert 0 <= summary["judge"]["held_out_accuracy"] <= 1
    assert summary["real"]["fid"] >= 0
    assert [point["iterations"] for point in summary["shipped"]["knob"]] == [1, 2, 3]
    knob = [(point["model"], point["iterations"]) for point in summary["knob"]]
    assert knob == [("viar", 1), ("viar", 2), ("viar", 3), ("var", None)]
    # keys and values, guidance, 20 images, 3 blocks, 1 + 4 + 16 tokens, 16 wide, float32
    expected = 2 * 2 * 20 * 3 * 21 * 16 * 4
    assert {point["cache_bytes"] for point in summary["knob"]} == {expected}
    assert summary["sampling"] == {"cfg": 1.5, "top_k": None, "top_p": 0.96, "seed": 0}
    for words in ("parameters", "peak cache, MB", "4 steps each", "The knob", "summary.json", "shipped.png"):
        assert words in shown
    saved = NextScaleTransformer.from_pretrained(folder / "viar")
    assert sum(p.numel() for p in saved.parameters()) == results[0]["parameters"]
    assert Tokenizer.from_pretrained(folder / "tokenizer").config.sides == SIDES  # for viar generate


def test_the_shipped_model_is_shown_before_anything_is_trained(
    small_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stages, "run_together", stop)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoConfig(out=tmp_path, iterations=(1,)), console)
    assert {path.name for path in tmp_path.glob("*.png")} == {"shipped.png", "shipped_knob.png"}
    assert "The VIAR that comes with the package" in console.file.getvalue()


def test_the_table_shows_models_that_never_hit_their_class(finished_demo: tuple[Path, str]) -> None:
    summary = json.loads((finished_demo[0] / "summary.json").read_text())
    for model in summary["models"].values():
        model["class_consistency"] = 0.0
    console = Console(file=io.StringIO(), width=200)
    print_summary(summary, console)
    (row,) = (line for line in console.file.getvalue().splitlines() if "class consistency (" in line)
    assert [cell.strip() for cell in row.split("│")[2:6]] == ["0.000", "0.000", "-", "0.000"]


def test_a_second_run_reuses_every_stage_and_a_change_redoes_what_depends_on_it(
    finished_demo: tuple[Path, str], small_demo: Any
) -> None:
    folder, _ = finished_demo
    before, summary = stamps(folder), (folder / "summary.json").read_text()
    _, shown = demo(folder)
    assert stamps(folder) == before
    assert (folder / "summary.json").read_text() == summary
    assert shown.count("unchanged, reused") == len(STAGES)

    changes: list[tuple[dict[str, Any], set[str]]] = [
        ({"per_class": 1}, {"evaluation"}),
        ({"per_class": 1, "steps": 2}, {"viar", "var", "evaluation"}),
    ]
    for settings, redone in changes:
        before = stamps(folder)
        demo(folder, **settings)
        after = stamps(folder)
        assert {stage for stage in STAGES if after[stage] != before[stage]} == redone, settings


def test_an_interrupted_stage_goes_on_and_stages_before_it_are_reused(
    small_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def interrupted(model: Any, tokenizer: Any, data: Any, folder: Path, *_: Any, **__: Any) -> None:
        found.append((folder.name, (folder / "state").exists()))
        (folder / "state").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(viar.commands.demo, "train_transformer", interrupted)
    for settings in ({}, {}, {"steps": 2}):
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path, **settings)
    # the second goes on from what the first left, the third is another run
    assert found == [("viar", False), ("viar", True), ("viar", False)]
    assert (tmp_path / "tokenizer" / "done.json").exists()
    assert not (tmp_path / "viar" / "done.json").exists()
    assert not (tmp_path / "summary.json").exists()


def test_a_source_of_any_room_changes_the_fingerprint_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint_of_code(PACKAGES, DISTRIBUTIONS)
    assert fingerprint_of_code(PACKAGES, DISTRIBUTIONS) == before
    read = Path.read_bytes
    packages = [Path(package.__file__).parent for package in (deqlib, viar)]
    rooms = {path.parent: path for package in packages for path in sorted(package.rglob("*.py"))}
    assert {"solvers", "commands", "series", "model", "tokenizer", "viar"} <= {room.name for room in rooms}
    for changed in rooms.values():
        with monkeypatch.context() as patch:
            patch.setattr(
                Path, "read_bytes", lambda path, changed=changed: read(path) + b"#" * path.samefile(changed)
            )
            assert fingerprint_of_code(PACKAGES, DISTRIBUTIONS) != before, changed


def test_demo_labels_fill_the_sample_grid() -> None:
    assert balanced_labels(10, 10).view(10, 10)[:, 0].tolist() == list(range(10))
