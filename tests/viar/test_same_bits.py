"""The same bits in every run: what it sets and puts back, what it refuses, and what a run keeps of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_broken_pictures import call
from test_train import fresh_transformer, pictures, settings
from tiny_models import tiny_tokenizer, tiny_transformer

from viar import determinism, prepare_inference
from viar.commands.table import COMMANDS
from viar.determinism import WORKSPACE, deterministic, is_deterministic
from viar.training import train_transformer
from viar.training.settings import compare_settings, run_settings

QUIET = Console(quiet=True)


def in_force() -> tuple[Any, ...]:
    """Settings of PyTorch that it changes."""
    cudnn = torch.backends.cudnn
    return (
        is_deterministic(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
        cudnn.deterministic,
        cudnn.benchmark,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


def test_what_it_sets_is_put_back_also_after_an_error() -> None:
    num_threads = torch.get_num_threads()
    precision = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        own = in_force()
        with deterministic():
            assert in_force() == (True, True, False, 1, True, False, "ieee")
        assert in_force() == own
        with pytest.raises(KeyError), deterministic():
            raise KeyError
        assert in_force() == own
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(num_threads)


def test_what_a_device_cannot_do_so_is_refused_by_name_and_other_faults_are_not() -> None:
    told = r"compute pooled_backward_cuda that gives the same bits .* a CPU"
    with pytest.raises(ValueError, match=told), deterministic():
        raise RuntimeError("pooled_backward_cuda does not have a deterministic implementation, but")
    with pytest.raises(RuntimeError, match="another"), deterministic():
        raise RuntimeError("another")


@pytest.mark.parametrize(("given", "started"), [(None, True), (":0:0", False)])
def test_a_gpu_that_is_told_too_late_is_refused(
    given: str | None, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    if given is not None:
        monkeypatch.setenv(WORKSPACE, given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    with pytest.raises(ValueError, match=f"{WORKSPACE}=:4096:8 .* got {given!r}; set it"), deterministic():
        pass


def test_a_gpu_that_has_not_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, "")  # so that what is set below is taken back
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    determinism._choose_workspace()
    assert os.environ[WORKSPACE] == ":4096:8"


def test_what_goes_by_measured_times_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    with deterministic(), pytest.raises(ValueError, match=r"compile: .* got compile=True; leave it"):
        prepare_inference(model, tokenizer, compile=True)
    for changes in ({"seconds": 5.0}, {"compile": True}):
        name, value = next(iter(changes.items()))
        with deterministic(), pytest.raises(ValueError, match=f"TrainConfig: {name}={value} goes by"):
            train_transformer(model, tokenizer, pictures(), tmp_path, settings(**changes), console=QUIET)


def test_a_run_keeps_that_it_was_begun_so_and_says_when_it_goes_on_otherwise(tmp_path: Path) -> None:
    model, config = fresh_transformer(), settings()
    plain = run_settings(model, pictures(), config)
    assert "deterministic" not in plain  # as in runs of earlier releases
    with deterministic():
        train_transformer(model, tiny_tokenizer(), pictures(), tmp_path, config, console=QUIET)
        told = run_settings(model, pictures(), config)
    assert json.loads((tmp_path / "run.json").read_text())["deterministic"] is True
    assert told == {**plain, "deterministic": True}
    (tmp_path / "run.json").write_text(json.dumps(told))
    (tmp_path / "state").mkdir()
    lines = compare_settings(tmp_path, plain)
    assert lines == ["the run goes on with another deterministic: true there, null now"]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_commands_that_compute_take_the_flag(name: str) -> None:
    code, output, _ = call(name, "--help")
    assert code == 0
    assert ("--deterministic" in output) == COMMANDS[name].computes


def test_a_command_says_what_it_holds_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_transformer().save_pretrained("viar")
    tiny_tokenizer().save_pretrained("tokenizer")
    pair = ("--model", "viar", "--tokenizer", "tokenizer", "--per-class", 1, "--deterministic")
    code, output, errors = call("generate", *pair, "--json")
    assert code == 0
    assert json.loads(output)["num_images"] == 3
    assert " ".join(errors.split()).startswith("deterministic: the same bits in every run")
    code, _, errors = call("generate", *pair, "--compile")
    assert code == 2
    assert "leave it, or deterministic" in errors
