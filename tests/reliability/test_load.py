"""The web page under load: pictures are made and changed by several clients at a time, for long."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from statistics import quantiles

import psutil
import pytest
from PIL import Image
from steadiness import Memory, told

pytest.importorskip("gradio", reason="the web page needs gradio")
gradio_client = pytest.importorskip("gradio_client", reason="the web page needs gradio")

NUM_CLIENTS = 4
PAUSE = 0.25  # seconds, on average, that a client looks at a picture before it asks for another
NUM_SCALES, SIDE = 6, 32  # of the model that comes with the package
NUM_SEEDS = 40  # so that much is asked for several times
EVERY = 2.0  # seconds between two looks at the memory
# Threads take turns at computing: what the C library keeps for each, and gives back at its own time, would
# come and go by a tenth of the memory.
ALLOCATION = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
WARM = 1 / 3  # share of the time, at its beginning, in which caches fill and memory is not looked at


def half_kept() -> str:
    """A mask that keeps the upper half, as the page takes it."""
    mask, file = Image.new("L", (SIDE, SIDE), 255), BytesIO()
    mask.paste(0, (0, SIDE // 2, SIDE, SIDE))
    mask.save(file, "png")
    return b64encode(file.getvalue()).decode()


MASK = half_kept()


@dataclass
class Asked:
    """What clients asked for, and what came of it.

    Attributes:
        seconds: that each answer took.
        errors: what went wrong, in words.
        answers: pictures, by what was asked for.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def take(self, question: str, picture: str, seconds: float) -> None:
        """Note an answer; another one to the same question is an error."""
        with self._one_at_a_time:
            self.seconds.append(seconds)
            if self.answers.setdefault(question, picture) != picture:
                self.errors.append(f"another picture of {question[:200]}")


@contextmanager
def served() -> Iterator[tuple[str, psutil.Process]]:
    """The page of the model that comes with the package, and its process, which SIGTERM ends as promised."""
    command = [sys.executable, "-m", "viar", "app", "--device", "cpu"]
    environment = os.environ | ALLOCATION
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            lines = iter(server.stdout.readline, "")
            address = next(found[0] for line in lines if (found := re.search(r"http://127[.\d]+:\d+", line)))
            yield address, psutil.Process(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    assert code == 128 + signal.SIGTERM


def keep_asking(address: str, index: int, until: float, asked: Asked) -> None:
    """One client: two pictures in three are new, one is the last one with its lower half made anew."""
    draw = random.Random(index)
    client = gradio_client.Client(address, verbose=False)
    picture = ""
    try:
        while time.monotonic() < until:
            iterations = draw.choice([None, [1] * NUM_SCALES, [4] * NUM_SCALES])
            settings = (draw.randrange(10), draw.randrange(NUM_SEEDS), 1.5, iterations)
            is_edit = picture and draw.random() < 1 / 3
            name, sent = ("in_paint", (picture, MASK, *settings)) if is_edit else ("generate", settings)
            start = time.monotonic()
            picture = client.predict(*sent, api_name=f"/{name}")["picture"]
            asked.take(f"{name} {sent}", picture, time.monotonic() - start)
            time.sleep(draw.expovariate(1 / PAUSE))
    except Exception as error:  # whatever it is, it is what this looks for
        asked.errors.append(f"{type(error).__name__}: {error}")
    finally:
        client.close()


@pytest.mark.filterwarnings("ignore")  # of what the client is made of
def test_a_page_that_several_clients_ask_answers_all_of_them_and_does_not_grow(
    times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    seconds, asked = times(5, 1800), Asked()
    with served() as (address, process), ThreadPoolExecutor(NUM_CLIENTS) as clients:
        begun, memory = time.monotonic(), Memory(process)
        for index in range(NUM_CLIENTS):
            clients.submit(keep_asking, address, index, begun + seconds, asked)
        time.sleep(WARM * seconds)
        while time.monotonic() < begun + seconds:
            memory.look(objects=False)
            time.sleep(min(EVERY, seconds / 10))
    gc.collect()  # clients leave event loops open, which is no fault of a later test
    percentiles = quantiles(asked.seconds, n=100)
    milliseconds = {f"p{share}": round(1000 * percentiles[share - 1]) for share in (50, 95, 99)}
    print(f"{len(asked.seconds)} requests, {milliseconds} ms, {memory.sizes} bytes")  # if what follows fails
    assert not asked.errors, asked.errors[:3]
    growth = memory.growth(times(15, 2) / 100)
    tally(
        "load",
        f"{NUM_CLIENTS} clients for {seconds / 60:.2g} minutes: two pictures in three generated, one edited",
        requests=len(asked.seconds),
        errors=len(asked.errors),
        growth=told(growth),
        **milliseconds,
    )
