"""When a solve ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ._checks import check_choice, check_instance, check_integer, check_number, settle_numbers
from ._settings import Settings
from .readout import Readout

Keep = Literal["best", "last"]
_MOST = 1e38  # tolerance: residuals may be float32, which ends soon above


@dataclass(frozen=True, kw_only=True)
class Stopping(Settings):
    """Stopping rule, applied to every sample by itself.

    A sample converges when `||f(z) - z|| <= atol + rtol * ||f(z)||` (Euclidean norms over all numbers of
    its state). The cell is evaluated at most `max_steps + 1` times: the last evaluation measures the
    residual of what the last step produced. One more may ask the whole batch, see `Status.COUPLED`.

    Args:
        rtol: relative tolerance. `None` takes exactly `max_steps` steps, see `Stopping.steps`.
        atol: absolute tolerance.
        max_steps: most solver steps.
        check_every: the host looks every so many steps whether all samples are done. Statuses and values
            are the same for any number; a larger one saves device synchronisations and may cost up to
            `check_every - 1` evaluations more.
        patience: a sample whose best residual was not improved on for so many steps is `STALLED`;
            `None` never gives up before `max_steps`.
        blowup: a sample whose residual exceeds its best by this factor, or is not finite, is `DIVERGED`;
            with solvers that take such a step back, if that did not help.
        norm_axes: axes of the state over which the norms are taken; every place on its other axes must
            then meet the tolerance by itself, and a sample's residual is that of its worst place. Default
            all but the batch: one norm a sample. `(-1,)` asks of a state (B, L, C) that every token
            converge.
        measure: with a fixed number of steps: record the residual at every step, at the cost of one more
            evaluation of the cell. A tolerance implies it.
        readout: a sample may also leave by what is made of its state, see `deqlib.loops`: where the readout
            says that it is done before its residual meets the tolerance, it is `EXITED`. With `rtol=0` the
            readout alone decides.
        min_steps: no sample is done before it took so many steps.
        keep: which iterate is the value of a sample that is not done, `STALLED` or out of steps: the "best",
            of the smallest residual, or the "last", as a loop by hand returns it. Of one that diverged it is
            the best. `None`: the last with a readout, which judges the iterate at hand, and with
            `hold_places`, which allows no other; else the best.
        hold_places: places that are done, by the residual or by a readout of one answer a place, stand still
            while the others of their sample go on; needs `norm_axes`. `(-1,)` lets the tokens of a state
            (B, L, C) leave one by one; `Solution.place_steps` has the steps of each. Others move on after a
            place stands still, so residuals are measured anew in the end: where a place does not meet the
            tolerance any longer, its sample is `EXITED`.

    Raises:
        TypeError, ValueError: a setting out of range, or one that has no effect.
    """

    rtol: float | None = 1e-3
    atol: float = 0.0
    max_steps: int = 50
    check_every: int = 1
    patience: int | None = 25
    blowup: float = 1e6
    norm_axes: tuple[int, ...] | None = None
    measure: bool = True
    readout: Readout | None = None
    min_steps: int = 0
    keep: Keep | None = None
    hold_places: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_instance("Stopping", bool, "True or False", measure=self.measure, hold_places=self.hold_places)
        axes = self.norm_axes
        if axes is not None and not (isinstance(axes, tuple) and axes and all(type(a) is int for a in axes)):
            raise TypeError(f"Stopping: norm_axes must be a tuple of axes or None, got {axes!r}")
        if axes is not None and len(set(axes)) < len(axes):
            raise ValueError(f"Stopping: norm_axes must name an axis once, got {axes}")
        if self.readout is not None:
            hint = "a readout such as deqlib.PredictionKL(head=...) or None"
            check_instance("Stopping", Readout, hint, readout=self.readout)
        check_choice("Stopping", ("best", "last", None), keep=self.keep)
        if self.rtol is None:
            check_integer("Stopping", 0, max_steps=self.max_steps)
            names = [
                "atol",
                "check_every",
                "patience",
                "blowup",
                "readout",
                "min_steps",
                "keep",
                "hold_places",
            ]
            names += ["norm_axes"] * (not self.measure)
            given = {name: getattr(self, name) for name in names}
            inert = {name: value for name, value in given.items() if value != getattr(type(self), name)}
            if inert:
                raise ValueError(f"Stopping: {inert} has no effect with a fixed number of steps (rtol=None)")
            return
        check_number("Stopping", 0, _MOST, rtol=self.rtol, atol=self.atol)
        check_number("Stopping", 1, open_minimum=True, blowup=self.blowup)
        check_integer("Stopping", 1, max_steps=self.max_steps, check_every=self.check_every)
        if self.patience is not None:
            check_integer("Stopping", 1, patience=self.patience)
        if not self.measure:
            raise ValueError("Stopping: measure=False needs a fixed number of steps, see Stopping.steps(n)")
        check_integer("Stopping", 0, min_steps=self.min_steps)
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"Stopping: min_steps must be at most max_steps={self.max_steps}, got {self.min_steps}"
            )
        if self.hold_places and axes is None:
            raise ValueError(
                "Stopping: hold_places needs places that are judged by themselves, got norm_axes=None; pass "
                "norm_axes=(-1,) for the tokens of a state (B, L, C)"
            )
        if self.hold_places and self.keep == "best":
            raise ValueError(
                'Stopping: keep="best" is one iterate for all places of a sample, and with hold_places each '
                "stops at its own; leave keep out"
            )

    @classmethod
    def steps(cls, num_steps: int, *, measure: bool = False) -> Stopping:
        """Exactly `num_steps` steps for every sample: no tolerance, no device synchronisation.

        No residual is computed unless `measure` asks for it.
        """
        return cls(rtol=None, max_steps=num_steps, measure=measure)

    def towards(self, end: Stopping, fraction: float) -> Stopping:
        """This rule a fraction of the way to another: a schedule for tolerance and budget.

        Tolerances are interpolated geometrically (linearly where one is 0), `max_steps` and `min_steps`
        linearly; the rest is this rule's. `layer.stopping = start.towards(end, step / num_steps)` in a
        training loop.

        Args:
            end: of the same kind, with a tolerance or with a fixed number of steps.
            fraction: in [0, 1].

        Raises:
            TypeError, ValueError: `fraction` is out of range, or one rule has a tolerance and the other not.
        """
        check_number("Stopping.towards", 0, 1, fraction=fraction)
        check_instance("Stopping.towards", Stopping, "a deqlib.Stopping", end=end)
        if self.is_fixed != end.is_fixed:
            raise ValueError("Stopping.towards: both rules must have a tolerance, or both a number of steps")

        def between(a: float, b: float) -> float:
            return a * (b / a) ** fraction if a > 0 and b > 0 else a + fraction * (b - a)

        steps = round(self.max_steps + fraction * (end.max_steps - self.max_steps))
        if self.rtol is None or end.rtol is None:
            return replace(self, max_steps=steps)
        return replace(
            self,
            rtol=between(self.rtol, end.rtol),
            atol=between(self.atol, end.atol),
            max_steps=steps,
            min_steps=round(self.min_steps + fraction * (end.min_steps - self.min_steps)),
        )

    def __repr__(self) -> str:
        as_asked = self.is_fixed and self == type(self).steps(self.max_steps, measure=self.measure)
        if not as_asked:
            return super().__repr__()
        return f"{type(self).__name__}.steps({self.max_steps}{', measure=True' * self.measure})"

    @property
    def is_fixed(self) -> bool:
        """Whether the number of steps is fixed in advance."""
        return self.rtol is None

    @property
    def keeps_last(self) -> bool:
        """Whether the value of a sample that is not done is its last iterate."""
        if self.keep is not None:
            return self.keep == "last"
        return self.is_fixed or self.hold_places or self.readout is not None

    @property
    def is_by_residual(self) -> bool:
        """Whether the residual alone says when a sample is done, and its best iterate is kept."""
        return self.readout is None and self.min_steps == 0 and not self.keeps_last
