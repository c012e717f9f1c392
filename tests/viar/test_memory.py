"""Work that memory does not suffice for is done in halves, and ends with the same."""

from __future__ import annotations

import io
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import tiny_tokenizer, tiny_transformer

import viar.commands.generate
import viar.generation.series.series
from viar import Sampling
from viar.commands.flags import ExecutionFlags, SamplingFlags
from viar.commands.generate import generate_batches
from viar.generation.series.series import generate_series
from viar.memory import BatchSize, is_shortage

SHORTAGES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("can't allocate memory: 9"),
    RuntimeError("could not create a primitive"),
]


@given(start=st.integers(0, 5), num=st.integers(0, 40), most=st.integers(1, 50), room=st.integers(1, 50))
def test_everything_is_done_once_in_order_and_in_parts_that_there_is_room_for(
    start: int, num: int, most: int, room: int
) -> None:
    told: list[int] = []

    def work(part: range) -> list[int]:
        if len(part) > room:
            raise MemoryError
        return list(part)

    size = BatchSize(most, told.append)
    done = list(size.parts(range(start, start + num), work))
    assert [number for part in done for number in part] == list(range(start, start + num))
    assert all(len(part) <= min(most, room) for part in done)
    assert told == sorted(told, reverse=True)
    # Halves of the first part that was too large, rounded up: no smaller than they have to be.
    assert all(2 * least > room for least in told)


def test_what_was_computed_before_memory_ended_is_gone_at_the_next_try() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(part: range) -> None:
        assert all(reference() is None for reference in held)
        made = torch.zeros(9)
        held.append(weakref.ref(made))
        if len(part) > 1:
            raise MemoryError(made.shape)

    list(BatchSize(4).parts(range(4), work))


@pytest.mark.parametrize("error", SHORTAGES)
def test_one_alone_that_there_is_no_room_for_is_told(error: Exception) -> None:
    def work(part: range) -> None:
        raise error

    assert is_shortage(error)
    with pytest.raises(type(error)):
        list(BatchSize(8).parts(range(8), work))


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def work(part: range) -> None:
        calls.append(part)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(BatchSize(8).parts(range(8), work))
    assert calls == [range(8)]


def short_of_memory(room: int, monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> None:
    """Let a sampler fail on more than `room` labels, as an allocator does."""
    real = getattr(place, name)

    def sample(model: object, tokenizer: object, labels: object, *rest: object, **settings: object) -> object:
        if len(labels) > room:  # type: ignore[arg-type]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(model, tokenizer, labels, *rest, **settings)

    monkeypatch.setattr(place, name, sample)


def test_a_series_goes_on_in_smaller_batches_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, told = (tiny_transformer("implicit"), tiny_tokenizer()), io.StringIO()
    generate_series(*models, tmp_path / "whole", 20, batch_size=16, console=Console(quiet=True))
    short_of_memory(3, monkeypatch, viar.generation.series.series, "sample_tokens")
    generate_series(*models, tmp_path / "short", 20, batch_size=16, console=Console(file=told, width=200))
    whole, short = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "short"))
    assert short == whole
    assert [told.getvalue().count(f"{most} images are sampled") for most in (8, 4, 2)] == [1, 1, 1]


def test_a_series_whose_batches_are_a_setting_is_refused_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny_transformer("implicit"), tiny_tokenizer()
    short_of_memory(3, monkeypatch, viar.generation.series.series, "sample_tokens")
    with pytest.raises(ValueError, match=r"batch_size: memory .* 4 images .* mixtures of codes"):
        generate_series(
            *models,
            tmp_path,
            4,
            batch_size=4,
            sampling=Sampling(more_smooth=True),
            console=Console(quiet=True),
        )


@pytest.mark.parametrize("report", [False, True])
def test_a_grid_goes_on_in_smaller_batches_with_the_same_images(
    report: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, told = (tiny_transformer("implicit"), tiny_tokenizer()), io.StringIO()
    reports: list[int] = []
    labels, console = torch.arange(12) % 3, Console(file=told, width=200)
    flags = SamplingFlags(execution=ExecutionFlags(batch_size=8))
    whole = torch.cat(list(generate_batches(*models, labels, flags, Console(quiet=True))))
    short_of_memory(2, monkeypatch, viar.commands.generate, "generate")
    tell = (lambda first, took: reports.append(first)) if report else None
    short = torch.cat(list(generate_batches(*models, labels, flags, console, tell=tell)))
    assert reports == [0, 2, 4, 6, 8, 10] * report
    torch.testing.assert_close(short, whole)
    assert "from here on 2 images are generated at a time" in told.getvalue()
