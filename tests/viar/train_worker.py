"""Two processes that train together; `test_train.py` starts this with a folder to write to and a port.

It is a program of its own because it forks, which saves loading everything twice and must happen before
any gradient is computed.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_train import interrupt, run_measured, run_tokenizer, run_transformer, run_without_dropout, settings

import viar.training.samples

WORLD = 2


def train(rank: int, folder: Path, port: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    if rank:
        viar.training.samples.generate = None  # called, it would end the process
    models = {
        "transformer": run_without_dropout(folder / "transformer", settings()),
        # Only the main process thinks that it is time to save: all must, or it waits for ever.
        "saving": run_transformer(folder / "saving", settings(save_every=1e9 if rank else 1e-9)),
        "parts": run_without_dropout(folder / "parts", settings(accumulate=2)),
        "pictures": run_without_dropout(folder / "pictures", settings(sample_every=2)),
        "tokenizer": run_tokenizer(folder / "tokenizer", settings(steps=4)),
    }
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.{rank}.pt")
    run_tokenizer(folder / "tokenizer without dropout", settings(steps=4), dropout=0.0)
    # Saved by the main process alone, to a folder that no other one sees.
    own = folder if rank == 0 else folder / "elsewhere"
    for sharding in ("none", "full"):
        how = settings(steps=6, sharding=sharding, save_every=1e-9, sample_every=2)
        run_without_dropout(own / sharding / "plain", how)
        run_measured(own / sharding / "measured", how)
        run_transformer(own / sharding / "whole", how)
        interrupt(own / sharding / "parts", how, run_transformer)
        run_transformer(own / sharding / "parts", how)
        interrupt(own / sharding / "for one", how, run_without_dropout)
        # What one process left, which is in the main one's folder alone.
        run_without_dropout(own / sharding / "of one", how)
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path, port: str) -> int:
    gc.freeze()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(rank, folder, port)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
