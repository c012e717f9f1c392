"""Every private name of PyTorch that is used here, each behind the public fact it stands for.

The range of supported versions has no upper end, and a private name may go in any release. So the packages
take none from PyTorch but through this module, and `tests/deqlib/test_torch_private.py` has a canary for
each: run on another version it says which names are gone or mean something else, and what hangs on them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Of the C extension: the compiler itself, which takes seconds to load, is not touched.
from torch._C._dynamo import eval_frame
from torch.nn.utils import parametrize

# Sees every operation before it runs: there is no public name for it.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Nests of tuples, lists, dicts and registered classes, taken apart and put together as `torch.export` and
# `torch.func` do it: there is no public module for them in the oldest versions supported.
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import keystr as keystr
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

F = TypeVar("F", bound=Callable[..., Any])


def is_func_active() -> bool:
    """Whether the caller runs inside a transform of `torch.func`, such as `vmap` or `grad`."""
    return bool(torch._C._are_functorch_transforms_active())


def is_forward_mode_active() -> bool:
    """Whether the caller runs inside `torch.autograd.forward_ad.dual_level`."""
    return torch.autograd.forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is under way."""
    return is_func_active() or is_forward_mode_active()


def is_traced() -> bool:
    """Whether operations of PyTorch are written down, to be done again: `torch.jit.trace`, `torch.fx`."""
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    is_tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return is_tracing or proxies is not None


def forward_mode(enabled: bool) -> AbstractContextManager[Any]:
    """A block in which tensors show their tangents and pass them on, or hide them.

    PyTorch hides them in the `jvp` of a custom function. With them shown there, an outer level of forward
    mode sees what is done; the tangents of the level at hand are then to be taken off first.
    """
    context: AbstractContextManager[Any] = torch.autograd.forward_ad._set_fwd_grad_enabled(enabled)
    return context


def without_graph(tensor: Tensor) -> Tensor:
    """`tensor` without the graph that made it, but with its tangent, which `detach` takes off too."""
    if not is_forward_mode_active():
        return tensor.detach()
    dual = torch.autograd.forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    if dual.tangent is None:
        return tensor.detach()
    made: Tensor = torch.autograd.forward_ad.make_dual(dual.primal.detach(), dual.tangent.detach())  # type: ignore[no-untyped-call]
    return made


def is_wrapped(tensor: Tensor) -> bool:
    """Whether `tensor` is a stand-in that a transform of `torch.func` gives to the function it transforms."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that a stand-in, see `is_wrapped`, stands for: one level further out."""
    inner: Tensor = torch._C._functorch.get_unwrapped(tensor)
    return inner


def unwrapped_if_dead(tensor: Tensor) -> Tensor:
    """`tensor`, or what it stands for if the transform that it was made by has ended."""
    inner: Tensor = torch._C._functorch.unwrap_if_dead(tensor)
    return inner


def coordinates(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values that a sparse tensor of layout COO holds, as they lie, coalesced or not."""
    return sparse._indices(), sparse._values()


def current_level() -> int:
    """How many transforms of `torch.func` are under way, one inside the other."""
    level: int = torch._C._functorch.maybe_current_level() or 0
    return level


def level_of(tensor: Tensor) -> int:
    """The number of the transform that made a stand-in, see `is_wrapped`, the outermost 1; else 0 or less."""
    level: int = torch._C._functorch.maybe_get_level(tensor)
    return level


def stood_in(tensor: Tensor, like: Tensor) -> Tensor:
    """A stand-in for `tensor` as `like` is one for another: of the same transform and batch axis."""
    level, axis = level_of(like), torch._C._functorch.maybe_get_bdim(like)
    made: Tensor
    if axis < 0:
        made = torch._C._functorch._wrap_for_grad(tensor, level)
    else:
        made = torch._C._functorch._add_batch_dim(tensor, axis, level)
    return made


def is_batched_gradient(gradient: Tensor) -> bool:
    """Whether `gradient` is many at once: `is_grads_batched=True`, which predates `torch.vmap`, made it."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(gradient))


def current_pass() -> int:
    """A number of the backward pass that the engine runs in this thread: the innermost; -1: none."""
    number: int = torch._C._current_graph_task_id()
    return number


def at_end_of_pass(call: Callable[[], Any]) -> None:
    """Have the engine call this when the innermost backward pass has ended; it keeps it until then."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def creation_order(node: Any) -> int:
    """A number of a node of the graph: of two made in one thread, the later one has the larger."""
    number: int = node._sequence_nr()
    return number


def times_written(tensor: Tensor) -> int:
    """How often `tensor` was changed in place, itself or by a view; autograd compares this count too.

    0 where PyTorch does not keep count.
    """
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def forget_cached_parametrizations() -> None:
    """Let weights be computed anew that `torch.nn.utils.parametrize.cached()` has kept, if it is in force."""
    if parametrize._cache_enabled:
        parametrize._cache.clear()


def namespaces(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module keeps its own parameters, its buffers, and other attributes; writing there sets them."""
    return module._parameters, module._buffers, vars(module)


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, so that it runs other kernels than those of its `forward`."""
    return module._compiled_call_impl is not None


def is_exporting() -> bool:
    """Whether `torch.export` is at work. In PyTorch 2.11 its own question is true of all that is compiled."""
    return torch.compiler._is_exporting_flag


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be called before or after the forward pass of `module` itself."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def has_global_hooks() -> bool:
    """Whether somebody wants to be called before or after the forward pass of every module there is."""
    return bool(
        torch.nn.modules.module._global_forward_pre_hooks or torch.nn.modules.module._global_forward_hooks
    )


def is_caching_parametrizations() -> bool:
    """Whether `torch.nn.utils.parametrize.cached()` is in force."""
    return parametrize._cache_enabled > 0


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has a shape and no numbers, as where a compiler tries a function out."""
    # The class is private, and importing it takes a while: its name is enough.
    return type(tensor).__name__ == "FakeTensor"


def called_modules(frame: FrameType | None) -> list[nn.Module]:
    """The modules whose forward pass `frame` runs in, the outermost first.

    Read off the frames of `nn.Module.__call__`, whose local names are the module and its inputs, which live
    as long as the call does anyway.
    """
    found: list[nn.Module] = []
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    found.reverse()
    return found


_MODULE_CALL = nn.Module._call_impl.__code__

# What PyTorch's wrappers of a module call the module that they wrap: torch.compile, FSDP, activation
# checkpointing.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def without_wrappers(name: str) -> str:
    """The name that a module has where no part of the model is wrapped, "" for the model itself."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def is_compiled_callable(function: Callable[..., Any]) -> bool:
    """Whether `function`, a module or not, came out of `torch.compile`, or `compile()` was called on it."""
    if isinstance(function, nn.Module) and is_compiled(function):
        return True
    # What a compiler is told to leave alone is wrapped too.
    is_left_alone = getattr(function, "_torchdynamo_disable", False)
    return hasattr(function, "_torchdynamo_orig_callable") and not is_left_alone


# What compiles the functions that this thread calls, inside a region of `torch.compile`; else `None`. And
# `put_in_force(compiler)`: let that compile what this thread calls from here on, or nothing with `None`; it
# returns what was in force. No functions of ours around them: a compiler in force would go into those too.
compiler_in_force: Callable[[], Any] = eval_frame.get_eval_frame_callback
put_in_force: Callable[[Any], Any] = eval_frame.set_eval_frame


def never_compiled(function: F) -> F:
    """`function`, which no compiler in force compiles as it is entered; what it calls may be compiled."""
    _skip(function, eval_frame._FrameAction.DEFAULT)
    return function


def compile_nothing_in_transforms() -> None:
    """Let a compiler in force leave alone what a transform of `torch.func` calls, unless it traces both.

    From then on and for all code: it would fail. It cannot begin to compile on a tensor that was computed
    inside of `grad` (PyTorch 2.12 and 2.13: AssertionError "False != True"), and has to where a graph breaks.
    """
    functions = (
        torch._functorch.eager_transforms.grad_and_value_impl,
        torch._functorch.eager_transforms._vjp_with_argnums,
        torch._functorch.eager_transforms._jvp_with_argnums,
        torch._functorch.vmap._flat_vmap,
        torch._functorch.vmap._chunked_vmap,
    )
    for function in functions:
        _skip(function, eval_frame._FrameAction.SKIP)


def _skip(function: Any, what_it_calls: Any) -> None:
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, what_it_calls)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
