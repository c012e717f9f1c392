"""`viar tokenize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape

from ..data import ImageData
from ..data.decoding import shown
from ..data.shard_writer import write_shards
from ..files import check_writable
from ..tokenizer import Tokenizer
from ..training.settings import describe_data
from .checks import check_beside_data
from .flags import without
from .loading import find_device, load_images, load_model, num_processes, process_index
from .output import report


def tokenize_command(
    tokenizer: str,
    data: str,
    out: Path,
    crops: int = 1,
    augment: int = 0,
    augmentations: Annotated[
        tuple[str, ...] | None, without("crop of folders and the hub, else none")
    ] = None,
    seed: int = 0,
    shard_size: int = 8192,
    batch_size: int = 64,
    processes: int = 1,
    device: str = "auto",
) -> None:
    """Write the tokens of a data set into a folder, for viar train --data FOLDER.

    Training from tokens spares reading pictures and the tokenizer's encoder in every epoch. The same command
    goes on where it was stopped, and gives the same files. Started by torchrun, on one machine or several
    that share the folder, each process makes files of its own.

    Args:
        tokenizer: Folder, hub id or published checkpoint of the tokenizer.
        data: Source of images: digits, mnist, emoji, hub:NAME, or a folder with a sub-folder a class.
        out: Folder of the tokens.
        crops: Rows of each training image, each cut or changed anew as --augmentations say.
        augment: Of digits, mnist and emoji: changed versions added of each training image.
        augmentations: What changes training images: rotate, shear, scale, shift, crop, flip.
        seed: Of crops and augmentations.
        shard_size: Rows of tokens in a file.
        batch_size: Images encoded at a time.
        processes: That share the work, about one a core, or one a GPU. The files are the same.
        device: cpu, cuda, or cuda:1; auto is cuda where there is one.
    """
    console = Console()
    check_writable(out, "--out", folder=True)
    check_beside_data(out, data)
    where = find_device(device)
    codec = load_model(Tokenizer, tokenizer, "--tokenizer").to(where)
    side = codec.config.image_side
    images = load_images(data, side, console, augment=augment, augmentations=augmentations)
    made = write_shards(
        codec,
        images,
        out,
        origin={"data": data, "augment": augment, "images": _fingerprints(images)},
        crops=crops,
        seed=seed,
        shard_size=shard_size,
        batch_size=batch_size,
        processes=processes,
        rank=process_index(),
        num_ranks=num_processes(),
        console=console,
    )
    if process_index():
        return
    train, validation = made.rows
    result = {"out": out, "rows": {"train": train, "validation": validation}}
    if report({**result, "files_made": made.made, "files_found": made.found}):
        return
    rows = f"{train} rows of tokens to train on and {validation} held out in {shown(out)}"
    whose = f" by the first of {num_processes()} processes" if num_processes() > 1 else ""
    files = f"{made.made} files made now{whose}, {made.found} were there"
    console.print(escape(f"{rows};\n{files}"), soft_wrap=True, highlight=False)


def _fingerprints(images: ImageData) -> list[str | None]:
    """Of both splits: with a file more and one fewer, rows made later would be of other images."""
    return [describe_data(part).get("fingerprint") for part in (images.train, images.validation)]
