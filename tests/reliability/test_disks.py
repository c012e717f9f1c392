"""A disk that is full, that must not be written, or that has no room for a whole file.

What was there before is whole, nothing half-written has a final name, the error names a file and what the
system said, and with room again the same command comes to the result of an undisturbed one.
"""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from random import Random

import pytest
from works import COMMANDS, WORKS, Refused, Work, make_inputs

PAGE = 4096  # bytes, by which a file in memory grows
DISK = "3m"
FEW, MANY = 1, 16  # limits of each kind of work
COUNTS = dict.fromkeys(("train", "go on"), (1, 6))  # of which each takes two trainings
OF_MANY_FILES = ("series", "tokenize", "go on", "folder")

Files = dict[str, bytes]
Fault = AbstractContextManager[None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk in memory."""
    place = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here ({error}); tests of a limited size of files run")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def folder(disk: Path) -> Iterator[Path]:
    """A name on the small disk, which is empty."""
    yield disk / "out"
    shutil.rmtree(disk / "out", ignore_errors=True)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, whatever program writes it: a disk that is full for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def pages_left(disk: Path, pages: int) -> Iterator[None]:
    """A disk with room for so many pages."""
    ballast, room = disk / "ballast", os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail - pages) * room.f_bsize)
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def files_left(disk: Path, count: int) -> Iterator[None]:
    """A disk with room for so many files and folders."""
    room = os.statvfs(disk)
    remount = ["mount", "-o"]
    most = room.f_files - room.f_ffree + count
    subprocess.run([*remount, f"remount,nr_inodes={most}", disk], check=True)
    try:
        yield
    finally:
        subprocess.run([*remount, f"remount,nr_inodes={room.f_files}", disk], check=True)


@contextmanager
def only_to_be_read(disk: Path) -> Iterator[None]:
    """A disk of which files can be read alone."""
    remount = ["mount", "-o"]
    subprocess.run([*remount, "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run([*remount, "remount,rw", disk], check=True)


def files(folder: Path) -> Files:
    """Files under their final names; what begins with a point, or is not whole by its name, is left out."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {
        str(path): (folder / path).read_bytes()
        for path in sorted(found)
        if not any(part.startswith(".") or part.endswith((".partial", ".new")) for part in path.parts)
    }


def done(work: Work, folder: Path, inputs: Path) -> str:
    """What was said against it; nothing where it was done."""
    try:
        work.do(folder, inputs)
    except (Refused, OSError, ValueError) as error:  # one of several processes is told of others' as the last
        return str(error)
    return ""


def limits(most: int, count: int, random: Random) -> list[int]:
    """Limits spread over all there are, each at random within its part."""
    edges = [round(most * number / count) for number in range(count + 1)]
    return [random.randrange(low, max(low + 1, high)) for low, high in itertools.pairwise(edges)]


def check_fault(work: Work, folder: Path, inputs: Path, fault: Fault, expected: Files) -> None:
    """Nothing is lost or half there, the error is clear, and the work comes to its result when done again."""
    folder.mkdir()
    work.before(folder, inputs)
    before = files(folder)
    with fault:
        told = done(work, folder, inputs)
    now = files(folder)
    if told:
        assert "No space left" in told or "File too large" in told, told
        assert str(folder) in told, told
        bad = [
            name
            for name in {**before, **now}
            if not any(Path(name).match(pattern) for pattern in work.growing)
            and now.get(name) not in (before.get(name), expected.get(name))
        ]
        assert not bad, (told, bad)
        assert done(work, folder, inputs) == ""
        now = files(folder)
    assert now.keys() == expected.keys()
    assert not [name for name in now if is_kept(work, name) and now[name] != expected[name]]


def is_kept(work: Work, name: str) -> bool:
    return not work.kept or any(Path(name).match(pattern) for pattern in work.kept)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    """What a kind of work leaves."""

    @cache
    def leave(name: str) -> Files:
        work, folder = WORKS[name], tmp_path_factory.mktemp("expected") / "out"
        folder.mkdir()
        work.before(folder, inputs)
        assert done(work, folder, inputs) == ""
        return files(folder)

    return leave


@pytest.fixture
def endured(
    inputs: Path, undisturbed: Callable[[str], Files], tally: Callable[..., None]
) -> Callable[[str, str, Path, list[Fault]], None]:
    """endured(kind, name, folder, faults): the work of a name loses nothing by faults, one after another."""

    def endure(kind: str, name: str, folder: Path, faults: list[Fault]) -> None:
        work = WORKS[name]
        for fault in faults:
            check_fault(work, folder, inputs, fault, undisturbed(name))
            shutil.rmtree(folder)
        tally("faults", f"{kind}: {work.what}", runs=len(faults), lost=0, wrong=0, unclear=0)

    return endure


def spread(name: str, most: int, times: Callable[[int, int], int]) -> list[int]:
    """Limits for the work of a name."""
    return limits(most, times(*COUNTS.get(name, (FEW, MANY))), Random(name))


@pytest.mark.parametrize("name", WORKS)
def test_a_file_that_cannot_be_written_to_its_end_loses_nothing(
    name: str,
    tmp_path: Path,
    undisturbed: Callable[[str], Files],
    times: Callable[[int, int], int],
    endured: Callable[..., None],
) -> None:
    most = max(map(len, undisturbed(name).values())) * (4 if WORKS[name].growing else 1)
    faults = [files_of_at_most(size) for size in spread(name, most, times)]
    endured("files end too early", name, tmp_path / "out", faults)


@pytest.mark.parametrize("name", WORKS)
def test_a_full_disk_loses_nothing(
    name: str,
    folder: Path,
    undisturbed: Callable[[str], Files],
    times: Callable[[int, int], int],
    endured: Callable[..., None],
) -> None:
    pages = sum(len(held) // PAGE + 1 for held in undisturbed(name).values())
    most = pages * (4 if WORKS[name].growing else 2)
    endured("full disk", name, folder, [pages_left(folder.parent, n) for n in spread(name, most, times)])


@pytest.mark.parametrize("name", OF_MANY_FILES)
def test_a_disk_that_takes_no_more_files_loses_nothing(
    name: str,
    folder: Path,
    undisturbed: Callable[[str], Files],
    times: Callable[[int, int], int],
    endured: Callable[..., None],
) -> None:
    runs = range(times(1, min(len(undisturbed(name)) + 2, 8)))
    endured("no more files", name, folder, [files_left(folder.parent, number) for number in runs])


@pytest.mark.parametrize("name", WORKS)
def test_a_disk_that_must_not_be_written_is_told_and_stays_as_it_was(
    name: str, inputs: Path, folder: Path, tally: Callable[..., None]
) -> None:
    work = WORKS[name]
    folder.mkdir()
    work.before(folder, inputs)
    before = files(folder)
    with only_to_be_read(folder.parent):
        told = done(work, folder, inputs)
    assert "Read-only file system" in told, told
    assert str(folder) in told, told
    assert files(folder) == before
    tally("faults", f"read-only disk: {work.what}", runs=1, lost=0, wrong=0, unclear=0)


def places(folder: Path) -> dict[str, Path]:
    """Names at which nothing can be written, or at which not what is meant."""
    folder.mkdir()
    (folder / "file").write_text("before")
    (folder / "folder").mkdir()
    (folder / "folder" / "file").write_text("before")
    (folder / "to nowhere").symlink_to(folder / "nowhere")
    (folder / "round").symlink_to(folder / "round")
    os.mkfifo(folder / "pipe")
    return {
        "a device": Path("/dev/null"),
        "a pipe": folder / "pipe",
        "a file": folder / "file",
        "a folder with files": folder / "folder",
        "below a file": folder / "file" / "out",
        "a link in a circle": folder / "round",
        "a name that is too long": folder / ("x" * 300),
        "a link to nowhere": folder / "to nowhere",
        "a folder that is not there": folder / "new" / "newer" / "out",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_written_to_is_refused_by_name_and_stays(
    name: str, inputs: Path, tmp_path: Path, tally: Callable[..., None]
) -> None:
    given = places(tmp_path / "out")
    for what, place in given.items():
        told = done(Work(what, COMMANDS[name]), place, inputs)
        assert not told or place.name in told, (what, told)
        if what == "a file" and not told:  # a picture takes the place of the file that was named
            (tmp_path / "out" / "file").write_text("before")
        assert (tmp_path / "out" / "file").read_text() == "before", what
        assert (tmp_path / "out" / "folder" / "file").read_text() == "before", what
    assert Path("/dev/null").is_char_device()
    assert given["a pipe"].is_fifo()
    tally("faults", f"written to no place: viar {name}", runs=len(given), lost=0, wrong=0, unclear=0)
