"""Many images: a series that is the same whatever makes it, in as many goes and processes as it takes.

An image of a series depends on (seed, index), its label and the settings, to the last bit of its file. Two
things stand in the way. The order in which a sum is computed depends on the size of a batch and on the
number of threads, and the last bits of the sum with it. And a token choice may hang on such a bit. Hence:

- Of an image, only tokens are taken from a batch, and only if `Sample.certain` says that no choice hangs on
  rounding. The others are sampled again alone.
- Pixels are computed from the tokens of one image at a time.
- On a CPU both happen on one thread, several images side by side.

Where `certain` promises nothing (weights or arithmetic below float32; `Adaptive`, which compares a residual
with a tolerance), batches are always the same: they begin at a multiple of the batch size, are always
full, on a CPU run on one thread, and their size is one of the settings of the series.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ...model.config import check_at_least
from ...model.schedule import Adaptive
from ...model.transformer import NextScaleTransformer
from ...tokenizer import Tokenizer
from ..sampling import Sample, check_pair, sample_tokens
from ..settings import Sampling
from .folder import SeriesFolder

FORMATS = ("png", "npz")
PATIENCE = timedelta(days=30)  # a slow process is no error; one that ended is noticed at once
LOOK_EVERY = 0.5  # seconds between two counts of the files


@dataclass(frozen=True)
class SeriesReport:
    """What `generate_series` did.

    Attributes:
        folder: where the images are.
        num: images of the series.
        made: images made by this call, in all processes; the others were there.
        resampled: how many of them were sampled again alone, see `viar.generation.series.series`.
        archive: the .npz, if asked for.
        seconds: spent on images, without the archive.
    """

    folder: Path
    num: int
    made: int
    resampled: int
    archive: Path | None
    seconds: float


def generate_series(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    folder: str | Path,
    num: int,
    *,
    sampling: Sampling | None = None,
    labels: Sequence[int] | None = None,
    formats: Sequence[str] = FORMATS,
    batch_size: int = 64,
    console: Console | None = None,
) -> SeriesReport:
    """Generate `num` images into a folder; goes on where an earlier call stopped.

    Image i is `folder`/00000i.png. The file is the same, bit for bit, whatever `num`, `batch_size`, the
    number of threads and processes, and however often the work was interrupted: on one kind of machine, with
    one release of PyTorch. `num` may be raised later. What the images depend on is kept in series.json,
    with a fingerprint of all weights; a folder of other settings is refused. Weights below float32, reduced
    float32 arithmetic and `Adaptive` make `batch_size` one of these settings.

    Every process that `accelerate launch` or `torchrun` started does its share if all call this; the main
    process shows the progress and writes the archive. If one fails, all end with an error.

    Args:
        model: VAR or VIAR in evaluation mode, on the device to work on.
        tokenizer: of the model's sizes, in evaluation mode, on the same device.
        folder: new, empty, or of the same series.
        num: images, at least 1.
        sampling: how to sample; default `Sampling()`.
        labels: classes that the images get in turn, image i the one at i modulo their number; default all.
        formats: "png" and "npz"; the latter is samples_{num}x{H}x{W}x3.npz with arr_0 (num, H, W, 3) uint8
            and labels arr_1 (num,) int64. With "npz" alone the pictures are removed once it is written.
        batch_size: images sampled at a time.
        console: where the progress is shown.

    Raises:
        ValueError: an argument out of range; the folder holds a series of other settings, which the message
            lists, or pictures without settings; a picture is damaged inside.
    """
    sampling = sampling or Sampling()
    _check(model, tokenizer, num, formats, batch_size)
    classes = _classes(model, labels)
    schedule = sampling.schedule(model.trunk)
    inexact = _why_inexact(model, tokenizer, schedule)
    settings = {
        **{f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling)},
        "iterations": repr(schedule[0]) if isinstance(schedule[0], Adaptive) else schedule,
        "labels": classes,
        "batch_size": f"{batch_size}, because of {inexact}" if inexact else "any",
        "compiled": _is_compiled(model),
        "model": _fingerprint(model),
        "tokenizer": _fingerprint(tokenizer),
        "machine": _machine(model.pos_embed.device),
        "torch": torch.__version__,
    }
    target = SeriesFolder(Path(folder), tokenizer.config.image_side)
    together = _Processes(model.pos_embed.device)
    missing = together.agree(settings, lambda: target.prepare(settings, num, formats))
    parts = list(_whole_batches(missing, batch_size) if inexact else _runs(missing, batch_size))
    draw = partial(sample_tokens, model, tokenizer, sampling=sampling)
    maker = _Maker(draw, tokenizer, classes, target, inexact is None)
    with maker, _float32(), _Bar(target, num, len(missing), console, together.is_main) as bar:
        for indices, wanted in parts[together.index :: together.count]:
            maker.make(indices, wanted)
            bar.look()
        together.wait(bar.look)
        bar.look(now=True)
        if "npz" in formats and together.is_main:
            _archive(target, num, classes, formats, maker)
        together.wait()
    return SeriesReport(
        folder=target.path,
        num=num,
        made=len(missing),
        resampled=sum(together.leave(maker.resampled)),
        archive=target.archive(num) if "npz" in formats else None,
        seconds=bar.seconds,
    )


def _check(
    model: NextScaleTransformer, tokenizer: Tokenizer, num: int, formats: Sequence[str], batch_size: int
) -> None:
    check_pair(model, tokenizer)
    check_at_least("generate_series", 1, num=num, batch_size=batch_size)
    for name, module in (("model", model), ("tokenizer", tokenizer)):
        if module.training:
            raise ValueError(f"{name}: expected evaluation mode, got training mode; call {name}.eval() first")
    if isinstance(formats, str) or not formats or not set(formats) <= set(FORMATS):
        raise ValueError(f"formats: expected one or both of {', '.join(FORMATS)}, got {formats!r}")


def _classes(model: NextScaleTransformer, labels: Sequence[int] | None) -> list[int]:
    if labels is None:
        return list(range(model.config.num_classes))
    if not len(labels):
        raise ValueError("labels: expected at least one class, or None for all, got none")
    model.check_labels(torch.as_tensor(labels))
    return [int(label) for label in labels]


def _why_inexact(
    model: NextScaleTransformer, tokenizer: Tokenizer, schedule: Sequence[int | Adaptive | None]
) -> str | None:
    """What keeps `Sample.certain` from holding, in words; `None` where it holds."""
    if any(isinstance(part, Adaptive) for part in schedule):
        return "adaptive iterations"
    dtypes = {p.dtype for module in (model, tokenizer) for p in module.parameters()}
    if low := sorted(str(dtype) for dtype in dtypes - {torch.float32, torch.float64}):
        return f"weights in {', '.join(low)}"
    kind = model.pos_embed.device.type
    if torch.is_autocast_enabled(kind):
        return f"autocast to {torch.get_autocast_dtype(kind)}"
    if torch.get_float32_matmul_precision() != "highest":
        return f"float32 matmul precision {torch.get_float32_matmul_precision()}"
    return None


def _is_compiled(model: NextScaleTransformer) -> bool:
    """Whether the blocks are: other kernels round differently."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def _fingerprint(module: NextScaleTransformer | Tokenizer) -> str:
    """Of config and weights."""
    digest = hashlib.sha256(json.dumps(module.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _machine(device: torch.device) -> str:
    """What kernels are chosen by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


@contextmanager
def _float32() -> Iterator[None]:
    """Convolutions of a GPU in float32, by the same algorithm each time; TensorFloat32 is its default."""
    wanted = {"allow_tf32": False, "benchmark": False, "deterministic": True}
    before = {name: getattr(torch.backends.cudnn, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(torch.backends.cudnn, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)


def _runs(missing: Sequence[int], batch_size: int) -> Iterator[tuple[range, list[int]]]:
    """Consecutive indices, up to a batch at a time: what to sample, and what of it is wanted."""
    start = 0
    for end in range(1, len(missing) + 1):
        whole = end - start == batch_size
        if end == len(missing) or missing[end] != missing[end - 1] + 1 or whole:
            yield range(missing[start], missing[end - 1] + 1), list(missing[start:end])
            start = end


def _whole_batches(missing: Sequence[int], batch_size: int) -> Iterator[tuple[range, list[int]]]:
    """Full batches at multiples of the batch size: what to sample, and what of it is wanted."""
    wanted: dict[int, list[int]] = {}
    for index in missing:
        wanted.setdefault(index // batch_size, []).append(index)
    for batch, indices in wanted.items():
        yield range(batch * batch_size, (batch + 1) * batch_size), indices


@dataclass
class _Maker:
    """Samples and decodes images, and writes them. A context: its threads end with it."""

    draw: Callable[..., Sample]
    tokenizer: Tokenizer
    classes: list[int]
    target: SeriesFolder
    exact: bool
    resampled: int = field(default=0, init=False)

    def __enter__(self) -> _Maker:
        self.on_cpu = self.tokenizer.quantizer.codebook.weight.device.type == "cpu"
        self.threads = torch.get_num_threads()
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = self.threads if self.on_cpu else max(1, (os.cpu_count() or 1) // num_processes)
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)  # for threads that start after this

    def make(self, indices: range, wanted: list[int]) -> None:
        """Sample images `indices`, and write those that are wanted."""
        labels = [self._label(index) for index in indices]
        if self.exact or not self.on_cpu:
            sample = self.draw(labels, first_index=indices.start)
        else:
            sample = self.pool.submit(self.draw, labels, first_index=indices.start).result()
        certain = sample.certain.tolist()
        jobs = []
        for index in wanted:
            row = index - indices.start
            tokens = [tokens_Bl[row : row + 1] for tokens_Bl in sample.tokens]
            alone = self.exact and not certain[row]
            self.resampled += alone
            jobs.append(self._start(index, None if alone else tokens))
        for job in jobs:
            job.result()

    def _start(self, index: int, tokens: list[Tensor] | None) -> Future[None]:
        if self.on_cpu:
            return self.pool.submit(self._finish, index, tokens)
        return self.pool.submit(self.target.write, index, self._pixels(index, tokens))

    def _finish(self, index: int, tokens: list[Tensor] | None) -> None:
        self.target.write(index, self._pixels(index, tokens))

    @torch.no_grad()
    def _pixels(self, index: int, tokens: list[Tensor] | None) -> Any:
        """(H, W, 3) uint8 of an image, from its tokens or, without, sampled alone."""
        if tokens is None:
            tokens = self.draw([self._label(index)], first_index=index).tokens
        image_CHW = self.tokenizer.decode(tokens)[0].float().add(1).div(2)
        return image_CHW.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()

    def _label(self, index: int) -> int:
        return self.classes[index % len(self.classes)]


def _archive(
    target: SeriesFolder, num: int, classes: list[int], formats: Sequence[str], maker: _Maker
) -> None:
    if not target.has_archive(num):
        target.write_archive(num, (classes[i % len(classes)] for i in range(num)), maker.pool)
    if "png" not in formats:
        target.remove_pictures(num)


class _Processes:
    """Those that work on a series together; also one alone.

    They talk over gloo whatever the device: a process that ends breaks its connections, and those that wait
    for it get an error.
    """

    def __init__(self, device: torch.device) -> None:
        state = PartialState(cpu=device.type == "cpu")
        self.index, self.count = state.process_index, state.num_processes
        self.is_main = self.index == 0
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    def agree(self, settings: dict[str, Any], decide: Callable[[], Any]) -> Any:
        """What `decide` returns or raises in the main process, given that all have the same settings."""
        for index, theirs in enumerate(self._gather(settings)):
            names = [name for name in settings if theirs[name] != settings[name]]
            if names:
                raise ValueError(
                    f"processes {self.index} and {index} differ in {', '.join(names)}; start all with the "
                    "same models and settings, on machines of one kind"
                )
        verdict: Any = None
        if self.is_main:
            try:
                verdict = decide()
            except (ValueError, OSError) as error:
                verdict = error
        verdict = self._broadcast(verdict)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until all processes are here."""
        if self.group is None:
            return
        barrier = dist.barrier(self.group, async_op=True)
        while not barrier.is_completed():
            meanwhile()
            time.sleep(0.05)
        barrier.wait()

    def leave(self, value: int) -> list[int]:
        """What all processes give."""
        values = self._gather(value)
        if self.group is not None:
            dist.destroy_process_group(self.group)
        return values

    def _gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _broadcast(self, value: Any) -> Any:
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


class _Bar:
    """Progress over all processes' images, shown by the main one; it counts the files."""

    def __init__(
        self, target: SeriesFolder, num: int, missing: int, console: Console | None, shown: bool
    ) -> None:
        self.target, self.num, self.before, self.shown = target, num, num - missing, shown
        self.progress = Progress(
            TextColumn("generate"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown,
        )

    def __enter__(self) -> _Bar:
        self.start = self.looked = time.monotonic()
        self.seconds = 0.0
        self.progress.start()
        self.task = self.progress.add_task("generate", total=self.num, completed=self.before, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def look(self, *, now: bool = False) -> None:
        """Count the files, if it is time to."""
        seconds = time.monotonic() - self.start
        if not now and time.monotonic() - self.looked < LOOK_EVERY:
            return
        self.looked, self.seconds = time.monotonic(), seconds
        if self.shown:
            done = max(self.target.count(self.num), self.before)
            rate = f"{(done - self.before) / max(seconds, 1e-9):.3g} images/s"
            self.progress.update(self.task, completed=done, rate=rate)
