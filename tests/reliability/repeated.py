"""One process that does what others do too, and prints digests of it: what every command writes, and solves.

    python repeated.py FOLDER STEPS

STEPS are those of both trainings.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import deqlib
from deqlib import Anderson, Auto, Broyden, ImplicitDifferentiation, NewtonKrylov, Picard, SharedInverse
from deqlib.solvers import Solver
from viar.commands.parsing import parsed

SMALL = ("--model.width", "64", "--model.depth", "4", "--model.num-heads", "4")
TRAINED = ("--train.batch-size", "16", "--train.validate-every", "0", "--train.sample-every", "0")
PAIR = ("--model", "viar", "--tokenizer", "tokenizer")
# By what is made, in the order in which one needs the other: the command line, and the files of it.
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "viar train-tokenizer": (
        ("train-tokenizer", "digits", "--out", "tokenizer", *TRAINED),
        "tokenizer/model.safetensors",
    ),
    "viar train": (
        ("train", "digits-viar", "--tokenizer", "tokenizer", "--out", "viar", *SMALL, *TRAINED),
        "viar/model.safetensors",
    ),
    "viar generate, 4 pictures of each class": (
        ("generate", *PAIR, "--per-class", "4", "--out", "grid.png"),
        "grid.png",
    ),
    "viar generate --adaptive, 2 pictures of each class": (
        ("generate", *PAIR, "--per-class", "2", "--adaptive", "1e-2", "--out", "adaptive.png"),
        "adaptive.png",
    ),
    "viar generate --num 12": (("generate", *PAIR, "--num", "12", "--out", "series"), "series/*.png"),
    "viar edit --num 4": (
        ("edit", *PAIR, "--image", "grid.png", "--label", "3", "--box", "0", "0", "1", "0.5", "--num", "4"),
        "edited-*.png",
    ),
    "viar tokenize": (
        ("tokenize", "--tokenizer", "tokenizer", "--data", "digits", "--out", "tokens"),
        "tokens/*",
    ),
}
SOLVERS: dict[str, Callable[[], Solver]] = {
    "Picard": Picard,
    "Anderson": Anderson,
    "Broyden": Broyden,
    "NewtonKrylov": NewtonKrylov,
    "Auto": Auto,
}


def digest(*parts: bytes) -> str:
    """Of some bytes, one after another."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def solved(x: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
    """Values (B, D) of a solve, and gradients of their squares with respect to `x`, (B, D)."""
    dim = x.shape[1]
    weight = 0.9 / dim**0.5 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    x = x.clone().requires_grad_()
    backward = SharedInverse() if isinstance(solver, Broyden) else ImplicitDifferentiation()
    solution = deqlib.fixed_point(
        lambda z, x: torch.tanh(z @ weight.T + x),
        torch.zeros_like(x),
        (x,),
        solver=solver,
        backward=backward,
        stopping=deqlib.Stopping(rtol=1e-4),
        on_failure="ignore",
    )
    (gradient,) = torch.autograd.grad(solution.value.square().sum(), x)
    return solution.value.detach(), gradient


def inputs() -> list[Tensor]:
    """Batches of several sizes, always the same."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in ((8, 32), (64, 256), (33, 100))]


def main() -> None:
    """Do all of it, and print the digests as JSON on the last line."""
    os.chdir(sys.argv[1])
    steps, found = sys.argv[2], {}
    for what, (arguments, pattern) in COMMANDS.items():
        trained = ("--train.steps", steps) if arguments[0].startswith("train") else ()
        sys.argv = ["viar", *arguments, *trained, "--deterministic"]
        parsed(arguments[0], sys.argv[2:])()
        files = sorted(Path().glob(pattern))
        assert files, what
        found[what] = digest(*(file.read_bytes() for file in files))
    for name, solver in SOLVERS.items():
        parts = [part for x in inputs() for part in solved(x, solver())]
        found[f"solve by {name}"] = digest(*(part.numpy().tobytes() for part in parts))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
