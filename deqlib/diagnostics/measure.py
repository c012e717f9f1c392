"""Measuring how a layer's solve and its gradients fare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .._checks import check_instance, check_integer
from ..backward import JFB, Backward, ImplicitDifferentiation, PhantomGradient, SharedInverse
from ..backward.base import on_tape, product
from ..fixed_point import fixed_point
from ..layer import ImplicitLayer
from ..solution import Solution
from ..solvers import Anderson, Auto, Broyden, Picard, Solver
from ..stopping import Stopping
from .dynamics import contraction, is_deterministic, paths
from .gradients import Leaves, compare, trainable
from .report import Diagnosis, SolveReport
from .spectrum import Product, spectral_norm, spectral_radius
from .subject import Subject, labels, normal, untouched


def diagnose(
    layer: ImplicitLayer,
    *inputs: Any,
    solvers: Sequence[Solver] | None = None,
    modes: Sequence[Backward] | None = None,
    stopping: Stopping | None = None,
    num_starts: int = 3,
    num_products: int = 24,
    loss: Callable[[Any], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Measure how the layer's solve and its gradients fare on these inputs, and suggest what to change.

    Works where the solve fails too: then that is what it says. Everything is measured with the cell as it
    is (call `layer.eval()` first where that matters) and leaves the layer as it was: parameters, their
    gradients, buffers, and PyTorch's own random numbers. Works under `no_grad` and `inference_mode`.

    What is measured:

    - residual curves of the layer's solver and of others, to one stopping rule;
    - the Jacobian J at the fixed point that the layer's solver finds, made exact by `Auto`: spectral radius
      by Arnoldi's process with products J^T u (its eigenvalues are those of J), spectral norm by Lanczos'
      process with products J v too, in forward mode, or by differentiating twice where the cell does not
      support that, which is then noted;
    - the factor by which plain iteration shrinks the residual in the end;
    - the gradient of each backward mode, computed as the layer would with its own solver and stopping rule,
      beside the exact implicit gradient, with respect to the trainable tensors that the cell uses and to
      the floating-point inputs;
    - path independence: how far apart the fixed points are that several starts lead to (Anil et al. 2022,
      arXiv 2211.09961).

    Cost, for a layer that converges: a few hundred evaluations of the cell on the batch. At most: a solve of
    `max_steps` for each solver, mode and start, 100 steps for each of `num_starts` + 2 tight solves, and
    3 `num_products` products. Memory: about `num_products` states beside what one evaluation keeps for its
    backward pass, or what the costliest mode keeps.

    Args:
        layer: what to look at.
        *inputs: a batch of its inputs; a few samples are enough.
        solvers: compared to the layer's own; default Picard, Anderson and Broyden.
        modes: compared to the layer's own; default JFB, both forms of PhantomGradient, the shared inverse
            and ImplicitDifferentiation. A mode that refuses the layer's solver runs with one that it takes.
        stopping: the rule that solvers are compared by; default the layer's, or `Stopping()` where that is
            a fixed number of steps.
        num_starts: random starts, each of the size of the solution; 0 leaves path independence out.
        num_products: most products with J^T of one Arnoldi process; half as many for the spectral norm.
        loss: `loss(z) -> scalar`, whose gradient at the fixed point is the one sent back; default a random
            direction.
        generator: of all that is drawn; default a new one of a fixed seed.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or a cell that breaks its contract.
    """
    solvers, modes, stopping = _settings(layer, solvers, modes, stopping)
    check_integer("diagnose", 0, num_starts=num_starts)
    check_integer("diagnose", 1, num_products=num_products)
    if loss is not None and not callable(loss):
        raise TypeError(f"diagnose: loss must be callable or None, got {type(loss).__name__}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    check_instance("diagnose", torch.Generator, "a torch.Generator or None", generator=generator)
    with untouched(layer, inputs):
        subject = Subject.of(layer, inputs)
        return _measure(layer, subject, solvers, modes, stopping, num_starts, num_products, loss, generator)


def _settings(
    layer: ImplicitLayer,
    solvers: Sequence[Solver] | None,
    modes: Sequence[Backward] | None,
    stopping: Stopping | None,
) -> tuple[list[Solver], list[Backward], Stopping]:
    """Defaults filled in, the layer's own first, everything once."""
    check_instance("diagnose", ImplicitLayer, "a deqlib.ImplicitLayer", layer=layer)
    if solvers is None:
        solvers = (Picard(), Anderson(), Broyden())
    if modes is None:
        phantoms = (PhantomGradient(), PhantomGradient(form="neumann"))
        modes = (JFB(), *phantoms, SharedInverse(), ImplicitDifferentiation())
    for name, kind, given in (("solvers", Solver, solvers), ("modes", Backward, modes)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"diagnose: {name} must be a list or tuple, got {type(given).__name__}")
        for i, one in enumerate(given):
            check_instance("diagnose", kind, f"a deqlib {kind.__name__.lower()}", **{f"{name}[{i}]": one})
    if stopping is None:
        own = layer.stopping
        stopping = Stopping(norm_axes=own.norm_axes) if own.is_fixed else own
    check_instance("diagnose", Stopping, "a deqlib.Stopping or None", stopping=stopping)
    if stopping.is_fixed:
        raise ValueError(
            "diagnose: stopping must have a tolerance to compare solvers by, got a number of steps"
        )
    all_solvers, all_modes = [layer.solver], [layer.backward_mode]
    all_solvers += [solver for i, solver in enumerate(solvers) if solver not in (layer.solver, *solvers[:i])]
    all_modes += [mode for i, mode in enumerate(modes) if mode not in (layer.backward_mode, *modes[:i])]
    return all_solvers, all_modes, stopping


def _measure(
    layer: ImplicitLayer,
    subject: Subject,
    solvers: list[Solver],
    modes: list[Backward],
    stopping: Stopping,
    num_starts: int,
    num_products: int,
    loss: Callable[[Any], Tensor] | None,
    generator: torch.Generator,
) -> Diagnosis:
    names = labels(solvers)
    solutions = [subject.solve(subject.z0, solver, stopping) for solver in solvers]
    curves = tuple(map(SolveReport.of, names, solvers, solutions))
    own = curves[0]
    if layer.stopping != stopping:
        rule = _measured(layer.stopping)
        name = f"{names[0]}, {rule.max_steps} steps" if rule.is_fixed else names[0]
        own = SolveReport.of(name, layer.solver, subject.solve(subject.z0, layer.solver, rule))

    reference = subject.polish(solutions[0])
    z = subject.ravel(reference.value)
    if torch.is_autocast_enabled(z.device.type):
        torch.clear_autocast_cache()  # casts made without a graph would cut the one of this evaluation
    source, output = on_tape(subject.f, z)
    radius, norm, notes = _jacobian(subject, z, source, output, num_products, generator)
    cotangent = _cotangent(subject, z, loss, generator)
    adjoint, exact, u = _adjoints(layer.backward_mode, subject, source, output, cotangent)
    leaves = Leaves((), ())
    if output.requires_grad:
        leaves = Leaves(trainable(output, source, subject.cell, subject.floating), subject.floating)
    gradients = leaves.gradients(output, u)
    del source, output  # their graph, before modes make theirs
    return Diagnosis(
        stopping=stopping,
        width=z.shape[1],
        dtype=subject.dtype,
        layer=own,
        solvers=curves,
        reference=SolveReport.of("fixed point", Auto(), reference),
        spectral_radius=radius,
        spectral_norm=norm,
        contraction=contraction(subject, stopping.max_steps),
        adjoint=adjoint,
        exact_adjoint=exact,
        gradients=tuple(
            compare(mode, name, layer, subject, cotangent, leaves, gradients)
            for name, mode in zip(labels(modes), modes, strict=True)
        ),
        path=paths(layer.solver, subject, stopping, solutions[0], z, num_starts, generator),
        deterministic=is_deterministic(subject, z),
        notes=(*_missed(reference, stopping), *notes),
    )


def _missed(reference: Solution, stopping: Stopping) -> Iterator[str]:
    """A note where there is no fixed point to take anything at."""
    residual = reference.relative_residual
    assert residual is not None  # the solve has a tolerance
    missed = int((~(residual <= (stopping.rtol or 0))).sum())
    if missed:
        yield (
            f"no fixed point was found for {missed} of {len(residual)} samples: J and gradients are those at "
            "the best iterate"
        )


def _jacobian(
    subject: Subject,
    z: Tensor,
    source: Tensor,
    output: Tensor,
    num_products: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Spectral radius and norm of every sample, and what stood in the way."""
    transposed = _transposed(source, output)
    radius = spectral_radius(transposed, normal(z, generator), num_products)
    start, half = normal(z, generator), -(-num_products // 2)

    def forward(v: Tensor) -> Tensor:
        with torch.no_grad():
            image: Tensor = torch.func.jvp(subject.f, (z,), (v,))[1]
        return image

    def twice(v: Tensor) -> Tensor:
        """J v as the derivative of J^T u, which is linear in u."""
        with torch.enable_grad():
            u = torch.zeros_like(v, requires_grad=True)
            (back,) = torch.autograd.grad(output, source, u, create_graph=True)
            (image,) = torch.autograd.grad(back, u, v)
        return image

    if not output.requires_grad:
        return radius, radius, ("the cell's output carries no gradient",)
    if not bool(torch.any(transposed(start) != 0)):  # NaN counts as not zero
        return radius, torch.zeros_like(radius), ()
    notes = []
    for jacobian in (forward, twice):
        try:
            norm = spectral_norm(jacobian, transposed, start, half)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            how = "in forward mode" if jacobian is forward else "twice"
            notes.append(f"the cell cannot be differentiated {how} ({reason})")
        else:
            return radius, norm, tuple(notes)
    return radius, torch.full_like(radius, torch.nan), (*notes, "so its spectral norm is not known")


def _transposed(source: Tensor, output: Tensor) -> Product:
    """u -> J^T u, zero where the cell's output carries no gradient."""
    return lambda u: product(u, output, source) if output.requires_grad else torch.zeros_like(u)


def _cotangent(
    subject: Subject, z: Tensor, loss: Callable[[Any], Tensor] | None, generator: torch.Generator
) -> Tensor:
    """The gradient g that arrives at the fixed point, (B, D)."""
    if loss is None:
        return normal(z, generator)
    value = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), subject.f.layout.unravel(z))
    result = loss(value)
    if not isinstance(result, Tensor) or result.numel() != 1:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"diagnose: loss must return a tensor of one number, got {got}")
    if not result.requires_grad:
        raise ValueError(
            "diagnose: loss must depend on the fixed point it is given, got one without gradient"
        )
    leaves = tree_leaves(value)
    found = torch.autograd.grad(result.sum(), leaves, allow_unused=True, retain_graph=True)
    rows = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return torch.cat([row.flatten(1) if row.dim() > 1 else row.unsqueeze(1) for row in rows], 1).to(z.dtype)


def _adjoints(
    mode: Backward, subject: Subject, source: Tensor, output: Tensor, g: Tensor
) -> tuple[SolveReport, SolveReport, Tensor]:
    """The adjoint solve with the layer's settings, a tight one, and what that found."""
    transposed = _transposed(source, output)
    if not isinstance(mode, ImplicitDifferentiation):
        mode = ImplicitDifferentiation()
    rule = _measured(replace(mode.stopping, norm_axes=None))  # the adjoint here is flat
    tight = replace(subject.tight, norm_axes=None)

    def solve(start: Tensor, solver: Solver, stopping: Stopping) -> Solution:
        with torch.no_grad():
            return fixed_point(
                lambda u: transposed(u) + g, start, solver=solver, stopping=stopping, on_failure="ignore"
            )

    own = solve(g, mode.solver, rule)
    exact = solve(own.value, Auto(), tight)
    reports = SolveReport.of("adjoint", mode.solver, own), SolveReport.of("adjoint, tight", Auto(), exact)
    return *reports, exact.value


def _measured(stopping: Stopping) -> Stopping:
    """The rule, recording residuals."""
    return replace(stopping, measure=True)
