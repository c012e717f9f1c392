"""Costs that can be counted, held to the numbers of counters.json exactly.

No clock is read and nothing here depends on the machine: what changes a number changed what the code does,
or is a new version of PyTorch, and is to be seen in review. Numbers that ought to change are written anew by

    UPDATE_COUNTERS=1 pytest tests/benchmarks/test_counters.py
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deqlib import (
    GMRES,
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    Solution,
    Solver,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.diagnostics import BackwardRow, ablate
from deqlib.solvers.base import Seen, can_look
from deqlib.testing import (
    Problem,
    convolution,
    expanding,
    explosion,
    linear,
    mixed_difficulty,
    mlp,
    monotone,
    nearly_singular,
    tanh_rnn,
    transformer,
)

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "viar")]
from tiny_models import tiny_tokenizer, tiny_transformer  # noqa: E402
from waits import Waits  # noqa: E402

from viar import Sampling, sample_tokens  # noqa: E402

FILE = Path(__file__).with_name("counters.json")
UPDATE = "UPDATE_COUNTERS"

Counts = dict[str, int]

SOLVERS: dict[str, Solver] = {
    "Picard": Picard(),
    "ReversiblePicard": ReversiblePicard(),
    "Anderson": Anderson(),
    "Broyden": Broyden(),
    "NewtonKrylov": NewtonKrylov(),
    "GMRES": GMRES(),
    "Auto": Auto(),
}
RULE = Stopping(rtol=1e-5, max_steps=100)


# What is counted -----------------------------------------------------------------------------------------


def problems() -> list[Problem]:
    """Small, in float64, and such that no count hangs on a rounding error."""
    spectrum = torch.linspace(-0.8, 0.8, 24, dtype=torch.float64)
    sequence = {"batch": 2, "tokens": 4, "width": 8, "dtype": torch.float64}
    flat = {"batch": 3, "width": 24, "dtype": torch.float64}
    return [
        linear(spectrum, batch=3, dtype=torch.float64),
        linear(spectrum, batch=3, non_normality=1.0, dtype=torch.float64, name="linear, non-normal"),
        nearly_singular(**flat),
        expanding(**flat),
        tanh_rnn(**flat, rate=0.8),
        monotone(**flat),
        mlp(**sequence),
        transformer(**sequence, heads=2),
        convolution(batch=2, channels=4, side=4, dtype=torch.float64),
        mixed_difficulty(batch=4, width=16, dtype=torch.float64),
        explosion(batch=3, dtype=torch.float64),
    ]


ONLY_ON = {
    "GMRES": ("linear", "linear, non-normal", "nearly singular", "expanding", "mixed difficulty"),  # affine
    "ReversiblePicard": ("linear", "transformer"),  # Picard, but for its damping
}


def solve(base: Problem, solver: Solver, stopping: Stopping = RULE, cell: Any = None) -> Solution:
    with torch.no_grad():
        return fixed_point(
            cell or base.cell, base.z0, base.inputs, solver=solver, stopping=stopping, on_failure="ignore"
        )


def pairs() -> Iterator[tuple[str, Problem, Solver]]:
    """Every solver on every problem that it is for."""
    for base in problems():
        for name, solver in SOLVERS.items():
            if base.name in ONLY_ON.get(name, base.name):
                yield f"{base.name}, {name}", base, solver


@functools.cache
def solutions() -> dict[str, Solution]:
    return {name: solve(base, solver) for name, base, solver in pairs()}


def evaluations() -> Counts:
    """Of the cell, until the tolerance is met or the solve fails."""
    return {name: solution.nfe for name, solution in solutions().items()}


def converged_samples() -> Counts:
    return {name: int(solution.converged.sum()) for name, solution in solutions().items()}


MODES: dict[str, Backward] = {
    **{
        f"adjoint by {name}": ImplicitDifferentiation(solver=solver, stopping=RULE)
        for name, solver in SOLVERS.items()
    },
    "SharedInverse": SharedInverse(),
    "SharedInverse, refined": SharedInverse(refine=5),
    "JFB": JFB(),
    "PhantomGradient, unrolled": PhantomGradient(),
    "PhantomGradient, Neumann": PhantomGradient(form="neumann"),
    "Reversible": Reversible(),
    "Unroll": Unroll(),
}


def backward_problems() -> list[Problem]:
    """Of rates at which the iteration can be run backwards too."""
    return [
        tanh_rnn(batch=3, width=24, rate=0.5, dtype=torch.float64),
        transformer(batch=2, tokens=4, width=8, heads=2, dtype=torch.float64),
    ]


@functools.cache
def backward_rows() -> dict[str, BackwardRow]:
    found = {}
    for base in backward_problems():
        layer = ImplicitLayer(base.cell, solver=Anderson(), stopping=RULE)
        rows = ablate(layer, *base.inputs, solvers=(), backwards=list(MODES.values()), rounds=1).backwards
        found |= {f"{base.name}, {name}": row for name, row in zip(MODES, rows, strict=True)}
    return found


def backward_products() -> Counts:
    """Vector-Jacobian products of a backward pass, those of the adjoint solve included."""
    return {name: row.products for name, row in backward_rows().items()}


def evaluations_on_tape() -> Counts:
    return {name: row.evaluations for name, row in backward_rows().items()}


def saved_bytes() -> Counts:
    """For the backward pass, parameters and inputs left out."""
    return {name: row.saved_bytes for name, row in backward_rows().items()}


def cache_bytes() -> Counts:
    """Keys and values that a generation holds at its end."""
    tokenizer, found = tiny_tokenizer(), {}
    for kind, caches in (("explicit", ("equilibrium",)), ("implicit", ("equilibrium", "iterate"))):
        for cache in caches:
            sample = sample_tokens(tiny_transformer(kind), tokenizer, [0, 1], Sampling(cache=cache))
            found[f"{kind} trunk, {cache} cache"] = sample.cache_bytes
    return found


def graph_breaks() -> Counts:
    """Of a compiled layer: none where the number of steps is fixed."""
    counters = torch._dynamo.utils.counters
    base, found = linear([0.5, 0.2, -0.4], batch=3, dtype=torch.float64), {}
    names = ("Picard", "Anderson", "Broyden", "NewtonKrylov", "GMRES", "Auto")
    rules = [(f"{name}, fixed", SOLVERS[name], Stopping.steps(2)) for name in names]
    rules.append(("Picard, to a tolerance", Picard(), RULE))
    for name, solver, stopping in rules:
        torch.compiler.reset()
        counters.clear()
        layer = ImplicitLayer(base.cell, solver=solver, stopping=stopping, on_failure="ignore")
        with torch.no_grad():
            torch.compile(layer, backend="eager")(*base.inputs)
        found[f"{name}: breaks"] = sum(counters["graph_break"].values())
        found[f"{name}: graphs"] = counters["stats"]["unique_graphs"]
    return found


class HostReads(Waits):
    """With the operations whose result's shape is that of its values."""

    names = (*Waits.names, "_unique2", "unique_dim", "masked_select")


def host_reads() -> Counts:
    """How often the host would wait for a device. Solvers are told that they are not on a CPU."""
    base = tanh_rnn(batch=3, width=24, rate=0.8, dtype=torch.float64)
    rules = {
        "fixed": Stopping.steps(5),
        "fixed and measured": Stopping.steps(5, measure=True),
        "to a tolerance": Stopping(rtol=1e-3),
        "to a tolerance, looking every 8 steps": Stopping(rtol=1e-3, check_every=8),
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for name, m in sys.modules.items() if name.startswith("deqlib.")]:
            if getattr(module, "can_look", None) is can_look:
                patch.setattr(module, "can_look", lambda z: False)
        for name, solver in SOLVERS.items():
            for rule, stopping in rules.items():
                with HostReads() as reads:
                    solve(base, solver, stopping)
                found[f"{name}, {rule}"] = sum(reads.counts.values())
        x = base.inputs[0].clone().requires_grad_()
        for rule in ("fixed", "to a tolerance"):
            with HostReads() as reads:
                z = fixed_point(base.cell, base.z0, (x, base.inputs[1]), stopping=rules[rule]).value
                z.sum().backward()
            found[f"Auto with gradient, {rule}"] = sum(reads.counts.values())
    return found


VIEWS = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "expand",
    "lift_fresh",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
}


class Kernels(TorchDispatchMode):
    """Counts the operations that a device has something to do for, a number read by the host among them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def small_cell(rate: float, batch: int = 8) -> Callable[[Tensor], Tensor]:
    """tanh(rate * (z W) + x), W orthogonal, for samples of 64 float32 numbers."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(64, 64, generator=draw))[0]
    x = torch.randn(batch, 64, generator=draw)
    return lambda z: torch.tanh(rate * (z @ matrix) + x)


def kernels(
    cell: Callable[[Tensor], Tensor], solver: Solver, stopping: Stopping, batch: int = 8
) -> tuple[list[int], Solution]:
    """Those before each evaluation of a solve, and at its end, beyond the cell's."""
    z0, counts = torch.zeros(batch, 64), []
    with torch.no_grad():
        with Kernels() as inside:
            cell(z0)
        with Kernels() as found:

            def counted(z: Tensor) -> Tensor:
                counts.append(found.count - inside.count * len(counts))
                return cell(z)

            solution = fixed_point(counted, z0, solver=solver, stopping=stopping, on_failure="ignore")
            counts.append(found.count - inside.count * len(counts))
    return counts, solution


def kernels_a_step(
    cell: Callable[[Tensor], Tensor], solver: Solver, rule: Callable[[int], Stopping], batch: int = 8
) -> float:
    """Between the 15th step and the 25th: what begins and ends a solve is not counted."""
    few, many = (kernels(cell, solver, rule(steps), batch)[0][-1] for steps in (15, 25))
    return (many - few) / 10


def endless(steps: int) -> Stopping:
    """A tolerance that is never met."""
    return Stopping(rtol=1e-30, max_steps=steps, patience=None)


SMALL_RULE = Stopping(rtol=1e-5, max_steps=200)
COUNTED = {name: SOLVERS[name] for name in ("Picard", "Anderson", "Broyden", "Auto")}


def kernel_launches() -> dict[str, float]:
    """Of a step beyond the cell's evaluation; operations dispatched, but for views."""
    cell, found = small_cell(0.95), {}
    for name, solver in COUNTED.items():
        counts, solution = kernels(cell, solver, SMALL_RULE)
        if name != "Auto":  # which would try all its methods on a tolerance that is never met
            found[f"{name}, to a tolerance"] = kernels_a_step(cell, solver, endless)
        found[f"{name}, whole solve"] = round(counts[-1] / solution.nfe, 1)
        found[f"{name}, fixed"] = kernels_a_step(cell, solver, Stopping.steps)
    return found


GROUPS: dict[str, Callable[[], dict[str, float]]] = {
    "evaluations": evaluations,
    "converged samples": converged_samples,
    "products of a backward pass": backward_products,
    "evaluations on the tape": evaluations_on_tape,
    "saved bytes": saved_bytes,
    "cache bytes": cache_bytes,
    "graph breaks": graph_breaks,
    "host reads": host_reads,
    "kernels a step": kernel_launches,
}


# Held to what is written down ----------------------------------------------------------------------------


def written() -> dict[str, Counts]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def write(group: str, found: Counts) -> None:
    counts = {**written(), group: found}
    FILE.write_text(json.dumps({name: counts[name] for name in GROUPS if name in counts}, indent=1) + "\n")


def differences(group: str, expected: Counts, found: Counts) -> str:
    """What has changed, a line each, and what to do about it; nothing where nothing has."""
    lines = [
        f"{group} | {name}: {expected.get(name, 'nothing')} is written down, "
        f"{found.get(name, 'nothing')} counted"
        for name in dict.fromkeys([*expected, *found])
        if expected.get(name) != found.get(name)
    ]
    how = f"if that is meant: {UPDATE}=1 pytest tests/benchmarks/test_counters.py, and say why in the commit"
    return "\n".join([*lines, how] if lines else [])


@pytest.mark.parametrize("group", GROUPS)
def test_counts_are_those_written_down(group: str) -> None:
    found = GROUPS[group]()
    if os.environ.get(UPDATE):
        write(group, found)
    changed = differences(group, written().get(group, {}), found)
    if changed:
        pytest.fail(changed, pytrace=False)


def test_nothing_else_is_written_down() -> None:
    assert list(written()) == list(GROUPS)


def test_no_count_of_a_solve_hangs_on_a_rounding_error() -> None:
    generator = torch.Generator().manual_seed(1)
    for name, base, solver in pairs():

        def cell(z: Tensor, *inputs: Any, base: Problem = base) -> Tensor:
            image = base.cell(z, *inputs)
            return image * (1 + 1e-15 * torch.randn(image.shape, generator=generator, dtype=image.dtype))

        shaken, plain = solve(base, solver, cell=cell), solutions()[name]
        assert shaken.nfe == plain.nfe, name
        assert torch.equal(shaken.converged, plain.converged), name


def test_a_change_is_told_with_its_name_both_numbers_and_the_way_to_update() -> None:
    lines = differences("reads", {"a": 1, "b": 2, "c": 5}, {"a": 3, "c": 5, "d": 0}).splitlines()
    assert lines[:3] == [
        "reads | a: 1 is written down, 3 counted",
        "reads | b: 2 is written down, nothing counted",
        "reads | d: nothing is written down, 0 counted",
    ]
    assert "UPDATE_COUNTERS=1 pytest tests/benchmarks/test_counters.py" in lines[3]
    assert differences("reads", {"a": 1}, {"a": 1}) == ""


@pytest.mark.parametrize(
    ("name", "to_a_tolerance", "fixed"), [("Picard", 12, 0), ("Anderson", 32, 20), ("Broyden", 34, 22)]
)
def test_a_step_starts_few_kernels(name: str, to_a_tolerance: int, fixed: int) -> None:
    cell, solver = small_cell(0.95), SOLVERS[name]
    assert kernels_a_step(cell, solver, Stopping.steps) <= fixed
    assert kernels_a_step(cell, solver, endless) <= to_a_tolerance
    # Too many samples for Python to go through.
    assert kernels_a_step(small_cell(0.95, 65), solver, endless, 65) <= to_a_tolerance
    counts, solution = kernels(cell, solver, SMALL_RULE)
    assert solution.converged.all()
    assert counts[-1] / solution.nfe <= to_a_tolerance


@pytest.mark.parametrize(("rate", "code"), [(0.3, 0), (0.95, 1)])
def test_auto_starts_few_kernels_more_than_the_method_it_chose(rate: float, code: int) -> None:
    base = linear(torch.linspace(-rate, rate, 64), batch=8)
    auto, solver = SOLVERS["Auto"], (Picard(), *Auto().methods)[code]
    (own, solution), (alone, other) = (kernels(base.f, s, SMALL_RULE) for s in (auto, solver))
    assert solution.converged.all()
    assert solution.method.tolist() == [code] * 8  # since the same look: their rates are the same
    # From the first look, at step 3, the first steps of a method aside, while nobody is finished.
    end = int(torch.minimum(solution.num_steps.min(), other.num_steps.min())) - 1
    begin = 3 if code == 0 else 5
    begin += (end - begin) % 3  # as many looks as there are in the long run
    assert end - begin >= 3
    assert own[end] - own[begin] <= alone[end] - alone[begin] + 4 * (end - begin)


def test_auto_starts_few_kernels_more_where_samples_change_method_at_different_looks() -> None:
    base, rule, names = nearly_singular(batch=8, width=64), Stopping(rtol=1e-6, max_steps=200), []

    class Watched(Auto):
        def observe(self, seen: Seen, state: Any) -> Any:
            state = super().observe(seen, state)
            names.append(tuple(state.method.tolist()))
            return state

    found, alone = (kernels(base.f, solver, rule)[0] for solver in (Watched(), Auto().methods[0]))
    changes = [step for step in range(1, len(names)) if names[step] != names[step - 1]]
    assert len(changes) >= 2
    assert len(set(names[changes[1]])) == 2  # some samples are left with the plain iteration
    own, usual = ([after - before for before, after in pairwise(counts)] for counts in (found, alone))
    # A step after the second change at which nobody is judged, beside a step of the method.
    assert own[changes[1] + 1] <= min(usual) + 4
