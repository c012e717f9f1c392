"""What a map depends on besides its argument, found by watching one evaluation.

A cell may use tensors in three ways: as inputs, as parameters of modules, and by closure. Where they have to
be known one by one (transforms of `torch.func`, forward mode, `Reversible`), one evaluation is watched, and
every tensor that enters a PyTorch function and was not made during the evaluation is one of them.

A later evaluation with others in their stead gives the cell other inputs, puts other parameters in their
places, and shows other tensors to PyTorch functions where they are given captured ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._autocast import autocast_dtype, without_autocast
from .._compiler import is_cell_compiled, quiet_about_states
from .._torch import (
    creation_order,
    current_level,
    forward_mode,
    is_compiled_callable,
    is_forward_mode_active,
    is_transformed,
    is_wrapped,
    level_of,
    stood_in,
    tree_map,
    unwrapped,
    unwrapped_if_dead,
)
from ..state import FlatMap, Map
from .placing import Place, placed, places_of


def watched(f: Map, z: Tensor) -> tuple[Tensor, Watch]:
    """f(z), and what was seen on the way. The evaluation is recorded on the tape as any other."""
    watch = Watch(z)
    if is_cell_compiled() or (isinstance(f, FlatMap) and is_compiled_callable(f.cell)):
        # A compiler would break its graph at every operation that is watched.
        if isinstance(f, FlatMap):
            watch.note((f.inputs, f.keywords))
        with quiet_about_states():
            return f(z), watch
    with watch:
        image = f(z)
    return image, watch


def watched_constant(f: Map, z: Tensor) -> Watch:
    """What f uses at `z`, from an evaluation that no derivative is taken of."""
    with torch.no_grad(), forward_mode(False):
        return watched(f, z)[1]


def primal(tensor: Tensor) -> Tensor:
    """`tensor` without the tangent of the innermost level of forward mode."""
    stripped: Tensor = torch.autograd.forward_ad.unpack_dual(tensor).primal  # type: ignore[no-untyped-call]
    return stripped


_SIMPLE = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})


class Watch(TorchFunctionMode):
    """Notes the tensors that an evaluation at `z` uses and does not make.

    Attributes:
        found: by id, those that a derivative may be taken of: they require gradient, carry a tangent, or
            belong to a function transform of `torch.func`. Neither `z` nor what it was made from.
        seen: by the same ids the tensors as the cell knows them. They are others within an evaluation of an
            outer cell that has tensors replaced, and when that is over.
        parameters: ids of all parameters, constants included.
        device_type: that of `z`.
    """

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}
        self.parameters: set[int] = set()
        self.device_type = z.device.type
        self.transformed = is_transformed()
        self.level = current_level()
        # A node that the evaluation makes comes after that of `z`, so its order tells the two apart. It does
        # not where there is no such node: for the leaves that the evaluation makes, and under a transform.
        # Those tensors are kept until the end, so that no other tensor can get the id of one that is gone.
        start = z.grad_fn
        self.begun = creation_order(start) if start is not None and not self.transformed else None
        self.made = {id(z): z}
        self.judged: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:  # the most common cases first: this runs once an operation
            kind = type(value)
            if kind is Tensor or kind is nn.Parameter:
                if id(value) not in self.judged:
                    self._judge(value)
            elif kind not in _SIMPLE:
                self._judge_all(value)
        if kwargs:
            self._judge_all(kwargs)
            result = func(*args, **kwargs)
        else:
            result = func(*args)
        if self.transformed or type(result) is not Tensor or (result.requires_grad and result.is_leaf):
            for tensor in _tensors(result):
                if self.transformed or (tensor.requires_grad and tensor.is_leaf):
                    self.made[id(tensor)] = tensor
        return result

    def note(self, inputs: Any) -> None:
        """Add the tensors that are known to be used, where what an evaluation does is out of sight."""
        self._judge_all(inputs)

    def _judge_all(self, value: Any) -> None:
        for tensor in _tensors(value):
            if id(tensor) not in self.judged:
                self._judge(tensor)

    def _judge(self, tensor: Tensor) -> None:
        """Decide where a tensor comes from.

        Once is enough: what comes from outside outlives the evaluation, so nothing that is made in it can get
        its id later.
        """
        self.judged.add(id(tensor))
        # A transform inside the cell wraps what it is given; the wrapper goes with it.
        tensor = stripped(tensor, self.level)
        key, meant = id(tensor), _resolved(tensor)
        if key not in self.made and self._is_outside(meant):
            self.found[key], self.seen[key] = meant, tensor
        if type(tensor) is nn.Parameter:
            self.parameters.add(key)

    def _is_outside(self, tensor: Tensor) -> bool:
        if self.transformed:
            return _needs_derivative(tensor)
        if not tensor.requires_grad:
            return False
        node = tensor.grad_fn
        return node is None or self.begun is None or creation_order(node) < self.begun


def stripped(tensor: Tensor, level: int) -> Tensor:
    """`tensor` without the wrappers of transforms that began after `level` of them."""
    while is_wrapped(tensor) and level_of(tensor) > level:
        tensor = unwrapped(tensor)
    return tensor


@dataclass(frozen=True, eq=False)
class ExplicitMap:
    """A map that takes what it depends on as arguments, and may be evaluated when the solve is long over.

    Attributes:
        f: the map.
        tensors: what it depends on, as it was when the solve was asked for.
        seen: these, as the cell knows them.
        constants: ids of parameters that it uses, but that no derivative is taken of.
        places: where the cell keeps tensors, and which were there: later `functional_call` may have put
            others back.
        autocast: makes a block in which autocast is as it was then.
    """

    f: Map
    tensors: Sequence[Tensor]
    seen: Sequence[Tensor]
    constants: Container[int]
    places: list[Place]
    autocast: Callable[[], AbstractContextManager[Any]]

    @classmethod
    def of(cls, f: Map, watch: Watch) -> ExplicitMap:
        """The map that `watch` saw an evaluation of."""
        found, seen, constants = dict(watch.found), dict(watch.seen), set(watch.parameters)
        places: list[Place] = []
        if isinstance(f, FlatMap):
            places = places_of((f.cell, f.inputs, f.keywords))
            given = list(_tensors([f.inputs, f.keywords, [value for _, _, value in places]]))
            for tensor in given:
                meant = _resolved(tensor)
                if id(tensor) not in found and _is_alive(meant) and _needs_derivative(meant):
                    found[id(tensor)], seen[id(tensor)] = meant, tensor
            constants |= {id(tensor) for tensor in given}
        known = [seen.get(key, tensor) for key, tensor in found.items()]
        return cls(f, list(found.values()), known, constants, places, _autocast_now(watch.device_type))

    def __call__(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """f(z), its tensors replaced by the given ones."""
        f = self.f
        new = {id(old): tensor for old, tensor in zip(self.seen, tensors, strict=True)}

        def change(leaf: Any) -> Any:
            return new.get(id(leaf), leaf)

        if isinstance(f, FlatMap):
            f = replace(f, inputs=tree_map(change, f.inputs), keywords=tree_map(change, f.keywords))
        with self.autocast(), placed(self.places, change), _substituted(new, self.constants):
            return f(z)


class _Active(threading.local):
    """The substitutions in force in this thread, the innermost last."""

    def __init__(self) -> None:
        self.modes: list[_Substituted] = []


_active = _Active()


def _resolved(tensor: Tensor) -> Tensor:
    """What `tensor` stands for in the substitutions in force."""
    for mode in reversed(_active.modes):
        tensor = mode.new.get(id(tensor), tensor)
    return tensor


class UnseenTensorError(RuntimeError):
    """A cell used a tensor in a way that its derivative cannot be known by."""


class _Substituted(TorchFunctionMode):
    """Within it, PyTorch functions see `new[id(old)]` wherever they are given `old`.

    Raises:
        UnseenTensorError: a function is given a parameter that is neither in `new` nor in `constants`, or a
            derivative with respect to an old tensor is taken inside the cell.
    """

    def __init__(self, new: dict[int, Tensor], constants: Container[int]) -> None:
        super().__init__()
        self.new, self.constants = new, constants
        # So that what is given in exchange, and by outer substitutions, passes.
        self.given = {id(tensor) for tensor in new.values()}
        self.level = current_level()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._replace(args), **(self._replace(kwargs) if kwargs else {}))

    def _replace(self, value: Any) -> Any:
        """`value` itself if there is nothing to replace in it."""
        if isinstance(value, Tensor):
            return self._meant(value)
        if isinstance(value, tuple | list):
            parts = [self._replace(part) for part in value]
            if all(a is b for a, b in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {key: self._replace(part) for key, part in value.items()}
        return value

    def _meant(self, value: Tensor) -> Tensor:
        key = id(value)
        if key in self.new:
            return self.new[key]
        if is_wrapped(value) and level_of(value) > self.level:
            return self._wrapped_meant(value)
        if type(value) is nn.Parameter and key not in self.constants and key not in self.given:
            raise UnseenTensorError(
                f"the cell used a parameter of shape {tuple(value.shape)} that it had not used before, "
                "so its derivative is not known: either its parameters were swapped around a solve whose "
                "cell hides the module they belong to, or it does not use the same ones every time; give "
                "the module itself as the cell, or pass its parameters as inputs"
            )
        return value

    def _wrapped_meant(self, value: Tensor) -> Tensor:
        """The same for what a transform inside the cell was given."""
        inner = unwrapped(value)
        meant = self._meant(inner)
        if meant is inner:
            return value
        if value.requires_grad:
            raise UnseenTensorError(
                "the cell differentiates by torch.func with respect to a tensor that it captured, of shape "
                f"{tuple(value.shape)}; pass it as an input of the layer, or in args of fixed_point"
            )
        return stood_in(meant, like=value)


@contextmanager
def _substituted(new: dict[int, Tensor], constants: Container[int]) -> Iterator[None]:
    """A block in which a substitution is in force."""
    mode = _Substituted(new, constants)
    _active.modes.append(mode)
    try:
        with mode:
            yield
    finally:
        _active.modes.pop()


def _autocast_now(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes blocks in which autocast is as it is now, for this type of device."""
    dtype, cached = autocast_dtype(device_type), torch.is_autocast_cache_enabled()

    def again() -> AbstractContextManager[Any]:
        if dtype is None:
            return nullcontext() if autocast_dtype(device_type) is None else without_autocast(device_type)
        return torch.autocast(device_type, dtype, cache_enabled=cached)

    return again


def _needs_derivative(tensor: Tensor) -> bool:
    """Whether a derivative may be taken of `tensor`, or it belongs to a function transform."""
    return tensor.requires_grad or is_wrapped(tensor) or _has_tangent(tensor)


def _is_alive(tensor: Tensor) -> bool:
    """Whether the transform that made `tensor`, if one did, is under way: a cell may have kept it longer."""
    return unwrapped_if_dead(tensor) is tensor and level_of(tensor) <= current_level()


def _has_tangent(tensor: Tensor) -> bool:
    if not is_forward_mode_active():
        return False
    with forward_mode(True):  # else it would hide them
        return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
