"""Calls with bad arguments, each watched: what came of it, and whether anybody could tell from it what to do.

A call runs in a fork, so that one that ends the interpreter or never ends is counted like any other.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import bad_values
import torch
from forks import AT_A_TIME, Counted, Hung, Outcome, counted_in_forks, limit
from torch import Tensor

import deqlib
import viar
from viar.memory import is_shortage

SECONDS = 5  # of a processor that a call may take
PACKAGES = tuple(str(Path(package.__file__).parent) for package in (deqlib, viar))
OWN_WARNINGS = ("deqlib", "viar")
# What Python says where a callable of the caller's takes other arguments.
BINDING = re.compile(r"(Cell\.forward|cell|head|squares|_with_step|\S*<lambda>)\(\) (got|takes|missing) ")
# What it says of an argument that there is not, behind a decorator or in a dictionary.
NO_SUCH = re.compile(
    r".* (unexpected keyword argument '(no_such_argument|odd)'|missing 1 required .*argument)"
)


@dataclass(frozen=True)
class Target:
    """Something public that can be called.

    Attributes:
        name: as users write it.
        call: called with what is given, by name.
        given: makes valid arguments anew.
        work: names of those that are an amount of work, where a huge number is no mistake.
        share: how often it is drawn, relative to others.
    """

    name: str
    call: Callable[..., Any]
    given: Callable[[], dict[str, Any]]
    work: tuple[str, ...] = ()
    share: float = 1.0


def drawn(targets: Sequence[Target], number: int) -> tuple[Target, dict[str, Any], list[str]]:
    """The call of a number, the same for the same number: target, arguments, names of those that are odd."""
    random = Random(number)
    target = random.choices(targets, [target.share for target in targets])[0]
    torch.manual_seed(number)
    given = target.given()
    names = list(given)
    changed = random.sample(names, min(len(names), random.choice([1, 1, 2])))
    for name in changed:
        given[name] = bad_values.spoilt(given[name], random, is_work=name in target.work)
    extra = random.random()
    if extra < 0.01:
        given["no_such_argument"] = 1
        changed.append("no_such_argument")
    elif extra < 0.02 and names:
        left_out = random.choice(names)
        del given[left_out]
        changed.append(f"without {left_out}")
    return target, given, changed


def watched(target: Target, given: dict[str, Any], changed: Sequence[str]) -> Outcome:
    """What comes of a call."""
    odd = ", ".join(f"{name}={_shown(given[name])}" if name in given else name for name in changed)
    limit(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = target.call(**given)
    except Hung:
        where = "".join(traceback.format_tb(sys.exc_info()[2])[-1:])
        return Outcome("hung", target.name, " ".join(where.split()), odd)
    except bad_values.Own:
        return Outcome("refused", target.name, "the caller's own error", odd)
    except Exception as error:
        wrong = unclear(error)
        told = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return Outcome("undocumented" if wrong else "refused", target.name, f"{wrong}{told}", odd)
    finally:
        limit(0)
    wrong = unsound(result) or foreign([warning.message for warning in caught])
    return Outcome("undocumented" if wrong else "taken", target.name, wrong, odd)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor({value.dtype}, {tuple(value.shape)}, {value.device}, {value.layout})"
    try:
        return " ".join(repr(value).split())[:120]
    except Exception:
        return type(value).__name__


def unclear(error: Exception) -> str:
    """What is wrong with an error; nothing where the package, or code of the caller, raised it as it is."""
    if is_shortage(error) or "Storage size calculation overflowed" in str(error):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.filename.startswith(PACKAGES) for frame in frames]
    if not any(inside):  # Python itself, which found that the arguments are not those of the signature
        return "" if isinstance(error, TypeError) and "argument" in str(error) else "outside: "
    ours = frames[len(inside) - 1 - inside[::-1].index(True)]
    if any("tests/" in frame.filename for frame in frames[frames.index(ours) + 1 :]):
        return ""  # a cell, a head or a loss of the caller's, which failed by itself
    if ours.name == "evaluate":
        return ""  # what calls the cell: one that is no Python has no frame of its own
    if ours.name == "from_dict" and "unexpected keyword argument" in str(error):
        return ""  # documented so: it names what is no field
    if (
        BINDING.match(str(error))
        or NO_SUCH.match(str(error))
        or (isinstance(error, OSError) and error.filename)
    ):
        return ""
    if frames[-1] is not ours or ours.lineno not in raising_lines(ours.filename):
        return f"{Path(ours.filename).name}:{ours.name}: "
    if not isinstance(error, TypeError | ValueError | NotImplementedError | OSError | RuntimeError):
        return f"{Path(ours.filename).name}:{ours.name}: "
    return "" if len(str(error)) > 12 else "says too little: "


@cache
def raising_lines(path: str) -> frozenset[int]:
    """Lines of a file that are part of a `raise`."""
    found = (node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Raise))
    return frozenset(line for node in found for line in range(node.lineno, (node.end_lineno or 0) + 1))


def unsound(result: Any) -> str:
    """What is wrong with a result; nothing where it is what a caller can rely on."""
    if isinstance(result, deqlib.Solution):
        leaves = torch.utils._pytree.tree_leaves(result.value)
        for leaf in leaves:
            if leaf.device.type != "meta" and result.status.numel():
                finite = leaf.isfinite().reshape(len(leaf), -1).all(1)
                if (~finite & (result.status == deqlib.Status.CONVERGED)).any():
                    return "a sample that is no number is told as converged"
    settings = getattr(result, "__dict__", {}) if not isinstance(result, torch.nn.Module) else {}
    for name, value in settings.items():
        if isinstance(value, float) and value != value and name not in ("residual", "seconds"):
            return f"a setting that is no number was taken: {name}"
    return ""


def foreign(caught: Sequence[Warning | str]) -> str:
    """The first warning that is none of the packages', as one line."""
    for warning in caught:
        if isinstance(warning, DeprecationWarning | FutureWarning):
            continue  # what PyTorch says of itself
        if not type(warning).__module__.startswith(OWN_WARNINGS) and not _is_own(str(warning)):
            return f"warns {type(warning).__name__}: {str(warning)[:200]}"
    return ""


def _is_own(text: str) -> bool:
    return text.startswith(("deqlib", "viar", "ImplicitLayer", "fixed_point"))


def count_calls(module: str, numbers: range, processes: int) -> Counted:
    """What comes of the calls of these numbers of the targets of a module, in processes of their own.

    A process that has gone back through a graph must not be forked: these are new, and go through none.
    """
    step = max(1, min(10 * AT_A_TIME, -(-len(numbers) // processes)))
    parts = [numbers[start : start + step] for start in range(0, len(numbers), step)]
    counted = Counted()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for part in pool.map(_calls_of, [module] * len(parts), parts, [tempfile.gettempdir()] * len(parts)):
            counted.kinds += part.kinds
            counted.told = {**part.told, **counted.told}
    return counted


def _calls_of(module: str, numbers: range, folder: str) -> Counted:
    tempfile.tempdir = folder
    torch.set_num_threads(1)
    targets = import_module(module).TARGETS
    with torch.no_grad():  # what is imported late would be so in every fork
        for target in targets:
            if target.name in ("viar.generate", "viar.load_official", "viar.Tokenizer.from_pretrained"):
                target.call(**target.given())
    return run_calls(targets, numbers)


def run_calls(targets: Sequence[Target], numbers: range) -> Counted:
    """What comes of the calls of these numbers, each in a forked process with others."""
    return counted_in_forks(lambda number: watched(*drawn(targets, number)), numbers, SECONDS)
