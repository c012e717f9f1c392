"""What a failed solve says: which layer, in which pass, and what can be changed of what is in use."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deqlib import (
    JFB,
    Anderson,
    Auto,
    FailurePolicy,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceError,
    NonConvergenceWarning,
    Picard,
    PredictionEntropy,
    Solver,
    Status,
    Stopping,
    fixed_point,
)

DIM = 4
FEW = Stopping(rtol=1e-9, max_steps=2)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        nn.init.orthogonal_(self.inner.weight, gain=0.9)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def failing(**settings: Any) -> ImplicitLayer:
    return ImplicitLayer(Cell(), **{"stopping": FEW, **settings})


def only_adjoint(**settings: Any) -> ImplicitLayer:
    return ImplicitLayer(Cell(), backward=ImplicitDifferentiation(stopping=FEW), **settings)


def messages(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # says the compiler
        run()
    assert all(w.category is NonConvergenceWarning for w in caught)
    return [str(w.message) for w in caught]


def train(model: nn.Module, x: Tensor | None = None) -> None:
    model(torch.randn(3, DIM) if x is None else x).sum().backward()


# Names --------------------------------------------------------------------------------------------------


def test_forward_and_adjoint_are_told_by_the_layers_name_in_its_model() -> None:
    model = nn.Sequential(ImplicitLayer(Cell()), nn.Sequential(nn.Linear(DIM, DIM), failing()))
    said = messages(lambda: train(model))
    assert len(said) == 1
    assert said[0].startswith("fixed-point solve of layer '1.1' (ImplicitLayer of Cell): 3 of 3 samples")
    model = nn.ModuleDict({"encoder": nn.Sequential(only_adjoint())})
    assert messages(lambda: train(model["encoder"]))[0].startswith("adjoint solve of layer '0' (Implicit")


def test_layers_alone_and_functions_are_told_by_what_they_are() -> None:
    x = torch.randn(3, DIM)
    assert messages(lambda: failing()(x))[0].startswith("fixed-point solve of ImplicitLayer of Cell: 3 of 3")

    def damped(z: Tensor, x: Tensor) -> Tensor:
        return 0.9 * z + x

    class Callable_:
        def __call__(self, z: Tensor, x: Tensor) -> Tensor:
            return damped(z, x)

        def method(self, z: Tensor, x: Tensor) -> Tensor:
            return damped(z, x)

    for cell, name in (
        (damped, r"test_layers_alone.*<locals>\.damped \(test_messages\.py:\d+\)"),
        (functools.partial(damped), r".*damped \(test_messages\.py:\d+\)"),
        (Callable_(), "Callable_"),
        (Callable_().method, r".*Callable_\.method \(test_messages\.py:\d+\)"),
        (Cell(), "Cell"),
    ):
        said = messages(lambda cell=cell: fixed_point(cell, x, (x,), stopping=FEW))  # type: ignore[misc]
        assert re.match(f"fixed-point solve of {name}: ", said[0]), said[0]


def test_a_cell_that_is_a_part_of_a_model_is_told_by_its_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Cell()

        def forward(self, x: Tensor) -> Tensor:
            return fixed_point(self.block, torch.zeros_like(x), (x,), stopping=FEW).value

    said = messages(lambda: Model()(torch.randn(3, DIM)))
    assert said[0].startswith("fixed-point solve of cell 'block' (Cell): ")


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deq = only_adjoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        nn.DataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: lambda x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
        lambda m: lambda x: m(x),
        copy.deepcopy,
    ],
    ids=["bare", "DataParallel", "compiled", "functional_call", "function", "copied"],
)
def test_wrapped_models_give_the_names_of_the_bare_one(wrap: Any) -> None:
    model = nn.Sequential(nn.Identity(), Outer())
    wrapped = wrap(model)
    said = messages(lambda: wrapped(torch.randn(3, DIM)).sum().backward())
    assert [text.partition(":")[0] for text in said] == [
        "adjoint solve of layer '1.deq' (ImplicitLayer of Cell)"
    ]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_keeps_its_name_where_it_is_computed_again(use_reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deq = failing(backward=JFB())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.deq, x, use_reentrant=use_reentrant)

    x = torch.randn(3, DIM, requires_grad=True)
    model = Model()
    said = messages(lambda: train(model, x))
    assert len(said) > 1
    assert {text.partition(" (")[0] for text in said} == {"fixed-point solve of layer 'deq'"}


def test_a_layer_in_a_layer_is_told_by_both_names() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = failing()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * self.inner(0.1 * z + x)

    said = messages(lambda: nn.Sequential(ImplicitLayer(Nested(), backward=JFB()))(torch.randn(3, DIM)))
    assert {text.partition(" (")[0] for text in said} == {"fixed-point solve of layer '0.cell.inner'"}


def test_a_backward_pass_in_another_thread_knows_the_name() -> None:
    model = nn.Sequential(nn.Identity(), only_adjoint())
    loss = model(torch.randn(3, DIM)).sum()

    def elsewhere() -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    assert messages(elsewhere)[0].startswith("adjoint solve of layer '1' (ImplicitLayer of Cell): ")


def test_names_keep_no_model_alive() -> None:
    gc.disable()
    try:
        model = nn.Sequential(only_adjoint())
        layer, gone = model[0], weakref.ref(model)
        loss = model(torch.randn(3, DIM)).sum()
        del model
        assert gone() is None
        said = messages(loss.backward)
        assert said[0].startswith("adjoint solve of ImplicitLayer of Cell: ")
        gone = weakref.ref(layer)
        del layer, loss
        assert gone() is None
    finally:
        gc.enable()


# What is said -------------------------------------------------------------------------------------------


def test_nobody_is_told_to_use_what_is_used() -> None:
    x = torch.randn(3, DIM)
    assert "Auto()" not in messages(lambda: failing(solver=Auto())(x))[0]
    assert (
        "use solver=Auto(), which tries several methods (now Anderson)"
        in (messages(lambda: failing(solver=Anderson())(x))[0])
    )
    said = messages(lambda: train(only_adjoint()))[0]
    assert "raise max_steps (now 2) of ImplicitDifferentiation(stopping=...)" in said
    assert "Auto()" not in said
    backward = ImplicitDifferentiation(solver=Picard(), stopping=FEW)
    said = messages(lambda: train(ImplicitLayer(Cell(), backward=backward)))[0]
    assert "use ImplicitDifferentiation(solver=Auto()), which tries several methods (now Picard)" in said


def test_damping_is_advised_to_solvers_that_have_it() -> None:
    def said(solver: Solver) -> str:
        with pytest.raises(NonConvergenceError, match="DIVERGED") as caught:
            fixed_point(lambda z: z * float("nan"), torch.ones(2, 8), solver=solver, on_failure="raise")
        return str(caught.value)

    assert "use damping (now 1)" in said(Picard())
    assert "use damping" not in said(Auto())


def test_precision_is_named_where_it_is_the_cause() -> None:
    weight = torch.randn(64, 64) / 16
    x = torch.randn(2, 64)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight.to(z.dtype) + x.to(z.dtype)) + 1e-4 * torch.randn_like(z)

    tight = Stopping(rtol=1e-6, max_steps=40)
    half = lambda: fixed_point(cell, x.bfloat16(), (x,), stopping=tight, backward=JFB())  # noqa: E731
    assert (
        "the cell computes in bfloat16, whose resolution of 8e-03 is coarser than rtol=1e-06: take rtol=0.008"
        in (messages(half)[0])
    )

    def cast() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fixed_point(
                lambda z, x: torch.tanh(z @ weight + x) + 1e-4 * torch.randn_like(z), x, (x,), stopping=tight
            )

    assert "the cell computes in bfloat16" in messages(cast)[0]
    # In float32 the tolerance can be met, so the noise is the cause; and far from it, type is none.
    assert "the cell computes in" not in messages(lambda: fixed_point(cell, x, (x,), stopping=tight))[0]
    slow = lambda: fixed_point(lambda z: 0.999 * z + 1, x.bfloat16() * 0, stopping=FEW, solver=Picard())  # noqa: E731
    assert "the cell computes in" not in messages(slow)[0]
    single = lambda: fixed_point(  # noqa: E731
        lambda z: torch.tanh(z @ weight + x) + 1e-8 * torch.randn_like(z), x, stopping=Stopping(rtol=1e-12)
    )
    assert "the cell computes in float32, whose resolution of 1e-07" in messages(single)[0]


def test_precision_is_not_the_cause_where_a_readout_alone_decides() -> None:
    never = PredictionEntropy(head=lambda z: z, threshold=0.0)
    rule = Stopping(rtol=0, readout=never, max_steps=22)
    with pytest.warns(NonConvergenceWarning) as told:
        fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=Picard(), stopping=rule)
    assert "resolution" not in str(told[0].message)
    assert "readout (now PredictionEntropy(" in str(told[0].message)


def test_precision_is_named_where_a_solve_at_rounding_runs_away() -> None:
    calls = iter(range(1000))

    def cell(z: Tensor) -> Tensor:
        call = next(calls)
        return z * 0.5 + 1 + (1e3 * z if call > 30 else (-1) ** call * 6e-7)

    said = messages(
        lambda: fixed_point(cell, torch.zeros(2, 4), solver=Picard(), stopping=Stopping(rtol=1e-12))
    )
    assert "DIVERGED: the cell computes in float32, whose resolution of 1e-07" in said[0]


def test_a_way_out_is_told_once_whatever_the_number_of_statuses() -> None:
    gains = torch.tensor([[0.999], [-1.0], [50.0], [float("nan")]])
    said = messages(lambda: fixed_point(lambda z: gains * z + 1, torch.ones(4, 3), solver=Picard()))[0]
    assert all(name in said for name in ("MAX_STEPS: ", "STALLED: ", "DIVERGED: "))
    assert said.count("Auto()") == said.count("loosen Stopping.rtol") == 1


def test_the_tolerance_that_is_used_is_the_one_to_loosen() -> None:
    rules = {Stopping(rtol=0, atol=1e-9, max_steps=3): "loosen Stopping.atol (now 1e-09), or"}
    rules[Stopping(rtol=1e-5, atol=1e-6, max_steps=3)] = "rtol (now 1e-05) or atol (now 1e-06), or"
    for rule, wanted in rules.items():
        found = messages(
            lambda rule=rule: fixed_point(lambda z: 0.9 * z + 1, torch.ones(2, 3), stopping=rule)
        )
        assert wanted in found[0]


def test_a_solution_where_a_part_of_it_belongs_names_the_part() -> None:
    layer, x = ImplicitLayer(Cell()), torch.ones(2, DIM)
    solution = layer.solve(x)
    with pytest.raises(TypeError, match="got Solution; pass its value"):
        layer.solve(x, z0=solution)
    with pytest.raises(ValueError, match="got Solution; pass its state"):
        layer.solve(x, state=solution)


def test_what_value_holds_is_told_where_no_iterate_beat_the_start() -> None:
    gains = torch.tensor([[0.97], [3.0], [3.0]])
    start = torch.ones(3, 2)

    def run(rows: slice) -> str:
        g = gains[rows]
        settings: dict[str, Any] = {"solver": Picard(), "stopping": Stopping(max_steps=3)}
        return messages(lambda: fixed_point(lambda z: g * z + 1, start[rows], **settings))[0]

    assert "; the best iterate is kept. What" in run(slice(0, 1))
    assert "none of them has an iterate better than the start, which is what value holds. What" in run(
        slice(1, 3)
    )
    assert (
        "2 of them have no iterate better than the start, which is what value holds; of the others the best "
        "iterate is kept. What" in run(slice(0, 3))
    )


# Policies -----------------------------------------------------------------------------------------------


@given(
    total=st.sampled_from([1, 10, 20, 25, 50, 100]), drawn=st.floats(0, 1), more=st.sampled_from([-1, 0, 1])
)
def test_a_share_of_samples_may_fail_without_a_word(total: int, drawn: float, more: int) -> None:
    failed = round(drawn * total)
    percent = min(max(100 * failed // total + more, 0), 99)  # as many as fail, or just not
    gains = torch.full((total, 1), 0.1)
    gains[:failed] = 5.0
    policy = FailurePolicy(action="raise", tolerated=float(f"0.{percent:02}"))

    def run() -> None:
        settings: dict[str, Any] = {"solver": Picard(), "backward": JFB(), "on_failure": policy}
        fixed_point(
            lambda z: gains * z + 1, torch.zeros(total, 1), stopping=Stopping(max_steps=9), **settings
        )

    if Fraction(failed, total) > Fraction(percent, 100):
        with pytest.raises(NonConvergenceError, match=f"{failed} of {total} samples"):
            run()
    else:
        run()


def test_the_share_counts_in_the_adjoint_too() -> None:
    x = torch.randn(3, DIM, requires_grad=True)
    g = torch.zeros(3, DIM)
    g[0] = 1  # the others have nothing to solve
    for tolerated, count in ((0.4, 0), (0.3, 1)):
        layer = only_adjoint(on_failure=FailurePolicy(tolerated=tolerated))
        assert len(messages(lambda layer=layer: torch.autograd.grad(layer(x), x, g))) == count  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"action": "explode"}, ValueError, "FailurePolicy: action must be one of .*got 'explode'"),
        ({"tolerated": 1.0}, ValueError, 'tolerated must be below 1, .*use action="ignore"'),
        ({"tolerated": -0.1}, ValueError, r"tolerated must be in \[0, 1\]"),
        ({"tolerated": float("nan")}, ValueError, "tolerated must be in"),
        ({"tolerated": "half"}, TypeError, "tolerated must be a number, got 'half'"),
        ({"tolerated": True}, TypeError, "tolerated must be a number, got True"),
    ],
)
def test_a_policy_is_validated(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FailurePolicy(**settings)


def test_solve_takes_a_policy_of_one_call_for_both_passes() -> None:
    layer, x = only_adjoint(on_failure="raise"), torch.randn(3, DIM)
    assert not messages(lambda: layer.solve(x, on_failure="ignore").value.sum().backward())
    with pytest.raises(NonConvergenceError, match="adjoint"):
        layer(x).sum().backward()
    assert layer.on_failure == "raise"


# Filters of warnings ------------------------------------------------------------------------------------

TRAINING = textwrap.dedent(
    """
    import warnings
    import torch
    from torch import nn
    from deqlib import ImplicitDifferentiation, ImplicitLayer, Picard, Stopping

    torch.manual_seed(0)
    few = Stopping(rtol=1e-9, max_steps=2)
    def make():
        linear = nn.Linear(4, 4)
        return ImplicitLayer(lambda z, x: torch.tanh(0.3 * linear(z) + x), stopping=few,
                             backward=ImplicitDifferentiation(stopping=few))
    model = nn.Sequential(make(), make())
    with warnings.catch_warnings():  # PyTorch changes filters when first used, so that all is told anew
        warnings.simplefilter("ignore")
        model(torch.randn(3, 4)).sum().backward()
    for _ in range(4):
        model(torch.randn(3, 4)).sum().backward()
    """
)


@pytest.mark.parametrize(("action", "count"), [("default", 4), ("once", 4), ("module", 4), ("always", 16)])
def test_filters_tell_a_layer_and_pass_once_whatever_the_numbers(action: str, count: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", action, "-W", "ignore::DeprecationWarning", "-c", TRAINING],
        capture_output=True,
        text=True,
        check=True,
    )
    told = re.findall(r"NonConvergenceWarning: (.*?): 3 of 3 .*worst relative residual \d", ran.stderr)
    assert len(told) == count, ran.stderr
    assert {name.partition(" (")[0] for name in told} == {
        f"{kind} solve of layer '{layer}'" for kind in ("fixed-point", "adjoint") for layer in (0, 1)
    }


def test_a_warning_knows_what_it_is_of_and_survives_a_pickle() -> None:
    with pytest.warns(NonConvergenceWarning) as caught:
        nn.Sequential(failing())(torch.randn(3, DIM))
    warning = caught[0].message
    assert isinstance(warning, NonConvergenceWarning)
    again = pickle.loads(pickle.dumps(warning))
    for one in (warning, again, copy.deepcopy(warning)):
        assert (one.layer, one.kind, one.counts) == ("0", "forward", {Status.MAX_STEPS: 3})
        assert str(one).startswith("fixed-point solve of layer '0'")
        assert str(one) == str(warning)
    assert pickle.loads(pickle.dumps(str(warning))) == str(warning)
    plain = NonConvergenceWarning("by hand")
    assert (str(plain), plain.layer, plain.kind) == ("by hand", "", "forward")


def test_an_error_survives_a_pickle_with_its_solution() -> None:
    with torch.no_grad(), pytest.raises(NonConvergenceError) as caught:
        failing(on_failure="raise", solver=Picard())(torch.randn(3, DIM))
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.message == str(again) == str(caught.value)
    assert torch.equal(again.solution.value, caught.value.solution.value)
