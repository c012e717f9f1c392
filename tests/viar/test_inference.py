"""Lower precision and compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_tokenizer, tiny_transformer
from torch import Tensor

import viar.model.trunk
from viar import NextScaleTransformer, Sampling, Tokenizer, generate, prepare_inference, sample_tokens
from viar.model.blocks import gelu


@pytest.fixture
def pair() -> tuple[NextScaleTransformer, Tokenizer]:
    return tiny_transformer(), tiny_tokenizer()


def native(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    """As if the processor had instructions for lower precisions, or none."""
    for module in (viar.model.trunk, viar.generation.inference):
        monkeypatch.setattr(
            module, "computes_in", lambda dtype, device: yes or dtype not in (torch.bfloat16, torch.float16)
        )


def residual_state(model: NextScaleTransformer, tokenizer: Tokenizer) -> Tensor:
    """What the trunk hands to the head at the last scale."""
    states: list[Tensor] = []
    handle = model.trunk.register_forward_hook(lambda _, __, output: states.append(output.x_BLC))
    sample_tokens(model, tokenizer, [0, 1], Sampling(top_k=1))
    handle.remove()
    return states[-1]


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_instructions", [False, True])
def test_lower_precision_changes_results_by_its_rounding(
    kind: str, dtype: torch.dtype, has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    exact = residual_state(model, tokenizer)
    native(monkeypatch, has_instructions)
    prepare_inference(model, tokenizer, dtype=dtype)
    rough = residual_state(model, tokenizer)
    assert rough.dtype == (dtype if has_instructions else torch.float32)
    assert {p.dtype for p in model.trunk.parameters()} == {dtype}
    error = float((rough - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.2
    images = generate(model, tokenizer, [0, 1, 2])
    assert images.dtype == torch.float32
    assert images.isfinite().all()


def test_weights_are_widened_a_block_at_a_time_to_what_they_were_rounded_to(
    pair: tuple[NextScaleTransformer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = pair
    native(monkeypatch, False)
    rounded = copy.deepcopy(model)
    rounded.trunk.bfloat16().float()
    prepare_inference(model, tokenizer, dtype=torch.bfloat16)
    expected = residual_state(rounded, tokenizer)
    # The vectors that modulate are computed in the type of the weights.
    torch.testing.assert_close(residual_state(model, tokenizer), expected, atol=0.05, rtol=0.05)
    assert {p.dtype for p in model.trunk.parameters()} == {torch.bfloat16}


def test_what_tokens_hang_on_stays_float32(
    pair: tuple[NextScaleTransformer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    native(monkeypatch, True)
    model, tokenizer = pair
    prepare_inference(model, tokenizer, dtype=torch.bfloat16)
    trunk = {f"trunk.{name}" for name, _ in model.trunk.named_parameters()}
    others = {p.dtype for name, p in model.named_parameters() if name not in trunk}
    assert others == {torch.float32}
    types = {name: {p.dtype for p in part.parameters()} for name, part in tokenizer.named_children()}
    assert types["decoder"] == types["post_quantizer"] == {torch.bfloat16}
    assert types["encoder"] == types["quantizer"] == types["pre_quantizer"] == {torch.float32}


def test_keys_and_values_have_the_type_that_is_computed_in(
    pair: tuple[NextScaleTransformer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = pair
    full = sample_tokens(model, tokenizer, [0]).cache_bytes
    prepare_inference(model, tokenizer, dtype=torch.bfloat16)
    for has_instructions, wanted in ((False, full), (True, full // 2)):
        native(monkeypatch, has_instructions)
        assert sample_tokens(model, tokenizer, [0]).cache_bytes == wanted


def test_preparing_ends_training_and_changes_images_by_rounding_at_most(
    pair: tuple[NextScaleTransformer, Tokenizer],
) -> None:
    model, tokenizer = pair
    images = generate(model, tokenizer, [0, 1])
    model.train()
    tokenizer.train()
    prepare_inference(model, tokenizer)
    torch.testing.assert_close(generate(model, tokenizer, [0, 1]), images, atol=1e-5, rtol=0)
    assert not tokenizer.training
    weight = tokenizer.decoder.conv_out.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_precision_is_refused(pair: tuple[NextScaleTransformer, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of torch.float32, .* got torch.int8"):
        prepare_inference(*pair, dtype=torch.int8)


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_compiled_blocks_give_the_same_images(kind: str) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    expected = residual_state(model, tokenizer)
    prepare_inference(model, tokenizer, compile="eager")  # the graphs, without what a compiler makes of them
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(residual_state(model, tokenizer), expected)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_ways_to_a_gelu_agree(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([-1e4, 1e4])]).to(dtype)
    expected = gelu(x.clone())
    with torch.no_grad():
        actual = gelu(argument := x.clone())
    assert actual.data_ptr() == argument.data_ptr()
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
