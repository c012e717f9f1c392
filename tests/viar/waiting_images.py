"""What viar does without waiting for the device, each on the device that it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from tiny_models import IMPLICIT, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor, nn
from waits import Case, look_at_nothing, replace_everywhere, runs_backward

from deqlib import StochasticJFB
from viar import NextScaleTransformer, Tokenizer, generate
from viar.model.execution import fails_on_device
from viar.training.losses import StepLoss, tokenizer_loss, transformer_loss
from viar.training.optim import build_optimizer
from viar.training.train import _tokenized


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Have the libraries take the device of a case for a GPU, and let alone what reads the host's numbers."""
    look_at_nothing(patch)
    replace_everywhere(patch, fails_on_device, lambda index: True)
    patch.setattr(StochasticJFB, "_draw", lambda self, bounds: bounds[1])


@cache
def pair(
    device: str, kind: str, *, low: bool = False, **changes: Any
) -> tuple[NextScaleTransformer, Tokenizer]:
    """In evaluation mode, in bfloat16 where `low`."""
    with torch.device(device), pytest.MonkeyPatch.context() as patch:
        # It reads numbers, and tiny models are drawn once more.
        patch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
        model, tokenizer = tiny_transformer(kind, **changes), tiny_tokenizer()
        return (narrowed(model), narrowed(tokenizer)) if low else (model, tokenizer)


def generation(
    device: str,
    kind: str,
    labels: Callable[[str], Any] = lambda _: [0, 3],
    *,
    low: bool = False,
    **settings: Any,
) -> None:
    generate(*pair(device, kind, low=low), labels(device), seed=5, first_index=7, **settings)


def narrowed(module: Any) -> Any:
    """A copy in bfloat16; modules cannot be moved to another type where there are no numbers."""
    again = type(module)(module.config)
    for name, owner in again.named_modules():
        source = module.get_submodule(name)
        for key, parameter in source.named_parameters(recurse=False):
            setattr(owner, key, nn.Parameter(parameter.detach().bfloat16()))
        for key, buffer in source.named_buffers(recurse=False):
            setattr(owner, key, buffer)
    return again.eval()


def all_scales_at_once(device: str) -> None:
    model, tokenizer = pair(device, "implicit")
    tokens = [torch.zeros(2, side * side, dtype=torch.int64, device=device) for side in (1, 2, 3)]
    with torch.no_grad():
        model(torch.zeros(2, dtype=torch.int64, device=device), tokenizer.next_scale_inputs(tokens), 3)
    tokenizer.decode(tokens)


def step(model: nn.Module, step_loss: StepLoss, batch: list[Tensor], number: int = 0) -> None:
    """A step of training but the optimiser's own."""
    model.train()
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    loss, _ = step_loss(model, batch, number)
    if runs_backward(batch[0].device.type):
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    optimizer.zero_grad(set_to_none=True)


def training(device: str, kind: str, *, rows: bool = False, **changes: Any) -> None:
    model, tokenizer = pair(device, kind, drop_path=0.2, label_dropout=0.5, **changes)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    if rows:
        batch = torch.zeros(4, 14, dtype=torch.int64, device=device)
    else:
        batch = uniform(4, 3, 6, 6).to(device, non_blocking=True)
    step(model, transformer_loss(partial(_tokenized, tokenizer), seed=0), [batch, labels])
    model.eval()


def training_under_autocast(device: str, kind: str) -> None:
    if device == "stand_in":
        pytest.skip("autocast knows no device that is made up")
    with torch.autocast(device, torch.bfloat16):
        training(device, kind)


def training_of_the_tokenizer(device: str) -> None:
    tokenizer = pair(device, "explicit")[1]
    step_loss = tokenizer_loss(tokenizer, kind="l1+edges", revive_every=2, init_codebook=True, seed=0)
    for number in range(2):  # the codebook is begun, then codes are revived
        step(tokenizer, step_loss, [uniform(4, 3, 6, 6).to(device, non_blocking=True)], number)
    tokenizer.eval()


IMPLICIT_GENERATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a schedule, a warm start, reused guidance": {
        "iterations": (4, 2),
        "warm_start": True,
        "guidance_reuse": 1,
    },
    "a cache of iterates, mixtures": {"iterations": (4, 2), "cache": "iterate", "more_smooth": True},
    "one evaluation, no guidance, the most likely token": {"iterations": 1, "cfg": 0.0, "top_k": 1},
    "few tokens, in bfloat16": {"top_k": 3, "top_p": 0.5, "low": True},
}
CASES: dict[str, Case] = {
    **{
        f"generate: {name}": partial(generation, kind="implicit", **settings)
        for name, settings in IMPLICIT_GENERATIONS.items()
    },
    "generate, explicit: labels on the device, all tokens, reused guidance": partial(
        generation,
        kind="explicit",
        labels=lambda device: torch.zeros(2, dtype=torch.int64, device=device),
        top_k=None,
        top_p=None,
        guidance_reuse=1,
    ),
    "all scales at once": all_scales_at_once,
    "train, explicit: images": partial(training, kind="explicit"),
    "train: images": partial(training, kind="implicit"),
    "train: images, under autocast": partial(training_under_autocast, kind="implicit"),
    "train: rows, with a penalty": partial(
        training, kind="implicit", rows=True, trunk=replace(IMPLICIT, residual_weight=0.1)
    ),
    "train the tokenizer": training_of_the_tokenizer,
}
