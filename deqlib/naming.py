"""Who asks for a solve, by a name that a reader knows: the layer's in its model, or the cell's."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ._torch import called_modules, without_wrappers

Modules = tuple["weakref.ref[nn.Module]", ...]

# The modules around a layer when it was last called within others. A checkpoint calls the layer again in the
# backward pass, by itself, and an optimiser or a test may too: it is known by the same name then.
_last_around: weakref.WeakKeyDictionary[nn.Module, Modules] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Caller:
    """The cell that is solved, its layer, and the modules that were being called then.

    Names are looked up when they are needed. The modules are held weakly: a graph must not keep a model.

    Attributes:
        cell: of the solve.
        layer: whose cell it is; `None` where `fixed_point` was called.
        layer_class: of the layer, also when that is gone; "" likewise.
        around: the modules being called, the outermost first.
    """

    cell: Callable[..., Any]
    layer: weakref.ref[nn.Module] | None
    layer_class: str
    around: Modules

    @classmethod
    def now(cls, cell: Callable[..., Any], layer: nn.Module | None) -> Caller:
        """Whoever calls this."""
        around = tuple(map(weakref.ref, called_modules(sys._getframe(1))))
        if layer is None:
            return cls(cell, None, "", around)
        known = weakref.ref(layer)
        if around and around[0] is not known:  # Python keeps one such reference to an object
            _last_around[layer] = around
        return cls(cell, known, type(layer).__name__, around)

    @property
    def name(self) -> str:
        """Of the layer, or of a cell that is a module, in its model; "" where it is in none."""
        target = self.layer() if self.layer else self.cell
        if not isinstance(target, nn.Module):
            return ""
        for root in self._roots(target):
            for name, module in root.named_modules():
                if module is target and without_wrappers(name):
                    return without_wrappers(name)
        return ""

    @property
    def kind(self) -> str:
        """What it is: "ImplicitLayer of Cell", "Cell", "cell (train.py:7)"."""
        cell = described(self.cell)
        return f"{self.layer_class} of {cell}" if self.layer_class else cell

    @property
    def label(self) -> str:
        """The name, or what it is where there is none."""
        return self.name or self.kind

    def __str__(self) -> str:
        name = self.name
        if not name:
            return self.kind
        return f"{'layer' if self.layer else 'cell'} {name!r} ({self.kind})"

    def _roots(self, target: nn.Module) -> Iterator[nn.Module]:
        """Models that it may be in, the largest first."""
        for reference in (*self.around, *_last_around.get(target, ())):
            root = reference()
            while isinstance(root, nn.DataParallel | nn.parallel.DistributedDataParallel):
                root = root.module
            if root is not None:
                yield root


def described(cell: Callable[..., Any]) -> str:
    """The class of a module or an object, the name of a function with the line that it begins at."""
    while isinstance(cell, partial):
        cell = cell.func
    function = getattr(cell, "__func__", cell)
    code = getattr(function, "__code__", None)
    if code is None:
        return getattr(function, "__qualname__", type(cell).__name__)
    return f"{function.__qualname__} ({Path(code.co_filename).name}:{code.co_firstlineno})"
