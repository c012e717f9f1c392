"""Whatever is given to what deqlib and viar export: a result, or an error that says what was wrong."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import targets_deqlib
import targets_viar
import torch
from bad_values import Own
from calls import Target, count_calls, drawn, run_calls, unclear, watched
from forks import Outcome

import deqlib
import viar
import viar.data
import viar.evaluation
import viar.tokenizer
import viar.training
import viar.weights
from deqlib import diagnostics, loops, testing

FIRST = 1_000_000  # number of the first call, which no trial while writing this had
TARGETS = {"deqlib": targets_deqlib, "viar": targets_viar}
EXPORTS = {
    "deqlib": (deqlib, deqlib.nn, loops, diagnostics, testing),
    "viar": (viar, viar.data, viar.evaluation, viar.training, viar.tokenizer, viar.weights),
}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls write goes with the test, and nobody else's cached folder is used."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    targets_viar.folder.cache_clear()


@pytest.mark.parametrize("package", ["deqlib", "viar"])
def test_a_call_with_bad_arguments_gives_a_result_or_says_what_is_wrong(
    package: str, times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    num = times(750, 60_000)
    counted = count_calls(f"targets_{package}", range(FIRST, FIRST + num), times(1, 2))
    assert sum(counted.kinds.values()) == num
    assert not counted.bad(), counted.bad()
    kinds = ("taken", "refused", "undocumented", "hung")
    told = {kind: counted.kinds[kind] for kind in kinds}
    tally("inputs", f"calls of {package}, one or two arguments of each spoilt", inputs=num, **told)


@pytest.mark.parametrize("package", ["deqlib", "viar"])
def test_all_that_a_package_exports_is_called_or_it_is_said_why_not(package: str) -> None:
    named = {name for target in TARGETS[package].TARGETS for name in target.name.split(", ")[0].split(".")}
    named |= {name for names in TARGETS[package].NOT_CALLED for name in names.split(", ")}
    exported = {name for module in EXPORTS[package] for name in module.__all__}
    assert not exported - named


@pytest.mark.parametrize("target", targets_deqlib.SETTINGS, ids=lambda target: target.name)
def test_what_is_spoilt_was_valid_before(target: Target) -> None:
    assert watched(target, target.given(), []).kind == "taken"


def test_a_call_is_the_same_for_the_same_number() -> None:
    for number in range(40):
        one, other = (drawn(targets_deqlib.SETTINGS, number) for _ in range(2))
        assert one[0] is other[0]
        assert one[2] == other[2]


def _outcome_of(call: Callable[[], object]) -> list[Outcome]:
    target = Target("it", call, dict)
    counted = run_calls([target], range(1))
    return [Outcome(kind, name, told) for kind, name, told in counted.told]


def test_a_process_that_ends_or_never_answers_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calls.SECONDS", 0.05)
    (ended,) = _outcome_of(lambda: os._exit(3))
    assert ended.kind == "undocumented"
    assert "ended the interpreter" in ended.told
    assert [outcome.kind for outcome in _outcome_of(lambda: time.sleep(60))] == ["hung"]


def test_calls_after_one_that_ended_its_process_are_made_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forks.AT_A_TIME", 6)
    calls = Target("it", lambda at: os._exit(3) if at == 1 else at, lambda: {"at": torch.tensor([5])})
    counted = run_calls([calls], range(30))
    assert sum(counted.kinds.values()) == 30
    assert counted.kinds["taken"] > 10


def test_an_error_from_the_depths_is_told_from_one_that_was_meant() -> None:
    def error_of(call: Callable[[], object]) -> Exception:
        with pytest.raises(Exception) as caught:  # noqa: PT011  # of any kind
            call()
        return caught.value

    assert unclear(error_of(lambda: deqlib.Picard(damping="x"))) == ""
    assert unclear(error_of(lambda: deqlib.Picard(daming=1))) == ""
    assert "evict" in unclear(error_of(lambda: deqlib.EquilibriumCache.evict(3, 1)))  # type: ignore[arg-type]

    def own(z: torch.Tensor) -> torch.Tensor:
        raise Own("mine")

    with pytest.raises(Own, match="mine"):
        deqlib.fixed_point(own, torch.zeros(2, 3))
