"""Two processes that make series together; `test_series.py` starts this as a program of its own.

It forks, which saves loading everything twice. Arguments: folder, port, number of images, and "slow" (one
series, slowly enough to be killed in the middle) or "fails" (a series, and one in which the second process
raises). It ends with the sum of 10 for the first process and 1 for the second, if they end with an error.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import tiny_tokenizer, tiny_transformer

import viar.generation.series.series
from viar.generation.series.series import generate_series

WORLD, BATCH = 2, 4


def work(rank: int, folder: Path, port: str, num: int, manner: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    models, sample, sampled = (
        (tiny_transformer(), tiny_tokenizer()),
        viar.generation.series.series.sample_tokens,
        [0],
    )

    def noted(model: Any, tokenizer: Any, labels: Any, **settings: Any) -> Any:
        if manner == "slow":
            time.sleep(0.2)
        sampled[0] += len(labels) if len(labels) > 1 else 0  # one alone is done for the second time
        return sample(model, tokenizer, labels, **settings)

    def failing(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("this process fails")

    viar.generation.series.series.sample_tokens = noted
    if manner == "slow":
        generate_series(*models, folder, num, batch_size=BATCH)
        return
    report = generate_series(*models, folder / "whole", num, batch_size=BATCH)
    counts = [0] * WORLD
    dist.all_gather_object(counts, sampled[0])
    # One write, so that the two do not mix their lines.
    os.write(1, f"{json.dumps({'made': report.made, 'images_of': counts})}\n".encode())
    if rank == 1:
        viar.generation.series.series.sample_tokens = failing
    generate_series(*models, folder / "broken", num, batch_size=BATCH)


def main(*arguments: Any) -> int:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(10 ** (1 - rank) for rank, process in enumerate(processes) if process.exitcode)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]))
