"""Values that nobody should pass, made for the place of a valid one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from inspect import isroutine
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import deqlib
import viar

HUGE = (2**40, 2**63, 10**30, 1e308)  # as a number of rounds this much work, and no mistake to tell
NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, -(2**63), 0.5, -0.0, -0.5, 1.5, 1e-300, -1e308),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        True,
        False,
        1j,
        np.int64(2),
        np.float32(0.5),
        np.bool_(True),
    ),
    *(np.float64("nan"), Decimal("0.5"), Fraction(1, 2)),
)
OTHERS: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: "",
    lambda: "cpu",
    lambda: "warn",
    lambda: "é\n\x00[/red]",
    lambda: b"x",
    lambda: [],
    lambda: (),
    dict,
    set,
    lambda: [1],
    lambda: (1, 2),
    lambda: (2, 1),
    lambda: (-1, -1),
    lambda: (None,),
    lambda: [[1], [2, 3]],
    lambda: {"a": 1},
    lambda: {1: torch.zeros(2)},
    object,
    lambda: object,
    lambda: int,
    lambda: ...,
    lambda: slice(None),
    lambda: range(3),
    lambda: (n for n in (1, 2)),
    lambda: np.zeros((2, 3)),
    lambda: np.array(["a"]),
    lambda: torch.float16,
    lambda: torch.int64,
    lambda: torch.device("meta"),
    torch.Generator,
    nn.Identity,
    lambda: torch.Size((2, 3)),
    lambda: Path("no/where"),
    lambda: torch.zeros(()),
    lambda: torch.tensor(float("nan")),
    lambda: torch.tensor([1, 2]),
    lambda: [torch.zeros(3, 4), None],
    lambda: {"a": torch.zeros(3, 4), "b": [torch.zeros(3)]},
)
OBJECTS: tuple[Callable[[], Any], ...] = (
    deqlib.Picard,
    deqlib.Anderson,
    deqlib.Broyden,
    deqlib.NewtonKrylov,
    deqlib.GMRES,
    deqlib.ReversiblePicard,
    deqlib.Auto,
    lambda: deqlib.Stopping.steps(0),
    lambda: deqlib.Stopping.steps(3, measure=True),
    lambda: deqlib.Stopping(rtol=1e-3, max_steps=4),
    lambda: deqlib.Stopping(norm_axes=(1,), max_steps=4),
    lambda: deqlib.Stopping(norm_axes=(5,), max_steps=4),
    lambda: deqlib.Stopping(readout=deqlib.StableArgMax(head=lambda z: z), max_steps=4),
    lambda: deqlib.Stopping(readout=deqlib.HaltingScore(head=lambda z: None), max_steps=4),
    deqlib.ImplicitDifferentiation,
    deqlib.JFB,
    deqlib.PhantomGradient,
    deqlib.StochasticJFB,
    deqlib.Unroll,
    deqlib.SharedInverse,
    deqlib.Reversible,
    deqlib.AdjointStart,
    lambda: deqlib.Uniform(0, 3),
    lambda: deqlib.Poisson(2),
    lambda: deqlib.FailurePolicy(tolerated=0.5),
    lambda: deqlib.EquilibriumCache(4),
    lambda: viar.Adaptive(max_steps=2),
    lambda: viar.Budget(evaluations=4),
    viar.Sampling,
    viar.ExplicitTrunkConfig,
    lambda: deqlib.Picard,  # the class in place of one of its objects
)


class Subclass(Tensor):
    """A tensor of a class of the caller's."""


class Own(Exception):
    """What a callable of the caller raises: passes through as it is."""


def _raise(*_: Any, **__: Any) -> Any:
    raise Own("of the caller")


def _answers(*values: Any, **keywords: Any) -> list[Callable[[], Any]]:
    """What a callable may give instead of a tensor like its first argument."""
    first = next((value for value in values if isinstance(value, Tensor)), torch.zeros(3, 4))
    return [
        lambda: None,
        lambda: "text",
        lambda: 1.0,
        lambda: first[:0],
        lambda: first.reshape(-1),
        lambda: first.unsqueeze(0),
        lambda: first.double(),
        lambda: first.half(),
        lambda: first.to(torch.complex64),
        lambda: first.to(torch.int64),
        lambda: first.detach(),
        lambda: first * float("nan"),
        lambda: first * float("inf"),
        lambda: first.to("meta"),
        lambda: (first, first),
        lambda: [first],
        lambda: {"z": first},
        lambda: first.sum(),
        lambda: first.to_sparse(),
    ]


def callables() -> list[Callable[..., Any]]:
    """Callables that raise, take nothing, and give what nobody asked for."""

    def giving(which: int, *values: Any, **keywords: Any) -> Any:
        return _answers(*values, **keywords)[which]()

    made: list[Callable[..., Any]] = [_raise, lambda: None, lambda *_, wanted: wanted]
    return made + [partial(giving, which) for which in range(len(_answers()))]


def _tensors(like: Tensor) -> list[Callable[[], Any]]:
    """Tensors like one, and not quite."""
    wide = like if like.dim() else like.reshape(1)
    return [
        lambda: like.to(torch.float64),
        lambda: like.to(torch.float16),
        lambda: like.to(torch.bfloat16),
        lambda: like.to(torch.int64),
        lambda: like.to(torch.int32),
        lambda: like.to(torch.uint8),
        lambda: like.to(torch.bool),
        lambda: like.to(torch.complex64),
        lambda: like.to("meta"),
        lambda: wide.to_sparse(),
        lambda: wide[:0],
        lambda: wide[:1],
        lambda: torch.cat([wide, wide]),
        lambda: wide[..., :0],
        lambda: wide[..., :1],
        lambda: torch.cat([wide, wide], -1),
        lambda: like.unsqueeze(0),
        lambda: like.unsqueeze(-1),
        lambda: like.reshape(-1),
        lambda: wide[0],
        lambda: wide.flatten()[0],
        lambda: wide.transpose(0, -1),
        lambda: wide[:1].expand(wide.shape),
        lambda: wide.flip(0)[::1],
        lambda: like.as_subclass(Subclass),
        lambda: like.tolist(),
        lambda: like.numpy(),
        lambda: [like, like],
        lambda: (like, None),
        lambda: {"a": like},
        lambda: like * 0 - 1,
        lambda: like * 0 + 10**6,
        *(partial(torch.full_like, like, value) for value in (0, -5, 127)),
        *(partial(_filled, like, value) for value in (float("nan"), float("inf"), 1e38)),
        lambda: like.clone().requires_grad_(),
        lambda: like.clone().requires_grad_() * 1,
    ]


def _filled(like: Tensor, value: float) -> Tensor:
    """Floating point, one of its numbers another."""
    made = like.clone().to(like.dtype if like.is_floating_point() else torch.float32)
    if made.numel():
        made.view(-1)[0] = value
    return made


def spoilt(value: Any, random: Random, *, is_work: bool = False) -> Any:
    """Something in the place of a valid value: near it more often than not.

    Args:
        value: valid.
        random: draws it.
        is_work: whether a huge number is no mistake but as much work.
    """
    if random.random() < 0.65:
        near = _near(value, random, is_work)
        if near is not value:
            return near
    other = _other(random, is_work)
    if isroutine(value) and isinstance(other, type):  # fails where no frame of it is seen
        return lambda *given, **named: other(*given, **named)
    return other


def _other(random: Random, is_work: bool) -> Any:
    """Of any kind."""
    numbers = NUMBERS if is_work else (*NUMBERS, *HUGE)
    kind = random.random()
    if kind < 0.35:
        return random.choice(numbers)
    if kind < 0.75:
        return random.choice(OTHERS)()
    if kind < 0.9:
        return random.choice(OBJECTS)()
    return random.choice(callables())


def _near(value: Any, random: Random, is_work: bool) -> Any:
    """Of the same kind as a value, or the value itself where there is nothing like it."""
    if isinstance(value, Tensor):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # complex made from real and the like: of this fuzzer's own making
            made = random.choice(_tensors(value))
            try:
                return made()
            except (RuntimeError, TypeError, IndexError):
                return value.clone()  # there is no such tensor
    if isinstance(value, bool) or value is None:
        return random.choice([True, False, None, 0, 1, "yes"])
    if isinstance(value, int | float):
        return random.choice(NUMBERS if is_work else (*NUMBERS, *HUGE))
    if isinstance(value, str):
        return random.choice(
            ["", value.upper(), value + " ", "x" * 5000, "../" + value, value + "\x00", None]
        )
    if isinstance(value, list | tuple) and value:
        return _spoilt_sequence(value, random, is_work)
    if isinstance(value, dict) and value:
        name = random.choice(list(value))
        other = {**value, name: spoilt(value[name], random, is_work=is_work)}
        return random.choice([other, {key: other[key] for key in other if key != name}, {**value, "odd": 1}])
    if isinstance(value, Path):
        return random.choice([str(value), value / "nothing", value.parent, Path(), Path("a\x00b"), b"x"])
    if callable(value) and not isinstance(value, nn.Module):
        return random.choice(callables())
    return value


def _spoilt_sequence(value: Any, random: Random, is_work: bool) -> Any:
    kind = type(value) if type(value) in (list, tuple) else list
    where = random.randrange(len(value))
    parts = list(value)
    parts[where] = spoilt(parts[where], random, is_work=is_work)
    return random.choice(
        [
            kind(parts),
            kind(parts),
            kind(value[:-1]),
            kind([*value, *value]),
            kind(value[::-1]),
            (list if kind is tuple else tuple)(value),
            kind([value]),
        ]
    )
