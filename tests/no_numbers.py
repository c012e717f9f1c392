"""Runs cases on a device that has no numbers, as a program of its own.

Arguments: the device, a module and its folder. The module has `CASES`, by name, and `pretend(patch)`. Prints,
as JSON, which cases waited for the device, and where, or in what they failed else.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
from waits import Case, device_without_numbers


def outcome(case: Case, device: str) -> str | None:
    """What a case raises, as a read of a number does, and where in the libraries; `None`: nothing."""
    try:
        case(device)
    except pytest.skip.Exception:
        return None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if {"deqlib", "viar"} & {*Path(frame.filename).parts}]
        place = f" at {ours[-1].filename}:{ours[-1].lineno}" if ours else ""
        return f"{type(error).__name__}: {str(error)[:300]}{place}"
    return None


def main(device: str, module: str, folder: str) -> None:
    sys.path.append(folder)
    cases = importlib.import_module(module)
    found: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch, device_without_numbers(device) as copies:
        cases.pretend(patch)
        for name, case in cases.CASES.items():
            copies.found.clear()
            if reason := outcome(case, device) or ", ".join(copies.found):
                found[name] = reason
    print(json.dumps(found), flush=True)
    # The thread that autograd has for a made-up device is not told to end: on a busy machine the end aborts.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
