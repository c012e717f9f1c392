from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.suites.memory import memory


def test_saved_bytes_are_flat_in_the_steps_for_every_mode_but_unrolling() -> None:
    sizes = memory(steps=[1, 10, 500], batch=4, width=16)
    unrolled = sizes.pop("explicit depth (Unroll)")
    assert unrolled[10] == 10 * unrolled[1]
    assert unrolled[500] == 500 * unrolled[1]
    assert len(sizes) == 4
    for by_steps in sizes.values():
        assert len(set(by_steps.values())) == 1


def test_the_command_writes_its_table_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "memory.json"
    arguments = ["benchmarks", "memory", "--steps", "1", "3", "--width", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    saved = json.loads(out.read_text())["saved_bytes"]
    assert saved["explicit depth (Unroll)"]["3"] == 3 * saved["explicit depth (Unroll)"]["1"]
