"""What a generation did, scale by scale."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleReport:
    """One scale of one generation.

    Attributes:
        side: of the token map.
        evaluations: of the implicit block, mean over the samples (with guidance an image is two samples);
            `None` for an explicit trunk, and without samples.
        residual: the largest relative residual of a sample at the last evaluation,
            ||f(z) - z|| / ||f(z)||; `None` likewise.
        seconds: from the scale's input to its tokens.
        cache_bytes: keys and values held after it.
    """

    side: int
    evaluations: float | None
    residual: float | None
    seconds: float
    cache_bytes: int


@dataclass(frozen=True)
class GenerationReport:
    """One generation; prints as a table.

    Attributes:
        scales: in order.
        decode_seconds: from the sum of all scales to images.
    """

    scales: tuple[ScaleReport, ...]
    decode_seconds: float

    @property
    def seconds(self) -> float:
        """All scales and decoding."""
        return sum(scale.seconds for scale in self.scales) + self.decode_seconds

    @property
    def evaluations(self) -> float | None:
        """Of the implicit block over all scales, mean over the samples; `None` for an explicit trunk."""
        counts = [scale.evaluations for scale in self.scales if scale.evaluations is not None]
        return sum(counts) if counts else None

    @property
    def cache_bytes(self) -> int:
        """Keys and values at the end, which is their peak."""
        return self.scales[-1].cache_bytes

    def __str__(self) -> str:
        """A line a scale, and the totals."""
        lines = [f"{'scale':>9} {'evaluations':>11} {'residual':>9} {'seconds':>8} {'cache, MB':>9}"]
        for scale in self.scales:
            evaluations = "-" if scale.evaluations is None else f"{scale.evaluations:.1f}"
            residual = "-" if scale.residual is None else f"{scale.residual:.1e}"
            size, megabytes = f"{scale.side} x {scale.side}", scale.cache_bytes / 1e6
            lines.append(f"{size:>9} {evaluations:>11} {residual:>9} {scale.seconds:8.3f} {megabytes:9.2f}")
        total = "-" if self.evaluations is None else f"{self.evaluations:.1f}"
        lines.append(f"{'decoding':>9} {'':>11} {'':>9} {self.decode_seconds:8.3f}")
        lines.append(f"{'all':>9} {total:>11} {'':>9} {self.seconds:8.3f} {self.cache_bytes / 1e6:9.2f}")
        return "\n".join(lines)
