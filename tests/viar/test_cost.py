"""What sampling and training cost: bytes of a training step, seconds of tasks in turns."""

from __future__ import annotations

import torch
from tiny_models import tiny_transformer
from torch import nn

from viar import ImplicitTrunkConfig
from viar.evaluation import seconds_of, training_bytes


def test_training_bytes_of_a_linear_model_are_those_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(10, 8)
    parameters = 8 * 16 + 16 * 4
    # weights, gradients, two moments; kept for the backward pass: the input of each linear layer, of
    # which the second is also what ReLU keeps
    expected = 4 * (4 * parameters + 10 * 8 + 10 * 16)
    assert training_bytes(model, lambda: model(x).sum()) == expected


def test_what_is_kept_twice_is_counted_once() -> None:
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(10, 8)
    assert training_bytes(model, lambda: (model(x) + model(x[:5].repeat(2, 1))).sum()) == 4 * (
        4 * 64 + 2 * 10 * 8
    )
    assert training_bytes(model, lambda: (model(x) + model(x)).sum()) == 4 * (4 * 64 + 10 * 8)


def test_training_bytes_count_the_size_of_numbers() -> None:
    model = nn.Linear(8, 8, bias=False).double()
    assert training_bytes(model, lambda: model(torch.randn(3, 8).double()).sum()) == 8 * (4 * 64 + 3 * 8)


def test_the_deeper_a_training_step_the_more_it_keeps_but_not_for_steps_without_gradient() -> None:
    def bytes_of(no_grad: int, grad: int) -> int:
        trunk = ImplicitTrunkConfig(num_pre=0, num_post=0, no_grad=(no_grad, no_grad), grad=(grad, grad))
        model = tiny_transformer(trunk=trunk).train()
        labels, inputs = torch.tensor([0, 1]), torch.randn(2, 13, 4)
        return training_bytes(model, lambda: model(labels, inputs).sum())

    assert bytes_of(1, 2) == bytes_of(6, 2)
    assert bytes_of(6, 2) - bytes_of(0, 2) == 2 * 14 * 16 * 4  # where it starts is a state of its own
    assert bytes_of(1, 3) - bytes_of(1, 2) == bytes_of(1, 2) - bytes_of(1, 1) > 0


def test_tasks_are_timed_in_turns() -> None:
    order = []
    seconds = seconds_of([lambda: order.append("a"), lambda: order.append("b")], repeats=2)
    assert order == ["a", "b", "a", "b"]
    assert len(seconds) == 2
    assert all(taken >= 0 for taken in seconds)
