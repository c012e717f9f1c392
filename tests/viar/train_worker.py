"""Two processes that train together; `test_train.py` starts this with a folder to write to and a port.

It is a program of its own because it forks, which saves loading everything twice and must happen before
any gradient is computed.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_train import (
    fresh_transformer,
    interrupt,
    pictures,
    run_against,
    run_averaged,
    run_tokenizer,
    run_transformer,
    run_without_dropout,
    settings,
)
from tiny_models import tiny_tokenizer
from torch import Tensor

import viar.training.losses
import viar.training.samples
from viar import NextScaleTransformer
from viar.training import cross_entropy, train_transformer

WORLD = 2


def run_measured(folder: Path, rank: int) -> NextScaleTransformer:
    """Averaged and measured, with a loss in the second step that is not finite in one of the processes."""
    calls: list[int] = []

    def broken(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(calls) + 1)
        return cross_entropy(logits, targets) * (math.nan if rank and calls[-1] == 2 else 1)

    viar.training.losses.cross_entropy = broken
    model = fresh_transformer(label_dropout=0.0, drop_path=0.0)
    config = settings(steps=5, ema=0.5, validate_every=2)
    result = train_transformer(model, tiny_tokenizer(), pictures(), folder, config, held_out=pictures(9))
    folder.with_name(f"measured.{rank}.json").write_text(json.dumps(result))
    return model


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
        "measured": run_measured(folder / "measured", rank),
        "adversarial": run_against(folder / "adversarial", settings()),
    }
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.{rank}.pt")
    run_tokenizer(folder / "tokenizer without dropout", settings(steps=4), dropout=0.0)
    # Saved by the main process alone, to a folder that no other one sees.
    own = folder if rank == 0 else folder / "elsewhere"
    for sharding in ("none", "full"):
        how = settings(steps=6, sharding=sharding, save_every=1e-9, sample_every=2)
        run_without_dropout(own / sharding / "plain", how)
        run_averaged(own / sharding / "averaged", how)
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
