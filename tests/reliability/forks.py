"""Work that may end its process, or never end, done in forks: what came of it is counted whatever it does."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub

PATIENCE = 6  # seconds that may pass for a second of a processor, on a machine that is busy
AT_A_TIME = 1000  # pieces of work of one process
BYTES = 2 << 30  # of addresses that a process may take more than it has: what asks for more is told so


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Attributes:
        kind: "taken", "refused", "undocumented" or "hung".
        target: name of what was called.
        told: in one line, what was raised or what is wrong with what was returned.
        changed: arguments that were not the valid ones.
    """

    kind: str
    target: str
    told: str = ""
    changed: str = ""


class Hung(BaseException):
    """A call took too long; no `Exception`, so that nobody on its way can take it for one."""


@dataclass
class Counted:
    """Outcomes by kind, and every distinct thing that was told, with the arguments of its first call."""

    kinds: Counter[str] = field(default_factory=Counter)
    told: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def add(self, outcome: Outcome, number: int) -> None:
        """Count one."""
        self.kinds[outcome.kind] += 1
        first = outcome.told.splitlines()[0] if outcome.told else ""
        self.told.setdefault((outcome.kind, outcome.target, first), f"#{number} {outcome.changed}")

    def bad(self) -> str:
        """What must not happen, for a message."""
        kinds = ("undocumented", "hung")
        return "\n".join(f"{key}: {where}" for key, where in self.told.items() if key[0] in kinds)


def counted_in_forks(work: Callable[[int], Outcome], numbers: range, seconds: float) -> Counted:
    """What comes of work by number.

    Args:
        work: calls `limit` around what may not end.
        numbers: of the pieces of work.
        seconds: that a piece may take.
    """
    counted = Counted()
    at = numbers.start
    while at < numbers.stop:
        part = range(at, min(at + AT_A_TIME, numbers.stop))
        for number, outcome in _forked(part, work, seconds):
            counted.add(outcome, number)
            at = number + 1
    return counted


def _forked(numbers: range, work: Callable[[int], Outcome], seconds: float) -> Iterator[tuple[int, Outcome]]:
    """Outcomes as they come; the last is of the call that ended its process, if one did."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _work(writing, numbers, work)
    os.close(writing)
    done = numbers.start
    held = b""
    while done < numbers.stop:
        ready, _, _ = select.select([reading], [], [], 2 * PATIENCE * seconds)
        more = os.read(reading, 1 << 16) if ready else b""
        if not more:
            break
        *lines, held = (held + more).split(b"\n")
        for line in lines:
            yield done, Outcome(*json.loads(line))
            done += 1
    ended = _ends(child)
    os.close(reading)
    if done < numbers.stop:
        kind, told = ("undocumented", "ended the interpreter") if ended else ("hung", "never answered")
        yield done, Outcome(kind, "?", f"call {done} {told}")


def _ends(child: int) -> bool:
    """Whether a process ends by itself; it ends in any case."""
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _work(writing: int, numbers: range, work: Callable[[int], Outcome]) -> None:
    """What the forked process does, which never returns."""
    try:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        os.chdir(tempfile.mkdtemp())  # a name that is a path after all is one from here
        signal.signal(signal.SIGALRM, _too_late)
        signal.signal(signal.SIGPROF, _too_late)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        for number in numbers:
            outcome = work(number)
            told = [outcome.kind, outcome.target, outcome.told, outcome.changed]
            os.write(writing, json.dumps(told).encode() + b"\n")
    finally:
        os._exit(0)


def limit(seconds: float) -> None:
    """Let a call be ended after so long, or no more: on a machine that is busy it is at work for less."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)


def _too_late(*_: Any) -> None:
    raise Hung
