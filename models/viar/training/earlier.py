"""States of runs that releases up to 0.2.0 left, in the files that Accelerate made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import load
from safetensors.torch import load_file

from ..pickles import check_pickled


def is_earlier(folder: Path) -> bool:
    """Whether a folder has a state of an earlier release."""
    return (folder / "optimizer.bin").is_file()


def read_earlier(folder: Path) -> dict[str, Any]:
    """Such a state as `viar.training.checkpoint` has it: one model, one optimiser, and where the run was."""
    weights: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        # of several processes under the names that DDP gives
        weights |= {name.removeprefix("module."): value for name, value in load_file(path).items()}
    scaler = folder / "scaler.pt"
    return {
        "models": [weights],
        "optimizers": [_load(folder / "optimizer.bin")],
        "scalers": [_load(scaler)] if scaler.is_file() else [],
        "registered": [_load(folder / "custom_checkpoint_0.pkl")],
        "generators": list(_generators(folder)),
    }


def _load(path: Path) -> Any:
    """What a file holds; the states of numpy's generators too, which Accelerate knows of."""
    check_pickled(path)
    return load(path, map_location="cpu", weights_only=True)


def _generators(folder: Path) -> Iterator[dict[str, Any]]:
    """Of each process in turn."""
    rank = 0
    while (path := folder / f"random_states_{rank}.pkl").is_file():
        held = _load(path)
        states = {"cpu": held["torch_manual_seed"]}
        if on_devices := held.get("torch_cuda_manual_seed"):  # of all that a process sees, its own among them
            states["cuda"] = on_devices[rank % len(on_devices)]
        yield states
        rank += 1
