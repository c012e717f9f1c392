"""viar: fidelity to the published programs, speed, memory, and what its promises are worth.

Parts:
  fidelity    tokens, logits, gradients and images against the numbers of the published programs
  cache       bytes of keys and values, VIAR's against VAR's, by iterations
  speed       sampling against a straightforward implementation of the published program
  depth30     images a second and peak memory of VIAR against VAR, published shape
  digits      one set of keys and values against one an iteration: same images of the trained digits?
  identity    one seed in batches, processes and goes of all kinds: same files?
  inpainting  class of held-out digits whose centre was hidden and made anew
  knob        iterations against images a second, cache and evaluations, trained digits

Each part prints its table; the bars are judged at the end. The exit code does not tell of them: a time
depends on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console

from viar import TransformerConfig

from ...report import Measured, measure_parts, terminal
from . import cache, depth30, digits, fidelity, identity, inpainting, knob, pictures, speed
from .models import Case, Trained, implicit

PARTS = ("fidelity", "cache", "speed", "depth30", "digits", "identity", "inpainting", "knob")
QUICK = {"sides": (1, 2, 3), "codebook_size": 64, "code_channels": 8, "num_classes": 10}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """Where to measure, and the trained models, loaded when a part first asks for them."""

    device: torch.device
    demo: Path
    console: Console

    @cached_property
    def trained(self) -> Trained:
        """Trained by the demo now if they were not before."""
        return Trained.load(self.demo, self.device, self.console)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the suite."""
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that everybody is timed (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where models run, such as cuda (%(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and few images: shows that all runs, no more"
    )
    parser.add_argument(
        "--decode", action="store_true", help="`speed` and `depth30` decode the tokens to images as well"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave compiled models out of `speed`")
    parser.add_argument("--batch", type=int, default=8, help="of `speed` (%(default)s)")
    parser.add_argument("--depth", type=int, default=30, help="of `depth30` (%(default)s)")
    parser.add_argument(
        "--depth-batch", type=int, help="images at a time of `depth30`; default 25 on a GPU, else 1"
    )
    parser.add_argument(
        "--depth-dtype", choices=DTYPES, help="of `depth30`; default bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="trained digits, made if missing (%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks/viar.json"),
        help="where the figures go, and beside them the pictures (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and the bars, write JSON and pictures."""
    console = terminal()
    setting = Setting(torch.device(arguments.device), arguments.demo, console)
    figures = measure_parts(arguments, _MEASURES, setting, console)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2, allow_nan=False, default=str))
    console.print(f"figures: {arguments.out}")
    for picture in pictures.draw(figures["parts"], arguments.out):
        console.print(f"picture: {picture}")


def _fidelity(setting: Setting, arguments: argparse.Namespace) -> Measured:
    row = fidelity.measure(setting.device)
    return row, fidelity.bars(row), fidelity.table(row)


def _cache(setting: Setting, arguments: argparse.Namespace) -> Measured:
    few = {"sides": QUICK["sides"], "counts": (2, 10)} if arguments.quick else {}
    row = cache.measure(setting.device, **few)
    return cache.record(row), cache.bars(row), cache.table(row)


def _speed(setting: Setting, arguments: argparse.Namespace) -> Measured:
    changes = {"width": 32, "num_heads": 2, **QUICK} if arguments.quick else {"width": 384, "num_heads": 6}
    config = TransformerConfig(depth=5, trunk=implicit(2, 2), **changes)
    case = Case.of(config, arguments.batch, 10, real_coder=arguments.decode and not arguments.quick)
    rows = speed.measure(
        case, arguments.rounds, setting.device, decode=arguments.decode, compiled=not arguments.no_compile
    )
    return speed.record(rows), speed.bars(rows), speed.table(rows)


def _depth30(setting: Setting, arguments: argparse.Namespace) -> Measured:
    on_gpu = setting.device.type == "cuda"
    batch = arguments.depth_batch or (25 if on_gpu else 1)
    dtype = DTYPES[arguments.depth_dtype or ("bfloat16" if on_gpu else "float32")]
    changes = {"width": 32, "num_heads": 2, **QUICK} if arguments.quick else {}
    real_coder = arguments.decode and not arguments.quick
    shape = depth30.case(arguments.depth, batch, real_coder=real_coder, **changes)
    rows = depth30.measure(shape, arguments.rounds, setting.device, dtype, decode=arguments.decode)
    return rows, depth30.bars(rows, setting.device), depth30.table(rows)


def _digits(setting: Setting, arguments: argparse.Namespace) -> Measured:
    few = {"per_class": 1, "counts": (1, 3)} if arguments.quick else {}
    rows = digits.measure(setting.trained, **few)
    return digits.record(rows), digits.bars(rows), digits.table(rows)


def _identity(setting: Setting, arguments: argparse.Namespace) -> Measured:
    few = {"num": 40, "batches": (16, 7, 5)} if arguments.quick else {}
    rows = identity.measure(setting.trained.folder, **few)
    return rows, identity.bars(rows), identity.table(rows)


def _inpainting(setting: Setting, arguments: argparse.Namespace) -> Measured:
    row = inpainting.measure(setting.trained, 20 if arguments.quick else None)
    return row, inpainting.bars(row), inpainting.table(row)


def _knob(setting: Setting, arguments: argparse.Namespace) -> Measured:
    few = {"per_class": 1, "settings": knob.FEW} if arguments.quick else {}
    rows = knob.measure(setting.trained, arguments.rounds, **few)
    return rows, [], knob.table(rows)


_MEASURES: dict[str, Callable[[Setting, argparse.Namespace], Measured]] = {
    "fidelity": _fidelity,
    "cache": _cache,
    "speed": _speed,
    "depth30": _depth30,
    "digits": _digits,
    "identity": _identity,
    "inpainting": _inpainting,
    "knob": _knob,
}
