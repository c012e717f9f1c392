"""Where a solve begins, and what is wrong where it cannot begin."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._torch import tree_leaves, tree_map
from .solution import Solution

# What PyTorch says where operands do not go together.
_MISFIT = re.compile(r"size|shape|dimension|broadcast|dtype|same type|device|channels", re.IGNORECASE)


def starting_point(
    init: Callable[..., Any] | None, inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Any:
    """`init(*inputs, **keywords)`, or zeros shaped like the first input: where a layer begins.

    Raises:
        TypeError: no state can be shaped like the first input, or `init` does not take the inputs.
        ValueError: there is neither.
    """
    if init is not None:
        try:
            return init(*inputs, **keywords)
        except TypeError as error:
            if not keywords or _takes(init, inputs, keywords):
                raise
            names = ", ".join(keywords)
            raise TypeError(
                f"init: it is given all inputs of the layer, keyword inputs ({names}) too, and does not take "
                f"these: {error}; give it a parameter for each, or **keywords"
            ) from error
    if not inputs:
        raise ValueError("ImplicitLayer: without inputs there is nothing to shape z0 like; pass init= or z0=")
    for leaf in tree_leaves(inputs[0]) or [inputs[0]]:
        fault = _unfit(leaf)
        if fault:
            whole = "" if leaf is inputs[0] else f" in a {type(inputs[0]).__name__}"
            raise TypeError(
                f"ImplicitLayer: the first input is {fault}{whole}, and without init= the state begins as "
                "zeros shaped like it, which takes a dense floating-point tensor or a pytree of these; pass "
                "init=lambda *inputs: ... that makes the first state, or z0= of one call, or put the input "
                "that the state is shaped like first"
            )
    return tree_map(torch.zeros_like, inputs[0])


def check_state(leaves: list[Any]) -> None:
    """Raise unless these are tensors that can be a state together: see `deqlib.fixed_point` on `z0`."""
    if not leaves:
        raise ValueError("z0: the state must hold at least one tensor, got an empty pytree")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"z0: every leaf of the state must be a tensor, got {type(leaf).__name__}; {_way_out(leaf)}"
            )
        if not leaf.is_floating_point() or leaf.dtype.itemsize == 1:
            raise TypeError(
                f"z0: the state must be of a floating-point dtype of 16 bits or more, got {leaf.dtype}; pass "
                "init= or z0= of the dtype that the cell computes in"
            )
        if leaf.layout is not torch.strided or leaf.is_nested:
            kind = "that is nested" if leaf.is_nested else f"of layout {leaf.layout}"
            raise TypeError(
                f"z0: the state must be dense, got a tensor {kind}; pass init= or z0= that "
                "is dense, and a sparse tensor as an input"
            )
        if leaf.dim() == 0:
            raise ValueError(
                "z0: the first axis of the state is the batch, got a tensor without axes; "
                "z0.reshape(1, 1) is one sample of one number"
            )
        if leaf.shape[0] != leaves[0].shape[0]:
            raise ValueError(
                "z0: all leaves must share the batch axis, "
                f"got {leaves[0].shape[0]} and {leaf.shape[0]} samples"
            )
        if leaf.device != leaves[0].device:
            raise ValueError(
                f"z0: all leaves must be on one device, got {leaves[0].device} and {leaf.device}"
            )


def misfit(error: Exception, state: Any, inputs: Any) -> str | None:
    """What does not go together where PyTorch refused an operation of the cell; `None`: that was not it.

    Args:
        error: what the cell raised.
        state: that it was given.
        inputs: whatever else it was given.
    """
    # One with a cause is told already: by a layer inside the cell.
    is_of_pytorch = type(error) in (RuntimeError, IndexError) and error.__cause__ is None
    if not (is_of_pytorch and _MISFIT.search(str(error))):
        return None
    given = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    others = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not given:
        return None
    shown = f"the state {', '.join(map(_shown, given))}"
    if others:
        shown += f", the inputs {', '.join(map(_shown, others[:6]))}" + ", ..." * (len(others) > 6)
    return f"{way_out_of_misfit(given[0].shape[0], others)} ({shown}; the cell failed with: {error})"


def way_out_of_misfit(batch: int, inputs: list[Tensor]) -> str:
    """What to do where a cell does not go with the state that it is given.

    Args:
        batch: samples of the state.
        inputs: tensors that the cell is given besides.
    """
    sizes = sorted({leaf.shape[0] for leaf in inputs if leaf.dim()})
    if sizes and batch not in sizes:
        return (
            f"z0: the state has {batch} samples, and no input has {batch} along its first axis but "
            f"{' and '.join(map(str, sizes))}; pass z0= or init= with as many samples as the inputs have"
        )
    return (
        "init: the state does not go with the cell; it begins as init= or z0= say, and without these as "
        "zeros shaped like the first input: pass init=lambda *inputs: ... that makes a state of the shape, "
        "dtype and device that the cell returns"
    )


def _takes(init: Callable[..., Any], inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
    """Whether the signature of `init` has a place for these."""
    try:
        inspect.signature(init).bind(*inputs, **keywords)
    except (TypeError, ValueError):
        return False
    return True


def _unfit(leaf: Any) -> str | None:
    """Why no state can be shaped like this, if so."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__ if leaf is not None else "None"
    if leaf.layout is not torch.strided:
        return f"a tensor of layout {leaf.layout}"
    if not leaf.is_floating_point():
        return f"a tensor of {leaf.dtype}"
    return None if leaf.dim() else "a tensor without axes"


def _way_out(leaf: Any) -> str:
    if isinstance(leaf, Solution):
        return "pass its value"
    if hasattr(leaf, "__array__") or isinstance(leaf, int | float):
        return "make it a tensor by torch.as_tensor"
    if hasattr(leaf, "__dataclass_fields__"):
        return "make its class known by torch.export.register_dataclass, or use a dict"
    return "pass a tensor, or a tuple, list, dict or named tuple of tensors"


def _shown(leaf: Tensor) -> str:
    """Shape, and what else tells two tensors apart."""
    return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')} on {leaf.device}"
