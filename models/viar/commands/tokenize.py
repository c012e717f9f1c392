"""`viar tokenize`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..data.decoding import shown
from ..data.shards import write_shards
from ..files import check_writable
from ..tokenizer import Tokenizer
from .checks import check_beside_data
from .loading import find_device, load_images, load_model


def tokenize_command(
    tokenizer: str,
    data: str,
    out: Path,
    crops: int = 1,
    augment: int = 0,
    seed: int = 0,
    shard_size: int = 8192,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Write the tokens of a data set into a folder, for viar train --data FOLDER.

    Training from tokens spares reading pictures and the tokenizer's encoder in every epoch. The same command
    goes on where it was stopped, and gives the same files.

    Args:
        tokenizer: Folder, hub id or published checkpoint of the tokenizer.
        data: Source of images: digits, mnist, or a folder with a sub-folder a class.
        out: Folder of the tokens.
        crops: Of a folder of pictures: squares cut at random out of each training picture.
        augment: Of digits and mnist: changed versions added of each training image.
        seed: Of the crops.
        shard_size: Images in a file.
        batch_size: Images encoded at a time.
        device: cpu, cuda, or cuda:1; auto is cuda where there is one.
    """
    console = Console()
    check_writable(out, "--out", folder=True)
    check_beside_data(out, data)
    where = find_device(device)
    codec = load_model(Tokenizer, tokenizer, "--tokenizer").to(where)
    images = load_images(data, codec.config.image_side, console, augment=augment)
    report = write_shards(
        codec,
        images,
        out,
        origin={"data": data, "augment": augment},
        crops=crops,
        seed=seed,
        shard_size=shard_size,
        batch_size=batch_size,
        console=console,
    )
    train, validation = report.rows
    rows = f"{train} rows of tokens to train on and {validation} held out in {shown(out)}"
    files = f"{report.made} files made now, {report.found} were there"
    console.print(escape(f"{rows};\n{files}"), soft_wrap=True, highlight=False)
