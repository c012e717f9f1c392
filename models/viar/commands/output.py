"""What a command did, for programs: with `--json` one object on standard output, and nothing else there."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from .loading import process_index

# Where the object goes, inside of `results_as_json`.
_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)


@contextmanager
def results_as_json() -> Iterator[None]:
    """Inside, `report` prints to standard output, and what else is meant for it goes to standard error."""
    told = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(told)


def report(values: Mapping[str, Any]) -> bool:
    """Print what a command did, if that was asked for as JSON; the first of several processes does.

    Args:
        values: by the keys that docs/viar.md lists; `None` takes the place of numbers that are not finite.

    Returns:
        whether it was asked for, so that what people read instead can be left out.
    """
    stream = _RESULTS.get()
    if stream is None:
        return False
    if not process_index():
        stream.write(json.dumps(plain(dict(values)), allow_nan=False) + "\n")
        stream.flush()
    return True


def plain(value: Any) -> Any:
    """What JSON has: names in place of paths, and `None` of what is no finite number.

    Args:
        value: numbers, texts, paths, and dictionaries and sequences of such.
    """
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
