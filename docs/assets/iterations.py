"""Digits of the shipped VIAR by more and more iterations per scale: the picture of the README.

    python docs/assets/iterations.py

The same seed for all, so that a column differs by its iterations alone.
"""

import sys
from pathlib import Path

import torch

import viar
from viar.data import save_grid

ITERATIONS = (1, 2, 4, 8)


def main(path: Path) -> None:
    """Write the picture, a row a count of iterations, a column a class."""
    model, tokenizer = viar.load_shipped()
    labels = list(range(model.config.num_classes))
    rows = [viar.generate(model, tokenizer, labels, iterations=count, seed=0) for count in ITERATIONS]
    names = [str(count) for count in ITERATIONS]
    save_grid(torch.cat(rows), path, columns=len(labels), row_names=names)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_suffix(".png"))
