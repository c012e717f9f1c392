"""What `--dry-run` tells of a training, and that it leaves nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_cli import call
from tiny_models import tiny_config, tiny_tokenizer
from torch import nn

from viar import ImplicitTrunkConfig, NextScaleTransformer
from viar.training import TrainConfig, dry_run, train_tokenizer, train_transformer
from viar.training.dry_run import (
    Train,
    deepest_and_mean,
    made_up_tokenizer,
    random_images,
    random_tokens,
    two_steps,
)

CONFIG = TrainConfig(steps=1000, batch_size=8, accumulate=2)


class Clock:
    """Stands still but for what a training says that it takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.batches: list[int] = []  # images of each that was made
        monkeypatch.setattr(dry_run, "time", SimpleNamespace(monotonic=lambda: self.now))

    def training(self, *runs: Sequence[float]) -> Train:
        """One whose batches take these seconds, in its first run, its second and so on."""
        remaining = iter(runs)

        def train(model: nn.Module, data: object, folder: Path, config: TrainConfig) -> None:
            assert folder.is_dir()
            for seconds in (*next(remaining), 0.0):
                images, _ = data.__getitems__(range(config.batch_size // config.accumulate))  # type: ignore[attr-defined]
                self.batches.append(len(images))
                self.now += seconds
            raise AssertionError("more batches than those of two steps")

        return train


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def linear() -> nn.Module:
    return nn.Linear(999, 1000)


def test_the_second_step_is_timed_with_all_its_parts(clock: Clock) -> None:
    told = two_steps([linear], clock.training((9, 1), (50, 60, 1, 2)), random_images(2), CONFIG)
    assert clock.batches == [1, 1, 4, 4, 4, 4]  # one image first: is there time for a whole batch
    assert (told.seconds, told.measured, told.why_not) == (3.0, 8, "")
    assert "time of a step of 8 images: 3 s (1 process on cpu)" in told.lines()
    assert "time of the run: 50 min (at most 1,000 steps)" in told.lines()


def test_where_a_batch_would_take_minutes_an_image_is_measured(clock: Clock) -> None:
    told = two_steps([linear], clock.training((50, 30), (50, 20)), random_images(2), CONFIG)
    assert clock.batches == [1, 1, 1, 1]
    lines = told.lines()
    assert "two steps of 8 images would take 8 min here" in lines
    assert "time of a step of 8 images: 3 min (1 process on cpu, 8 times as long as measured)" in lines
    assert "time of the run: 1 d 20 h (at most 1,000 steps)" in lines


def test_time_is_of_the_last_model_and_a_run_ends_by_whichever_end_is_first(clock: Clock) -> None:
    train = clock.training((1, 1), (1, 1, 7, 8), (1, 1, 2, 3))
    told = two_steps([linear, linear], train, random_images(2), replace(CONFIG, seconds=60))
    assert told.seconds == 5.0
    assert told.lines()[-1] == "time of the run: 60 s (at most 1,000 steps)"


def test_parameters_and_what_is_there_all_the_time_are_counted(clock: Clock) -> None:
    for ema, share in ((0.0, 4), (0.9, 5)):
        train = clock.training((1, 1), (1, 1, 1, 1))
        told = two_steps([linear], train, random_images(2), replace(CONFIG, ema=ema))
        assert told.parameters == {"weight": 999_000, "others": 1000}
        assert sum(told.fixed_bytes.values()) == share * 4_000_000
        assert told.peak_bytes > 50e6  # PyTorch alone takes as much
        assert "parameters: 1.00 M (weight 1.00 M, others 1,000)" in told.lines()


def test_a_model_that_does_not_fit_is_told_of_without_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run.psutil, "virtual_memory", lambda: SimpleNamespace(available=15_900_000))
    told = two_steps([linear], pytest.fail, random_images(2), CONFIG)
    assert told.lines()[1:] == [
        "memory all the time: 16.0 MB (weights 4.0 MB, gradients 4.0 MB, two moments 8.0 MB)",
        "no step was taken: 15.9 MB are free here",
    ]


def test_a_device_that_cannot_do_what_is_asked_is_no_reason_not_to_count() -> None:
    told = two_steps([linear], pytest.fail, random_images(2), replace(CONFIG, mixed_precision="fp16"))
    assert told.parameters["weight"] == 999_000
    assert told.lines()[-1].startswith("no step was taken: mixed_precision='fp16' needs a GPU")


def test_most_memory_and_the_mean_time_are_those_of_random_depth() -> None:
    config = tiny_config("implicit")
    trunk = ImplicitTrunkConfig(num_pre=1, num_post=0, no_grad=(0, 10), grad=(1, 12))
    deepest, mean = deepest_and_mean(replace(config, trunk=trunk))
    for settings, no_grad, grad in ((deepest, 10, 12), (mean, 5, 7)):
        assert settings == replace(config, trunk=replace(trunk, no_grad=(no_grad,) * 2, grad=(grad,) * 2))
    explicit = tiny_config("explicit")
    assert deepest_and_mean(explicit) == [explicit]


@pytest.mark.parametrize("kind", ["tokenizer", "explicit", "implicit"])
def test_the_loop_that_trains_takes_the_steps_and_the_folder_is_gone(kind: str) -> None:
    folders: list[Path] = []
    quiet = Console(quiet=True)

    def train(model: nn.Module, data: object, folder: Path, config: TrainConfig) -> None:
        folders.append(folder)
        if kind == "tokenizer":
            train_tokenizer(model, data, folder, config, console=quiet)  # type: ignore[arg-type]
        else:
            codec = made_up_tokenizer(tiny_config(kind))
            train_transformer(model, codec, data, folder, config, console=quiet)  # type: ignore[arg-type]

    if kind == "tokenizer":
        builds, make = [tiny_tokenizer], random_images(tiny_tokenizer().config.image_side)
    else:
        config = tiny_config(kind)
        builds = [partial(NextScaleTransformer, some) for some in deepest_and_mean(config)]
        make = random_tokens(config)
    told = two_steps(builds, train, make, replace(CONFIG, ema=0.9))
    gc.collect()
    assert told.measured == 8
    assert 0 < told.seconds < 60
    assert sum(told.parameters.values()) == sum(p.numel() for p in builds[0]().parameters())
    assert len(folders) == 1 + len(builds)
    assert not any(folder.exists() for folder in folders)


def test_the_command_needs_neither_pictures_nor_tokenizer_nor_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--train.batch-size", 4, "--data", "nowhere")
    for recipe in (("train-tokenizer", "digits"), ("train", "digits-viar", "--train.ema", 0.9)):
        code, output, errors = call(*recipe, *small, "--dry-run")
        assert (code, errors) == (0, "")
        assert output.startswith("parameters: 0.")
        assert "time of a step of 4 images" in output
    assert "averaged weights 1.1 MB" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", [("train-tokenizer", "digits"), ("train", "digits-viar")])
def test_what_is_given_beside_a_dry_run_is_checked(recipe: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    code, _, errors = call(*recipe, "--out", tmp_path, "--dry-run")
    assert code == 2
    assert "holds a finished run" in errors
    code, _, errors = call(*recipe, "--from", tmp_path / "nothing", "--dry-run")
    assert code == 2
    assert "--from" in errors
    code, _, errors = call(*recipe)
    assert code == 2
    assert "--out: give the folder of the run; or --dry-run, which needs none" in errors
    if recipe[0] == "train":
        code, _, errors = call(*recipe, "--out", tmp_path / "new")
        assert code == 2
        assert "--tokenizer: give a trained tokenizer; or --dry-run, which needs none" in errors
