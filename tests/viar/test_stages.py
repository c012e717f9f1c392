"""Stages of a long job: what is reused, what goes on, what is done again."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stage_work import fail_at_once, meet

from viar.commands.stages import Stage, Stages, fingerprint_of_code


def test_stages_run_together_in_processes_and_keep_what_finished(tmp_path: Path) -> None:
    stages = Stages(tmp_path, Console(file=io.StringIO()), code="1")
    both = {"a": Stage(partial(meet, "b"), 1), "b": Stage(partial(meet, "a"), 1)}
    results = stages.run_together(both)
    assert len({result["process"] for result in results.values()} | {os.getpid()}) == 3
    assert {result["threads"] for result in results.values()} == {1}
    assert stages.run_together(both) == results
    with pytest.raises(ValueError, match="no such luck"):
        stages.run_together({"a": both["a"], "c": Stage(fail_at_once, 1)})
    assert stages.run_together({"a": both["a"]}) == {"a": results["a"]}
    assert not (tmp_path / "c" / "done.json").exists()


def test_stages_depend_on_settings_on_stages_before_and_on_the_code(tmp_path: Path) -> None:
    ran: list[str] = []

    def run_both(a: Any, b: Any, code: str = "1") -> list[str]:
        ran.clear()
        stages = Stages(tmp_path, Console(file=io.StringIO()), code=code)

        def work(name: str) -> Callable[[Path], dict[str, Any]]:
            return lambda folder: ran.append(name) or {"name": name}

        assert stages.run("a", Stage(work("a"), a)) == {"name": "a"}
        assert stages.run("b", Stage(work("b"), b, ("a",))) == {"name": "b"}
        return list(ran)

    assert run_both(1, 1) == ["a", "b"]
    assert run_both(1, 1) == []
    assert run_both(1, 2) == ["b"]
    assert run_both(2, 2) == ["a", "b"]
    assert run_both(2, 2, code="2") == ["a", "b"]
    assert run_both({"x": (1, 2)}, Path("p"), code="2") == ["a", "b"]
    assert run_both({"x": (1, 2)}, Path("p"), code="2") == []


def test_a_stage_interrupted_under_other_settings_starts_from_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path, Console(file=io.StringIO()), code="1")

    def fail(folder: Path) -> dict[str, Any]:
        assert not (folder / "half").exists()
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    for settings in (1, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            stages.run("a", Stage(fail, settings))
    kept = Stage(lambda folder: {"kept": (folder / "half").exists()}, 1)
    assert stages.run("a", kept) == {"kept": True}


def test_the_fingerprint_of_code_is_of_every_python_file_and_of_versions(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.py").write_text("1")
    seen = {fingerprint_of_code([tmp_path / "a"], ()), fingerprint_of_code([tmp_path / "a"], ("torch",))}
    (tmp_path / "a" / "notes.txt").write_text("of no account")
    assert fingerprint_of_code([tmp_path / "a"], ()) in seen
    (tmp_path / "a" / "b" / "c.py").write_text("2")
    seen.add(fingerprint_of_code([tmp_path / "a"], ()))
    assert len(seen) == 3
