"""Files and folders that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from viar.files import replacing, replacing_path


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    with replacing(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert texts(tmp_path) == {"a": "after"}


def half_a_file(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def half_a_file_by_name(path: Path) -> None:
    with replacing_path(path) as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("write", [half_a_file, half_a_file_by_name])
@pytest.mark.parametrize("before", [{}, {"a": "before"}])
def test_a_file_that_never_is_whole_leaves_nothing(
    write: Callable[[Path], None], before: dict[str, str], tmp_path: Path
) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a")
    assert texts(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == set(before)


def test_a_folder_takes_its_place_and_is_made_with_its_parents(tmp_path: Path) -> None:
    with replacing_path(tmp_path / "new" / "b") as fresh:
        assert fresh.name == "b"
        fresh.mkdir()
        (fresh / "c").write_text("whole")
        assert not (tmp_path / "new" / "b").exists()
    assert texts(tmp_path) == {"new/b/c": "whole"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b"]


def test_of_a_folder_that_is_there_only_files_that_were_written_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    (folder / "c").write_text("before")
    monkeypatch.chdir(folder)  # a working directory that was replaced would be lost
    with replacing_path(Path()) as fresh:
        fresh.mkdir()
        (fresh / "c").write_text("after")
    assert texts(Path()) == {"kept": "kept", "c": "after"}
