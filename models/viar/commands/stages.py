"""Stages of a long job: pieces of work whose results are kept, and done again only when they do not stand.

Every stage writes into a folder of its own, with two files that this module keeps there. `begun.json` has a
fingerprint of all that goes into the result: settings, the fingerprints of the stages before, and the code.
`done.json` has the fingerprint and the result. A stage whose fingerprint stands is reused; one that was
interrupted under the same fingerprint gets its folder as it left it, so that it can go on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..checksums import read_json, to_json
from ..files import replacing
from .ended import Ended

BEGUN, DONE = "begun.json", "done.json"
Result = dict[str, Any]  # plain values only, since it is kept as JSON
LOOK_EVERY = 0.5  # seconds between two looks at the metrics of stages that run


@dataclass(frozen=True)
class Stage:
    """A piece of work whose result can be kept.

    Attributes:
        work: from the stage's folder to its result.
        settings: all that decides the result besides the stages before and the code; compared as JSON.
        before: names of the stages it builds on.
    """

    work: Callable[[Path], Result]
    settings: Any
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stages:
    """Runs stages whose last result does not stand.

    Attributes:
        root: folder with a sub-folder a stage.
        console: where progress is shown.
        code: `fingerprint_of_code` of whatever the stages run.
    """

    root: Path
    console: Console
    code: str

    def run(self, name: str, stage: Stage) -> Result:
        """Result of one stage, from now or from the last time."""
        fingerprint, result = self._look_up(name, stage)
        if result is None:
            result = stage.work(self._begin(name, fingerprint))
            self._finish(name, fingerprint, result)
        return result

    def run_together(self, stages: dict[str, Stage]) -> dict[str, Result]:
        """Results of stages that do not build on one another, by name.

        Each runs in a process of its own on its share of the cores: small models gain little from more
        threads, and whatever else keeps the machine busy meets all of them alike. Their `work` is sent to
        those processes, so it must be picklable.
        """
        found = {name: self._look_up(name, stage) for name, stage in stages.items()}
        results = {name: result for name, (_, result) in found.items() if result is not None}
        todo = [name for name in stages if name not in results]
        if not todo:
            return results
        threads = max(1, torch.get_num_threads() // len(todo))
        columns = (TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[shown]}"))
        with (
            ProcessPoolExecutor(
                len(todo), get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
            ) as pool,
            Progress(SpinnerColumn(), *columns, console=self.console) as bar,
        ):
            running = {
                pool.submit(stages[name].work, self._begin(name, found[name][0])): (
                    name,
                    bar.add_task(name, total=None, shown=""),
                )
                for name in todo
            }
            while running:
                with _ended_together():
                    done = wait(running, timeout=LOOK_EVERY, return_when=FIRST_COMPLETED).done
                for future in done:
                    name, task = running.pop(future)
                    results[name] = future.result()
                    self._finish(name, found[name][0], results[name])
                    bar.stop_task(task)
                for name, task in running.values():
                    bar.update(task, shown=_last_metrics(self.root / name))
        return results

    def _look_up(self, name: str, stage: Stage) -> tuple[str, Result | None]:
        """Fingerprint of a stage, and its last result if that stands."""
        upstream = [_read(self._done(other))["fingerprint"] for other in stage.before]
        key = json.dumps([stage.settings, upstream, self.code], sort_keys=True, default=str)
        fingerprint = hashlib.sha256(key.encode()).hexdigest()
        done = self._done(name)
        if done.exists():
            record = _read(done)
            if record.get("fingerprint") == fingerprint:
                self.console.print(f"[dim]{name}: unchanged, reused from {escape(str(done.parent))}[/dim]")
                result: Result = record["result"]
                return fingerprint, result
        return fingerprint, None

    def _begin(self, name: str, fingerprint: str) -> Path:
        """Folder of a stage: as an interrupted run of the same stage left it, else empty."""
        folder = self.root / name
        begun = folder / BEGUN
        interrupted = begun.exists() and not self._done(name).exists()
        told = json.dumps(fingerprint).encode()
        if not (interrupted and begun.read_bytes() == told):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with replacing(begun) as file:
                file.write(told)
        return folder

    def _finish(self, name: str, fingerprint: str, result: Result) -> None:
        with replacing(self._done(name)) as file:
            file.write(to_json({"fingerprint": fingerprint, "result": result}))

    def _done(self, name: str) -> Path:
        return self.root / name / DONE


def fingerprint_of_code(packages: Sequence[Path], distributions: Sequence[str]) -> str:
    """Hash of sources and of the versions they run on.

    Args:
        packages: folders, every Python file of which counts, however deep.
        distributions: installed packages whose version counts.
    """
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    for distribution in distributions:
        digest.update(metadata.version(distribution).encode())
    return digest.hexdigest()


@contextmanager
def _ended_together() -> Iterator[None]:
    """Inside, SIGTERM is handed on to the processes of the stages, which save their state and end."""
    try:
        yield
    except Ended:
        for process in active_children():
            process.terminate()
        raise


def _read(done: Path) -> dict[str, Any]:
    """What a stage left when it was done.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return read_json(done)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{done}: expected the result of a stage, found a damaged file; remove it, and the stage is done "
            "again"
        ) from error


def _last_metrics(folder: Path) -> str:
    """The last line of a training run's log, for the screen; empty where there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return "  ".join(f"{key} {value:.4g}" for key, value in json.loads(lines[-1]).items())
    except (OSError, IndexError, ValueError):  # not yet there, or being written
        return ""
