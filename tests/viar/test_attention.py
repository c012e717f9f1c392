"""Attention of all scales at once: scale by scale it is what it is under one dense mask."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TRUNKS, enlarge, tiny_config, tiny_transformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deqlib import ImplicitDifferentiation, ImplicitLayer, Stopping, Unroll
from viar import ImplicitTrunkConfig, NextScaleTransformer
from viar.model import scales
from viar.model.attention import Attention
from viar.model.blocks import Block
from viar.model.config import SIDES_256, SIDES_512
from viar.model.implicit import ImplicitCell
from viar.model.scales import BlockCausal, block_causal, block_causal_mask, scale_slices

LADDERS = st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True).map(sorted)
SIDES = (1, 2, 3, 4)
EACH_ALONE = 1


@contextmanager
def alone_from(tokens: int) -> Iterator[None]:
    """Scales of so many tokens attend by themselves."""
    with mock.patch.object(scales, "MIN_TOKENS_ALONE", tokens):
        yield


def groups_of(sides: Any, tokens: int = EACH_ALONE) -> BlockCausal:
    with alone_from(tokens):
        return block_causal(sides)


def dense(sides: Any) -> BlockCausal:
    """Everything in one group: attention under a mask (L, L)."""
    mask_LL = block_causal_mask(sides)
    return BlockCausal((len(mask_LL),), mask_LL)


def an_attention(qk_norm: bool = True, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    return enlarge(Attention(width=12, num_heads=3, qk_norm=qk_norm)).double()


def tokens_of(sides: Any, batch: int = 2, width: int = 12) -> Tensor:
    return torch.randn(batch, sum(side * side for side in sides), width, dtype=torch.float64)


# The groups


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8, unique=True).map(sorted), st.integers(1, 500))
def test_groups_let_every_token_see_what_the_dense_mask_lets_it_see(sides: list[int], tokens: int) -> None:
    sizes, mask_ll = groups_of(sides, tokens)
    length, end = sum(side * side for side in sides), 0
    seen = torch.zeros(length, length, dtype=torch.bool)
    for group, size in enumerate(sizes):
        where, end = slice(end, end + size), end + size
        seen[where, :end] = mask_ll if group == 0 and mask_ll is not None else True
    assert end == length
    assert seen.equal(block_causal_mask(sides))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8, unique=True).map(sorted), st.integers(1, 500))
def test_only_small_scales_at_the_beginning_share_a_group(sides: list[int], tokens: int) -> None:
    sizes, mask_ll = groups_of(sides, tokens)
    together = len(sides) - len(sizes) + 1
    assert list(sizes[1:]) == [side * side for side in sides[together:]]
    assert all(size >= tokens for size in sizes[1:])
    assert together == 1 or sides[together - 1] ** 2 < tokens
    assert (mask_ll is None) == (together == 1)


def test_groups_of_the_ladders_in_use() -> None:
    assert block_causal(SIDES_256).sizes == (155, 100, 169, 256)
    assert block_causal(SIDES_512).sizes == (147, 169, 324, 576, 1024)
    for sides in ((1, 2, 4), SIDES):  # pictures of digits: one group under the mask of all
        sizes, mask_LL = block_causal(sides)
        assert sizes == (sum(side * side for side in sides),)
        assert mask_LL.equal(block_causal_mask(sides))


# The same numbers


def by_definition(attention: Attention, x_BLC: Tensor, sides: Any) -> Tensor:
    """A softmax over what each scale sees, written out."""
    B, L, C = x_BLC.shape
    heads = attention.num_heads
    w_q, w_k, w_v = attention.qkv.weight.chunk(3)
    q, k, v = x_BLC @ w_q.T + attention.q_bias, x_BLC @ w_k.T, x_BLC @ w_v.T + attention.v_bias
    q, k, v = (t.view(B, L, heads, C // heads).transpose(1, 2) for t in (q, k, v))
    if attention.log_scale is None:
        q = q * 0.25 / (C // heads) ** 0.5
    else:
        q = F.normalize(q, dim=-1) * attention.log_scale.exp().clamp_max(100)
        k = F.normalize(k, dim=-1)
    parts = []
    for where in scale_slices(sides):
        weights = (q[:, :, where] @ k[:, :, : where.stop].mT).softmax(-1)
        parts.append(weights @ v[:, :, : where.stop])
    return torch.cat(parts, 2).transpose(1, 2).reshape(B, L, C) @ attention.out.weight.T + attention.out.bias


@given(sides=LADDERS, tokens=st.integers(1, 30), qk_norm=st.booleans(), seed=st.integers(0, 99))
def test_outputs_and_gradients_are_those_of_the_definition(
    sides: list[int], tokens: int, qk_norm: bool, seed: int
) -> None:
    attention, x = an_attention(qk_norm, seed), tokens_of(sides)
    leaves = [x.requires_grad_(), *attention.parameters()]
    weight = torch.randn_like(x)
    causal = groups_of(sides, tokens)
    for image in (attention(x, causal), attention(x, dense(sides))):
        expected = by_definition(attention, x, sides)
        torch.testing.assert_close(image, expected)
        gradients = torch.autograd.grad(image, leaves, weight)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, weight))


@given(sides=LADDERS, tokens=st.integers(1, 30), qk_norm=st.booleans())
def test_second_derivatives_are_those_of_the_definition(sides: list[int], tokens: int, qk_norm: bool) -> None:
    attention, x = an_attention(qk_norm), tokens_of(sides, batch=1)
    leaves = [x.requires_grad_(), *attention.parameters()]
    causal, weight, direction = groups_of(sides, tokens), torch.randn_like(x), torch.randn_like(x)

    def second(image: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(image.square(), x, weight, create_graph=True)
        return torch.autograd.grad(first, leaves, direction, allow_unused=True)

    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
        actual = second(attention(x, causal))
    torch.testing.assert_close(actual, second(by_definition(attention, x, sides)))


def trained(kind: str, causal: BlockCausal, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits and gradients of a training step with these groups; the same draws at every call."""
    trunk = (
        {}
        if kind == "explicit"
        else {"trunk": ImplicitTrunkConfig(num_pre=1, num_post=1, no_grad=(1, 1), grad=(2, 2))}
    )
    model = tiny_transformer(kind, sides=SIDES, depth=4, **{**trunk, **settings}).train()
    model.group_sizes, model.first_mask = causal
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 29, model.config.code_channels, generator=generator)
    torch.manual_seed(1)
    logits = model(torch.tensor([0, 1, 3]), inputs, generator=generator)
    logits.square().mean().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", list(TRUNKS))
def test_a_training_step_is_that_under_the_dense_mask(kind: str, qk_norm: bool) -> None:
    settings = {"qk_norm": qk_norm, "drop_path": 0.3, "label_dropout": 0.3}
    logits, gradients = trained(kind, groups_of(SIDES, 9), **settings)
    expected, expected_gradients = trained(kind, dense(SIDES), **settings)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("kind", list(TRUNKS))
def test_under_autocast_groups_differ_as_little_as_the_type_allows(kind: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = trained(kind, groups_of(SIDES))
        dense_logits, _ = trained(kind, dense(SIDES))
    exact, exact_gradients = trained(kind, dense(SIDES))
    assert (logits - exact).norm() < 1.2 * (dense_logits - exact).norm()
    assert all(gradient.isfinite().all() for gradient in gradients)
    whole, exact_whole = (torch.cat([g.flatten() for g in found]) for found in (gradients, exact_gradients))
    assert (whole - exact_whole).norm() < 0.1 * exact_whole.norm()


# What else models go through


def test_a_model_takes_its_groups_along() -> None:
    with alone_from(4):
        model = tiny_transformer("implicit", sides=SIDES)
        assert model.group_sizes == (1, 4, 9, 16)
        with torch.device("meta"):
            twin = NextScaleTransformer(model.config)
        twin.load_state_dict(model.state_dict(), assign=True)
    assert not any("mask" in name for name in model.state_dict())
    whole = tiny_transformer("implicit", sides=SIDES)
    assert whole.group_sizes == (30,)
    inputs, labels = torch.randn(2, 29, model.config.code_channels), torch.tensor([0, 1])
    with torch.no_grad():
        expected = whole(labels, inputs)
        for other in (model, copy.deepcopy(model), twin.eval()):
            torch.testing.assert_close(other(labels, inputs), expected, rtol=1e-4, atol=1e-5)


def test_transforms_go_through_groups() -> None:
    attention, causal = an_attention(), groups_of(SIDES, 9)
    x, tangent = tokens_of(SIDES, batch=4), tokens_of(SIDES, batch=4)

    def one(x_LC: Tensor) -> Tensor:
        return attention(x_LC[None], causal)[0]

    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(torch.func.vmap(one)(x), attention(x, causal))
        _, actual = torch.func.jvp(lambda x: attention(x, causal), (x,), (tangent,))
        _, expected = torch.func.jvp(lambda x: by_definition(attention, x, SIDES), (x,), (tangent,))
        torch.testing.assert_close(actual, expected)


def test_a_block_is_compiled_and_exported_with_groups() -> None:
    torch.manual_seed(0)
    block = enlarge(Block(tiny_config(sides=SIDES), drop_path=0.0))
    x, modulation = torch.randn(2, 30, 16), block.modulate(torch.randn(2, 16)).detach()
    inputs = (x, modulation, groups_of(SIDES, 9))
    with torch.no_grad():
        expected = block(*inputs)
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), expected)
        torch.testing.assert_close(torch.export.export(block, inputs).module()(*inputs), expected)


def test_a_fixed_point_is_differentiated_through_groups() -> None:
    torch.manual_seed(0)
    cell = enlarge(ImplicitCell(tiny_config(sides=SIDES), drop_path=0.0)).double()
    with torch.no_grad():
        cell.projection_in.weight[:, :16].mul_(0.1)  # the half that meets the state: it contracts
    u, cond = tokens_of(SIDES, width=16), torch.randn(2, 16, dtype=torch.float64)

    def gradients(causal: BlockCausal, backward: Any) -> tuple[Tensor, ...]:
        layer = ImplicitLayer(cell, stopping=Stopping(rtol=1e-13, max_steps=100), backward=backward)
        z = layer.solve(cell.inject(u), cell.block.modulate(cond), causal, z0=torch.zeros_like(u)).value
        return torch.autograd.grad(z.square().sum(), list(cell.parameters()), allow_unused=True)

    exact = ImplicitDifferentiation(stopping=Stopping(rtol=1e-12, max_steps=200))
    expected = gradients(dense(SIDES), Unroll())
    torch.testing.assert_close(gradients(groups_of(SIDES, 9), exact), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", list(TRUNKS))
def test_groups_of_another_ladder_are_refused(kind: str) -> None:
    trunk = tiny_transformer(kind, sides=SIDES).trunk
    modulations = trunk.modulate(torch.randn(1, 16))
    with pytest.raises(ValueError, match=r"causal: expected groups of 30 tokens in all, .* got \(14,\)"):
        trunk(torch.randn(1, 30, 16), modulations, causal=block_causal((1, 2, 3)))
