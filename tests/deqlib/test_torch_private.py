"""Private names of PyTorch: none is used outside of `deqlib/_torch.py`, and there is a canary for each.

On a version of PyTorch that lacks one, or where it means something else, the failure says what hangs on it.
Nothing of the library is imported before a test needs it, so that one name that is gone hides no other.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deqlib", "models/viar", "benchmarks")
HOME = ROOT / "deqlib" / "_torch.py"
Pair = namedtuple("Pair", "first second")


def ours() -> Any:
    """The module under test."""
    return importlib.import_module("deqlib._torch")


# What each name stands for ------------------------------------------------------------------------------


def trees_are_taken_apart_and_put_together() -> bool:
    tree = {"b": [1, (2,)], "a": Pair(3, None)}
    leaves, spec = ours().tree_flatten(tree)
    same = ours().tree_flatten({"b": [0, (0,)], "a": Pair(0, None)})[1]
    return bool(
        ours().tree_unflatten(leaves, spec) == tree
        and spec == same
        and isinstance(spec, ours().TreeSpec)
        and spec.num_leaves == len(leaves) == len(ours().tree_leaves(tree))
        and not spec.is_leaf()
        and ours().tree_flatten(1.0)[1].is_leaf()
        and ours().tree_map(lambda leaf: -leaf, (1, [2])) == (-1, [-2])
    )


def operations_are_seen() -> bool:
    names = []

    class Noting(ours().TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append((str(func), func.is_view))
            return func(*args, **(kwargs or {}))

    with Noting():
        torch.ones(2, 2).mT.add(1)
    return names == [("aten.ones.default", False), ("aten.transpose.int", True), ("aten.add.Tensor", False)]


def leaves_of_trees_have_readable_paths() -> bool:
    paths = [path for path, _ in ours().tree_flatten_with_path({"a": [1, 2]})[0]]
    return [ours().keystr(path) for path in paths] == ["['a'][0]", "['a'][1]"]


def transforms_are_noticed() -> bool:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(ours().is_func_active() and ours().is_transformed())
        return x.square().sum()

    x = torch.ones(2)
    torch.vmap(look)(x.unsqueeze(1))
    torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    return seen == [True] * 3 and not ours().is_func_active() and not ours().is_transformed()


def traces_are_noticed() -> bool:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(ours().is_traced())
        return x + 1

    torch.fx.experimental.proxy_tensor.make_fx(look)(torch.ones(2))
    return seen == [True] and not ours().is_traced()


def levels_of_forward_mode_are_noticed() -> bool:
    before = ours().is_forward_mode_active()
    with forward_ad.dual_level():
        inside = ours().is_forward_mode_active() and ours().is_transformed() and not ours().is_func_active()
    return inside and not before and not ours().is_forward_mode_active()


def tangents_are_hidden_and_shown() -> bool:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with ours().forward_mode(False):
            hidden = forward_ad.unpack_dual(dual).tangent is None
            with ours().forward_mode(True):
                shown = forward_ad.unpack_dual(2 * dual).tangent is not None
    return hidden and shown


def stand_ins_are_told_and_taken_off() -> bool:
    x, seen = torch.ones(2), []

    def look(stand_in: Tensor) -> Tensor:
        inner = ours().unwrapped(stand_in)
        seen.append(ours().is_wrapped(stand_in) and not ours().is_wrapped(inner) and torch.equal(inner, x))
        return stand_in.sum()

    torch.func.grad(look)(x)
    return seen == [True] and not ours().is_wrapped(x)


def dead_stand_ins_are_taken_off() -> bool:
    x, kept, alive = torch.ones(2), [], []

    def keep(stand_in: Tensor) -> Tensor:
        kept.append(stand_in)
        alive.append(ours().unwrapped_if_dead(stand_in) is stand_in)
        return stand_in.sum()

    torch.func.grad(keep)(x)
    inner = ours().unwrapped_if_dead(kept[0])
    return alive == [True] and not ours().is_wrapped(inner) and torch.equal(inner, x)


def sparse_tensors_show_what_they_hold() -> bool:
    indices, values = torch.tensor([[0, 1, 1]]), torch.ones(3)
    tensor = torch.sparse_coo_tensor(indices, values, (2,), is_coalesced=False, check_invariants=True)
    held = ours().coordinates(tensor)
    return bool(torch.equal(held[0], indices) and held[1].data_ptr() == values.data_ptr())


def batched_gradients_are_told() -> bool:
    x, seen = torch.ones(2, requires_grad=True), []
    y = 2 * x
    y.register_hook(lambda g: seen.append(ours().is_batched_gradient(g)))
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    return seen == [False, True]


def passes_are_told_apart_and_end() -> bool:
    x, seen, ended = torch.ones(2, requires_grad=True), [], []
    y = 2 * x

    def look(_: Tensor) -> None:
        outer = ours().current_pass()
        ours().at_end_of_pass(lambda: ended.append(outer))
        with torch.enable_grad():
            z = 3 * x.detach().requires_grad_()
        z.register_hook(lambda _: seen.append((outer, ours().current_pass())))
        z.backward(torch.ones(2))
        seen.append((outer, ours().current_pass()))
        assert not ended

    y.register_hook(look)
    y.sum().backward()
    (outer, inner), after = seen
    return outer != inner and after == (outer, outer) and ended == [outer] and ours().current_pass() == -1


def levels_of_stand_ins_are_told_and_made() -> bool:
    x, y, seen = torch.ones(2, 3), torch.full((2, 3), 2.0), []

    def look(a: Tensor, b: Tensor) -> Tensor:
        made = ours().stood_in(y, like=b)
        seen.append(
            (ours().current_level(), ours().level_of(a), ours().level_of(made), made.shape == b.shape)
        )
        return (a * made).sum()

    found = torch.func.grad(look)(x, x)
    each = torch.vmap(look, (1, 1))(x, x)
    told = seen == [(1, 1, 1, True)] * 2 and ours().current_level() == 0 and ours().level_of(x) <= 0
    return told and torch.equal(found, y) and each.shape == (3,)


def attributes_of_modules_are_set() -> bool:
    module, new = nn.BatchNorm1d(2), torch.full((2,), 3.0)
    vars(module)["free"] = torch.ones(2)  # no buffer
    parameters, buffers, others = ours().namespaces(module)
    parameters["weight"], buffers["running_mean"], others["free"] = new, new, new
    return module.weight is new and module.running_mean is new and module.free is new


def later_nodes_have_larger_numbers() -> bool:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return 2 * grads[0]

    x = torch.ones(2, requires_grad=True)
    made = [2 * x, Twice.apply(x), x.sin(), Twice.apply(x)]
    numbers = [ours().creation_order(tensor.grad_fn) for tensor in made]
    return numbers == sorted(set(numbers))


def writing_is_counted() -> bool:
    x = torch.ones(2, 2)
    counts = [ours().times_written(x)]
    for write in (x.add_, x[0].add_, x.detach().add_, x.view(4).add_):
        write(1)
        counts.append(ours().times_written(x))
    return counts == sorted(set(counts))


class Twofold(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def cached_weights_are_forgotten() -> bool:
    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "weight", Twofold())
    ours().forget_cached_parametrizations()  # nothing to forget, and no error
    with parametrize.cached():
        first = layer.weight
        kept = layer.weight is first
        ours().forget_cached_parametrizations()
        return kept and layer.weight is not first


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[nn.Module]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(ours().called_modules(sys._getframe(0)))
        return x


def modules_around_a_call_are_told() -> bool:
    inner = Looks()
    middle = nn.Sequential(inner)
    outer = nn.Sequential(nn.Identity(), middle)
    outer(torch.ones(1))
    middle.register_forward_pre_hook(lambda *_: None)  # takes another way through `nn.Module.__call__`
    outer(torch.ones(1))
    compiled = torch.compile(outer, backend="eager")
    wrapped = checkpoint_wrapper(outer)
    names = [{ours().without_wrappers(name) for name, _ in m.named_modules()} for m in (compiled, wrapped)]
    return inner.seen == [[outer, middle, inner]] * 2 and names == [{"", "0", "1", "1.0"}] * 2


def compiled_modules_are_told() -> bool:
    plain, compiled = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled.compile(backend="eager")
    return ours().is_compiled(compiled) and not ours().is_compiled(plain)


def hooks_are_told() -> bool:
    plain, before, after = (nn.Linear(2, 2) for _ in range(3))
    before.register_forward_pre_hook(lambda *_: None)
    handle = after.register_forward_hook(lambda *_: None)
    told = [ours().has_hooks(module) for module in (plain, before, after)]
    handle.remove()
    return told == [False, True, True] and not ours().has_hooks(after)


def hooks_of_all_modules_are_told() -> bool:
    register = (
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
    )
    told = [ours().has_global_hooks()]
    for add in register:
        handle = add(lambda *_: None)
        told.append(ours().has_global_hooks())
        handle.remove()
    return told == [False, True, True] and not ours().has_global_hooks()


def cached_weights_are_told() -> bool:
    with torch.nn.utils.parametrize.cached():
        inside = ours().is_caching_parametrizations()
    return inside and not ours().is_caching_parametrizations()


def compiled_functions_are_told() -> bool:
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    compiled = [torch.compile(function, backend="eager") for function in (torch.sin, nn.Linear(2, 2))]
    told = all(ours().is_compiled_callable(function) for function in [in_place, *compiled])
    others = (nn.Identity(), pow, torch.compiler.disable(lambda x: x))
    return told and not any(ours().is_compiled_callable(function) for function in others)


class AddsWhereExported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.is_exporting = ours().is_exporting

    def forward(self, x: Tensor) -> Tensor:
        return x + (1 if self.is_exporting() else 0)


def an_export_is_told_from_a_compilation() -> bool:
    module, x = AddsWhereExported(), torch.zeros(1)
    exported = torch.export.export(module, (x,)).module()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    return [float(run(x)) for run in (module, exported, compiled)] == [0, 1, 0]


def compilers_go_out_of_force_and_back() -> bool:
    seen: list[Any] = []

    def within(x: Tensor) -> Tensor:
        compiler = ours().put_in_force(None)
        seen.append((compiler, ours().compiler_in_force(), ours().put_in_force(compiler)))
        return x

    skipped = torch.compiler.disable(ours().never_compiled(within), recursive=False)
    torch.compile(lambda x: skipped(x.sin()).cos(), backend="eager")(torch.ones(2))
    ((compiler, inside, before),) = seen
    return callable(compiler) and inside is before is ours().compiler_in_force() is None


def transforms_in_compiled_functions_run_as_they_are() -> bool:
    seen: list[Any] = []

    def look(x: Tensor) -> Tensor:
        seen.append(ours().compiler_in_force())
        return x

    look = torch.compiler.disable(look, recursive=False)

    def within(x: Tensor) -> Tensor:
        return look(2 * x).sin().sum()  # without the mark the compiler begins after `look`, and fails

    ours().compile_nothing_in_transforms()
    x = torch.ones(2)
    f = torch.func
    for run in (f.grad(within), f.vmap(within), lambda x: f.vjp(within, x)[0], f.jacfwd(within)):
        torch.compiler.reset()
        torch.compile(run, backend="eager")(x)
        torch.compile(f.vmap(within, chunk_size=1), backend="eager")(x)
    return bool(seen) and all(compiler is None for compiler in seen)


def fake_tensors_are_told() -> bool:
    seen = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(ours().is_fake(x))
            return x + 1

    torch.export.export(Look(), (torch.ones(2),), strict=False)
    return bool(seen) and all(seen) and not ours().is_fake(torch.ones(2))


@dataclass(frozen=True)
class Canary:
    """What is to hold of some private names, and what hangs on them."""

    names: tuple[str, ...]
    holds: Callable[[], bool]
    hangs: str


FUNCTORCH = "torch._C._functorch."
PYTREE = "torch.utils._pytree."
FRAMES = (
    "get_eval_frame_callback",
    "set_eval_frame",
    "set_code_exec_strategy",
    "_FrameExecStrategy",
    "_FrameAction.SKIP",
    "_FrameAction.DEFAULT",
)
CANARIES = (
    Canary(
        tuple(
            PYTREE + name
            for name in ("TreeSpec", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten")
        ),
        trees_are_taken_apart_and_put_together,
        "states that are no single tensor (state.py), inputs of cells, diagnostics",
    ),
    Canary(
        (PYTREE + "tree_flatten_with_path", PYTREE + "keystr"),
        leaves_of_trees_have_readable_paths,
        "the messages of CellConformance",
    ),
    Canary(
        ("torch._C._are_functorch_transforms_active",),
        transforms_are_noticed,
        "solves under torch.func transforms: without it their derivatives are wrong and not refused",
    ),
    Canary(
        ("torch._C._get_dispatch_mode", "torch._C._TorchDispatchModeKey.PROXY"),
        traces_are_noticed,
        "solves on a GPU that torch.fx traces: without it the graph lacks what kernels do",
    ),
    Canary(
        ("torch.autograd.forward_ad._current_level",),
        levels_of_forward_mode_are_noticed,
        "solves in forward mode: without it tangents are lost without a word",
    ),
    Canary(
        ("torch.autograd.forward_ad._set_fwd_grad_enabled",),
        tangents_are_hidden_and_shown,
        "forward mode of ImplicitDifferentiation, JFB and PhantomGradient",
    ),
    Canary(
        (FUNCTORCH + "is_functorch_wrapped_tensor", FUNCTORCH + "get_unwrapped"),
        stand_ins_are_told_and_taken_off,
        "torch.func transforms of a layer: which tensors they differentiate, and masks that outlive them",
    ),
    Canary(
        (FUNCTORCH + "unwrap_if_dead",),
        dead_stand_ins_are_taken_off,
        "backward passes that run when the transform they were recorded in is over",
    ),
    Canary(
        ("sparse._indices", "sparse._values"),
        sparse_tensors_show_what_they_hold,
        "deqlib.diagnostics.saved_bytes with sparse tensors",
    ),
    Canary(
        (FUNCTORCH + "is_legacy_batchedtensor",),
        batched_gradients_are_told,
        "refusing is_grads_batched=True, under which a solve would read one gradient's numbers for all",
    ),
    Canary(
        (
            FUNCTORCH + "maybe_current_level",
            FUNCTORCH + "maybe_get_level",
            FUNCTORCH + "maybe_get_bdim",
            FUNCTORCH + "_wrap_for_grad",
            FUNCTORCH + "_add_batch_dim",
        ),
        levels_of_stand_ins_are_told_and_made,
        "torch.func transforms of a layer whose cell uses torch.func itself",
    ),
    Canary(
        ("torch._C._current_graph_task_id", "torch.autograd.Variable._execution_engine.queue_callback"),
        passes_are_told_apart_and_end,
        "second derivatives of ImplicitDifferentiation",
    ),
    Canary(
        ("node._sequence_nr",),
        later_nodes_have_larger_numbers,
        "which tensors a cell captures: Reversible",
    ),
    Canary(
        ("module._parameters", "module._buffers"),
        attributes_of_modules_are_set,
        "torch.func transforms of a layer whose parameters are swapped",
    ),
    Canary(
        ("torch.utils._python_dispatch.TorchDispatchMode",),
        operations_are_seen,
        "operations that benchmarks count on a CPU",
    ),
    Canary(("tensor._version",), writing_is_counted, "the error for cells that write to their argument"),
    Canary(
        ("torch.nn.utils.parametrize._cache_enabled", "torch.nn.utils.parametrize._cache.clear"),
        cached_weights_are_forgotten,
        "gradients of parametrized weights in a block of parametrize.cached()",
    ),
    Canary(
        ("module._compiled_call_impl",),
        compiled_modules_are_told,
        "the word of a series of images that they can be repeated to the last bit",
    ),
    Canary(
        ("module._forward_pre_hooks", "module._forward_hooks"),
        hooks_are_told,
        "hooks of a model that generates by CUDA graphs: without it they are not called in replays",
    ),
    Canary(
        (
            "torch.nn.modules.module._global_forward_pre_hooks",
            "torch.nn.modules.module._global_forward_hooks",
        ),
        hooks_of_all_modules_are_told,
        "hooks of all modules where one generates by CUDA graphs: without it they are not called in replays",
    ),
    Canary(
        ("torch.nn.utils.parametrize._cache_enabled",),
        cached_weights_are_told,
        "CUDA graphs in a block of parametrize.cached(): without it they read weights that were freed",
    ),
    Canary(
        ("torch.nn.Module._call_impl.__code__",),
        modules_around_a_call_are_told,
        "names of layers in messages and records",
    ),
    Canary(
        ("…._torchdynamo_orig_callable", "…._torchdynamo_disable"),
        compiled_functions_are_told,
        "compiled cells: without it they run as they are on the tape",
    ),
    Canary(
        ("torch.compiler._is_exporting_flag",),
        an_export_is_told_from_a_compilation,
        "solves inside torch.compile: they are refused there as in torch.export",
    ),
    Canary(
        ("torch._C._dynamo.eval_frame", *(f"torch._C._dynamo.eval_frame.{name}" for name in FRAMES)),
        compilers_go_out_of_force_and_back,
        "solves inside torch.compile: without it the driver is compiled piece by piece",
    ),
    Canary(
        (
            "torch._functorch.eager_transforms.grad_and_value_impl",
            "torch._functorch.eager_transforms._vjp_with_argnums",
            "torch._functorch.eager_transforms._jvp_with_argnums",
            "torch._functorch.vmap._flat_vmap",
            "torch._functorch.vmap._chunked_vmap",
        ),
        transforms_in_compiled_functions_run_as_they_are,
        "torch.compile around a transform of a layer: without it errors inside of the compiler",
    ),
    Canary(
        ("torch._subclasses.FakeTensor",),
        fake_tensors_are_told,
        "torch.export and torch.compile: without it a solver reads numbers that are not there",
    ),
)
by_canary = pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.names[0].rpartition(".")[2])


@by_canary
def test_a_private_name_of_pytorch_is_there(canary: Canary) -> None:
    tensor = torch.ones(2, requires_grad=True)
    roots = {"torch": torch, "tensor": tensor, "node": (2 * tensor).grad_fn, "module": nn.Identity()}
    roots["sparse"] = tensor.detach().to_sparse()
    roots["…"] = torch.compiler.disable(lambda x: x)
    importlib.import_module("torch._subclasses")
    for name in canary.names:
        root, *parts = name.split(".")
        found = roots[root]
        for part in parts:
            if not hasattr(found, part):
                pytest.fail(f"PyTorch {torch.__version__} has no {name}. On it hangs: {canary.hangs}")
            found = getattr(found, part)


@by_canary
def test_a_private_name_of_pytorch_stands_for_what_it_did(canary: Canary) -> None:
    if not canary.holds():
        pytest.fail(
            f"PyTorch {torch.__version__}: of {', '.join(canary.names)} it does not hold any more that "
            f"{canary.holds.__name__.replace('_', ' ')}. On it hangs: {canary.hangs}"
        )


# Where the names are ------------------------------------------------------------------------------------


def test_every_private_name_has_a_canary() -> None:
    known = {name for canary in CANARIES for name in canary.names}
    used = {name for _, name in private_names(HOME.read_text(), set())}
    assert used | {"torch._subclasses.FakeTensor"} == known  # that one goes by the name of the class


def test_private_names_are_used_in_one_file_alone() -> None:
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    sources = {path: path.read_text() for path in files if path != HOME}
    own = {name for source in sources.values() for name in defined(ast.parse(source))}
    own |= {"_fields", "_asdict", "_replace", "_make"}  # of named tuples, in public whatever they look like
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, source in sources.items()
        for line, name in private_names(source, own)
    ]
    assert not found, "reach these through deqlib/_torch.py, with a canary here"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("import torch\ntorch._C._functorch.f(1)", "torch._C._functorch.f"),
        ("import torch as t\nt.utils._pytree.f(1)", "torch.utils._pytree.f"),
        ("from torch import nn\nnn._reduction.f", "torch.nn._reduction.f"),
        ("def f(x):\n    return x.grad_fn._sequence_nr()", "x.grad_fn._sequence_nr"),
        ("def f(x):\n    return g(x)._version", "…._version"),
        ("class A(B):\n    def f(self):\n        return self._buffers", "self._buffers"),
        ("def f(x):\n    return getattr(x, '_version', 0)", "…._version"),
        ("import sys\nsys.modules.get('torch._dynamo')", "torch._dynamo"),
    ],
)
def test_a_private_name_is_found_however_it_is_reached(source: str, name: str) -> None:
    assert [found for _, found in private_names(source, {"_own"})] == [name]


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys._getframe(1)",
        "class A:\n    def f(self):\n        return self._own",
        "from .rooms import _own",
        "import torch\ntorch.__version__",
        '"""A docstring on torch._C is none."""',
    ],
)
def test_names_that_are_not_pytorchs_are_left_alone(source: str) -> None:
    assert not list(private_names(source, {"_own"}))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    """Private names that a file gives to something: functions, classes, attributes, fields, parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_names(source: str, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of what may be PyTorch's private parts; names in `own` are the packages'."""
    tree = ast.parse(source)
    modules: dict[str, str] = {}  # what a name that was imported stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                if is_torchs(alias.name):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{'.' * node.level}{node.module or ''}.{alias.name}"
                modules[alias.asname or alias.name] = full
                if is_torchs(full):
                    yield node.lineno, full
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = dotted(node, modules)
            root = name.partition(".")[0]
            foreign = any(is_private(part) and part not in own for part in name.split(".")[1:])
            if is_torchs(name) or (foreign and (root not in roots(modules) or root == "torch")):
                yield node.lineno, name
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = getattr(node.args[1], "value", "")
            if isinstance(name, str) and is_private(name) and name not in own:
                yield node.lineno, f"….{name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_torchs(node.value):
            yield node.lineno, node.value


def is_torchs(name: str) -> bool:
    return re.fullmatch(r"torch(\.\w+)*", name) is not None and any(map(is_private, name.split(".")))


def roots(modules: dict[str, str]) -> set[str]:
    return {full.partition(".")[0] for full in modules.values()}


def dotted(node: ast.expr, modules: dict[str, str]) -> str:
    """`a.b.c` of an attribute, `a` by its full name if it was imported, and an ellipsis if it is no name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    root = modules.get(node.id, node.id) if isinstance(node, ast.Name) else "…"
    return ".".join([root, *reversed(parts)])
