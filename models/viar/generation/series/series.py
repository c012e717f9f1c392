"""Many images: a series that is the same whatever makes it, in as many goes and processes as it takes.

An image of a series depends on (seed, index), its label and the settings, to the last bit of its file. Two
things stand in the way. The order in which a sum is computed depends on the size of a batch and on the
number of threads, and the last bits of the sum with it. And a token choice may hang on such a bit. Hence:

- Of an image, only tokens are taken from a batch, and only if `Sample.certain` says that no choice hangs on
  rounding. The others are sampled again alone.
- Pixels are computed from the tokens of one image at a time.
- On a CPU both happen on one thread, several images side by side.

Where `certain` promises nothing (weights or arithmetic below float32; `Adaptive`, which compares a residual
with a tolerance; `more_smooth`, whose mixtures no tokens give, so that pixels come from their sum), batches
are always the same: they begin at a multiple of the batch size, are always full, on a CPU run on one thread,
and their size is one of the settings of the series.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from ...determinism import deterministic_convolutions
from ...files import held
from ...kinds import check_kind
from ...model.config import check_at_least
from ...model.transformer import NextScaleTransformer
from ...tokenizer import Tokenizer
from ..graphs import Parts, why_eager
from ..sampling import check_pair, sample_tokens
from ..settings import Sampling, as_labels, as_sampling
from .folder import SeriesFolder
from .maker import Maker, runs, whole_batches
from .processes import Processes
from .progress import SeriesProgress
from .provenance import provenance, why_inexact

FORMATS = ("png", "npz")


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
    float32 arithmetic, `Adaptive` and `more_smooth` make `batch_size` one of these settings.

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
        batch_size: images sampled at a time; half as many from where memory does not suffice on, unless it
            is one of the settings.
        console: where the progress is shown.

    Raises:
        ValueError: an argument out of range; the folder holds a series of other settings, which the message
            lists, or pictures without settings; a picture is damaged inside; another process works in the
            folder; memory does not suffice for a batch whose size is a setting of the series.
        MemoryError, RuntimeError: memory does not suffice for a single image.
    """
    check_kind("folder: expected", folder, str | Path)
    check_kind("num: expected", num, int)
    check_kind("batch_size: expected", batch_size, int)
    check_kind("console: expected", console, Console | None)
    sampling = as_sampling(sampling)
    _check(model, tokenizer, num, formats, batch_size)
    classes = _classes(model, labels)
    schedule = sampling.schedule(model.trunk)
    inexact = why_inexact(model, tokenizer, sampling, schedule)
    batches = f"{batch_size}, because of {inexact}" if inexact else "any"
    graphs = model.graphs is not None and why_eager(Parts.of(model, tokenizer), schedule) is None
    settings = provenance(
        model, tokenizer, sampling, schedule, classes, batches, graphs=graphs and inexact is not None
    )
    target = SeriesFolder(Path(folder), tokenizer.config.image_side)
    together = Processes(model.pos_embed.device)
    entered = ExitStack()

    def enter() -> list[int]:  # called in the main process, which holds the folder for all
        entered.enter_context(held(target.path))
        return target.prepare(settings, num, formats)

    with entered:
        missing = together.agree(settings, enter)
        # A batch of another size would be captured for once.
        whole = graphs or inexact is not None
        parts = list(whole_batches(missing, batch_size) if whole else runs(missing, batch_size))
        draw = partial(sample_tokens, model, tokenizer, sampling=sampling)
        maker = Maker(draw, tokenizer, classes, target, batch_size, inexact, sampling.more_smooth, console)
        progress = SeriesProgress(target, num, len(missing), console, shown=together.is_main)
        with maker, deterministic_convolutions(model.pos_embed.device.type), progress:
            for indices, wanted in parts[together.index :: together.count]:
                maker.make(indices, wanted)
                progress.look()
            together.wait(progress.look)
            progress.look(now=True)
            if "npz" in formats and together.is_main:
                _archive(target, num, classes, formats, maker)
            together.wait()
    return SeriesReport(
        folder=target.path,
        num=num,
        made=len(missing),
        resampled=sum(together.leave(maker.resampled)),
        archive=target.archive(num) if "npz" in formats else None,
        seconds=progress.seconds,
    )


def _check(
    model: NextScaleTransformer, tokenizer: Tokenizer, num: int, formats: Sequence[str], batch_size: int
) -> None:
    check_pair(model, tokenizer)
    check_at_least("generate_series", 1, num=num, batch_size=batch_size)
    for name, module in (("model", model), ("tokenizer", tokenizer)):
        if module.training:
            raise ValueError(f"{name}: expected evaluation mode, got training mode; call {name}.eval() first")
    is_several = isinstance(formats, Collection) and not isinstance(formats, str)
    if not (is_several and formats and all(isinstance(name, str) and name in FORMATS for name in formats)):
        raise ValueError(f"formats: expected one or both of {', '.join(FORMATS)}, got {formats!r}")


def _classes(model: NextScaleTransformer, labels: Sequence[int] | None) -> list[int]:
    if labels is None:
        return list(range(model.config.num_classes))
    given = as_labels(labels).cpu()  # on a GPU they would not be read, see `check_labels`
    if not given.numel():
        raise ValueError("labels: expected at least one class, or None for all, got none")
    model.check_labels(given)
    return [int(label) for label in given]


def _archive(
    target: SeriesFolder, num: int, classes: list[int], formats: Sequence[str], maker: Maker
) -> None:
    if not target.has_archive(num):
        target.write_archive(num, (classes[i % len(classes)] for i in range(num)), maker.pool)
    if "png" not in formats:
        target.remove_pictures(num)
