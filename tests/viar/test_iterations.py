"""The knob: every form of `iterations` spelled out scale by scale."""

from __future__ import annotations

from fractions import Fraction
from math import trunc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deqlib import Anderson, Picard
from viar import Adaptive, Budget
from viar.model.schedule import iteration_schedule


@given(st.integers(1, 99), st.integers(1, 14))
def test_an_int_holds_for_all_scales(count: int, num_scales: int) -> None:
    assert iteration_schedule(count, num_scales) == [count] * num_scales


@given(st.integers(1, 200), st.integers(1, 200), st.integers(2, 14))
def test_a_tuple_is_linear_in_exact_fractions_truncated_to_int(
    first: int, last: int, num_scales: int
) -> None:
    exact = [first + Fraction(last - first) * k / (num_scales - 1) for k in range(num_scales)]
    assert iteration_schedule((first, last), num_scales) == [trunc(value) for value in exact]


def test_a_tuple_meets_both_ends() -> None:
    assert iteration_schedule((10, 1), 10) == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert iteration_schedule((10, 10), 10) == [10] * 10
    assert iteration_schedule((4, 2), 4) == [4, 3, 2, 2]
    assert iteration_schedule((7, 3), 1) == [7]
    assert iteration_schedule((10, 2), 2) == [10, 2]
    # 1 + 15 / 11 * 11 is 15.999999999999998
    assert iteration_schedule((1, 16), 12) == [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 16]


@given(st.lists(st.integers(1, 99), min_size=1, max_size=14))
def test_a_list_is_taken_as_it_is(counts: list[int]) -> None:
    schedule = iteration_schedule(counts, len(counts))
    assert schedule == counts
    assert schedule is not counts


def test_two_counts_for_two_scales_mean_the_same_as_list_and_as_tuple() -> None:
    assert iteration_schedule([5, 9], 2) == iteration_schedule((5, 9), 2) == [5, 9]


def test_a_longer_tuple_is_one_count_a_scale() -> None:
    assert iteration_schedule((3, 5, 4), 3) == [3, 5, 4]


def test_adaptive_holds_for_all_scales_and_carries_its_rule() -> None:
    adaptive = Adaptive(rtol=1e-3, max_steps=7, solver=Anderson(memory=2))
    assert iteration_schedule(adaptive, 3) == [adaptive] * 3
    assert (adaptive.stopping.rtol, adaptive.stopping.max_steps) == (1e-3, 7)
    assert Adaptive().solver == Picard()


@given(st.integers(1, 14), st.integers(0, 300), st.floats(1, 50))
def test_a_budget_is_spent_exactly_and_counts_never_rise(num_scales: int, extra: int, ratio: float) -> None:
    counts = iteration_schedule(Budget(evaluations=num_scales + extra, ratio=ratio), num_scales)
    assert len(counts) == num_scales
    assert sum(counts) == num_scales + extra
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1


@given(st.integers(2, 14), st.integers(1, 30))
def test_a_budget_of_ratio_one_spreads_evenly(num_scales: int, each: int) -> None:
    assert (
        iteration_schedule(Budget(evaluations=each * num_scales, ratio=1), num_scales) == [each] * num_scales
    )


def test_a_budget_falls_linearly_with_its_ratio() -> None:
    assert Budget(evaluations=60).counts(10) == [10, 9, 8, 7, 6, 6, 5, 4, 3, 2]
    exact = [10 - 8 * k / 9 for k in range(10)]
    for count, wanted in zip(Budget(evaluations=60).counts(10), exact, strict=True):
        assert abs(count - wanted) < 1
    assert Budget(evaluations=10).counts(10) == [1] * 10
    assert Budget(evaluations=7).counts(1) == [7]


def test_a_budget_below_one_evaluation_a_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="Budget: 3 scales need at least one evaluation each, got 2"):
        iteration_schedule(Budget(evaluations=2), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluations": 0}, "evaluations must be an integer of at least 1, got 0"),
        ({"evaluations": 10**23}, "evaluations must be at most 1000000, got 1000"),
        ({"evaluations": 2.0}, "evaluations must be an integer of at least 1, got 2.0"),
        ({"evaluations": 5, "ratio": 0.5}, "ratio must be a number of at least 1, got 0.5"),
        ({"evaluations": 5, "ratio": float("nan")}, "ratio must be"),
    ],
)
def test_a_budget_names_the_setting_that_is_wrong(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"Budget: {message}"):
        Budget(**settings)


@pytest.mark.parametrize(
    ("iterations", "error", "message"),
    [
        ([1, 2], ValueError, r"one count a scale \(3\).*got 2 counts: \[1, 2\]"),
        ((1, 2, 3, 4), ValueError, "got 4 counts"),
        ([], ValueError, "got 0 counts"),
        (0, ValueError, "at least 1 iteration, got 0"),
        ([1, 0, 1], ValueError, "at least 1 iteration"),
        ((3, 0), ValueError, "at least 1 iteration"),
        ([1, 10**23, 1], ValueError, "at most 1000000 a scale"),
        (-1, ValueError, "at least 1 iteration, got -1"),
        (True, TypeError, "got True"),
        (2.0, TypeError, "got 2.0"),
        ([1, 2.0, 3], TypeError, "got "),
        ([1, True, 3], TypeError, "got "),
        ("10", TypeError, "got '10'"),
        (None, TypeError, "got None"),
    ],
)
def test_anything_else_is_refused(iterations: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"iterations: .*{message}"):
        iteration_schedule(iterations, 3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"max_steps": 2.5}, TypeError, "max_steps"),
        ({"solver": "anderson"}, TypeError, "solver must be a deqlib solver"),
        ({"solver": Picard}, TypeError, "solver must be a deqlib solver"),
    ],
)
def test_adaptive_names_the_setting_that_is_wrong(
    settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Adaptive(**settings)
