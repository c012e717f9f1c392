"""Training: runs learn, go on after an interruption, and do the same in parts and in two processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TOKENIZER, tiny_config, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor, nn

import viar.training.loop
import viar.training.losses
from viar import ImplicitTrunkConfig, NextScaleTransformer, Tokenizer
from viar.data import (
    AugmentedImages,
    Batch,
    ImageFolder,
    TensorImages,
    TokenizedImages,
    save_picture,
    tokenize,
)
from viar.tokenizer.quantizer import perplexity
from viar.training import (
    AdversarialConfig,
    TrainConfig,
    cross_entropy,
    train_tokenizer,
    train_transformer,
    validation_loss,
)

DEADLOCK = 600.0  # seconds after which two processes are taken to wait for each other
FINISHED = {"README.md", "config.json", "metrics.jsonl", "model.safetensors", "run.json"}


def pictures(count: int = 24) -> TensorImages:
    """Each class has a brightness of its own."""
    labels = torch.arange(count) % 3
    images = uniform(count, 3, 6, 6) * 0.4 - 0.9 + 0.6 * labels.view(-1, 1, 1, 1)
    return TensorImages(images, labels)


class Disk:
    """The same pictures, but not held in memory as far as training knows: two methods are a data set."""

    def __init__(self, data: TensorImages) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.data.__getitems__(indices)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 3, "batch_size": 8, "lr": 3e-3, "save_every": 1e9, **changes})


def fresh_transformer(seed: int = 0, **changes: Any) -> NextScaleTransformer:
    """With everything random in training that there is: labels, paths and iterations."""
    torch.manual_seed(seed)
    return NextScaleTransformer(tiny_config(**{"label_dropout": 0.5, "drop_path": 0.3, **changes}))


def fresh_tokenizer(seed: int = 0, dropout: float = 0.1) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(dataclasses.replace(TOKENIZER, dropout=dropout))


Run = Callable[[Path, TrainConfig], nn.Module]


def run_transformer(folder: Path, config: TrainConfig, **changes: Any) -> NextScaleTransformer:
    model = fresh_transformer(**changes)
    train_transformer(model, tiny_tokenizer(), pictures(), folder, config)
    return model


def run_transformer_from_disk(folder: Path, config: TrainConfig) -> NextScaleTransformer:
    model = fresh_transformer()
    train_transformer(model, tiny_tokenizer(), Disk(pictures()), folder, config)
    return model


def run_tokenizer(folder: Path, config: TrainConfig, dropout: float = 0.1) -> Tokenizer:
    tokenizer = fresh_tokenizer(dropout=dropout)
    train_tokenizer(tokenizer, pictures(), folder, config, revive_every=2)
    return tokenizer


def run_against(folder: Path, config: TrainConfig) -> Tokenizer:
    """Against a discriminator and without chance: dropout, or codes that become vectors."""
    tokenizer, against = tiny_tokenizer(), AdversarialConfig(weight=0.8, start=1, base_channels=4)
    train_tokenizer(
        tokenizer, pictures(), folder, config, adversarial=against, init_codebook=False, revive_every=99
    )
    return tokenizer


RUNS = pytest.mark.parametrize(
    "run", [run_transformer, run_transformer_from_disk, run_tokenizer], ids=lambda f: f.__name__
)


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(actual: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        if tolerance:
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        else:
            assert a.equal(b), name


# Learning


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_a_transformer_learns_the_tokens_of_its_classes(kind: str, tmp_path: Path) -> None:
    tokenizer, data = tiny_tokenizer(), pictures()
    model = tiny_transformer(kind)
    before = validation_loss(model, tokenizer, data)
    result = train_transformer(model, tokenizer, data, tmp_path, settings(steps=30, batch_size=24, lr=1e-2))
    assert validation_loss(model, tokenizer, data) < 0.8 * before
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [1, 10, 20, 30]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert (result["steps"], result["loss"]) == (30, rows[-1]["loss"])


def test_a_tokenizer_learns_to_reconstruct(tmp_path: Path) -> None:
    tokenizer = fresh_tokenizer()
    result = train_tokenizer(tokenizer, pictures(), tmp_path, settings(steps=30, batch_size=24))
    rows = logged(tmp_path)
    assert rows[-1]["reconstruction"] < 0.8 * rows[0]["reconstruction"]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["reconstruction"] + rows[-1]["quantizer"], rel=1e-5)
    assert 0 < result["codebook_usage"] <= 1


def test_a_finished_run_can_be_loaded_and_leaves_no_state(tmp_path: Path) -> None:
    model = run_transformer(tmp_path / "model", settings(save_every=1e-9))
    assert_same(NextScaleTransformer.from_pretrained(tmp_path / "model"), model)
    tokenizer = run_tokenizer(tmp_path / "tokenizer", settings(save_every=1e-9))
    assert_same(Tokenizer.from_pretrained(tmp_path / "tokenizer"), tokenizer)
    for name in ("model", "tokenizer"):
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert names == FINISHED


def test_a_run_ends_after_its_seconds() -> None:
    assert settings(steps=None, seconds=4.0).progress(99, 1.0) == 0.25
    assert settings(steps=10, seconds=4.0).progress(9, 1.0) == 0.9
    assert settings(steps=10, seconds=4.0).progress(1, 5.0) == 1.0
    assert settings(steps=10).progress(12, 1e9) == 1.0


def test_seconds_alone_end_a_run(tmp_path: Path) -> None:
    model = fresh_transformer()
    result = train_transformer(
        model, tiny_tokenizer(), pictures(), tmp_path, settings(steps=None, seconds=0.05)
    )
    assert result["steps"] >= 1
    assert result["seconds"] >= 0.05


def test_the_codebook_starts_from_data_and_dead_codes_come_back(tmp_path: Path) -> None:
    tokenizer = fresh_tokenizer()
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight[8:] = 1e4  # out of reach, but for a start from data
    train_tokenizer(tokenizer, pictures(), tmp_path / "a", settings(steps=1))
    assert tokenizer.quantizer.codebook.weight.abs().max() < 100

    tokenizer = fresh_tokenizer()
    tokenizer.quantizer.init_codebook = lambda vectors, generator: None
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight[8:] = 1e4
    train_tokenizer(tokenizer, pictures(), tmp_path / "b", settings(steps=20), revive_every=10)
    assert tokenizer.quantizer.codebook.weight.abs().max() < 100
    revived = [row.get("revived") for row in logged(tmp_path / "b")]
    assert revived[0] is None
    assert revived[1] >= 8  # of step 10


def test_every_scale_tells_how_it_uses_the_codebook_and_what_it_leaves(tmp_path: Path) -> None:
    tokenizer = fresh_tokenizer()
    train_tokenizer(tokenizer, pictures(), tmp_path, settings(steps=10))
    last = logged(tmp_path)[-1]
    for name, values in {
        "usage": tokenizer.quantizer.codebook_usage(),
        "perplexity": perplexity(tokenizer.quantizer.usage).tolist(),
    }.items():
        assert [last[f"{name}_{scale}"] for scale in (1, 2, 3)] == pytest.approx(values)
    assert all(0 < last[f"left_{scale}"] < 2 for scale in (1, 2, 3))


def test_revival_every_twenty_steps_is_logged_by_default(tmp_path: Path) -> None:
    train_tokenizer(fresh_tokenizer(), pictures(), tmp_path, settings(steps=20))
    assert [row["step"] for row in logged(tmp_path) if "revived" in row] == [20]


# The seed


@RUNS
def test_the_same_seed_trains_the_same_model(run: Run, tmp_path: Path) -> None:
    first, second, third = (run(tmp_path / str(i), settings(seed=seed)) for i, seed in enumerate((4, 4, 5)))
    assert_same(first, second)
    assert any(not a.equal(b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


def test_iterations_in_training_are_drawn_anew_from_seed_and_step(tmp_path: Path) -> None:
    model, seeds = fresh_transformer(), []

    def noting(seeds: list[int]) -> Any:
        # Of a generator that was seeded and not yet drawn from, this is the seed.
        return lambda _, __, given: seeds.append(given["generator"].initial_seed())

    handle = model.register_forward_pre_hook(noting(seeds), with_kwargs=True)
    train_transformer(model, tiny_tokenizer(), pictures(), tmp_path, settings(seed=2, accumulate=2))
    steps = seeds[::2]
    assert steps == seeds[1::2]  # all parts of a batch get the same
    assert len(set(steps)) == 3
    handle.remove()
    other: list[int] = []
    model.register_forward_pre_hook(noting(other), with_kwargs=True)
    train_transformer(model, tiny_tokenizer(), pictures(), tmp_path, settings(seed=3))
    assert not set(other) & set(steps)


# Interruptions


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, owner: Any, name: str, *, after: bool) -> None:
    """Make the so-manieth call of `owner.name` raise, before or after doing its work."""
    original, calls = getattr(owner, name), []

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call and not after:
            raise Interrupted
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Interrupted
        return result

    monkeypatch.setattr(owner, name, interrupting)


@RUNS
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(steps=6, save_every=1e-9)  # a state after every step
    expected = run(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, viar.training.loop, "set_progress", after=False)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", config)
    assert (tmp_path / "parts" / "state").is_dir()
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    steps = []
    with monkeypatch.context() as patch:
        set_progress = viar.training.loop.set_progress
        patch.setattr(
            viar.training.loop, "set_progress", lambda *a, **k: steps.append(a[1]) or set_progress(*a, **k)
        )
        actual = run(tmp_path / "parts", config)
    assert steps == [4 / 6, 5 / 6]
    assert_same(actual, expected)
    assert [row["step"] for row in logged(tmp_path / "parts")] == [1]


def interrupt(folder: Path, config: TrainConfig, run: Run, at_step: int = 5) -> None:
    """Leave a run that was interrupted at the beginning of that step, counted from 1."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, at_step, viar.training.loop, "set_progress", after=False)
        with pytest.raises(Interrupted):
            run(folder, config)


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory: pytest.TempPathFactory) -> NextScaleTransformer:
    return run_transformer(tmp_path_factory.mktemp("whole"), settings(steps=5))


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (torch, "save", 3, False),
        (torch, "save", 3, True),
        (Path, "rename", 4, False),  # the old state, out of the way
        (Path, "rename", 4, True),
        (Path, "rename", 5, True),  # the new one, into its place
        (shutil, "rmtree", 5, False),
        (shutil, "rmtree", 5, True),
    ],
)
def test_an_interruption_while_saving_leaves_a_state_that_is_whole(
    owner: Any,
    name: str,
    call: int,
    after: bool,
    five_steps: NextScaleTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(steps=5, save_every=1e-9)
    with monkeypatch.context() as patch:
        interrupt_at(patch, call, owner, name, after=after)
        with pytest.raises(Interrupted):
            run_transformer(tmp_path / "parts", config)
    progress = []
    with monkeypatch.context() as patch:
        set_progress = viar.training.loop.set_progress
        patch.setattr(
            viar.training.loop, "set_progress", lambda *a, **k: progress.append(a[1]) or set_progress(*a, **k)
        )
        actual = run_transformer(tmp_path / "parts", config)
    assert progress[0] > 0  # it did not start over
    assert_same(actual, five_steps)
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names == FINISHED


def test_a_run_interrupted_before_its_first_state_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(steps=12)
    expected = run_transformer(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 11, viar.training.loop, "set_progress", after=False)
        with pytest.raises(Interrupted):
            run_transformer(tmp_path / "parts", config)
    assert [row["step"] for row in logged(tmp_path / "parts")] == [1, 10]
    assert_same(run_transformer(tmp_path / "parts", config), expected)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


# The step


def gradients_of(run: Run, folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Gradient of the first step, as the optimiser gets it."""
    seen: list[Tensor] = []

    class Noting(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            held = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(torch.cat([g.flatten() for g in held]).clone())
            super().step(closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Noting)
        run(folder, config)
    return seen[0]


def run_without_dropout(folder: Path, config: TrainConfig) -> nn.Module:
    return run_transformer(folder, config, label_dropout=0.0, drop_path=0.0)


def run_averaged(folder: Path, config: TrainConfig) -> nn.Module:
    """With averaged weights, of which those are kept that do best on held-out pictures."""
    model = fresh_transformer(label_dropout=0.0, drop_path=0.0)
    config = dataclasses.replace(config, ema=0.5, validate_every=2, patience=1)
    train_transformer(model, tiny_tokenizer(), pictures(), folder, config, held_out=pictures(5))
    return model


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (
        gradients_of(run_without_dropout, tmp_path / str(n), settings(steps=1, accumulate=n), monkeypatch)
        for n in (1, 4)
    )
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_training_in_parts_ends_where_training_in_one_does(tmp_path: Path) -> None:
    whole, parts = (run_without_dropout(tmp_path / str(n), settings(accumulate=n)) for n in (1, 2))
    assert_same(parts, whole, atol=2e-5, rtol=1e-4)


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = gradients_of(run_without_dropout, tmp_path / "a", settings(steps=1), monkeypatch)
    clipped = gradients_of(run_without_dropout, tmp_path / "b", settings(steps=1, clip=1e-3), monkeypatch)
    assert free.norm() > 1e-2
    torch.testing.assert_close(clipped, free * 1e-3 / free.norm(), atol=1e-7, rtol=1e-3)


def test_schedules_reach_the_optimizer_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        viar.training.loop, "set_progress", lambda *args, **given: seen.append((args[1], given))
    )
    run_transformer(tmp_path, settings(steps=4, weight_decay=(0.1, 0.2)))
    assert [progress for progress, _ in seen] == [0, 0.25, 0.5, 0.75]
    assert all(given == {"lr": 3e-3, "weight_decay": (0.1, 0.2)} for _, given in seen)


def test_bfloat16_training_moves_the_weights_of_the_implicit_block(tmp_path: Path) -> None:
    trunk = ImplicitTrunkConfig(num_pre=1, num_post=1, no_grad=(2, 2), grad=(1, 1))
    start = fresh_transformer(trunk=trunk)
    for precision in ("bf16", "no", "bf16"):  # one process may use both
        model = run_transformer(tmp_path / precision, settings(mixed_precision=precision), trunk=trunk)
        moved = zip(start.named_parameters(), model.parameters(), strict=True)
        assert all(not a.equal(b) and b.dtype == torch.float32 for (_, a), b in moved)


@pytest.mark.parametrize("source", [Disk, lambda data: data], ids=["from disk", "in memory"])
def test_labels_that_are_no_classes_are_refused_before_they_are_on_the_device(
    source: Callable[[TensorImages], Any], tmp_path: Path
) -> None:
    data = source(TensorImages(pictures().images, torch.full((len(pictures()),), 3)))
    with pytest.raises(ValueError, match="the model's classes, 0 to 2, got values from 3 to 3"):
        train_transformer(fresh_transformer(), tiny_tokenizer(), data, tmp_path, settings())


def test_tokens_are_those_of_full_precision_whatever_the_training_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, data, targets = tiny_tokenizer(), pictures(), {}

    def noted(logits: Tensor, wanted: Tensor) -> Tensor:
        targets.setdefault(folder.name, []).append(wanted)
        return cross_entropy(logits, wanted)

    monkeypatch.setattr(viar.training.losses, "cross_entropy", noted)
    for folder, source in ((tmp_path / "memory", data), (tmp_path / "disk", Disk(data))):
        config = settings(batch_size=24, mixed_precision="bf16")
        train_transformer(fresh_transformer(), tokenizer, source, folder, config)
    assert torch.cat(targets["memory"]).equal(torch.cat(targets["disk"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = tokenize(tokenizer, data.images, data.labels)
    for a, b in zip(tokens, tokenize(tokenizer, data.images, data.labels), strict=True):
        assert a.equal(b)


def test_the_tokenizer_is_frozen_while_a_transformer_trains(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer().train()
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    train_transformer(fresh_transformer(), tokenizer, Disk(pictures()), tmp_path, settings())
    assert all(value.equal(before[key]) for key, value in tokenizer.state_dict().items())
    assert not tokenizer.training
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_tokenized_images_hold_what_tokenizing_a_batch_gives() -> None:
    tokenizer, data = tiny_tokenizer(), pictures(10)
    samples = TokenizedImages(tokenizer, data, batch_size=4)
    assert len(samples) == 10
    where = [7, 0, 9]
    expected = tokenize(tokenizer, *data.__getitems__(where))
    for actual, wanted in zip(samples.__getitems__(where), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_cross_entropy_is_the_mean_over_all_positions() -> None:
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_validation_loss_is_that_of_all_images_in_evaluation_mode() -> None:
    tokenizer, data = tiny_tokenizer(), pictures(10)
    model = tiny_transformer(label_dropout=0.9, drop_path=0.5).train()
    losses = [validation_loss(model, tokenizer, data, batch_size=size) for size in (10, 4, 1)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert model.training
    inputs, targets, labels = tokenize(tokenizer, data.images, data.labels)
    with torch.no_grad():
        logits = model.eval()(labels, inputs, 5)
    expected = F.cross_entropy(logits.transpose(1, 2), targets)
    assert validation_loss(model, tokenizer, data, iterations=5) == pytest.approx(float(expected), rel=1e-5)
    assert not model.training


# Two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which two processes have trained together, see `train_worker.py`."""
    folder = tmp_path_factory.mktemp("two")
    for sharding in ("none", "full"):
        config = settings(steps=6, save_every=1e-9, sample_every=2)
        interrupt(folder / sharding / "of one", config, run_without_dropout)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("train_worker.py")), str(folder), str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = worker.communicate(timeout=DEADLOCK)
        assert worker.returncode == 0, output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "saving", "parts", "tokenizer", "measured", "adversarial"])
def test_processes_that_train_together_hold_the_same_model(name: str, two_processes: Path) -> None:
    first, second = (torch.load(two_processes / f"{name}.{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    for key, value in first.items():
        # hits are counted by each process for itself, and those of the main process shared
        assert value.equal(second[key]) or key == "quantizer.usage", key
    assert {path.name for path in (two_processes / name).iterdir()} == FINISHED


@pytest.mark.slow
def test_a_step_that_one_process_finds_not_finite_is_left_out_by_both(
    two_processes: Path, tmp_path: Path
) -> None:
    told = [json.loads((two_processes / f"measured.{rank}.json").read_text()) for rank in range(2)]
    assert [result["skipped"] for result in told] == [1, 1]
    for name in ("best_step", "validation_loss"):
        assert told[0][name] == told[1][name]
    model = NextScaleTransformer.from_pretrained(two_processes / "measured").eval()
    own = validation_loss(model, tiny_tokenizer(), pictures(9))
    assert told[0]["validation_loss"] == pytest.approx(own, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "parts"])
def test_two_processes_train_what_one_trains_on_the_same_batches(
    name: str, two_processes: Path, tmp_path: Path
) -> None:
    expected = run_without_dropout(tmp_path, settings())
    together = NextScaleTransformer.from_pretrained(two_processes / name)
    assert_same(together, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_train_the_codebook_that_one_does(two_processes: Path, tmp_path: Path) -> None:
    expected = run_tokenizer(tmp_path, settings(steps=4), dropout=0.0)
    together = Tokenizer.from_pretrained(two_processes / "tokenizer without dropout")
    expected.quantizer.usage /= 2  # the mean of the processes' hits
    assert_same(together, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_train_a_tokenizer_against_the_discriminator_of_one(
    two_processes: Path, tmp_path: Path
) -> None:
    alone = run_against(tmp_path, settings()).eval()
    together = Tokenizer.from_pretrained(two_processes / "adversarial").eval()
    # Not the weights: the bias of the keys changes nothing, and rounding alone moves it.
    expected, actual = (tokenizer(pictures().images).reconstruction for tokenizer in (alone, together))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


SHARDINGS = pytest.mark.parametrize("sharding", ["none", "full"])


@pytest.mark.slow
@SHARDINGS
def test_processes_that_share_one_set_of_weights_train_the_same_model_and_draw(
    sharding: str, two_processes: Path, tmp_path: Path
) -> None:
    folder = two_processes / sharding / "plain"
    together = NextScaleTransformer.from_pretrained(folder)
    assert_same(together, run_without_dropout(tmp_path, settings(steps=6)), atol=1e-5, rtol=1e-4)
    averaged = NextScaleTransformer.from_pretrained(folder.with_name("averaged"))
    expected = run_averaged(tmp_path / "averaged", settings(steps=6))
    assert_same(averaged, expected, atol=1e-5, rtol=1e-4)
    drawn = sorted(path.name for path in (folder / "samples").iterdir())
    assert drawn == [f"step-{step:06d}.png" for step in (2, 4, 6)]


@pytest.mark.slow
@SHARDINGS
def test_two_processes_go_on_bit_for_bit_without_a_common_folder(sharding: str, two_processes: Path) -> None:
    whole, parts = (
        NextScaleTransformer.from_pretrained(two_processes / sharding / name) for name in ("whole", "parts")
    )
    assert_same(parts, whole)
    assert not list((two_processes / "elsewhere").rglob("*.*"))


@pytest.mark.slow
@SHARDINGS
def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(
    sharding: str, two_processes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run_without_dropout(tmp_path, settings(steps=6))
    two_after_one = NextScaleTransformer.from_pretrained(two_processes / sharding / "of one")
    assert_same(two_after_one, expected, atol=1e-5, rtol=1e-4)
    folder = two_processes / sharding / "for one"
    assert (folder / "state").is_dir()
    capsys.readouterr()
    one_after_two = run_without_dropout(folder, settings(steps=6))
    assert_same(one_after_two, expected, atol=1e-5, rtol=1e-4)
    assert "the run goes on in 1 processes instead of 2" in capsys.readouterr().out


@pytest.mark.slow
def test_the_main_process_alone_draws_and_the_model_is_the_same(two_processes: Path) -> None:
    assert [path.name for path in (two_processes / "pictures" / "samples").iterdir()] == ["step-000002.png"]
    for rank in range(2):
        drawn, plain = (
            torch.load(two_processes / f"{name}.{rank}.pt", weights_only=True)
            for name in ("pictures", "transformer")
        )
        assert all(value.equal(plain[key]) for key, value in drawn.items())


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "give steps or seconds"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"seconds": -1.0}, "seconds must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"save_every": 0.0}, "save_every must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"sample_every": -1}, "sample_every must be at least 0, got -1"),
        ({"validate_every": -1}, "validate_every must be at least 0, got -1"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"max_skipped": 0}, "max_skipped must be at least 1, got 0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"trackers": ("paper",)}, r"trackers must be out of .*, got \['paper'\]"),
        ({"mixed_precision": "half"}, "mixed_precision must be 'no', 'bf16' or 'fp16', got 'half'"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        settings(**changes)


def test_a_batch_that_does_not_divide_into_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=8 must divide among accumulate=3 parts"):
        run_transformer(tmp_path, settings(accumulate=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"codebook_size": 8}, "codebook_size is 16, the model's is 8"), ({"sides": (1, 3)}, "sides is")],
)
def test_a_tokenizer_of_other_sizes_is_refused_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_transformer(fresh_transformer(**changes), tiny_tokenizer(), pictures(), tmp_path, settings())


def test_crops_of_a_folder_are_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    files = []
    for index, image in enumerate(uniform(6, 3, 9, 12)):
        save_picture(image, tmp_path / f"{index}.png")
        files.append((tmp_path / f"{index}.png", 0))
    models = []
    for workers in (0, 2):
        tokenizer, data = fresh_tokenizer(), AugmentedImages(ImageFolder(files, 6, train=True), ["flip"])
        train_tokenizer(tokenizer, data, tmp_path / str(workers), settings(workers=workers))
        models.append(tokenizer)
    assert_same(*models)
    told = json.loads((tmp_path / "0" / "run.json").read_text())
    assert told["data"]["augmentations"] == ["crop", "flip"]
