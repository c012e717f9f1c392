"""For whoever loops a block: solves that go on over many samples, and over many losses."""

from .streaming import Stream, StreamReport, solve_stream
from .supervision import deep_supervision

__all__ = ["Stream", "StreamReport", "deep_supervision", "solve_stream"]
