"""Valid calls of everything public in deqlib, for the fuzzer to spoil."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from calls import Target
from torch import Tensor, nn

import deqlib
from deqlib import diagnostics, regularizers, testing
from deqlib import nn as deq_nn
from deqlib.testing import strategies

BATCH, WIDTH = 3, 4
STOPPING = deqlib.Stopping(rtol=1e-3, max_steps=12)


class Cell(nn.Module):
    """A contraction, with an input by position and one by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.linear.weight, gain=0.5)

    def forward(self, z: Tensor, x: Tensor, *, scale: Any = 1.0) -> Tensor:
        return torch.tanh(self.linear(z) + scale * x)


def cell(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * torch.cos(z) + x


def squares(value: Any) -> Tensor:
    return value.square().sum()


def x() -> Tensor:
    return torch.linspace(-1, 1, BATCH * WIDTH).view(BATCH, WIDTH).clone()


def layer(**settings: Any) -> deqlib.ImplicitLayer:
    return deqlib.ImplicitLayer(Cell(), **{"stopping": STOPPING, "on_failure": "ignore", **settings})


def head(z: Tensor) -> Tensor:
    return z


def defaults(made: Callable[..., Any], **values: Any) -> dict[str, Any]:
    """All arguments of a signature: their defaults where no other value is given."""
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(made).parameters.items()
        if parameter.default is not parameter.empty
        and repr(parameter.default) != "<factory>"  # a dataclass makes it anew each time
    }
    return {**found, **values}


def made_by(made: Callable[..., Any], name: str = "", share: float = 1.0, **values: Any) -> Target:
    """The target of a class or function whose valid arguments are its defaults and these."""
    full = name or f"{made.__module__.partition('.')[0]}.{made.__qualname__}"
    return Target(full, made, lambda: defaults(made, **values), share=share)


SETTINGS = [
    made_by(deqlib.Stopping),
    made_by(deqlib.Stopping.steps, num_steps=3),
    made_by(deqlib.Picard),
    made_by(deqlib.Anderson),
    made_by(deqlib.Broyden),
    made_by(deqlib.NewtonKrylov),
    made_by(deqlib.GMRES),
    made_by(deqlib.ReversiblePicard),
    made_by(deqlib.Auto, methods=(deqlib.Anderson(), deqlib.Broyden())),
    made_by(deqlib.ImplicitDifferentiation, solver=deqlib.GMRES(), stopping=deqlib.Stopping()),
    made_by(deqlib.JFB),
    made_by(deqlib.PhantomGradient),
    made_by(deqlib.StochasticJFB),
    made_by(deqlib.Unroll),
    made_by(deqlib.AdjointStart),
    made_by(deqlib.SharedInverse),
    made_by(deqlib.Reversible),
    made_by(deqlib.Uniform, least=1, most=3),
    made_by(deqlib.Poisson, mean=3.0),
    made_by(deqlib.LogNormalPoisson, mean=3.0),
    made_by(deqlib.Geometric, mean=3.0),
    made_by(deqlib.FailurePolicy),
    made_by(deqlib.OutputDifference, head=head),
    made_by(deqlib.PredictionKL, head=head),
    made_by(deqlib.PredictionEntropy, head=head, threshold=0.1),
    made_by(deqlib.StableArgMax, head=head),
    made_by(deqlib.HaltingScore, head=head),
    made_by(deqlib.EquilibriumCache, max_tokens=8),
    made_by(deqlib.StepCache, max_tokens=8, num_steps=2),
    Target(
        "deqlib.Stopping.towards",
        lambda end, fraction: deqlib.Stopping.steps(2).towards(end, fraction),
        lambda: {"end": deqlib.Stopping.steps(8), "fraction": 0.5},
    ),
    Target(
        "deqlib.StochasticJFB.towards",
        lambda end, fraction: deqlib.StochasticJFB().towards(end, fraction),
        lambda: {"end": deqlib.StochasticJFB(no_grad=(0, 2)), "fraction": 0.5},
    ),
    Target(
        "deqlib.DepthDistribution.towards",
        lambda end, fraction: deqlib.Poisson(3).towards(end, fraction),
        lambda: {"end": deqlib.Poisson(5), "fraction": 0.5},
    ),
    Target(
        "deqlib.DepthDistribution.draw",
        lambda shape, generator: deqlib.Geometric(3).draw(shape, generator),
        lambda: {"shape": (3,), "generator": torch.Generator()},
        work=("shape",),
    ),
]


def _solve_and_back(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call, and where its value carries gradient, the backward pass."""

    def run(**given: Any) -> Any:
        found = call(**given)
        value = found.value if isinstance(found, deqlib.Solution) else found
        if isinstance(value, Tensor) and value.requires_grad and value.device.type != "meta":
            value.sum().backward()
        return found

    return run


def _settings_of_solve() -> dict[str, Any]:
    return {
        "solver": deqlib.Picard(),
        "stopping": STOPPING,
        "backward": deqlib.JFB(),
        "on_failure": "ignore",
        "compact": False,
        "state": None,
    }


def _with_step(z: Tensor, step: deqlib.Step) -> Tensor:
    return 0.5 * z + step.number.unsqueeze(1).to(z.dtype)


SOLVES = [
    Target(
        "deqlib.ImplicitLayer",
        deqlib.ImplicitLayer,
        lambda: defaults(deqlib.ImplicitLayer, cell=Cell(), init=torch.zeros_like, solver=deqlib.Picard()),
        share=2,
    ),
    Target(
        "deqlib.ImplicitLayer.forward",
        _solve_and_back(lambda x, scale, **odd: layer()(x, scale=scale, **odd)),
        lambda: {"x": x(), "scale": 1.0},
        share=3,
    ),
    Target(
        "deqlib.ImplicitLayer.solve",
        _solve_and_back(lambda x, **given: layer().solve(x, **given)),
        lambda: {"x": x(), "z0": torch.zeros(BATCH, WIDTH), "scale": 1.0, **_settings_of_solve()},
        share=4,
    ),
    Target(
        "deqlib.fixed_point",
        _solve_and_back(deqlib.fixed_point),
        lambda: {
            "f": cell,
            "z0": torch.zeros(BATCH, WIDTH),
            "args": (x(),),
            "kwargs": {},
            **_settings_of_solve(),
            "has_aux": False,
            "with_step": False,
        },
        share=6,
    ),
    Target(
        "deqlib.fixed_point, with_step",
        _solve_and_back(deqlib.fixed_point),
        lambda: {
            "f": _with_step,
            "z0": torch.zeros(BATCH, WIDTH),
            **_settings_of_solve(),
            "with_step": True,
        },
    ),
    Target(
        "deqlib.fixed_point, defaults",
        _solve_and_back(deqlib.fixed_point),
        lambda: {"f": Cell(), "z0": torch.zeros(BATCH, WIDTH), "args": (x(),), "stopping": STOPPING},
        share=3,
    ),
    Target(
        "deqlib.fixed_point, of a pytree",
        _solve_and_back(deqlib.fixed_point),
        lambda: {
            "f": lambda z: {"a": 0.5 * z["a"] + 1, "b": [0.5 * z["b"][0]]},
            "z0": {"a": torch.zeros(BATCH, WIDTH), "b": [torch.ones(BATCH)]},
            "stopping": STOPPING,
        },
    ),
    Target(
        "deqlib.solve_stream",
        torch.no_grad()(lambda **given: list(deqlib.solve_stream(layer(), **given))),
        lambda: {"samples": list(x()), "batch_size": 2, "stopping": STOPPING, "kwargs": {"scale": 1.0}},
    ),
    Target(
        "deqlib.solve_stream, layer",
        torch.no_grad()(lambda **given: list(deqlib.solve_stream(**given))),
        lambda: {"layer": layer(), "samples": list(x()), "batch_size": 2},
    ),
    Target(
        "deqlib.deep_supervision",
        lambda layer, x, **given: list(deqlib.deep_supervision(layer, x, **given)),
        lambda: {"layer": layer(), "x": x(), "num_solves": 2, "z0": torch.zeros(BATCH, WIDTH)},
        work=("num_solves",),
    ),
    Target("deqlib.record", deqlib.record, lambda: {"values": False}),
    Target(
        "deqlib.causal_mask",
        deqlib.causal_mask,
        lambda: {
            "queries": torch.zeros(2, 3, 1),
            "keys": torch.zeros(2, 4, 1),
            "first": torch.zeros(2, dtype=torch.int64),
        },
    ),
]


def _cache() -> deqlib.KeyValueCache:
    made = deqlib.EquilibriumCache(8)
    made.open(2, torch.zeros(BATCH, 2, 2, WIDTH))
    made.update(torch.zeros(BATCH, 2, 2, WIDTH), torch.zeros(BATCH, 2, 2, WIDTH))
    return made


CACHES = [
    Target(
        "deqlib.KeyValueCache.open",
        torch.no_grad()(lambda **given: deqlib.EquilibriumCache(8).open(**given)),
        lambda: {"num_tokens": 2, "like": torch.zeros(BATCH, 2, 2, WIDTH)},
    ),
    Target(
        "deqlib.KeyValueCache.update",
        torch.no_grad()(lambda **given: _cache().update(**given)),
        lambda: {
            "keys": torch.zeros(BATCH, 2, 2, WIDTH),
            "values": torch.zeros(BATCH, 2, 2, WIDTH),
            "layer": "",
            "rows": slice(None),
        },
    ),
    Target(
        "deqlib.KeyValueCache.slot",
        torch.no_grad()(lambda **given: _cache().slot(**given)),
        lambda: {"layer": "", "rows": slice(None), "evaluation": 0},
    ),
    Target(
        "deqlib.KeyValueCache.evict",
        torch.no_grad()(lambda **given: _cache().evict(**given)),
        lambda: {"num_tokens": 1},
    ),
    Target(
        "deqlib.KeyValueCache.reorder",
        torch.no_grad()(lambda **given: _cache().reorder(**given)),
        lambda: {"rows": torch.tensor([2, 0, 1])},
    ),
]


def _in_a_solve(module: nn.Module) -> Callable[..., Any]:
    def run(x: Any) -> Any:
        with deq_nn.one_solve():
            return module(x)

    return run


MODULES = [
    made_by(deq_nn.Dropout, "deqlib.nn.Dropout"),
    made_by(deq_nn.StableInjection, "deqlib.nn.StableInjection", width=WIDTH),
    made_by(deq_nn.MonotoneCell, "deqlib.nn.MonotoneCell", width=WIDTH),
    Target(
        "deqlib.nn.spectral_norm",
        deq_nn.spectral_norm,
        lambda: defaults(deq_nn.spectral_norm, module=nn.Linear(WIDTH, WIDTH)),
        work=("num_iterations",),
    ),
    Target(
        "deqlib.nn.remove_spectral_norm",
        deq_nn.remove_spectral_norm,
        lambda: {"module": deq_nn.spectral_norm(nn.Linear(WIDTH, WIDTH))},
        share=0.5,
    ),
    Target("deqlib.nn.one_solve", deq_nn.one_solve, dict, share=0.1),
    Target("deqlib.nn.checkpoint_contexts", deq_nn.checkpoint_contexts, dict, share=0.1),
    Target("deqlib.nn.Dropout.forward", _in_a_solve(deq_nn.Dropout(0.3)), lambda: {"x": x()}),
    Target(
        "deqlib.nn.Dropout.forward, shared",
        _in_a_solve(deq_nn.Dropout(0.3, shared_axes=(1,))),
        lambda: {"x": x()},
    ),
    Target(
        "deqlib.nn.StableInjection.forward",
        lambda z, x: deq_nn.StableInjection(WIDTH)(z, x),
        lambda: {"z": x(), "x": x()},
    ),
    Target(
        "deqlib.nn.MonotoneCell.forward",
        lambda u, x: deq_nn.MonotoneCell(WIDTH)(u, x),
        lambda: {"u": x(), "x": x()},
    ),
    Target(
        "deqlib.regularizers.jacobian_penalty",
        lambda cell, z, x, **given: regularizers.jacobian_penalty(cell, z, x, **given),
        lambda: {"cell": Cell(), "z": x(), "x": x(), "num_probes": 1, "generator": torch.Generator()},
        work=("num_probes",),
    ),
    Target(
        "deqlib.regularizers.trajectory",
        lambda layer, x, **given: regularizers.trajectory(layer, x, **given),
        lambda: {"layer": layer(), "x": x(), "steps": (1, 3), "z0": torch.zeros(BATCH, WIDTH)},
    ),
    Target(
        "deqlib.regularizers.correction_loss",
        regularizers.correction_loss,
        lambda: {"states": [x(), x()], "criterion": squares, "decay": 0.8},
    ),
]
LOOKS = [
    Target(
        "deqlib.diagnose",
        lambda layer, x, **given: deqlib.diagnose(layer, x, **given),
        lambda: {
            "layer": layer(),
            "x": x(),
            "solvers": (deqlib.Picard(),),
            "modes": (deqlib.JFB(),),
            "stopping": STOPPING,
            "num_starts": 2,
            "num_products": 4,
            "rounds": 1,
            "loss": squares,
            "generator": torch.Generator(),
        },
        work=("num_starts", "num_products", "rounds"),
        share=0.4,
    ),
    Target(
        "deqlib.ablate",
        lambda layer, x, **given: deqlib.ablate(layer, x, **given),
        lambda: {
            "layer": layer(),
            "x": x(),
            "solvers": (deqlib.Picard(),),
            "backwards": (deqlib.JFB(),),
            "rtol": 1e-3,
            "max_steps": 8,
            "rounds": 1,
        },
        work=("rounds", "max_steps"),
        share=0.4,
    ),
    Target(
        "deqlib.diagnostics.saved_bytes",
        diagnostics.saved_bytes,
        lambda: {"compute": lambda: nn.Linear(WIDTH, WIDTH)(x()).square(), "exclude": [x()]},
    ),
]
SMALL = {"width": 8, "spectrum": [0.5, -0.2]}  # a problem is computed in full
PROBLEMS = [
    made_by(
        made, f"deqlib.testing.{name}", share=0.4, **{key: SMALL[key] for key in SMALL if key in arguments}
    )
    for name, made in ((name, getattr(testing, name)) for name in testing.__all__ if name[0].islower())
    if (arguments := inspect.signature(made).parameters)
]
STRATEGIES = [
    made_by(getattr(strategies, name), f"deqlib.testing.strategies.{name}")
    for name in ("contractions", "states", "pytree_problems")
]
TARGETS = [*SETTINGS, *SOLVES, *CACHES, *MODULES, *LOOKS, *PROBLEMS, *STRATEGIES]

# Public, and not called with arguments of a user's: why not.
NOT_CALLED = {
    "Backward, DepthDistribution, KeyValueCache, Readout, Solver": "bases",
    "Ablation, BackwardRow, CouplingReport, Diagnosis, GradientReport, PathReport, PrecisionReport, Problem, "
    "RecordedSolve, RecordedSolves, Solution, SolveReport, SolverRow, Step, Stream, StreamReport": "results",
    "NonConvergenceError, NonConvergenceWarning, ReconstructionError, ReconstructionWarning": "raised",
    "OnFailure, Status": "names for values",
    "suite": "takes nothing, and computes all problems",
}
