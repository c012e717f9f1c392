"""Copies, pickles, averages and state dicts of every module at every moment: nothing of a call is in them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pickles import restored
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import deqlib
from deqlib import ImplicitLayer, Solution, Stopping

WIDTH = 4


class Cell(nn.Module):
    """Contractive, with a place for the module that a test is about."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.inject = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Identity() if inner is None else inner

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(0.3 * self.linear(z) + self.inject(x)))


class WithStart(nn.Module):
    """A module whose layer starts where a method of it says."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layer = ImplicitLayer(Cell(), init=self.start, stopping=Stopping.steps(2))

    def start(self, x: Tensor) -> Tensor:
        return self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def normalised() -> nn.Module:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    return deqlib.nn.spectral_norm(block, at_most=True)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def of(**settings: Any) -> Callable[[], nn.Module]:
    # Training here is wild enough that a solve may miss its tolerance; that is not what is tested.
    return lambda: ImplicitLayer(Cell(), **{"on_failure": "ignore", **settings})


def starts_warm() -> nn.Module:
    return of(backward=deqlib.ImplicitDifferentiation(warm_start=deqlib.AdjointStart()))()


def reversible() -> nn.Module:
    steps = Stopping.steps(9)
    return of(solver=deqlib.ReversiblePicard(), backward=deqlib.Reversible(), stopping=steps)()


SOLVERS = ("Picard", "Anderson", "Broyden", "NewtonKrylov", "Auto")
MODES = ("ImplicitDifferentiation", "JFB", "PhantomGradient", "SharedInverse", "StochasticJFB", "Unroll")
KINDS: dict[str, Callable[[], nn.Module]] = {
    **{name: of(solver=getattr(deqlib, name)()) for name in SOLVERS},
    **{name: of(solver=deqlib.Broyden(), backward=getattr(deqlib, name)()) for name in MODES},
    "GMRES": of(backward=deqlib.ImplicitDifferentiation(solver=deqlib.GMRES())),
    "Reversible": reversible,
    "AdjointStart": starts_warm,
    "generator": lambda: of(backward=deqlib.StochasticJFB(generator=seeded()))(),
    "partial": of(init=partial(torch.zeros_like)),
    "lambda": of(init=lambda x: x * 0),
    "method": WithStart,
    "module": of(init=nn.Linear(WIDTH, WIDTH)),
    "compact": of(compact=True),
    "Dropout": lambda: ImplicitLayer(Cell(deqlib.nn.Dropout(0.5))),
    "Dropout of a generator": lambda: ImplicitLayer(Cell(deqlib.nn.Dropout(0.5, generator=seeded()))),
    "StableInjection": lambda: ImplicitLayer(deqlib.nn.StableInjection(WIDTH)),
    "_SpectralNorm": lambda: ImplicitLayer(Cell(normalised())),
    "MonotoneCell": lambda: ImplicitLayer(deqlib.nn.MonotoneCell(WIDTH)),
}
UNPICKLABLE = {"lambda"}  # Python's own limit: a function without a name
# Modules that live as long as one call, or that users inherit from.
WITHIN_A_CALL = {"_ByName", "_Recorder", "_StateAlone"}


def inputs() -> Tensor:
    return torch.randn(3, WIDTH, generator=seeded(7))


def run(layer: nn.Module) -> Tensor:
    """The output, with all that is random drawn from one seed."""
    torch.manual_seed(11)
    return layer(inputs())


# What may happen to a layer before it is copied. What is returned is held while it is.


def off_the_tape(layer: nn.Module) -> Any:
    with torch.no_grad():
        return run(layer)


def backward(layer: nn.Module) -> None:
    run(layer).sum().backward()


def step(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    backward(layer)
    optimizer.step()


def failed(layer: nn.Module) -> Any:
    found = next(m for m in layer.modules() if isinstance(m, ImplicitLayer))
    if found.stopping.is_fixed:
        return None
    before = found.stopping, found.on_failure
    found.stopping, found.on_failure = Stopping(rtol=1e-12, max_steps=1), "raise"
    try:
        with contextlib.suppress(deqlib.NonConvergenceError):
            run(layer)
    finally:
        found.stopping, found.on_failure = before
    return found


def penalised(layer: nn.Module) -> Any:
    with deqlib.nn.one_solve():
        return run(layer) + run(layer)


def reversed_once(layer: nn.Module) -> None:
    layer.train(not layer.training)


HAPPENINGS = (off_the_tape, run, backward, step, failed, penalised, reversed_once)


def storages(layer: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in layer.state_dict().values()}


def check_twin(layer: nn.Module, twin: nn.Module) -> None:
    """The twin computes the same and shares nothing."""
    assert type(twin).__name__ == type(layer).__name__
    assert not storages(layer) & storages(twin)
    assert twin.training == layer.training
    kept = copy.deepcopy(layer.state_dict())
    generators = copy.deepcopy(layer)  # one that is drawn from moves on, so that each side needs its own
    expected, actual = run(generators), run(twin)
    assert actual.equal(expected)
    actual.sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.01)
    assert all(value.equal(kept[name]) for name, value in layer.state_dict().items())
    assert not run(twin).equal(expected)


PROTOCOLS = (2, 3, 4, 5, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_computes_the_same_bits_after_all_that_may_happen(kind: str) -> None:
    for protocol, happenings in ((None, HAPPENINGS), (2, ())):
        check_twins(kind, happenings, protocol)


@given(
    st.sampled_from(list(KINDS)),
    st.lists(st.sampled_from(HAPPENINGS), max_size=4),
    st.sampled_from(PROTOCOLS),
)
def test_a_twin_computes_the_same_bits_whatever_happened_before(
    kind: str, happenings: list[Callable[[nn.Module], Any]], protocol: int | None
) -> None:
    check_twins(kind, happenings, protocol)


def check_twins(kind: str, happenings: Sequence[Callable[[nn.Module], Any]], protocol: int | None) -> None:
    layer = KINDS[kind]()
    keys, size = list(layer.state_dict()), len(pickle.dumps(layer)) if kind not in UNPICKLABLE else 0
    held = [happening(layer) for happening in happenings]
    assert list(layer.state_dict()) == keys
    check_twin(layer, copy.deepcopy(layer))
    if kind not in UNPICKLABLE:
        assert len(pickle.dumps(layer)) == size
        check_twin(layer, restored(layer, protocol))
    del held


@pytest.mark.parametrize("kind", KINDS)
def test_within_one_solve_and_compiled_a_twin_computes_the_same(kind: str) -> None:
    layer = KINDS[kind]().eval()
    with deqlib.nn.one_solve():
        run(layer)
        check_twin(layer, copy.deepcopy(layer))
    layer.compile(backend="eager")
    for twin in (copy.deepcopy(layer), *([] if kind in UNPICKLABLE else [restored(layer, None)])):
        check_twin(layer, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_follows_its_model(kind: str) -> None:
    layer = KINDS[kind]()
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.25), use_buffers=True)
    average.update_parameters(layer)  # the first one copies
    expected = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(3):
        step(layer)
        average.update_parameters(layer)
        for name, value in layer.state_dict().items():
            expected[name].lerp_(value, 0.75)
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    run(average).sum().backward()  # it is a model like any other
    twin = KINDS[kind]()
    twin.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(run(twin.eval()), run(average.module.eval()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_without_values_takes_a_state_dict(kind: str, assign: bool) -> None:
    layer = KINDS[kind]()
    step(layer)
    with torch.device("meta"):
        twin = KINDS[kind]()
    for module in twin.modules():  # one that was given from outside has its values
        if isinstance(module, ImplicitLayer) and isinstance(module.init, nn.Module):
            module.init = copy.deepcopy(module.init)
    if not assign:
        twin.to_empty(device="cpu")
    twin.load_state_dict(layer.state_dict(), assign=assign)
    with torch.no_grad():
        assert run(twin.eval()).equal(run(layer.eval()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_of_another_type_is_near(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind]().eval()
    twin = copy.deepcopy(layer).to(dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", deqlib.NonConvergenceWarning)  # half precision may not get there
        expected, actual = run(layer), twin(inputs().to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)
    assert twin.float()(inputs()).dtype == torch.float32


def test_batch_norm_in_a_cell_is_updated_for_an_average() -> None:
    layer = ImplicitLayer(Cell(nn.BatchNorm1d(WIDTH)), stopping=Stopping.steps(3))
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(layer)
    data = [torch.randn(8, WIDTH, generator=seeded(i)) for i in range(4)]
    update_bn(data, average)
    norm = average.module.cell.inner
    assert int(norm.num_batches_tracked) == 4 * 3  # evaluations of the cell: three steps each
    assert not norm.running_mean.eq(0).any()


def test_taking_the_norm_off_a_copy_leaves_the_original() -> None:
    x = inputs()
    for original in (deqlib.nn.spectral_norm(nn.Linear(WIDTH, WIDTH)), normalised()):
        expected = original(x)
        for twin in (copy.deepcopy(original), restored(original, 5)):
            deqlib.nn.remove_spectral_norm(twin)
            torch.testing.assert_close(twin(x), expected)
            assert original(x).equal(expected)
    attention = deqlib.nn.spectral_norm(nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    twin = restored(attention, 2)
    assert twin(x, x, x)[0].equal(attention(x, x, x)[0])
    deqlib.nn.remove_spectral_norm(attention)
    twin(x, x, x)


def test_a_weight_with_other_parametrizations_is_copied_with_them() -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(linear, "weight", nn.Tanh(), unsafe=True)
    parametrize.register_parametrization(linear, "bias", nn.Softplus(), unsafe=True)
    deqlib.nn.spectral_norm(linear)
    for twin in (copy.deepcopy(linear), restored(linear, None)):
        assert twin(inputs()).equal(linear(inputs()))
        assert list(twin.state_dict()) == list(linear.state_dict())


def test_a_tied_normalised_module_stays_tied_in_a_copy() -> None:
    shared = deqlib.nn.spectral_norm(nn.Linear(WIDTH, WIDTH))
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    for twin in (copy.deepcopy(model), restored(model, 4)):
        assert twin[0] is twin[1][0]
        assert len(list(twin.parameters())) == 2


def test_a_copied_adjoint_start_begins_afresh() -> None:
    start = deqlib.AdjointStart()
    g = torch.ones(2, 3)
    start.remember(g, 2 * g)
    assert start.guess(g).equal(2 * g)
    for twin in (copy.deepcopy(start), pickle.loads(pickle.dumps(start))):
        assert twin.guess(g).equal(g)
        twin.remember(g, 3 * g)
    assert start.guess(g).equal(2 * g)


# What a solve returns


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solution_is_copied_and_pickled_without_its_graph(mode: str, solver: str) -> None:
    if mode == "SharedInverse" and solver != "Broyden":
        pytest.skip("needs Broyden's history")
    layer = of(solver=getattr(deqlib, solver)(), backward=getattr(deqlib, mode)())()
    solution = layer.solve(inputs())
    assert solution.value.requires_grad
    assert copy.copy(solution).value is solution.value
    for twin in (copy.deepcopy(solution), pickle.loads(pickle.dumps(solution))):
        assert isinstance(twin, Solution)
        assert not twin.value.requires_grad
        assert twin.value.equal(solution.value)
        assert twin.status.equal(solution.status)
        assert repr(twin) == repr(solution)
        with torch.no_grad():  # where a random number of steps plays no part
            again, now = (layer.solve(inputs(), z0=s.value, state=s.state) for s in (solution, twin))
        assert now.value.equal(again.value)


@pytest.mark.parametrize("wrap", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_failure_reaches_another_process(wrap: Callable[[Any], Any]) -> None:
    layer = of(stopping=Stopping(rtol=1e-9, max_steps=1), on_failure="raise")()
    with pytest.raises(deqlib.NonConvergenceError) as caught:
        layer(inputs())
    caught.value.add_note("of the second block")
    twin = wrap(caught.value)
    assert str(twin) == str(caught.value)
    assert twin.solution.status.equal(caught.value.solution.status)
    assert twin.__notes__ == ["of the second block"]


@pytest.mark.slow
def test_a_layer_works_in_another_process() -> None:
    context = torch.multiprocessing.get_context("spawn")
    layers = [KINDS[kind]().eval() for kind in ("_SpectralNorm", "Auto", "AdjointStart")]
    for layer in layers:
        backward(layer)
        layer.zero_grad()
        layer.share_memory()
    with context.Pool(1) as pool:
        found = pool.map(numbers_of, layers)
    for layer, numbers in zip(layers, found, strict=True):
        assert torch.tensor(numbers).equal(off_the_tape(layer))


def numbers_of(layer: nn.Module) -> list[list[float]]:
    torch.set_num_threads(1)
    return off_the_tape(layer).tolist()


# Nothing is left out


def classes() -> Iterator[type]:
    """All that the package defines."""
    for info in pkgutil.walk_packages(deqlib.__path__, "deqlib."):
        if info.name.startswith("deqlib.testing"):
            continue
        module = importlib.import_module(info.name)
        yield from (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == info.name)


def test_every_module_of_the_package_is_among_those_tested() -> None:
    tested = {type(module) for make in KINDS.values() for module in make().modules()}
    found = [c for c in classes() if issubclass(c, nn.Module)]
    assert len(found) >= 4
    assert {c.__name__ for c in found if c not in tested} == WITHIN_A_CALL


def test_every_solver_mode_and_setting_is_equal_to_its_copies() -> None:
    contracts = (deqlib.Solver, deqlib.Backward, Stopping)
    found = [c for c in classes() if issubclass(c, contracts) and not inspect.isabstract(c)]
    assert len(found) > 12
    for kind in found:
        required = [
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if required:
            continue  # made by others, for one solve
        setting = kind()
        for protocol in range(2, 6):
            assert pickle.loads(pickle.dumps(setting, protocol)) == setting
        assert copy.deepcopy(setting) == copy.copy(setting) == setting
