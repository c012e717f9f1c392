"""TensorFloat32 and its like: what a series makes of them, what is computed without, however PyTorch is told.

PyTorch's settings for GPUs can be made, and read, without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from viar import Sampling
from viar.determinism import deterministic_convolutions
from viar.generation.series.provenance import why_inexact
from viar.precision import below_float32, full_float32
from viar.tokenizer.quantizer import _full_precision

backends: Any = torch.backends  # not all of it is annotated
OPERATIONS = [(kind, operation) for kind in ("cuda", "cpu") for operation in ("conv", "matmul")]
ON_GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))

# How users tell PyTorch: by the older names, and by the newer ones.
WAYS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul.allow_tf32": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "cudnn.allow_tf32": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "tf32 everywhere": lambda: setattr(backends, "fp32_precision", "tf32"),
    "ieee everywhere": lambda: setattr(backends, "fp32_precision", "ieee"),
    "matmul in tf32": lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "conv in ieee": lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
    "a CPU's matmul in bf16": lambda: setattr(backends.mkldnn.matmul, "fp32_precision", "bf16"),
}
by_way = pytest.mark.parametrize("way", WAYS)


def state() -> list[Any]:
    """What all settings say, by both names; some are errors, where both were used."""
    readings: list[Callable[[], Any]] = [
        lambda: backends.cuda.matmul.allow_tf32,
        lambda: backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: backends.cudnn.rnn.fp32_precision,
        *(lambda at=at: below_float32(*at) for at in OPERATIONS),
    ]
    found = []
    for read in readings:
        try:
            found.append(read())
        except RuntimeError:
            found.append(RuntimeError)
    return found


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    # Before as well: a benchmark that ran in this process has left the settings it measures with.
    _set_defaults()
    before = state()
    yield
    _set_defaults()
    assert state() == before


def _set_defaults() -> None:
    torch.set_float32_matmul_precision("highest")
    for owner in (
        backends,
        backends.cudnn,
        backends.cuda.matmul,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    ):
        owner.fp32_precision = "none"
    for owner in (backends.cudnn.conv, backends.cudnn.rnn):
        owner.fp32_precision = "tf32"
    backends.cudnn.allow_tf32 = True


@by_way
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_operations_are_in_float32_inside_and_as_they_were_afterwards(way: str, kind: str) -> None:
    WAYS[way]()
    before = state()
    with suppress(KeyboardInterrupt), full_float32(kind, "conv", "matmul"):
        assert below_float32(kind, "conv") is below_float32(kind, "matmul") is None
        raise KeyboardInterrupt
    assert state() == before


@by_way
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_while_one_thread_is_inside_another_that_leaves_changes_nothing(way: str, kind: str) -> None:
    WAYS[way]()
    before = state()
    first, second = (full_float32(kind, "conv", "matmul") for _ in range(2))
    with first:
        second.__enter__()
    assert below_float32(kind, "conv") is below_float32(kind, "matmul") is None
    second.__exit__(None, None, None)
    assert state() == before


def low() -> set[tuple[str, str]]:
    return {at for at in OPERATIONS if below_float32(*at) is not None}


@by_way
def test_what_is_said_of_all_operations_afterwards_is_heard(way: str) -> None:
    found = []
    for enters in (False, True):
        for owner in (
            backends.cudnn.conv,
            backends.cuda.matmul,
            backends.mkldnn.conv,
            backends.mkldnn.matmul,
        ):
            owner.fp32_precision = "none"
        WAYS[way]()
        if enters:
            for kind in ("cuda", "cpu"):
                with full_float32(kind, "conv", "matmul"):
                    pass
        backends.fp32_precision = "ieee"
        found.append(low())
        backends.fp32_precision = "none"
    assert found[1] <= found[0]


@by_way
def test_the_quantizer_computes_in_float32_on_a_gpu(way: str) -> None:
    WAYS[way]()
    before = state()
    with _full_precision(ON_GPU):  # type: ignore[arg-type]
        assert below_float32("cuda", "conv") is below_float32("cuda", "matmul") is None
        assert not torch.is_autocast_enabled("cuda")
    assert state() == before


@by_way
def test_a_series_convolves_in_float32_and_multiplies_as_told(way: str) -> None:
    WAYS[way]()
    before = state()
    for kind in ("cuda", "cpu"):
        matmul = below_float32(kind, "matmul")
        with deterministic_convolutions(kind):
            assert below_float32(kind, "conv") is None
            assert below_float32(kind, "matmul") == matmul
        assert state() == before


ON_CUDA = {"high", "medium", "matmul.allow_tf32", "tf32 everywhere", "matmul in tf32"}
ON_CPU = {"high": "high", "medium": "medium", "tf32 everywhere": "high", "a CPU's matmul in bf16": "medium"}


@by_way
def test_products_below_float32_are_a_setting_of_a_series(way: str) -> None:
    WAYS[way]()

    def reason(kind: str) -> str | None:
        module: Any = SimpleNamespace(
            pos_embed=SimpleNamespace(device=torch.device(kind)), parameters=lambda: iter([torch.zeros(1)])
        )
        return why_inexact(module, module, Sampling(), [3, 3])

    assert reason("cuda") == ("float32 matmul precision high" if way in ON_CUDA else None)
    assert reason("cpu") == (f"float32 matmul precision {ON_CPU[way]}" if way in ON_CPU else None)


def test_what_is_no_cpu_and_no_gpu_of_this_kind_is_left_alone() -> None:
    assert below_float32("mps", "conv") is None
    with full_float32("mps", "conv", "matmul"):
        pass
