"""The same bits in every run: arithmetic whose order hangs on no threads, trials or free memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .precision import full_float32

# What cuBLAS reads when it is first used; with another value its sums may differ from run to run.
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
NOT_POSSIBLE = "does not have a deterministic implementation"  # in PyTorch's message
_IN_FORCE: ContextVar[bool] = ContextVar("deterministic", default=False)


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, what is computed has the same bits in every run, whatever the number of threads.

    That holds with one release of PyTorch on one kind of CPU, or of GPU, and among one number of processes:
    sums of several are rounded otherwise. PyTorch chooses deterministic algorithms, float32 is computed as
    float32, and arithmetic on a CPU takes one thread, which is slower. All of it are settings of the process,
    put back in the end but for `CUBLAS_WORKSPACE_CONFIG`, which CUDA has read by then.

    A training, whose settings must have no `seconds` and no `compile` then, keeps in run.json that it was
    begun so. Series of images and tokens on disk are the same without this.

    Raises:
        ValueError: CUDA was started before without `CUBLAS_WORKSPACE_CONFIG`, or with another value; or,
            from inside, a device has no deterministic way to compute something.
    """
    _choose_workspace()
    threads = torch.get_num_threads()
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    told = _IN_FORCE.set(True)
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        exact = full_float32("cuda", "matmul"), full_float32("cpu", "conv", "matmul")
        with deterministic_convolutions("cuda"), exact[0], exact[1]:
            yield
    except RuntimeError as error:
        if NOT_POSSIBLE not in str(error):
            raise
        operation = str(error).split()[0]
        raise ValueError(
            f"deterministic: on this device PyTorch knows no way to compute {operation} that gives the same "
            "bits each time; work on a CPU, or leave it"
        ) from error
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        _IN_FORCE.reset(told)


def is_deterministic() -> bool:
    """Whether this is inside of `deterministic`."""
    return _IN_FORCE.get()


def holds_for() -> str:
    """What `deterministic` holds for here, in a line."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return (
        f"deterministic: the same bits in every run and on any number of threads, with PyTorch "
        f"{torch.__version__} on a CPU of this kind ({cpu}) or a GPU of one kind; not from one kind to "
        "another, nor among another number of processes, nor where the environment has MKL or oneDNN take "
        "other kernels"
    )


@contextmanager
def deterministic_convolutions(device_type: str) -> Iterator[None]:
    """Convolutions computed in float32, and on a GPU by the same algorithm each time.

    PyTorch's default on a GPU is TensorFloat32, and the algorithm may be what a trial finds fastest. The
    settings before are put back at the end.

    Args:
        device_type: that they are computed on.
    """
    wanted = {"benchmark": False, "deterministic": True}
    before = {name: getattr(torch.backends.cudnn, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(torch.backends.cudnn, name, value)
        with full_float32(device_type, "conv"):
            yield
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)


def _choose_workspace() -> None:
    """Have cuBLAS sum in one order, which it is told by the environment before CUDA starts."""
    found = os.environ.get(WORKSPACE)
    if found in WORKSPACES or not torch.cuda.is_available():
        return
    if found is not None or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ValueError(
            f"deterministic: expected {WORKSPACE}={WORKSPACES[0]} in the environment before CUDA starts, got "
            f"{found!r}; set it before this process, or enter before anything is on a GPU"
        )
    os.environ[WORKSPACE] = WORKSPACES[0]
