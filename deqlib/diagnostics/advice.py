"""What to change, said by explicit thresholds on the numbers of a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backward import ImplicitDifferentiation
from ..solvers import Picard
from ..stopping import Stopping
from .findings import Findings
from .gradients import Difference
from .reports import GradientReport, tolerance_of

GOOD_COSINE = 0.95  # from here on a cheap gradient is good enough
POOR_COSINE = 0.8  # below, the layer's own mode is worth changing
SAVING = 0.8  # another solver is worth naming where it needs at most this share of the evaluations
SLOW_RATE = 0.95  # from this spectral radius on plain iteration needs over 45 steps a digit
POOR_ERROR = 0.1  # relative error from which on the solves behind the layer's gradient are worth tightening
FASTER = 0.5  # a solver with more evaluations is worth naming where it needs at most this share of the time
DOMINANT = 0.5  # samples are named that together make up this share of the error, if they are
NAMED = 3  # at most so many
ADJOINT_RESIDUAL = 1e-2  # relative residual up to which the exact gradient counts as known
PATH_DEPENDENCE = 1e-2  # relative distance of two fixed points that counts as two


def advise(found: Findings) -> tuple[str, ...]:
    """Short sentences in order of importance, the cause before what follows from it."""
    lines = (*_soundness(found), *_independence(found))
    if not found.deterministic or _is_coupled(found):
        return (*lines, "Mend that first: all that is said of solvers and gradients rests on it.")
    rules = (_tolerance, _stability, _speed, _adjoint, _precision, _gradient, _paths)
    lines += tuple(line for rule in rules for line in rule(found))
    return lines or ("Nothing to change: the layer converges, and no cheaper setting does as well.",)


def _soundness(found: Findings) -> Iterator[str]:
    """A cell that is not finite, or not a function."""
    bad = int(found.reference.relative_residual.isinf().sum())
    if bad:
        yield (
            f"The cell is not finite for {_samples(bad, found)}: look for NaN in the inputs and parameters; "
            "what is said of gradients below may suffer from it."
        )
    if not found.deterministic:
        yield (
            "The cell gives different values at one point (dropout, or statistics that it updates): a fixed "
            "point is not defined; diagnose it in eval mode, and draw random numbers once a solve."
        )


def _independence(found: Findings) -> Iterator[str]:
    """Samples that depend on one another, though every one is stopped by itself."""
    if found.coupling is None or not _is_coupled(found):
        return
    yield (
        f"Samples depend on one another: {_samples(found.coupling.num_coupled, found)} move when others do "
        "(BatchNorm or attention over the batch, nodes of a graph as samples, a state without a batch axis). "
        "Each is stopped by itself, so make what belongs together one sample with a batch axis, x[None], or "
        "keep samples apart: norms over a sample, BatchNorm in eval()."
    )


def _is_coupled(found: Findings) -> bool:
    return found.coupling is not None and found.coupling.num_coupled > 0


def _tolerance(found: Findings) -> Iterator[str]:
    """Samples that miss the tolerance, and whether any solver reaches it."""
    if found.layer.num_failed:
        yield (
            f"The layer's solver misses its tolerance for {_samples(found.layer.num_failed, found)} "
            f"({found.layer.outcome})."
        )
    reach = [report for report in found.solvers if not report.num_failed]
    rtol = found.stopping.rtol or 0.0
    if reach:
        return
    eps = torch.finfo(found.dtype).eps
    if rtol < eps and not found.stopping.atol:
        yield (
            f"rtol={rtol:.0e} is beyond what the cell computes in ({str(found.dtype).removeprefix('torch.')} "
            f"resolves {eps:.0e}): use rtol={2 * eps:.0e}, for the adjoint too, or a finer type."
        )
    elif found.reference.num_failed or (found.reference.residual > rtol and not found.stopping.atol):
        yield (
            "No solver compared reaches the tolerance for all samples: make the cell contractive "
            "(deqlib.nn), allow more steps, or loosen rtol."
        )
    else:
        yield (
            "No solver compared reaches the tolerance within the steps allowed, yet there are fixed points "
            f"({found.reference.nfe} evaluations): raise Stopping.max_steps, or use Auto()."
        )


def _stability(found: Findings) -> Iterator[str]:
    """Whether plain iteration converges, and how fast, by the spectral radius."""
    radius = found.spectral_radius
    unstable = int((radius >= 1).sum())
    if unstable:
        yield (
            f"The spectral radius is 1 or more for {_samples(unstable, found)} (largest {_top(radius):.2f}): "
            "Picard cannot converge there. Use Anderson or Broyden, or make the cell contractive with "
            "deqlib.nn.spectral_norm or a penalty on the Jacobian (deqlib.regularizers)."
        )
    slow = int(((radius >= SLOW_RATE) & (radius < 1)).sum())
    if slow and isinstance(found.layer.solver, Picard):
        digits = math.log(0.1) / math.log(_top(radius[radius < 1]))
        yield (
            f"The spectral radius is close to 1 for {_samples(slow, found)}: Picard needs about "
            f"{digits:.0f} steps a digit; use Anderson or Broyden."
        )


def _speed(found: Findings) -> Iterator[str]:
    """A solver with fewer evaluations than the layer's, or with far less time."""
    reach = [report for report in found.solvers if not report.num_failed]
    if not reach:
        return
    best = min(reach, key=lambda report: report.nfe)
    layer, rtol = found.layer, found.stopping.rtol or 0.0
    if layer.num_failed:
        yield f"{best.name} reaches the tolerance for all samples, in {best.nfe} evaluations: use it."
    elif layer.residual > rtol and layer not in found.solvers:
        yield (
            f"The layer's fixed number of steps leaves a relative residual of {layer.residual:.0e}; "
            f"{best.name} reaches {tolerance_of(found.stopping)} in {best.nfe} evaluations."
        )
    elif best.nfe <= SAVING * layer.nfe:
        share = best.seconds / layer.seconds  # NaN where nothing was timed
        took = "" if math.isnan(share) else f"; in time {share:.2f} of what that takes, on this machine"
        yield (
            f"{best.name} reaches the tolerance in {best.nfe} evaluations, the layer's {layer.name} takes "
            f"{layer.nfe}{took}."
        )
    quick = min(reach, key=lambda report: report.seconds)
    if not layer.num_failed and layer in reach and quick.seconds <= FASTER * layer.seconds and quick != best:
        yield (
            f"{quick.name} takes {quick.seconds / layer.seconds:.2f} of the time of the layer's {layer.name} "
            f"on this machine, with {quick.nfe} evaluations instead of {layer.nfe}: the cell is cheap beside "
            "the solver."
        )


def _adjoint(found: Findings) -> Iterator[str]:
    """A backward solve that fails."""
    solve = found.adjoint if _is_implicit(found) else found.exact_adjoint
    if _is_implicit(found) and solve.num_failed:
        yield (
            f"The adjoint misses its tolerance for {_samples(solve.num_failed, found)} ({solve.outcome}, "
            f"relative residual up to {solve.residual:.0e}): gradients are that much off there. Give "
            "ImplicitDifferentiation more steps, another solver, or an rtol that the cell's type allows."
        )
    elif found.exact_adjoint.residual > ADJOINT_RESIDUAL:
        yield (
            "The exact gradient is not known, since its adjoint does not converge (relative residual "
            f"{found.exact_adjoint.residual:.0e}): cosines say nothing."
        )


def _precision(found: Findings) -> Iterator[str]:
    """A gradient that is far off because a solve stops early: which one, and on which samples."""
    parts = found.precision
    # NaN, where it is not known, is not large.
    if not (parts.error > POOR_ERROR and found.exact_adjoint.residual <= ADJOINT_RESIDUAL):
        return
    forward = parts.forward.worst
    adjoint = 0.0 if parts.adjoint is None else parts.adjoint.worst
    blame = [part for part, error in (("forward", forward), ("adjoint", adjoint)) if not error <= POOR_ERROR]
    blame = blame or ["forward" if forward >= adjoint else "adjoint"]
    if parts.adjoint is None:
        what = f"The layer's forward solve alone puts the exact gradient off by {_size(parts.forward)}: "
    else:
        what = (
            f"The layer's gradient is off by {_size(parts.both)}. A tight adjoint alone would leave "
            f"{forward:.2g}, a tight forward solve alone {adjoint:.2g}: "
        )
    ways = {"forward": _tighten_forward, "adjoint": _tighten_adjoint}
    yield what + " and ".join(ways[part](found) for part in blame) + "." + _dominant(found)


def _size(error: Difference | None) -> str:
    """In words, relative to the exact gradient."""
    assert error is not None
    kinds = {"parameters": error.error, "inputs": error.input_error}
    told = [f"{value:.2f} for {kind}" for kind, value in kinds.items() if value is not None]
    return " and ".join(told) + ", relative to the exact one"


def _tighten_forward(found: Findings) -> str:
    if found.layer.num_failed:
        return "give the forward solve more steps or another solver, it misses its tolerance"
    rule = found.layer_stopping
    if rule.rtol is None:
        return f"take more than {rule.max_steps} forward steps"
    return f"tighten the forward solve, stopping={_tighter(rule, found.precision.forward.worst, found)}"


def _tighten_adjoint(found: Findings) -> str:
    mode, adjoint = found.gradients[0].mode, found.precision.adjoint
    assert isinstance(mode, ImplicitDifferentiation)
    assert adjoint is not None
    if found.adjoint.num_failed:
        return "give the adjoint more steps or another solver, it misses its tolerance"
    if mode.stopping.rtol is None:
        return f"take more than {mode.stopping.max_steps} steps of the adjoint"
    rule = _tighter(mode.stopping, adjoint.worst, found)
    return f"tighten the adjoint, ImplicitDifferentiation(stopping={rule})"


def _tighter(rule: Stopping, error: float, found: Findings) -> str:
    """A rule that should leave a tenth of what is too much: errors go with tolerances, near enough."""
    share = POOR_ERROR / 10 / error if error < math.inf else 0.1
    wanted = {
        name: 10 ** math.floor(math.log10(now * min(share, 0.1)))
        for name, now in (("rtol", rule.rtol), ("atol", rule.atol))
        if now
    }
    finest = 2 * torch.finfo(found.dtype).eps
    if wanted.get("rtol", math.inf) < finest:
        return f"Stopping(rtol={finest:.0e}), the finest that the type allows, or use a finer type"
    told = ", ".join(f"{name}={value:.0e}" for name, value in ({"rtol": 0.0} | wanted).items())
    return f"Stopping({told}) or so".replace("0e+00", "0")


def _dominant(found: Findings) -> str:
    """The samples behind the error, by their places in the batch."""
    share, residual = found.precision.share, found.precision.residual
    if found.batch == 1 or not bool(share.isfinite().all()):
        return ""
    shares, order = share.sort(descending=True)
    enough = int((shares.cumsum(0) < DOMINANT).sum()) + 1
    last = int(residual.argmax())
    far = f" The largest relative residual is that of sample {last} ({float(residual[last]):.0e})."
    if enough > min(NAMED, found.batch // 2):
        return f" No few samples dominate: the most is {shares[0]:.0%}, sample {int(order[0])}'s." + far
    names = ", ".join(str(int(place)) for place in order[:enough])
    part = float(shares[:enough].sum())
    size = f"{part:.0%} of it" if part <= 1 else "more than all of it, which others undo in part"
    return f" Sample{'s' * (enough > 1)} {names} make{'s' * (enough == 1)} up {size}." + far


def _gradient(found: Findings) -> Iterator[str]:
    """A mode that is as good and cheaper, or one that is not good enough."""
    if not found.exact_adjoint.residual <= ADJOINT_RESIDUAL:
        return
    own, *others = found.gradients
    good = [mode for mode in others if mode.worst_cosine >= GOOD_COSINE and _cost(mode) < _cost(own)]
    if good:
        best = min(good, key=_cost)
        solver = f" with {type(best.solver).__name__}" if best.solver != found.layer.solver else ""
        yield (
            f"{best.name}{solver} is good enough (cosine {best.worst_cosine:.2f} to the exact gradient, norm "
            f"ratio {_norm_ratio(best):.2f}) and saves {_cost(own) - _cost(best)} evaluations and products a "
            "training step."
        )
    if own.worst_cosine < POOR_COSINE and not _is_implicit(found):
        yield (
            f"The layer's {own.name} has a cosine of {own.worst_cosine:.2f} to the exact gradient: take more "
            "terms, or ImplicitDifferentiation()."
        )


def _paths(found: Findings) -> Iterator[str]:
    """Several fixed points, or starts that lead to none."""
    path = found.path
    if path is None:
        return
    several = int((path.distance > PATH_DEPENDENCE).sum())
    if several:
        yield (
            f"Different starts lead to different fixed points for {_samples(several, found)} (relative "
            f"distance up to {_top(path.distance):.2g}): the output depends on init, so keep it the same in "
            "training and use, or make the cell contractive."
        )
    lost = int((path.reached < path.num_starts).sum())
    if lost and not found.solvers[0].num_failed:
        yield (
            f"From some of {path.num_starts} starts the layer's solver does not converge for "
            f"{_samples(lost, found)}: it depends on a good init."
        )


def _cost(mode: GradientReport) -> int:
    return mode.evaluations + mode.products


def _norm_ratio(mode: GradientReport) -> float:
    ratio = mode.norm_ratio if mode.norm_ratio is not None else mode.input_norm_ratio
    return math.nan if ratio is None else ratio


def _is_implicit(found: Findings) -> bool:
    return isinstance(found.gradients[0].mode, ImplicitDifferentiation)


def _samples(count: int, found: Findings) -> str:
    return f"{count} of {found.batch} samples"


def _top(values: Tensor) -> float:
    return float(values[~values.isnan()].max())
