"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_transformer

from viar import NextScaleTransformer
from viar.files import alone, check_writable, held, naming, replacing, replacing_path


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


def test_two_that_write_one_file_at_a_time_come_one_after_the_other(tmp_path: Path) -> None:
    path, numbers = tmp_path / "a.png", range(8)

    def write(number: int) -> None:
        with replacing(path, in_turn=True) as file:
            for _ in range(20):
                file.write(bytes([number]) * 1000)
                file.flush()

    with ThreadPoolExecutor(len(numbers)) as writers:
        list(writers.map(write, numbers))
    assert path.read_bytes() in [bytes([number]) * 20_000 for number in numbers]
    assert list(tmp_path.iterdir()) == [path]


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


def by_pytorch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(torch.zeros(1000), file)


def by_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path)


def by_python(path: Path) -> None:
    path.write_bytes(bytes(4000))


@pytest.mark.parametrize("write", [by_pytorch, by_safetensors, by_python])
def test_what_the_system_refuses_is_told_of_the_file_whoever_writes_it(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised, naming(tmp_path / "final"):
            write(tmp_path / "partial")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(tmp_path / "final")


def test_other_errors_are_not_taken_for_those_of_writing(tmp_path: Path) -> None:
    given: list[Exception] = [
        RuntimeError("no file at all"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "another"),
        ValueError("a picture is damaged"),
    ]
    for error in given:
        with pytest.raises(type(error)) as raised, naming(tmp_path):
            raise error
        assert raised.value is error


def test_a_folder_is_held_by_one_and_let_go_of_at_the_end(tmp_path: Path) -> None:
    with held(tmp_path / "new" / "run"):
        with (
            pytest.raises(ValueError, match="another process is at work in this folder; wait"),
            held(tmp_path / "new" / "run"),
        ):
            pass
        with held(tmp_path / "other"):
            pass
    with held(tmp_path / "new" / "run"):
        pass
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_folder_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from viar.files import held\n"
        "with held(Path(sys.argv[1])):\n    print('holds', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        with pytest.raises(ValueError, match="another process"), held(tmp_path):
            pass
        process.kill()
        process.wait()
    with held(tmp_path):
        pass


def test_a_file_in_place_of_a_folder_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder, found a file"), held(tmp_path / "file"):
        pass


def half_a_folder(folder: Path) -> None:
    with alone(folder):
        assert list(folder.iterdir()) == []
        (folder / "half").touch()
        raise KeyboardInterrupt


def test_a_folder_of_ones_own_is_gone_in_the_end_whatever_a_killed_process_left(tmp_path: Path) -> None:
    folder = tmp_path / "new" / ".saving"
    folder.mkdir(parents=True)
    (folder / "left").touch()
    (tmp_path / "new" / ".saving.lock").touch()
    with pytest.raises(KeyboardInterrupt):
        half_a_folder(folder)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_of_ones_own_is_waited_for(tmp_path: Path) -> None:
    folder, order = tmp_path / "a", []

    def work() -> None:
        with alone(folder):
            order.append("second")

    thread = threading.Thread(target=work)
    with alone(folder):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_model_that_is_half_way_written_over_another_is_not_read_as_a_mixture(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    real, done = os.replace, list[object]()

    def ends(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", ends)
    with pytest.raises(KeyboardInterrupt):
        tiny_transformer(seed=1, drop_path=0.25).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"found no model.safetensors"):
        NextScaleTransformer.from_pretrained(tmp_path)
    monkeypatch.undo()
    tiny_transformer(seed=1, drop_path=0.25).save_pretrained(tmp_path)
    assert NextScaleTransformer.from_pretrained(tmp_path).config.drop_path == 0.25


@pytest.mark.parametrize("length", [242, 247, 256])
def test_a_name_that_is_too_long_for_what_is_added_is_refused_at_once(length: int, tmp_path: Path) -> None:
    name = "é" + "a" * (length - 6) + ".png"  # é has two bytes
    for path in (tmp_path / name, tmp_path / "new" / name):
        with pytest.raises(ValueError, match=rf"--out: .*(at most 241 bytes, got one of {length}|too long)"):
            check_writable(path, "--out", folder=False)
    check_writable(tmp_path / ("a" * 241), "--out", folder=False)
    with replacing_path(tmp_path / ("a" * 241)) as fresh:
        fresh.write_text("whole")


def test_a_folder_to_be_made_may_not_have_too_long_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out: .*(at most 255 bytes, got one of 256|too long)"):
        check_writable(tmp_path / ("a" * 256) / "a.png", "--out", folder=False)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weights_may_be_read_by_whom_the_user_lets_read_new_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        tiny_transformer().save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes.keys() >= {"config.json", "model.safetensors"}
    assert set(modes.values()) == {0o666 & ~mask}
