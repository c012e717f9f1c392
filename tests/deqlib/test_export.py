"""A fixed number of steps, traced: compiled, exported, and on tensors without numbers.

Every solver at its default settings. Tracing thousands of operations takes long, so of the larger cases some
are left to `HYPOTHESIS_PROFILE=thorough`; what the host can see does not depend on who traces, and that is
checked at every number of steps by solves that look at nothing and on fake tensors.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import look_at_nothing

from deqlib import (
    GMRES,
    Anderson,
    Auto,
    Broyden,
    ImplicitLayer,
    NewtonKrylov,
    Picard,
    ReversiblePicard,
    Solver,
    Stopping,
)

DEFAULTS: dict[str, Solver] = {
    "picard": Picard(),
    "reversible": ReversiblePicard(),
    "anderson": Anderson(),
    "anderson I": Anderson(kind="I"),
    "broyden": Broyden(),
    "newton": NewtonKrylov(),
    "newton jvp": NewtonKrylov(derivative="jvp"),
    "gmres": GMRES(),
    "auto": Auto(),
}
STEPS = (1, 8, 24)
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

# The cases that are traced in any case. `test_compile.py` compiles eight steps of most solvers.
COMPILED = {
    1: [*DEFAULTS],
    8: ["reversible", "gmres"],
    24: ["picard"],
}
EXPORTED = {
    1: [*DEFAULTS],
    8: ["picard", "anderson"],
    24: ["picard"],
}
EXPORTED_STRICTLY = {
    1: ["picard", "anderson", "newton jvp"],
    8: ["picard"],
    24: [],
}


class Cell(nn.Module):
    """tanh(W z + b + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        with torch.no_grad():
            self.inner.weight *= 0.6

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def layer_of(name: str, steps: int, *, measure: bool = False) -> ImplicitLayer:
    return ImplicitLayer(Cell(), solver=DEFAULTS[name], stopping=Stopping.steps(steps, measure=measure))


def cases(chosen: dict[int, list[str]]) -> pytest.MarkDecorator:
    """The chosen names and numbers of steps; all of them in a thorough run."""
    found = [(name, steps) for steps in STEPS for name in DEFAULTS if THOROUGH or name in chosen[steps]]
    return pytest.mark.parametrize(("name", "steps"), found)


everything = pytest.mark.parametrize("steps", STEPS)
by_name = pytest.mark.parametrize("name", DEFAULTS)


@everything
@by_name
def test_what_is_found_without_looking_is_what_is_found(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(name, steps, measure=True).double(), torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        looking = layer.solve(x)
        look_at_nothing(monkeypatch)
        blind = layer.solve(x)
    torch.testing.assert_close(blind.value, looking.value, rtol=1e-12, atol=1e-12)
    assert torch.equal(blind.num_steps, looking.num_steps)


@cases(COMPILED)
def test_a_compiled_solve_is_the_eager_solve(name: str, steps: int) -> None:
    layer, x = layer_of(name, steps), torch.randn(3, 5)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@cases(EXPORTED)
def test_an_exported_solve_is_the_eager_solve(name: str, steps: int) -> None:
    check_exported(name, steps, strict=False)


# Dynamo tells that the scope which modules of `deqlib.nn` ask is set and reset in the forward pass.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@cases(EXPORTED_STRICTLY)
def test_a_strictly_exported_solve_is_the_eager_solve(name: str, steps: int) -> None:
    torch.compiler.reset()
    check_exported(name, steps, strict=True)


def check_exported(name: str, steps: int, *, strict: bool) -> None:
    layer = layer_of(name, steps)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.zeros(3, 5),), strict=strict)
        for _ in range(2):  # the graph holds nothing of the inputs that it was traced with
            x = torch.randn(3, 5)
            torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


@everything
@by_name
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_get_the_shapes_dtypes_and_device_of_a_solve(name: str, steps: int, device: str) -> None:
    x = torch.randn(3, 5)
    with torch.no_grad():
        expected = layer_of(name, steps, measure=True).solve(x)
        try:
            with FakeTensorMode():
                weight, fake = torch.empty(5, 5, device=device), torch.empty(3, 5, device=device)
                layer = ImplicitLayer(
                    lambda z, x: torch.tanh(z @ weight + x),
                    solver=DEFAULTS[name],
                    stopping=Stopping.steps(steps, measure=True),
                )
                found = layer.solve(fake)
        except RuntimeError as error:
            if not any(cause in str(error) for cause in ("not linked with support for cuda", "CUDA driver")):
                raise
            pytest.skip(
                "this build of PyTorch, or one without a driver, refuses some operations on fake CUDA tensors"
            )
    names = ("value", "residual", "relative_residual", "num_steps", "status", "sample_nfe", "trace", "method")
    for attribute in names:
        got, wanted = getattr(found, attribute), getattr(expected, attribute)
        assert got.shape == wanted.shape, attribute
        assert got.dtype == wanted.dtype, attribute
        assert got.device.type == device, attribute
    assert found.nfe == expected.nfe
