from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from deqlib import Stopping


def test_the_defaults_are_those_documented() -> None:
    rule = Stopping()
    assert (rule.rtol, rule.atol, rule.max_steps) == (1e-3, 0.0, 50)
    assert not rule.is_fixed


def test_steps_is_a_fixed_number_of_steps_that_measures_only_when_asked() -> None:
    assert Stopping.steps(7).is_fixed
    assert Stopping.steps(7).max_steps == 7
    assert not Stopping.steps(7).measure
    assert Stopping.steps(7, measure=True).measure
    assert Stopping.steps(0).max_steps == 0


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rtol": -1e-3}, ValueError, r"rtol must be in \[0, inf\], got -0.001"),
        ({"rtol": float("nan")}, ValueError, "rtol"),
        ({"rtol": "1e-3"}, TypeError, r"rtol must be a number, got '1e-3' \(str\)"),
        ({"atol": -1.0}, ValueError, "atol"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"max_steps": 10.0}, TypeError, "max_steps must be an int, got 10.0"),
        ({"check_every": 0}, ValueError, "check_every"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"blowup": 1.0}, ValueError, r"blowup must be in \(1, inf\], got 1.0"),
        ({"measure": False}, ValueError, r"measure=False needs a fixed number of steps.*Stopping.steps"),
        ({"rtol": None, "max_steps": -1}, ValueError, "max_steps must be at least 0, got -1"),
        ({"tolerance": 1e-3}, TypeError, "tolerance"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Stopping(**settings)


@pytest.mark.parametrize("setting", [{"atol": 1e-3}, {"check_every": 5}, {"patience": 3}, {"blowup": 10.0}])
def test_a_setting_that_a_fixed_number_of_steps_makes_inert_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=f"{next(iter(setting))}.* has no effect with a fixed number of steps"
    ):
        Stopping(rtol=None, max_steps=5, **setting)


def test_a_rule_is_a_value() -> None:
    assert Stopping(rtol=1e-4) == Stopping(rtol=1e-4)
    assert hash(Stopping(rtol=1e-4)) == hash(Stopping(rtol=1e-4))
    assert dataclasses.replace(Stopping(), max_steps=9) == Stopping(max_steps=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Stopping().rtol = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Stopping(1e-3)  # type: ignore[misc]
