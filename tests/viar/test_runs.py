"""What a run does beside its steps: it averages, measures, leaves out what is not finite, and tells."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_broken_pictures import call
from test_train import (
    Disk,
    Interrupted,
    assert_same,
    fresh_tokenizer,
    fresh_transformer,
    interrupt_at,
    logged,
    pictures,
    settings,
)
from tiny_models import tiny_tokenizer, tiny_transformer
from torch import Tensor, nn

import viar.training.asked
import viar.training.log
import viar.training.loop
import viar.training.losses
import viar.training.trackers
from viar import NextScaleTransformer, Tokenizer
from viar.commands.ended import Ended, told_of_sigterm
from viar.data import tokenize
from viar.files import held
from viar.training import cross_entropy, train_tokenizer, train_transformer
from viar.training.asked import asked_to_end
from viar.training.checkpoint import Checkpoint, TrainState
from viar.training.curve import draw_curve
from viar.training.ema import AveragedWeights
from viar.training.guard import StepGuard, poisoned
from viar.training.held_out import BestWeights, HeldOut, measured, tokenizer_measure, transformer_measure
from viar.training.log import RunLog
from viar.training.loop import check_device
from viar.training.settings import compare_settings, run_settings

STEP = "set_progress"  # what the loop calls once a step, before it


def train(folder: Path, held_out: Any = None, console: Console | None = None, **changes: Any) -> nn.Module:
    model = fresh_transformer()
    train_transformer(
        model, tiny_tokenizer(), pictures(), folder, settings(**changes), held_out=held_out, console=console
    )
    return model


# The average of the weights


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.floats(0.1, 0.999))
def test_the_average_follows_its_formula_in_steps_that_moved_the_weights(
    moves: list[bool], decay: float
) -> None:
    model = nn.Linear(2, 3)
    average = AveragedWeights(model, decay)
    expected = model.weight.detach().double()
    for n, moved in enumerate(moves, start=1):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(n, torch.tensor(float(moved)))
        if moved:
            d = min(decay, (1 + n) / (10 + n))
            expected = d * expected + (1 - d) * model.weight.detach().double()
    with average.in_place():
        torch.testing.assert_close(model.weight.detach().double(), expected, atol=1e-5, rtol=1e-5)


def test_the_average_is_in_place_for_a_while_and_in_float32_whatever_the_weights_are() -> None:
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    model.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    average = AveragedWeights(model, 0.999)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(10**6, torch.tensor(1.0))  # a change that bfloat16 would not hold
    saved = average.state_dict()
    assert list(saved) == ["weight"]
    torch.testing.assert_close(saved["weight"], before["weight"].float() + 0.001, atol=2e-5, rtol=0)
    with average.in_place():
        assert model.weight.equal(saved["weight"].bfloat16())
    assert model.weight.equal(before["weight"] + 1)
    other = AveragedWeights(model, 0.999)
    other.load_state_dict(saved)
    assert other.state_dict()["weight"].equal(saved["weight"])
    with pytest.raises(ValueError, match="another model"):
        other.load_state_dict({"bias": saved["weight"]})


def test_a_run_ends_with_the_average_of_its_weights_and_trains_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, Tensor]] = []
    update = AveragedWeights.update

    def noting(self: AveragedWeights, *arguments: Any) -> None:
        update(self, *arguments)
        weights.append({name: weight.clone() for name, weight in self._weights.items()})

    monkeypatch.setattr(AveragedWeights, "update", noting)
    model = train(tmp_path / "average", steps=4, ema=0.2)
    last = train(tmp_path / "last", steps=4)
    expected = dict(fresh_transformer().named_parameters())
    for n, moved in enumerate(weights, start=1):
        d = min(0.2, (1 + n) / (10 + n))
        expected = {name: d * value + (1 - d) * moved[name] for name, value in expected.items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
        assert weights[-1][name].equal(last.get_parameter(name)), name
    assert_same(NextScaleTransformer.from_pretrained(tmp_path / "average"), model)
    told = json.loads((tmp_path / "average" / "run.json").read_text())["result"]
    assert (told["weights"], told["steps"]) == ("the averaged weights", 4)


# Held-out data


def test_what_is_measured_of_a_transformer_is_the_mean_over_all_samples() -> None:
    tokenizer, data, model = tiny_tokenizer(), pictures(10), tiny_transformer()
    inputs, targets, labels = tokenize(tokenizer, data.images, data.labels)
    with torch.no_grad():
        logits = model(labels, inputs)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    held_out = HeldOut(data, transformer_measure(lambda *batch: tokenize(tokenizer, *batch)))
    for batch_size in (10, 4, 1):
        found = measured(
            model, held_out, batch_size=batch_size, workers=0, device=torch.device("cpu"), together=None
        )
        assert found == pytest.approx(
            {
                "loss": float(losses.mean()),
                "accuracy": float((logits.argmax(-1) == targets).float().mean()),
                "loss_1": float(losses[:, :1].mean()),
                "loss_2": float(losses[:, 1:5].mean()),
                "loss_3": float(losses[:, 5:].mean()),
            },
            rel=1e-5,
        )


class Group:
    """Stands for one of several processes whose sums are added by hand."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: size)


@pytest.mark.parametrize(("size", "batch_size", "num_ranks"), [(10, 4, 2), (9, 3, 3), (5, 8, 3), (7, 2, 2)])
def test_processes_share_what_is_measured_and_run_as_many_batches_each(
    size: int, batch_size: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    calls: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: sums.append(tensor.clone()))
    for rank in range(num_ranks):

        def measure(model: nn.Module, batch: Any, calls: list[int] = calls[rank]) -> dict[str, Tensor]:
            calls.append(len(batch[0]))
            return tokenizer_measure(model, batch)

        found = measured(
            tokenizer,
            HeldOut(pictures(size), measure),
            batch_size=batch_size,
            workers=0,
            device=torch.device("cpu"),
            together=Group(rank, num_ranks),  # type: ignore[arg-type]
        )
    images = pictures(size).images
    error = (tokenizer.decode(tokenizer.encode(images)) - images).square().mean()
    names = list(found)
    assert float(sum(sums)[names.index("loss")]) / size == pytest.approx(float(error), rel=1e-5)
    assert {len(called) for called in calls} == {-(-size // batch_size)}


def test_a_run_that_measures_is_the_run_without_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {"with": [], "without": []}
    set_progress = viar.training.loop.set_progress

    def noting(optimizer: Any, *arguments: Any, **options: Any) -> None:
        parameters = [p.detach().flatten() for group in optimizer.param_groups for p in group["params"]]
        seen[name].append(torch.cat(parameters))
        set_progress(optimizer, *arguments, **options)

    monkeypatch.setattr(viar.training.loop, STEP, noting)
    for name, held_out in (("with", Disk(pictures(9))), ("without", None)):
        train(tmp_path / name, held_out, steps=4, validate_every=1, ema=0.5, accumulate=2)
    for one, other in zip(seen["with"], seen["without"], strict=True):
        assert one.equal(other)
    rows = [row for row in logged(tmp_path / "with") if "validation_loss" not in row]
    assert rows == logged(tmp_path / "without")
    assert [row["step"] for row in logged(tmp_path / "with") if "validation_loss" in row] == [1, 2, 3, 4]


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Held-out data has these losses, in turn, whatever the weights are."""
    ahead = iter(losses)
    monkeypatch.setattr(viar.training.loop, "measured", lambda *_, **__: {"loss": next(ahead)})


def test_the_weights_that_did_best_are_kept_and_the_run_ends_when_they_stay_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [3.0, 1.0, math.nan, 2.0, 1.0, 0.5])
    offer, kept, best = BestWeights.offer, [], {}

    def looking(self: BestWeights, save: Any, loss: float) -> bool:
        is_best = offer(self, save, loss)
        kept.append(sorted(path.name for path in self.folder.iterdir()))
        if is_best:
            best.update(NextScaleTransformer.from_pretrained(self.path).state_dict())
        return is_best

    monkeypatch.setattr(BestWeights, "offer", looking)
    model, folder = fresh_transformer(), tmp_path / "run"
    config = settings(steps=16, validate_every=2, patience=3)
    result = train_transformer(model, tiny_tokenizer(), pictures(), folder, config, held_out=pictures(3))
    assert kept == [["step-000002"], *[["step-000004"]] * 4]
    assert (result["steps"], result["best_step"], result["validation_loss"]) == (10, 4, 1.0)
    for found in (model, NextScaleTransformer.from_pretrained(folder)):
        assert all(value.equal(best[name]) for name, value in found.state_dict().items())
    told = json.loads((folder / "run.json").read_text())["result"]
    assert told["weights"] == "the weights after step 4, the best on held-out data"
    assert not {"best", "state"} & {path.name for path in folder.iterdir()}


def test_best_weights_that_the_state_names_stay_until_another_state_is_saved(tmp_path: Path) -> None:
    state = TrainState(step=4)
    best = BestWeights(tmp_path / "best", state, is_main=True)

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    def offer(step: int, loss: float) -> list[str]:
        state.step = step
        best.offer(lambda: SimpleNamespace(save_pretrained=save), loss)
        return sorted(path.name for path in best.folder.iterdir())

    assert offer(4, 3.0) == ["step-000004"]
    best.saved()
    assert offer(5, 2.0) == ["step-000004", "step-000005"]
    assert offer(6, 1.0) == ["step-000004", "step-000006"]
    (best.folder / ".step-000007.abc").mkdir()  # as a kill while writing leaves it
    (best.folder / "notes").mkdir()
    restored = TrainState(step=4, best_step=4, best_loss=3.0, best_digest=state.best_digest)
    BestWeights(tmp_path / "best", restored, is_main=False)
    assert len(list(best.folder.iterdir())) == 4
    again = BestWeights(tmp_path / "best", restored, is_main=True)
    assert sorted(path.name for path in best.folder.iterdir()) == ["notes", "step-000004"]
    (again.path / "model.safetensors").write_bytes(b"Weights")
    for found in ("damaged ones", "nothing"):
        for again_or_at_the_end in (lambda: BestWeights(again.folder, restored, is_main=True), again.read):
            with pytest.raises(ValueError, match=f"expected the best weights so far.*found {found}"):
                again_or_at_the_end()
        shutil.rmtree(again.path, ignore_errors=True)


def test_a_tokenizer_ends_with_the_weights_that_did_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [1.0, 2.0])
    tokenizer = fresh_tokenizer()
    config = settings(steps=4, validate_every=2)
    result = train_tokenizer(tokenizer, pictures(), tmp_path, config, held_out=pictures(3))
    assert result["best_step"] == 2
    assert_same(Tokenizer.from_pretrained(tmp_path), tokenizer)


@pytest.mark.parametrize(("held_out", "every"), [(None, 1), (pictures(3), 0)])
def test_patience_without_measurements_is_refused(held_out: Any, every: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patience=2 counts measurements of held-out"):
        train(tmp_path / "run", held_out, validate_every=every, patience=2)
    assert not (tmp_path / "run").exists()


def test_a_block_is_inspected_in_full_precision_whatever_the_training_runs_in(tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        train(tmp_path / precision, pictures(6), validate_every=3, lr=1e-9, mixed_precision=precision)
    full, low = (logged(tmp_path / precision)[-1] for precision in ("no", "bf16"))
    for name in ("validation_residual", "validation_spectral_radius"):
        assert low[name] == pytest.approx(full[name], rel=1e-4)


# Interruptions


def files_of(folder: Path) -> dict[str, Any]:
    """Content of every file, but for the seconds that the run took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    run = json.loads(found["run.json"])
    del run["result"]["seconds"]
    return {**found, "run.json": run}


def test_a_run_that_is_killed_ends_with_every_file_of_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"steps": 12, "ema": 0.9, "validate_every": 3, "sample_every": 4}
    break_steps(monkeypatch, {4, 7})
    monkeypatch.setattr(Checkpoint, "is_due", lambda self: self.state.step == 5)
    train(tmp_path / "whole", pictures(9), **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9, viar.training.loop, STEP, after=False)
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", pictures(9), **changes)
    assert logged(tmp_path / "parts")[-1]["step"] > 5
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # a line that was being written
    train(tmp_path / "parts", pictures(9), **changes)
    expected, found = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert list(found) == list(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert "samples/step-000008.png" in found
    assert [row["step"] for row in logged(tmp_path / "parts")] == [1, 3, 6, 9, 10, 12]


def test_damaged_lines_of_a_log_are_told_and_the_others_stay(tmp_path: Path) -> None:
    good = '{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.0}'
    path = tmp_path / "metrics.jsonl"
    bad = [b'{"step": 1, "lo', b'{"stgp": 1}', b'{"step": "1"}', b"[1]", b'{"step": 1, "loss": \xff}']
    path.write_bytes(b"\n".join([good[0].encode(), *bad, good[1].encode()]) + b"\n")
    console = Console(file=io.StringIO(), width=10_000)
    RunLog(
        path,
        "run",
        step=2,
        seconds=0.0,
        progress=0.0,
        batch_size=1,
        device=torch.device("cpu"),
        is_main=True,
        console=console,
    )
    assert path.read_text().splitlines() == list(good)
    assert console.file.getvalue() == f"{path}: 5 damaged or unfinished lines are left out\n"


def terminate_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Send this process SIGTERM at the so-manieth step."""
    original, calls = viar.training.loop.set_progress, []

    def terminating(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        original(*args, **kwargs)

    monkeypatch.setattr(viar.training.loop, STEP, terminating)


def test_a_run_that_gets_sigterm_saves_its_state_and_ends_well_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path / "whole", steps=7)
    told = io.StringIO()
    with monkeypatch.context() as patch:
        terminate_at(patch, 4)
        with pytest.raises(SystemExit) as ended:
            train(tmp_path / "parts", console=Console(file=told, width=200), steps=7)
    assert ended.value.code == 0
    assert "ended by SIGTERM after step 4; the same command goes on" in told.getvalue()
    assert signal.getsignal(signal.SIGTERM) is before
    told = io.StringIO()
    train(tmp_path / "parts", console=Console(file=told, width=200), steps=7)
    assert "goes on after step 4" in told.getvalue()
    assert files_of(tmp_path / "parts").keys() == files_of(tmp_path / "whole").keys()
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_gets_sigterm_in_its_last_step_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate_at(monkeypatch, 3)
    train(tmp_path, steps=3)
    assert (tmp_path / "model.safetensors").is_file()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(ValueError, match="another process is at work in this folder"):
        train(tmp_path, steps=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [False, True])
def test_a_run_that_is_killed_while_its_model_is_written_goes_on(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"steps": 3, "save_every": 1e-9}
    train(tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, NextScaleTransformer, "save_pretrained", after=after)
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", **changes)
    assert "result" in json.loads((tmp_path / "parts" / "run.json").read_text())
    train(tmp_path / "parts", **changes)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("names", ["of one process", "of DDP"])
def test_a_run_of_an_earlier_release_goes_on(
    names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tmp_path / "whole", steps=4)

    def save(self: Checkpoint) -> None:
        self.accelerator.save_state(str(self.folder))
        state = {"step": self.state.step, "seconds": self.state.seconds}
        torch.save(state, self.folder / "custom_checkpoint_0.pkl")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "is_due", lambda self: self.state.step == 2)
        patch.setattr(Checkpoint, "save", save)
        interrupt_at(patch, 4, viar.training.loop, STEP, after=False)
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", steps=4)
    if names == "of DDP":
        weights = tmp_path / "parts" / "state" / "model.safetensors"
        save_file({f"module.{name}": value for name, value in load_file(weights).items()}, weights)
    run = json.loads((tmp_path / "parts" / "run.json").read_text())
    for name in ("validate_every", "patience", "ema", "max_skipped", "compile", "trackers", "sharding"):
        del run["train"][name]
    (tmp_path / "parts" / "run.json").write_text(json.dumps(run))
    text, console = written()
    assert_same(train(tmp_path / "parts", None, console, steps=4), expected)
    assert text.getvalue().splitlines()[0] == "transformer  goes on after step 2"


def test_settings_that_an_earlier_release_did_not_keep_are_taken_at_their_defaults(tmp_path: Path) -> None:
    now = run_settings(fresh_transformer(), pictures(), settings(), class_names=["a"], origin={"name": "b"})
    (tmp_path / "state").mkdir()
    older = json.loads(json.dumps(now))
    for part, name in ((older, "class_names"), (older, "origin"), (older["data"], "augmentations")):
        del part[name]
    del older["train"]["ema"]
    (tmp_path / "run.json").write_text(json.dumps(older))
    assert compare_settings(tmp_path, now) == []
    now["data"]["augmentations"] = ["flip"]
    now["train"]["ema"] = 0.9
    with pytest.raises(ValueError, match=r"train.ema: 0.0 there, 0.9 now; data.augmentations: \[\] there"):
        compare_settings(tmp_path, now)


# Steps that are not finite


def break_steps(monkeypatch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """In these steps, counted from 1, the loss is not a number."""
    now = [0]
    step = viar.training.loop._Run._step

    def noting(self: Any, progress: float) -> Any:
        now[0] = self.state.step + 1
        return step(self, progress)

    def broken(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) * (math.nan if now[0] in steps else 1)

    monkeypatch.setattr(viar.training.loop._Run, "_step", noting)
    monkeypatch.setattr(viar.training.losses, "cross_entropy", broken)


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_gradients_that_are_not(loss: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    poisoned(weight.sum() * 0 + loss).backward()
    assert not weight.grad.isfinite().any()
    weight.grad = None
    poisoned((weight * 0.3).square().sum()).backward()
    poisoned_gradient, weight.grad = weight.grad, None
    (weight * 0.3).square().sum().backward()
    assert poisoned_gradient.equal(weight.grad)


def test_steps_that_are_not_finite_move_nothing_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    step = StepGuard.step

    def noting(self: StepGuard, optimizer: Any, *arguments: Any) -> Any:
        moved, sound = step(self, optimizer, *arguments)
        inner = optimizer.optimizer
        held = [p.detach() for group in inner.param_groups for p in group["params"]]
        held += [value for state in inner.state.values() for value in state.values()]
        seen.append((float(moved), torch.cat([value.flatten() for value in held])))
        return moved, sound

    monkeypatch.setattr(StepGuard, "step", noting)
    break_steps(monkeypatch, {3, 4, 9})
    model = fresh_transformer()
    result = train_transformer(
        model, tiny_tokenizer(), pictures(), tmp_path, settings(steps=10, accumulate=2)
    )
    assert [moved for moved, _ in seen] == [1, 1, 0, 0, 1, 1, 1, 1, 0, 1]
    for (_, before), (moved, after) in itertools.pairwise(seen):
        assert before.equal(after) != moved
        assert after.isfinite().all()
    assert result["skipped"] == 3
    assert logged(tmp_path)[-1]["skipped"] == 3


@pytest.mark.parametrize(
    ("steps", "changes", "row"),
    [
        ({3, 4, 5, 7, 8}, {"steps": 20, "max_skipped": 3}, 3),  # the row is over when it is looked at
        ({4, 5, 6}, {"steps": 6, "max_skipped": 3}, 3),
        ({1, 2}, {"steps": 2}, 2),  # all of them
    ],
)
def test_too_many_such_steps_in_a_row_end_the_run_and_the_last_state_stays(
    steps: set[int], changes: dict[str, Any], row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, steps)
    monkeypatch.setattr(Checkpoint, "is_due", lambda self: self.state.step == 2)
    with pytest.raises(FloatingPointError, match=f"{row} steps in a row, up to step .*; lower lr, or use"):
        train(tmp_path, **changes)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "state").is_dir() == (changes["steps"] > 2)


def test_steps_for_which_the_scale_of_float16_was_too_high_are_counted_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer: Any = SimpleNamespace(scaler=object(), step=lambda: None, optimizer=None)
    state = TrainState()
    guard = StepGuard(torch.device("cpu"), state)
    number = torch.tensor
    told = []
    for norm, losses in (
        (1.0, [1.0, 1.0]),
        (math.inf, [1.0, 2.0]),  # the scale
        (math.nan, [1.0, math.nan]),
        (math.inf, [-math.inf, 1.0]),
        (1.0, [1.0]),
    ):
        moved, sound = guard.step(optimizer, number(norm), [number(loss) for loss in losses])
        told.append((float(moved), float(sound)))
    assert told == [(1, 1), (0, 1), (0, 0), (0, 0), (1, 1)]
    guard.note(state)
    assert (state.skipped, state.rescaled, state.skipped_in_row, state.skipped_longest) == (2, 1, 0, 3)
    again = TrainState()
    StepGuard(torch.device("cpu"), state).note(again)
    assert again == state


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_step_that_is_not_finite_leaves_the_codebook_finite(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0]
    step, forward = viar.training.loop._Run._step, Tokenizer.forward

    def noting(self: Any, progress: float) -> Any:
        now[0] = self.state.step
        return step(self, progress)

    monkeypatch.setattr(viar.training.loop._Run, "_step", noting)
    monkeypatch.setattr(
        Tokenizer, "forward", lambda self, images: forward(self, images * (math.nan if now[0] == at else 1))
    )
    tokenizer = fresh_tokenizer()
    config = settings(steps=6, batch_size=24)
    result = train_tokenizer(tokenizer, pictures(), tmp_path, config, revive_every=2)
    assert result["skipped"] == 1
    assert all(value.isfinite().all() for value in tokenizer.state_dict().values())


def test_fewer_such_steps_in_a_row_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_steps(monkeypatch, {3, 4, 6, 7})
    train(tmp_path, steps=10, max_skipped=3)


# What is told


def written(**options: Any) -> tuple[io.StringIO, Console]:
    text = io.StringIO()
    return text, Console(file=text, width=200, **options)


def test_where_there_is_no_screen_lines_come_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viar.training.log, "LINE_EVERY", 0.0)
    text, console = written()
    train(tmp_path, pictures(6), console, steps=20, validate_every=10)
    lines = text.getvalue().splitlines()
    number = r"[\d.e+-]+"
    line = (
        rf"transformer +\d+%  step (\d+)  loss {number}  accuracy {number}  {number} images/s  {number} GB  "
    )
    told = [re.match(line + r"[\d:]+ left$", text) for text in lines]
    assert [match and match[1] for match in told] == ["1", "10", None, "20", None, None]
    assert lines[2].startswith("transformer  step 10  held out: loss ")
    assert lines[-1].startswith("transformer  20 steps done, saved: the weights after step")
    monkeypatch.setattr(viar.training.log, "LINE_EVERY", 1e9)
    text, console = written()
    train(tmp_path / "rare", None, console, steps=20)
    assert len(text.getvalue().splitlines()) == 2  # the first and the last


def test_on_a_screen_there_is_one_bar_with_all_of_it(tmp_path: Path) -> None:
    text, console = written(force_terminal=True)
    train(tmp_path, pictures(6), console, steps=10, validate_every=5)
    assert re.search(r"step 10  loss \S+  accuracy \S+  \S+ images/s", text.getvalue())
    assert "held out: loss" in text.getvalue()


def test_loss_of_each_scale_accuracy_and_gradient_norm_are_kept(tmp_path: Path) -> None:
    train(tmp_path, steps=1, accumulate=1, batch_size=24)
    (row,) = logged(tmp_path)
    names = ["step", "loss", "accuracy", "loss_1", "loss_2", "loss_3", "grad_norm", "skipped"]
    assert list(row) == names
    of_scales = (row["loss_1"] + 4 * row["loss_2"] + 9 * row["loss_3"]) / 14
    assert of_scales == pytest.approx(row["loss"], rel=1e-5)


def test_a_curve_is_drawn_of_what_was_measured(tmp_path: Path) -> None:
    train(tmp_path / "run", pictures(6), steps=10, validate_every=5)
    with Image.open(tmp_path / "run" / "curve.png") as picture:
        assert picture.size == (960, 540)
    rows: list[dict[str, float]] = [{"step": step, "loss": 9.0 / step} for step in (1, 10, 20)]
    draw_curve(rows[:1], tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()
    draw_curve([*rows, {"step": 21, "loss": math.nan, "validation_loss": math.nan}], tmp_path / "some.png")
    assert (tmp_path / "some.png").exists()


def test_a_curve_shows_of_the_training_what_is_measured_of_held_out_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []
    plot = Axes.plot

    def noting(self: Axes, steps: Any, values: Any, *others: Any, **options: Any) -> Any:
        drawn.append(list(values))
        return plot(self, steps, values, *others, **options)

    monkeypatch.setattr(Axes, "plot", noting)
    config = settings(steps=10, batch_size=24, validate_every=10, accumulate=1, lr=1e-9)
    tokenizer = fresh_tokenizer(dropout=0.0)
    train_tokenizer(tokenizer, pictures(), tmp_path / "tokenizer", config, held_out=pictures())
    training, held_out = drawn[-2:]
    assert training[-1] == pytest.approx(held_out[-1], rel=1e-3)
    rows = [{"step": step, "loss": 9.0, "cross_entropy": 1.0 + step} for step in (1, 10)]
    draw_curve([*rows, {"step": 10, "validation_loss": 3.0}], tmp_path / "penalty.png")
    assert drawn[-2:] == [[2.0, 11.0], [3.0]]


def test_the_time_in_which_the_host_waits_for_the_device_counts_as_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(viar.training.loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    on_host = viar.training.loop._on_host

    def waiting(numbers: Any) -> dict[str, float]:
        now[0] += 5.0
        return on_host(numbers)

    monkeypatch.setattr(viar.training.loop, "_on_host", waiting)
    result = train_transformer(
        fresh_transformer(), tiny_tokenizer(), pictures(), tmp_path, settings(steps=10)
    )
    assert result["seconds"] == 10.0  # the first step and the tenth are read


def test_processes_that_would_train_each_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(settings())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes started.*ACCELERATE_USE_CPU=true"):
        check_device(settings())


def test_trackers_get_all_of_it_and_are_told_where_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, set[str]]] = []
    made: list[Any] = []

    class Tracker:
        def __init__(self, name: str, folder: Path, **options: Any) -> None:
            made.append((name, folder, options))

        def start(self) -> None:
            made.append("started")

        def log(self, values: dict[str, float], step: int) -> None:
            told.append((step, set(values)))

        def finish(self) -> None:
            made.append("finished")

    monkeypatch.setattr(viar.training.trackers, "TensorBoardTracker", Tracker)
    monkeypatch.setattr(viar.training.trackers, "is_tensorboard_available", lambda: True)
    train(tmp_path, pictures(6), steps=10, validate_every=10)
    assert made == [("tensorboard", tmp_path, {"purge_step": 1}), "started", "finished"]
    assert [step for step, _ in told] == [1, 10, 10]
    names = ("loss_1", "loss_3", "grad_norm", "images_per_second", "memory_gb")
    assert {f"training/{name}" for name in names} <= told[1][1]
    names = ("loss", "loss_3", "accuracy", "residual", "spectral_radius")
    assert {f"validation/{name}" for name in names} <= told[2][1]
    made.clear()
    train(tmp_path / "none", steps=1, trackers=())
    assert made == []


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viar.training.trackers, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="trackers has 'wandb', which is not installed; install it"):
        train(tmp_path / "run", trackers=("wandb",))
    assert not (tmp_path / "run").exists()


# Compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's own making
def test_a_compiled_run_is_the_run_without_and_measures_and_draws_eagerly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    compile_module = nn.Module.compile

    def compile_quickly(self: nn.Module) -> None:
        compiled.append(self)
        compile_module(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    changes = {"steps": 2, "validate_every": 1, "sample_every": 1}
    plain = train(tmp_path / "plain", pictures(6), **changes)
    assert not compiled
    model = train(tmp_path / "compiled", pictures(6), compile=True, **changes)
    assert isinstance(model, NextScaleTransformer)
    assert compiled == list(model.trunk.compiled_parts())
    assert_same(model, plain, atol=1e-5, rtol=1e-4)


ASKED = "SIGTERM: ends after this step, its state saved; a second SIGTERM ends at once\n"


def test_sigterm_is_answered_at_once_and_a_second_ends_a_run_at_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One right behind the first is the same: a launcher passes on what its processes get too."""
    seconds = iter([10.0, 10.1, 12.0])
    monkeypatch.setattr(viar.training.asked, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with told_of_sigterm(), asked_to_end() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set()
        assert capfd.readouterr().err == ASKED
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Ended):
            os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_a_run_that_is_ended_by_sigterm_tells_programs_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer(sides=(1, 2, 4)).save_pretrained(tmp_path / "tokenizer")
    flags = [
        *("train", "digits-viar", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "run", "--json"),
        *("--model.width", 16, "--model.num-heads", 2, "--model.depth", 3),
        *("--train.steps", 4, "--train.batch-size", 2),
    ]
    with monkeypatch.context() as patch:
        terminate_at(patch, 2)
        code, output, errors = call(*flags)
    assert output, errors
    told = json.loads(output)
    assert (code, told) == (0, {"out": str(tmp_path / "run"), "done": False, "steps": 2}), errors
    code, output, errors = call(*flags)
    told = json.loads(output)
    assert (code, told["done"], told["steps"]) == (0, True, 4), errors
