"""What settings look like in print: what differs from their defaults, in a form that Python reads back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import deqlib
from deqlib import (
    JFB,
    Anderson,
    Auto,
    Broyden,
    ImplicitDifferentiation,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    Solver,
    Stopping,
    Unroll,
)
from deqlib.diagnostics.settings import each_once, labels


class Bare(Solver):
    """The least that a solver is, no dataclass."""

    def init(self, z0: Tensor) -> Any:
        return None

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        return fz, state


@dataclass(frozen=True, kw_only=True)
class Nested(Bare):
    inner: Solver = field(default_factory=Picard)
    gain: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Weighted(Bare):
    weights: Tensor = field(default_factory=lambda: torch.ones(2))


@dataclass(frozen=True, kw_only=True)
class Told(Bare):
    gain: float = 1.0

    def __repr__(self) -> str:
        return "as I say"


@dataclass(frozen=True, kw_only=True)
class ToldToo(Told):
    more: int = 3


stoppings = st.one_of(
    st.builds(
        Stopping,
        rtol=st.floats(1e-12, 1),
        atol=st.sampled_from([0.0, 1e-3]),
        max_steps=st.integers(1, 90),
        patience=st.sampled_from([None, 25, 3]),
        blowup=st.sampled_from([1e6, float("inf")]),
        norm_axes=st.sampled_from([None, (-1,), (1, 2)]),
    ),
    st.builds(Stopping.steps, st.integers(0, 60), measure=st.booleans()),
    st.just(Stopping(rtol=None, norm_axes=(-1,))),
)
solvers = st.recursive(
    st.one_of(
        st.builds(Picard, damping=st.sampled_from([1.0, 0.5])),
        st.builds(Anderson, memory=st.integers(1, 12)),
        st.builds(Broyden, memory=st.integers(1, 130), restart=st.sampled_from([None, 7])),
        st.just(NewtonKrylov(derivative="jvp")),
    ),
    lambda inner: st.builds(Nested, inner=inner, gain=st.floats(-2, 2)),
    max_leaves=3,
)
solvers |= st.builds(Auto, methods=st.lists(solvers, min_size=1, max_size=2).map(tuple))
modes = st.one_of(
    st.builds(ImplicitDifferentiation, solver=solvers, stopping=stoppings),
    st.builds(PhantomGradient, steps=st.integers(1, 9), form=st.sampled_from(["unroll", "neumann"])),
    st.sampled_from([JFB(), Unroll()]),
)


@given(settings=st.one_of(stoppings, solvers, modes))
def test_what_is_printed_is_read_back_as_the_same_settings(settings: Any) -> None:
    assert eval(repr(settings), {**vars(deqlib), "Nested": Nested}) == settings


def test_only_what_differs_from_the_defaults_is_printed() -> None:
    assert repr(Anderson()) == "Anderson()"
    assert repr(Stopping()) == "Stopping()"
    assert repr(Stopping.steps(50)) == "Stopping.steps(50)"
    assert repr(Stopping.steps(5, measure=True)) == "Stopping.steps(5, measure=True)"
    both = ImplicitDifferentiation(solver=Anderson(memory=5), stopping=Stopping(rtol=1e-6))
    assert repr(both) == ("ImplicitDifferentiation(solver=Anderson(memory=5), stopping=Stopping(rtol=1e-06))")
    assert repr(Nested(inner=Anderson(memory=2))) == "Nested(inner=Anderson(memory=2))"


def test_a_repr_of_the_users_own_is_kept_and_a_class_without_settings_has_a_plain_one() -> None:
    assert repr(Told(gain=2.0)) == repr(ToldToo(more=1)) == "as I say"
    assert "Bare object at" in repr(Bare())
    assert repr(Weighted(weights=torch.zeros(1))) == "Weighted(weights=tensor([0.]))"


@given(settings=st.lists(st.one_of(solvers, st.builds(Bare)), max_size=6))
def test_names_are_all_different_and_say_no_default(settings: list[Any]) -> None:
    names = labels(settings)
    assert len(set(names)) == len(names) == len(settings)
    for name, one in zip(names, settings, strict=True):
        assert name.startswith(type(one).__name__)
        plain = name.partition(" #")[0]
        assert plain == type(one).__name__ or all(part in repr(one) for part in plain[:-1].split("(")[1:2])


def test_equal_settings_and_settings_that_cannot_be_compared_are_numbered() -> None:
    assert labels([Picard(), Picard(), Bare(), Bare()]) == ["Picard", "Picard #2", "Bare", "Bare #2"]
    held = Weighted()
    assert each_once([held, held, Weighted(), Picard(), Picard()])[0] is held
    assert len(each_once([held, held, Weighted(), Picard(), Picard()])) == 3


@pytest.mark.parametrize("settings", [Stopping(rtol=1e-6), Anderson(memory=3)])
def test_errors_print_settings_the_same_way(settings: Any) -> None:
    with pytest.raises(TypeError, match=r"got (Stopping\(rtol=1e-06\)|Anderson\(memory=3\)) \("):
        deqlib.fixed_point(lambda z: z, torch.ones(1, 1), backward=settings)
