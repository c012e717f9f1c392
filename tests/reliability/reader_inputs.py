"""Gives spoiled inputs to all readers, in a process of its own, and prints what came of them as JSON.

    python tests/reliability/reader_inputs.py INPUTS [SEED] [--guided READER]

Input i of a reader follows from the seed and i. With `--guided`, the package atheris makes inputs for one
reader that reach new lines of it; `ATHERIS` names the folder that it is in, if it is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT = 10.0  # seconds that an input may take of the processor
PATIENCE = 120.0  # seconds after which one that waits is taken to hang, on a busy machine
MOST_MEMORY = 6 * 2**30  # bytes of addresses beyond those at the start: what asks for more is told
EXAMPLES = 5  # of each reader that are shown, of what must not happen


class _HungError(BaseException):
    """No `Exception`, so that no reader takes it for damage."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--guided")
    parser.add_argument("--only")
    given = parser.parse_args()
    if given.guided:
        sys.path.insert(0, os.environ.get("ATHERIS", ""))
        import atheris

        with atheris.instrument_imports(include=["viar"]):
            import readers
    else:
        import readers
    scratch = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        found = list(readers.readers(Path(folder)))
        warnings.simplefilter("ignore")
        _limit_memory()
        for limit in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(limit, _hang)
        if given.guided:
            (reader,) = (one for one in found if one.what == given.guided)
            _guided(reader, given.inputs)
        elif given.only:
            found = [one for one in found if one.what == given.only]
        total = sum(reader.share for reader in found)
        told = {
            reader.what: _tried(reader, given.inputs * reader.share // total, given.seed) for reader in found
        }
        gc.collect()
        json.dump(told, sys.stdout)


def _tried(reader: Any, inputs: int, seed: int) -> dict[str, Any]:
    """What came of so many inputs."""
    import spoiling

    counts, bad = Counter[str](), list[str]()
    began, longest = time.perf_counter(), 0.0
    for index in range(inputs):
        draw = random.Random(f"{seed} {reader.what} {index}")
        content = draw.choice(reader.seeds)
        if index >= len(reader.seeds):
            content = spoiling.spoiled(draw, content, reader.spoil)
        start = time.perf_counter()
        outcome, text = tried(reader, content)
        longest = max(longest, time.perf_counter() - start)
        counts[outcome] += 1
        if outcome in ("undocumented", "hung") and len(bad) < EXAMPLES:
            bad.append(f"input {index} of seed {seed}: {text}")
    tried(reader, reader.seeds[0])  # another reader may read the same folder
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**counts, "bad": bad, "seconds": time.perf_counter() - began, "longest": longest, "peak": peak}


def tried(reader: Any, content: bytes) -> tuple[str, str]:
    """What came of an input: taken, refused, undocumented or hung; and the error."""
    try:
        with _in_time():
            reader.read(content)
    except _HungError:
        return "hung", f"more than {LIMIT} s of work or {PATIENCE} s"
    except reader.documented as error:
        text = str(error)
        clear = any(name in text for name in reader.names)
        return ("refused" if clear and not _of_memory(error) else "undocumented"), repr(error)[:300]
    except Exception as error:
        return "undocumented", repr(error)[:300]
    return "taken", ""


def _of_memory(error: BaseException | None) -> bool:
    """Whether what was refused asked for memory first."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    limits = {signal.ITIMER_PROF: LIMIT, signal.ITIMER_REAL: PATIENCE}
    for timer, limit in limits.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in limits:
            signal.setitimer(timer, 0)


def _hang(*_: object) -> None:
    raise _HungError


def _limit_memory() -> None:
    with open("/proc/self/statm") as told:
        used = int(told.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))


def _guided(reader: Any, inputs: int) -> None:
    """Never returns: atheris ends the process, so counts are told before the last input ends."""
    import atheris
    import spoiling

    counts, bad = Counter[str](), list[str]()

    def one(content: bytes) -> None:
        outcome, text = tried(reader, content)
        counts[outcome] += 1
        if outcome in ("undocumented", "hung") and len(bad) < EXAMPLES:
            bad.append(f"{text} of {content[:2000]!r}")
        if counts.total() == inputs:
            json.dump({reader.what: {**counts, "bad": bad}}, sys.stdout)
            sys.stdout.flush()
            os._exit(0)

    def changed(content: bytes, most: int, seed: int) -> bytes:
        return spoiling.spoiled(random.Random(seed), content, reader.spoil)[:most]

    with tempfile.TemporaryDirectory() as corpus:
        for index, seed in enumerate(reader.seeds):
            Path(corpus, str(index)).write_bytes(seed)
        flags = ["-seed=1", f"-atheris_runs={2 * inputs}", "-rss_limit_mb=0", "-max_len=1000000"]
        flags.append(f"-artifact_prefix={corpus}/")  # else it leaves slow inputs where it was started
        atheris.Setup([sys.argv[0], *flags, corpus], one, custom_mutator=changed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
