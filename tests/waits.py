"""What makes the host wait for a device: reads of numbers that are counted, and a device that has none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Case = Callable[[str], object]  # of the name of the device that it is to happen on


class Lists(TorchFunctionMode):
    """Counts the tensors that are read as lists, which on a CPU is no operation that is dispatched."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            self.counts["tolist"] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for the device."""

    names = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.lists = Lists(self.counts)

    def __enter__(self) -> Waits:
        self.lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names or (name.startswith("index") and _has_mask(args)):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    """Whether an index is a mask: how many numbers it takes, only the device knows."""
    indices = [index for arg in args if isinstance(arg, list | tuple) for index in arg]
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def replace_everywhere(patch: pytest.MonkeyPatch, function: Any, new: Any) -> None:
    """Put `new` in the place of a function of the libraries, in every module that knows it by its name."""
    name = function.__name__
    modules = [module for key, module in sys.modules.items() if key.startswith(("deqlib.", "viar."))]
    using = [module for module in modules if getattr(module, name, None) is function]
    assert len(using) > 1  # those that import it by name, besides its own
    for module in using:
        patch.setattr(module, name, new)


def look_at_nothing(patch: pytest.MonkeyPatch) -> None:
    """As on a device: reading a number costs, so nothing must be read that need not be."""
    from deqlib.solvers.base import can_look

    replace_everywhere(patch, can_look, lambda z: False)


class Copies(TorchDispatchMode):
    """Notes copies between the host and a device for which the host waits.

    From the device it always does. To the device it does not where the copy is asked for with
    `non_blocking`: few numbers of ordinary memory are put aside before the call returns.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], result)
            waits = not (kwargs or {}).get("non_blocking", False)
            if self._is_on(source) != self._is_on(target) and (self._is_on(source) or waits):
                self.found.append(f"{name} {source.device} to {target.device} {tuple(source.shape)}")
        elif name.startswith("index") and self._is_on(args[0]):
            indices = [index for arg in args[1:] if isinstance(arg, list | tuple) for index in arg]
            if any(isinstance(index, Tensor) and not self._is_on(index) for index in indices):
                self.found.append(f"{name} by numbers of the host")
        return result

    def _is_on(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device


STAND_IN = "stand_in"
without_numbers = pytest.mark.parametrize(
    "device",
    [
        STAND_IN,
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.backends.cuda.is_built(), reason="PyTorch for CPUs does not index fake CUDA tensors"
            ),
        ),
    ],
)


@contextmanager
def device_without_numbers(device: str) -> Iterator[Copies]:
    """A device on which tensors have shapes alone: any read of a number raises. It need not be there.

    Args:
        device: "cuda", or `STAND_IN`, which is made up for this process, and which it then has for good.

    Yields:
        The copies for which the host would wait.
    """
    if device == STAND_IN:
        _make_device(device)
    with FakeTensorMode(), Copies(device) as copies:
        yield copies


def runs_backward(device: str) -> bool:
    """Whether backward passes run there: autograd asks for a GPU, of fake tensors too."""
    return device != "cuda" or torch.cuda.is_available()


def waiting_on(device: str, cases: ModuleType) -> dict[str, str]:
    """What `CASES` of a module wait for on a device without numbers, found out by a program of its own."""
    assert cases.__file__ is not None
    file, program = Path(cases.__file__), Path(__file__).with_name("no_numbers.py")
    arguments = [sys.executable, program, device, file.stem, file.parent]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _make_device(name: str) -> str:
    from torch.utils.backend_registration import (  # private, and used in tests alone
        _DummyBackendModule,
        _setup_privateuseone_for_python_backend,
    )

    class Module(_DummyBackendModule):
        def is_available(self) -> bool:
            return False  # as a GPU that is not there: fake tensors then touch no device

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    _setup_privateuseone_for_python_backend(name, backend_module=Module())
    return name
