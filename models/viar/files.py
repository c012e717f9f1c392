"""Files that are whole or not there: written under another name first, then moved to their own.

A folder may have been somebody else's, with links in it to files elsewhere: where a file is written whose
name a user did not give, a link of that name is replaced, and what it leads to stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

LOCK = ".lock"  # in a folder that a process works in
ADDED = "..partial.lock"  # the longest that a name gets while something is written, see `replacing_path`


def check_writable(path: Path, owner: str, *, folder: bool) -> None:
    """Raise unless something can be written at `path`; nothing is left there.

    Args:
        path: of a file, or of a folder for files; neither it nor its parents need be there.
        owner: what the message begins with, such as the flag that names the path.
        folder: whether a folder is meant.

    Raises:
        ValueError: a file where a folder is meant or the reverse, or a place where nothing can be written.
    """
    wanted, other = ("folder", "file") if folder else ("file", "folder")
    try:
        _check_regular(path, owner)
        if path.exists() and path.is_dir() != folder:
            raise ValueError(f"{owner}: expected the name of a {wanted}, {path} is a {other}; give another")
        real = Path(os.path.realpath(path))  # through links, as it is written
        there, fresh = real if real.is_dir() else real.parent, [real.name]
        while not there.exists() and there != there.parent:
            fresh.append(there.name)
            there = there.parent
        _check_lengths(owner, fresh, there)
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{owner}: nothing can be written to {path} ({reason}); give another") from error


def _check_lengths(owner: str, names: Sequence[str], folder: Path) -> None:
    """Raise where a name is too long for a folder: what is written has a longer one until it is whole.

    Args:
        owner: what the message begins with.
        names: of what is written, and of folders that are made for it.
        folder: that is there.
    """
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows does not tell
        most = 255
    for name, room in zip(names, [most - len(ADDED)] + [most] * len(names), strict=False):
        if len(os.fsencode(name)) > room:
            raise ValueError(
                f"{owner}: expected a name of at most {room} bytes, got one of {len(os.fsencode(name))} "
                f"({name[:20]}...); give a shorter one"
            )


def _check_regular(path: Path, owner: str) -> None:
    """Raise where a file would take the place of a device or a pipe, such as /dev/null."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{owner}: expected a file or folder, {path} is a device or a pipe; give another")


@contextmanager
def replacing(path: Path, *, apart: bool = False, in_turn: bool = False) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when it is whole, and is gone if it never is.

    A link is replaced itself, whatever it leads to; a user who names one means the other file, so commands
    pass on `os.path.realpath` of what was named.

    Args:
        path: of the file.
        apart: until then it has a name that no other process gives, on this machine or on another; of a
            process that is killed it stays. Else it has one that the next to write it takes over.
        in_turn: two that write it at a time come one after the other, through a lock beside it. Not needed in
            a folder that is `held`.

    Raises:
        ValueError: `path` is a device or a pipe, or has no name.
        OSError: it cannot be written; it is named, see `naming`.
    """
    if not path.name:
        raise ValueError(f"path: expected the name of a file, got {str(path)!r}; give one")
    _check_regular(path, str(path))
    owner = f".{socket.gethostname()}-{os.getpid()}" if apart else ""
    partial = path.with_name(f"{path.name}{owner}.partial")
    with _turn(partial) if in_turn else nullcontext():
        try:
            with naming(path):
                # Made anew, so that a link of its name, or a pipe, is not written to.
                partial.unlink(missing_ok=True)
                with partial.open("xb") as file:
                    yield file
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """The same for writers that ask for a name, not an open file, and for those that write a folder.

    Yields a path of the same name in a new folder beside `path`, which one process at a time has; its parents
    are made. A file, or a folder where none was, takes the place of `path`. Of a folder that is there, each
    file that was written is replaced, and the others stay. A link to a folder stands for that folder; any
    other is replaced itself.

    Raises:
        ValueError: `path` is a device or a pipe.
        OSError: it cannot be written; it is named, see `naming`.
    """
    _check_regular(path, str(path))
    if path.is_dir() or not path.is_symlink():
        path = Path(os.path.realpath(path))
    folder = begun_beside(path)
    with alone(folder):
        fresh = folder / path.name
        with naming(path):
            yield fresh
        if path.is_dir():  # It may be somebody's working directory, so even an empty one is not replaced.
            for file in fresh.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(fresh, path)


def begun_beside(path: Path) -> Path:
    """The folder in which what is to take the place of a path is begun; see `alone`."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, what the operating system refuses in writing is told of `path`.

    Writers of Python name no file, and those of PyTorch and of safetensors raise errors of other kinds.

    Raises:
        OSError: where one was raised without a name, or in words of a writer's own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _refusal(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _refusal(error: BaseException) -> int | None:
    """The number of what the operating system said, unless the error tells of which file."""
    if isinstance(error, SafetensorError):
        told = re.search(r"\(os error (\d+)\)", str(error))
        return int(told[1]) if told else None
    if isinstance(error, OSError) and error.filename is not None:
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return None if error.__context__ is None else _refusal(error.__context__)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, this process or thread has a new and empty folder, gone afterwards; others wait for it.

    What a process that was killed left in it is gone too.

    Args:
        folder: its parents are made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _turn(folder):
        if folder.is_symlink():  # else files would be made where it leads to
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Inside, this process or thread alone works at a path; others wait for it."""
    lock = path.with_name(f"{path.name}.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            with suppress(OSError):  # where an open file cannot be removed, it stays, and is in nobody's way
                lock.unlink()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process may work in a folder, which is made if it is not there.

    The operating system lets go of it however this process ends, so one that was killed is in nobody's way.

    Raises:
        ValueError: another process works in it, or there is a file of its name.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder}: another process is at work in this folder; wait for it to end, or give another folder"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed, it stays, and is in nobody's way
            (folder / LOCK).unlink()
        lock.release()


def flush(path: Path) -> None:
    """Return when a file, or of a folder the names in it, would outlive a loss of power.

    Args:
        path: of a file that is written and closed, or of a folder.
    """
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
