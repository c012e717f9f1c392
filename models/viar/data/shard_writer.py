"""Tokens of a data set written to disk by one process or many, on one machine or several.

Each file is made by one process on one thread, from the settings and its number alone: the files are the
same whoever makes them and however often the work was interrupted. Processes share them by counting, without
a word between them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..checksums import read_json, to_json
from ..files import replacing
from ..kinds import checked
from ..model.config import check_at_least
from ..pretrained import fingerprint
from ..screen import tracked
from ..seeds import LARGEST_SEED
from ..tokenizer import Tokenizer
from .augment import SLIGHT
from .batches import rows_of
from .dataset import ImageData
from .folders import ImageFolder
from .shards import SETTINGS, SPLITS, ShardSettings, checksum_path, is_shards, is_whole, read_settings

Shard = tuple[str, str, range]  # split, name of the file, rows


@dataclass(frozen=True)
class ShardReport:
    """What `write_shards` did.

    Attributes:
        rows: of the training split, and of the held-out one.
        made: files made by this call.
        found: files that were there, of those that this call was to make.
    """

    rows: tuple[int, int]
    made: int
    found: int


@checked
def write_shards(
    tokenizer: Tokenizer,
    data: ImageData,
    folder: Path,
    *,
    origin: Mapping[str, Any],
    crops: int = 1,
    seed: int = 0,
    shard_size: int = 8192,
    batch_size: int = 64,
    processes: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
    console: Console | None = None,
) -> ShardReport:
    """Write the tokens of all images into a folder; goes on where an earlier call stopped.

    The files are the same bit for bit on one kind of machine, however often the work was interrupted and
    into however many processes it was divided: each is made on one thread. What is drawn at random for a row,
    such as a crop, depends on `seed` and the number of the row alone, and is what training on the images with
    that seed draws.

    Args:
        tokenizer: in evaluation mode, on the device to work on.
        data: images; of those that are changed whenever they are drawn, every training image gives `crops`
            rows.
        folder: new, empty, or begun with the same settings.
        origin: where the images come from, in plain values; compared where the folder was begun before.
        crops: rows of each training image, at least 1.
        seed: of what is drawn.
        shard_size: rows of a file.
        batch_size: images encoded at a time.
        processes: that this call divides its files among; a core each on a CPU, else a GPU each in turn, from
            the tokenizer's on. More than one start an interpreter each, with a copy of `data`.
        rank: of this call among several that write into the folder at the same time, on any machines.
        num_ranks: calls that do so.
        console: where the progress is shown.

    Raises:
        ValueError: an argument out of range; several rows of images that are always the same; the folder
            holds something else, or tokens made with other settings, which the message lists.
        BrokenProcessPool: one of `processes` was ended from outside.
    """
    settings = _settings_of(tokenizer, data, origin, crops, seed, shard_size, batch_size)
    check_at_least("tokenize", 1, processes=processes, num_ranks=num_ranks)
    if not 0 <= rank < num_ranks:
        raise ValueError(f"tokenize: expected a rank in [0, {num_ranks}), got {rank}")
    _enter(folder, settings, _earlier_augmentations(data, origin))
    shards = [(split, name, rows) for split in SPLITS for name, rows in settings.shards(split)]
    own = shards[rank::num_ranks]
    missing = [shard for shard in own if not is_whole(folder / shard[1])]
    work = _Work(tokenizer, data, folder, settings)
    processes = min(processes, len(missing))
    made = _made_apart(work, missing, processes) if processes > 1 else work.make(missing)
    for _ in tracked(made, "tokenize", total=len(missing), console=console):
        pass
    _tidy(folder, {name for _, name, _ in own} | ({SETTINGS} if rank == 0 else set()))
    rows = settings.rows("train"), settings.rows("validation")
    return ShardReport(rows, len(missing), len(own) - len(missing))


def _settings_of(
    tokenizer: Tokenizer,
    data: ImageData,
    origin: Mapping[str, Any],
    crops: int,
    seed: int,
    shard_size: int,
    batch_size: int,
) -> ShardSettings:
    check_at_least("tokenize", 1, crops=crops, shard_size=shard_size, batch_size=batch_size)
    check_at_least("tokenize", 0, seed=seed)
    if seed > LARGEST_SEED:
        raise ValueError(f"tokenize: seed must be at most {LARGEST_SEED}, got {seed}")
    if crops > 1 and not getattr(data.train, "at_random", True):
        raise ValueError(
            f"crops: expected 1 for images that are the same whenever they are drawn, got {crops}; name "
            "augmentations, which change them"
        )
    return ShardSettings(
        tokenizer=fingerprint(tokenizer),
        sides=tokenizer.config.sides,
        codebook_size=tokenizer.config.codebook_size,
        num_classes=data.num_classes,
        origin=origin,
        images=(len(data.train), len(data.validation)),
        crops=crops,
        seed=seed,
        shard_size=shard_size,
        batch_size=batch_size,
        class_names=data.class_names,
        augmentations=getattr(data.train, "augmentations", ()),
    )


def _earlier_augmentations(data: ImageData, origin: Mapping[str, Any]) -> tuple[str, ...]:
    """What images of this kind went through in releases whose folders do not tell it."""
    if isinstance(data.train, ImageFolder):
        return ("crop",)
    return SLIGHT if origin.get("augment") else ()


def _enter(folder: Path, settings: ShardSettings, earlier: Sequence[str]) -> None:
    """Begin a folder, or go on in one of the same settings. Others may do so at the same time."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder for the tokens, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(asdict(settings)))
    others = any(path.suffix != ".partial" for path in folder.iterdir())  # before another begins the folder
    if is_shards(folder):
        read_settings(folder)
        found = {"augmentations": list(earlier), **read_json(folder / SETTINGS)}
        # What else an older folder does not tell is taken to be the same.
        wanted["origin"] = {name: wanted["origin"].get(name) for name in found["origin"]}
        differ = [name for name in wanted if name in found and wanted[name] != found[name]]
        if differ:
            listed = "; ".join(f"{name}: {found[name]} there, {wanted[name]} now" for name in differ)
            raise ValueError(
                f"{folder} holds tokens made with other settings; give another folder, or these settings as "
                f"they were: {listed}"
            )
        return
    if others:
        raise ValueError(f"{folder}: holds something else than tokens; give a new or an empty folder")
    with replacing(folder / SETTINGS, apart=True) as file:
        file.write(to_json(wanted))


def _tidy(folder: Path, names: set[str]) -> None:
    """Remove what processes that were killed left of these files."""
    for path in folder.glob("*.partial"):
        stem = path.name.partition(".")[0]
        if any(stem == Path(name).stem for name in names):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Work:
    """All that a file is made from."""

    tokenizer: Tokenizer
    data: ImageData
    folder: Path
    settings: ShardSettings

    def make(self, shards: Sequence[Shard]) -> Iterator[None]:
        """Make these files; gives something after each."""
        images = dict(zip(SPLITS, (self.data.train, self.data.validation), strict=True))
        for split, name, rows in shards:
            table = np.empty(len(rows), self.settings.dtype)
            # Batches begin with the file, whichever files are there already.
            for start in range(0, len(rows), self.settings.batch_size):
                chunk = rows[start : start + self.settings.batch_size]
                part = table[start : start + len(chunk)]
                part["tokens"], part["label"] = self._encoded(images[split], chunk)
            _write(self.folder / name, table)
            yield

    def _encoded(self, images: Any, rows: range) -> tuple[np.ndarray, np.ndarray]:
        device = self.tokenizer.quantizer.codebook.weight.device
        with _one_thread():
            batch, labels = rows_of(images, rows, self.settings.seed)
            with torch.autocast(device.type, enabled=False):
                tokens = torch.cat(self.tokenizer.encode(batch.to(device)), 1)
        return tokens.cpu().numpy(), labels.numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are rounded otherwise on another number of threads, and of codes equally near another is taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(path: Path, table: np.ndarray) -> None:
    content = BytesIO()
    np.save(content, table)
    checksum = hashlib.sha256(content.getbuffer()).hexdigest()
    for place, data in ((path, content.getbuffer()), (checksum_path(path), checksum.encode())):
        try:
            with replacing(place, apart=True) as file:
                file.write(data)
        except FileNotFoundError:
            if not place.is_file():  # else another that makes the same file has ended and tidied up
                raise


def _made_apart(work: _Work, shards: Sequence[Shard], processes: int) -> Iterator[None]:
    """Have these files made by other processes; gives something after each."""
    context = get_context("spawn")
    device = work.tokenizer.quantizer.codebook.weight.device
    work = replace(work, tokenizer=copy.deepcopy(work.tokenizer).cpu())
    running, waiting = [], []
    try:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, work, shards[number::processes], _turn(device, number))
            process = context.Process(target=_make_apart, args=arguments, daemon=True)
            process.start()
            sender.close()  # this end of it, so that the end of the process is seen
            running.append(process)
            waiting.append(receiver)
        while waiting:
            ready: list[Any] = wait(waiting)
            for receiver in ready:
                try:
                    told = receiver.recv()
                except EOFError:
                    raise BrokenProcessPool("a process that makes tokens ended before its work did") from None
                if isinstance(told, Exception):
                    raise told
                if told == "file":
                    yield
                else:
                    waiting.remove(receiver)
    finally:
        for process in running:
            process.terminate()
            process.join()


def _turn(device: torch.device, number: int) -> torch.device:
    """The device of a process of that number: on GPUs one after the other, from the first one's on."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", ((device.index or 0) + number) % torch.cuda.device_count())


def _make_apart(sender: Connection, work: _Work, shards: Sequence[Shard], device: torch.device) -> None:
    """What each process does: make its files, and tell of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C meets all: the one that started them ends them
    torch.set_num_threads(1)
    try:
        work.tokenizer.to(device)
        for _ in work.make(shards):
            sender.send("file")
        sender.send("done")
    except BrokenPipeError:  # the process that started this one was killed
        return
    except Exception as error:  # to be raised where it is waited for
        sender.send(error)
