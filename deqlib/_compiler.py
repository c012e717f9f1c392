"""What `torch.compile` does with a solve that it cannot look into: it compiles the cell, and nothing else.

Left alone, the compiler would go through the driver, the solver and the adjoint function by function, and
compile pieces of each: half a minute for nothing. So a solve takes what compiles out of force, and brings it
back around each evaluation of the cell. The same holds for a backward pass inside a compiled region, where
only its own graph, compiled before, is used.

No compiler is loaded by importing this.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch

from ._torch import is_func_active, is_transformed, never_compiled, put_in_force

F = TypeVar("F", bound=Callable[..., Any])


class _Region(threading.local):
    """What compiles the cell of the solve at hand in this thread, `None` outside of a compiled region."""

    def __init__(self) -> None:
        self.compiler: Any = None


_region = _Region()


def is_cell_compiled() -> bool:
    """Whether the cell of the solve at hand is compiled, evaluation by evaluation."""
    return not torch.compiler.is_compiling() and _region.compiler is not None and not is_transformed()


@contextlib.contextmanager
def quiet_about_states() -> Iterator[None]:
    """A block in which a compiler may take in a state that is recorded.

    It looks at the gradient of what it is given, of which PyTorch warns where the tensor was computed.
    """
    if not torch.is_grad_enabled():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


@never_compiled
def evaluate(cell: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """`cell(*args, **keywords)`, compiled where the solve is in a compiled region."""
    # The solver may have asked for a product with the Jacobian, which is a transform.
    if torch.compiler.is_compiling() or _region.compiler is None or is_transformed():
        return cell(*args, **keywords)
    compiler, _region.compiler = _region.compiler, None
    with quiet_about_states():
        outer = put_in_force(compiler)
        try:
            return cell(*args, **keywords)
        finally:
            put_in_force(outer)
            _region.compiler = compiler


@never_compiled
def run_eagerly(solve: Callable[..., Any], /, *args: Any, **settings: Any) -> Any:
    """`solve(*args, **settings)` as it is, but for its cell.

    Where a transform of `torch.func` was given a compiled function, what that does after the solve is not
    compiled: see `compile_nothing_in_transforms`.
    """
    outer, before = put_in_force(None), _region.compiler
    # Not under a transform: the compiler cannot begin inside of one.
    _region.compiler = None if is_transformed() else outer
    try:
        return solve(*args, **settings)
    finally:
        _region.compiler = before
        put_in_force(None if is_func_active() else outer)


@never_compiled
def around(wrapper: Callable[..., Any], function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """`wrapper(function, *args, **keywords)` as it is; in a compiled region `function` alone is compiled."""
    compiler = put_in_force(None)

    def compiled(*args: Any, **keywords: Any) -> Any:
        outer = put_in_force(compiler)
        try:
            return function(*args, **keywords)
        finally:
            put_in_force(outer)

    try:
        return wrapper(compiled if compiler is not None else function, *args, **keywords)
    finally:
        put_in_force(compiler)


def uncompiled(function: F) -> F:
    """`function`, which a compiled region runs as it is, with all that it calls; a compiler may trace it."""

    @functools.wraps(function)
    def run(*args: Any, **settings: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **settings)
        outer = put_in_force(None)
        try:
            return function(*args, **settings)
        finally:
            put_in_force(outer)

    return cast("F", never_compiled(run))
