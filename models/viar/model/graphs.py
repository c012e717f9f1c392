"""Work of a model captured as CUDA graphs: given to the device kernel by kernel once, replayed as a whole.

A capture fixes every address, size and number that the host decides; what the device computes may change:
inputs, which are copied to where the capture read them, and weights, which are read where they lie.

All captures share one pool of memory, so that what one needs on the way another may use too. This is right
because pieces of work never overlap: one lock, one after the other on the device, results copied out of the
pool before the next one begins. Within one piece, the graphs are replayed in the order they were captured in.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

MOST_CAPTURES = 16  # held at a time; then the one that was not used for longest goes

Addresses = tuple[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], ...]


# A piece of work, from its inputs. What it does up to a yield is one step, captured by itself; a step reads
# inputs, weights, and what steps before it left. What it yields last is the result: tensors, and whatever the
# host knows.
Work = Callable[..., Iterator[tuple[Any, ...]]]


class Replayable(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Let the device do it again."""


@dataclass(frozen=True, eq=False)
class Capture:
    """A piece of work that can be replayed."""

    inputs: tuple[Tensor, ...]
    steps: list[Replayable]
    results: tuple[Any, ...]


class Device:
    """All that is asked of CUDA for graphs: a pool, captures, an order between streams.

    Args:
        device: of the type "cuda".
    """

    _one_at_a_time = threading.Lock()  # captures of one process

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            # Captures share memory only on one stream, and the one that PyTorch would take is of whatever
            # device was current when it took it first.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, the device is the current one, and begins what it is asked for after the turn before."""
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(torch.cuda.current_stream())

    def capture(self, step: Callable[[], tuple[Any, ...]]) -> tuple[Replayable, tuple[Any, ...]]:
        """The kernels of `step`, which do not run, and what it returns.

        Raises:
            RuntimeError: CUDA cannot capture it.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # A failure leaves PyTorch's context on its stream; the outer one puts the caller's back.
            # Other threads may go on: one that asks for memory would be an error in the default mode.
            with (
                self._one_at_a_time,
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                results = step()
        except RuntimeError as error:
            error.add_note(
                "This was while a CUDA graph was captured; prepare_inference(..., graphs=False) does without."
            )
            raise
        return graph, results

    def wait(self) -> None:
        """Until the device is done with the last turn."""
        self._done.synchronize()

    @property
    def num_bytes(self) -> int:
        """Bytes of the device's memory in the pool."""
        return sum(part["total_size"] for part in torch.cuda.memory_snapshot(self._pool))  # type: ignore[no-untyped-call]


class Graphs:
    """CUDA graphs of one model: none until there is work, none in a copy or a pickle of the model.

    Threads may share it: their work is done in turns.
    """

    def __init__(self) -> None:
        self._captures: dict[Hashable, Capture] = {}  # the last used one at the end
        self._places: Addresses = ()
        self._device: Device | None = None
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def __deepcopy__(self, memo: object) -> Graphs:
        """Without graphs: they read the weights that they were captured with, not those of a copy."""
        return Graphs()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        """Without graphs, see `__deepcopy__`."""
        return Graphs, ()

    def __repr__(self) -> str:
        """How many, and how large."""
        return f"Graphs(num_captures={self.num_captures}, num_bytes={self.num_bytes})"

    @property
    def num_captures(self) -> int:
        """Pieces of work that can be replayed."""
        return len(self._captures)

    @property
    def num_bytes(self) -> int:
        """Bytes of the device's memory in their pool. What the driver holds for the graphs is not counted."""
        device = self._device  # another thread may drop it
        return 0 if device is None else device.num_bytes

    def run(
        self, key: Hashable, weights: Iterable[Tensor], inputs: tuple[Tensor, ...], work: Work
    ) -> tuple[Any, ...]:
        """The result of a piece of work; its tensors are copies that are the caller's.

        Args:
            key: all that the host decides: sizes, settings, where to read what is neither input nor weight.
            weights: tensors of any shape that every piece of work may read. They may change in place. If one
                was replaced since the last call, no capture is right any more, and all are dropped.
            inputs: of any shapes, on one device.
            work: done three times where `key` is new, to warm up, to be captured, and in the replay.

        Raises:
            RuntimeError: CUDA cannot capture a step.
        """
        # What is kept has to outlive a caller's inference mode, and turning that off turns gradients on.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            places = addresses(weights)
            if places != self._places:
                self._release()
                self._places = places
            device = self._device = self._device or Device(inputs[0].device)
            with device.turn():
                capture = self._captures.pop(key, None) or self._capture(device, inputs, work)
                self._captures[key] = capture
                for kept, given in zip(capture.inputs, inputs, strict=True):
                    kept.copy_(given)
                for step in capture.steps:
                    step.replay()
                results = tuple(
                    value.clone() if isinstance(value, Tensor) else value for value in capture.results
                )
            if len(self._captures) > MOST_CAPTURES:
                device.wait()  # what is replayed must not go
                del self._captures[next(iter(self._captures))]
            return results

    def release(self) -> None:
        """Drop all captures. PyTorch keeps their memory until it is short of it, or `empty_cache()`."""
        with self._lock:
            self._release()

    def tell(self, reason: str) -> None:
        """Say once, by the logger `viar`, why something runs without graphs."""
        if reason not in self._told:
            self._told.add(reason)
            logging.getLogger("viar").warning("CUDA graphs: %s; running without them", reason)

    def _capture(self, device: Device, inputs: tuple[Tensor, ...], work: Work) -> Capture:
        try:
            return _captured(device, inputs, work)
        except BaseException:
            self._release()  # a pool that a capture failed in takes no other
            raise

    def _release(self) -> None:
        if self._device is not None:
            self._device.wait()
        self._captures.clear()
        self._device = None


def _captured(device: Device, inputs: tuple[Tensor, ...], work: Work) -> Capture:
    kept = tuple(given.clone() for given in inputs)
    # Kernels are loaded and chosen, and handles of libraries made, at their first use: not in a capture. That
    # is a matter of the thread, so the caller's stream will do. The stream of captures would not: workspaces
    # are a stream's, graphs write to them, and they are to come from the pool.
    num_steps = sum(1 for _ in work(*kept))
    steps: list[Replayable] = []
    running, results = work(*kept), ()
    for _ in range(num_steps):
        step, results = device.capture(partial(next, running))
        steps.append(step)
    # The rest of what the work holds goes with it: its place in the pool is free for the next capture.
    return Capture(kept, steps, results)


def addresses(tensors: Iterable[Tensor]) -> Addresses:
    """Where tensors lie, and what a kernel takes the memory there for."""
    return tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)
