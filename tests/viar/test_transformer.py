"""Transformer of both trunks: published numbers, initial weights, dropout, causality, saving and errors."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_reference import (
    golden_config,
    golden_grad_norms,
    golden_labels,
    golden_tensors,
    golden_transformer,
    uniform,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SIDES, TRUNKS, enlarge, tiny_config, tiny_transformer
from torch import Tensor

from viar import Adaptive, ImplicitTrunkConfig, NextScaleTransformer, TransformerConfig
from viar.checkpoints.official import official_names
from viar.model.attention import Attention
from viar.model.blocks import Block, DropPath
from viar.model.scales import BlockCausal, block_causal_mask, scale_ids, scale_slices
from viar.model.trunk import drop_path_rates

KINDS = list(TRUNKS)
ROUNDS = ["0.1", "2.3", "4.1"]


def inputs_for(model: NextScaleTransformer, batch: int = 2, seed: int = 0) -> Tensor:
    sides = model.config.sides
    shape = (batch, sum(side * side for side in sides) - sides[0] ** 2, model.config.code_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: NextScaleTransformer, labels: Tensor, inputs: Tensor, **settings: Any) -> Tensor:
    with torch.no_grad():
        return model(labels, inputs, **settings)


# Published numbers


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return golden_tensors()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_logits_of_the_explicit_trunk_match_the_published_program(golden: dict[str, Tensor]) -> None:
    model = golden_transformer("var")
    close(logits_of(model, golden_labels(), golden["teacher_input"]), golden["var.logits"])


@pytest.mark.parametrize("rounds", ROUNDS)
def test_logits_and_gradients_of_the_implicit_trunk_match_the_published_program(
    golden: dict[str, Tensor], rounds: str
) -> None:
    no_grad, grad = map(int, rounds.split("."))
    model = golden_transformer("viar", no_grad=(no_grad, no_grad), grad=(grad, grad)).train()
    logits = model(golden_labels(), golden["teacher_input"])
    close(logits, golden[f"viar.logits.{rounds}"])

    probe = torch.from_numpy(uniform("probe", tuple(logits.shape))).float()
    (logits * probe).mean().backward()
    ours = official_names(model)
    expected = {ours[key]: norm for key, norm in golden_grad_norms()[rounds].items()}
    assert set(expected) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        norm = float(parameter.grad.norm())
        assert norm == pytest.approx(expected[name], rel=2e-4, abs=1e-9), name


@pytest.mark.parametrize("rounds", ROUNDS)
def test_logits_without_gradient_are_those_of_as_many_iterations(
    golden: dict[str, Tensor], rounds: str
) -> None:
    total = sum(map(int, rounds.split(".")))
    model = golden_transformer("viar", iterations=total)
    for settings in ({}, {"iterations": total}):
        actual = logits_of(model, golden_labels(), golden["teacher_input"], **settings)
        close(actual, golden[f"viar.logits.{rounds}"])


# The ladder


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6, unique=True).map(sorted))
def test_slices_ids_and_mask_agree_on_where_a_scale_is(sides: list[int]) -> None:
    ids, mask = scale_ids(sides), block_causal_mask(sides)
    slices = scale_slices(sides)
    assert slices[0].start == 0
    assert [s.stop - s.start for s in slices] == [side * side for side in sides]
    for scale, where in enumerate(slices):
        assert (ids[where] == scale).all()
        assert mask[where, : where.stop].all()
        assert not mask[where, where.stop :].any()


# Initial weights


@pytest.fixture(scope="module")
def fresh() -> dict[str, NextScaleTransformer]:
    torch.manual_seed(0)
    sizes = {"depth": 8, "width": 96, "num_heads": 4, "sides": (1, 2, 3, 5), "num_classes": 40}
    sizes |= {"codebook_size": 64, "code_channels": 16}
    trunk = ImplicitTrunkConfig(num_pre=1, num_post=1)
    return {
        "explicit": NextScaleTransformer(TransformerConfig(**sizes)),
        "implicit": NextScaleTransformer(TransformerConfig(**sizes, trunk=trunk)),
        "shared": NextScaleTransformer(TransformerConfig(**sizes, shared_modulation=True)),
    }


@pytest.mark.parametrize("kind", ["explicit", "implicit", "shared"])
def test_initial_weights_follow_the_published_table(
    fresh: dict[str, NextScaleTransformer], kind: str
) -> None:
    model = fresh[kind]
    std, deep = math.sqrt(1 / (3 * 96)), math.sqrt(2 * 8)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name.endswith("log_scale"):
            assert torch.all(values == math.log(4)), name
            continue
        if name.endswith("bias"):
            assert not values.any(), name
            continue
        if ".modulation" in name:  # rows of the two gates, and the other four
            rows = values.view(6, 96, -1)
            parts = {1e-5 * std: rows[:2], 0.5 * std: rows[2:]}
        elif name.endswith((".out.weight", ".fc2.weight")):
            parts = {std / deep: values}
        elif name == "head_modulation.weight":
            parts = {0.5 * std: values}
        elif name == "head.weight":
            parts = {0.02 * std: values}
        else:
            parts = {std: values}
        for expected, part in parts.items():
            count = part.numel()
            assert float(part.abs().max()) <= 7 * expected, name
            assert float(part.abs().max()) >= expected, name
            spread = 5 / math.sqrt(2 * count)
            assert float(part.std()) == pytest.approx(expected, rel=spread), name
            assert abs(float(part.mean())) < 5 * expected / math.sqrt(count), name


def test_two_blocks_never_start_alike(fresh: dict[str, NextScaleTransformer]) -> None:
    first, second = fresh["explicit"].trunk.blocks[:2]
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name.endswith(("bias", "log_scale")) or not a.equal(b), name


# Dropout


def seen_labels(model: NextScaleTransformer, labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    seen = []
    condition = model.condition
    monkeypatch.setattr(model, "condition", lambda labels: seen.append(labels) or condition(labels))
    logits_of(model, labels, inputs_for(model, len(labels)))
    return seen[0]


def test_labels_become_the_null_class_at_the_rate_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer("explicit", sides=(1, 2), label_dropout=0.3).train()
    labels = torch.arange(4000) % 3
    seen = seen_labels(model, labels, monkeypatch)
    dropped = seen != labels
    assert (seen[dropped] == model.null_class).all()
    assert abs(float(dropped.float().mean()) - 0.3) < 0.04


def test_labels_are_never_dropped_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer("explicit", sides=(1, 2), label_dropout=0.9)
    labels = torch.arange(50) % 3
    assert seen_labels(model, labels, monkeypatch).equal(labels)


def test_the_published_drop_path_rises_linearly_to_a_tenth_at_depth_24() -> None:
    assert drop_path_rates(TransformerConfig(depth=24)) == pytest.approx([0.1 * i / 23 for i in range(24)])
    assert max(drop_path_rates(TransformerConfig(depth=30))) == pytest.approx(0.125)
    assert drop_path_rates(TransformerConfig(depth=3, drop_path=0.4)) == pytest.approx([0, 0.2, 0.4])
    assert drop_path_rates(TransformerConfig(depth=1, drop_path=0.4)) == [0.0]


def test_kept_blocks_of_the_implicit_trunk_keep_their_drop_path() -> None:
    config = TransformerConfig(depth=30, width=30, trunk=ImplicitTrunkConfig())
    with torch.device("meta"):
        trunk = NextScaleTransformer(config).trunk
    published = [0.125 * i / 29 for i in range(30)]
    assert [block.drop_path.rate for block in trunk.pre] == pytest.approx(published[:5])
    assert trunk.layer.cell.block.drop_path.rate == pytest.approx(published[15])
    assert [block.drop_path.rate for block in trunk.post] == pytest.approx(published[25:])


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    layer = DropPath(0.25).train()
    x = torch.ones(4000, 2, 3)
    out = layer(x)
    assert (out == out[:, :1, :1]).all()
    assert sorted(out[:, 0, 0].unique().tolist()) == pytest.approx([0, 4 / 3])
    assert abs(float(out.mean()) - 1) < 0.05
    assert layer.eval()(x) is x
    assert "0.25" in repr(layer)


# Structure


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_that_of_its_definition(qk_norm: bool) -> None:
    attention = enlarge(Attention(width=12, num_heads=3, qk_norm=qk_norm)).double()
    if qk_norm:
        with torch.no_grad():
            attention.log_scale[0, :, 0, 0] = torch.tensor([0.0, 1.0, 9.0])  # the last above log 100
    x, past = torch.randn(2, 5, 12).double(), [torch.randn(2, 3, 2, 4).double() for _ in range(2)]
    w_q, w_k, w_v = attention.qkv.weight.chunk(3)
    q, k, v = x @ w_q.T + attention.q_bias, x @ w_k.T, x @ w_v.T + attention.v_bias
    mask_LL = torch.rand(5, 5) > 0.3
    mask_LL[:, 0] = True
    expected, expected_masked = [], []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        keys = torch.cat([past[0][:, head], normed(k[..., part], qk_norm)], 1)
        values = torch.cat([past[1][:, head], v[..., part]], 1)
        scale = [1, math.e, 100][head] if qk_norm else 0.25 / 2
        weights = normed(q[..., part], qk_norm) * scale @ keys.mT
        expected.append(weights.softmax(-1) @ values)
        own = weights[..., 2:].masked_fill(~mask_LL, -torch.inf)
        expected_masked.append(own.softmax(-1) @ v[..., part])
    expected, expected_masked = (
        torch.cat(parts, -1) @ attention.out.weight.T + attention.out.bias
        for parts in (expected, expected_masked)
    )
    slot = tuple(torch.cat([t, torch.full((2, 3, 5, 4), torch.nan).double()], 2) for t in past)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, None, slot), expected)
    torch.testing.assert_close(slot[1][:, :, 2:].transpose(1, 2).flatten(2), v)
    assert slot[0][:, :, :2].equal(past[0])
    assert slot[1][:, :, :2].equal(past[1])
    torch.testing.assert_close(attention(x, BlockCausal((5,), mask_LL)), expected_masked)
    everywhere = BlockCausal((5,), torch.ones_like(mask_LL))
    torch.testing.assert_close(attention(x, everywhere), attention(x))


def normed(x: Tensor, wanted: bool) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True) if wanted else x


@pytest.mark.parametrize("shared", [False, True])
def test_a_block_is_modulated_as_defined(shared: bool) -> None:
    block = enlarge(Block(tiny_config(shared_modulation=shared), drop_path=0.0)).double()
    x = torch.randn(2, 5, 16).double()
    cond = torch.randn(2, 6, 16).double() if shared else torch.randn(2, 16).double()
    if shared:
        vectors = cond + block.modulation_offset[0]
    else:
        vectors = block.modulation(torch.nn.functional.silu(cond)).view(2, 6, 16)
    g1, g2, s1, s2, b1, b2 = (vectors[:, i : i + 1] for i in range(6))

    def plain(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    h = x + g1 * block.attention(plain(x) * (1 + s1) + b1)
    hidden = torch.nn.functional.gelu(block.fc1(plain(h) * (1 + s2) + b2), approximate="tanh")
    expected = h + g2 * block.fc2(hidden)
    torch.testing.assert_close(block(x, block.modulate(cond)), expected)
    with torch.no_grad():  # other kernels, the same function
        torch.testing.assert_close(block(x, block.modulate(cond)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared_modulation", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_of_a_scale_do_not_depend_on_later_inputs(
    kind: str, shared_modulation: bool, qk_norm: bool
) -> None:
    model = tiny_transformer(kind, shared_modulation=shared_modulation, qk_norm=qk_norm)
    labels, inputs = torch.tensor([0, 3]), inputs_for(model)
    logits = logits_of(model, labels, inputs)
    assert logits.shape == (2, 14, 16)
    for where in scale_slices(SIDES)[1:]:
        changed = inputs.clone()
        changed[:, where.start - 1] += 1.0  # the first token of the scale; inputs lack the one of scale 0
        difference = (logits_of(model, labels, changed) - logits).abs().amax((0, 2))
        assert difference[: where.start].max() == 0
        assert difference[where].min() > 1e-4  # every token of the scale sees it
        assert difference[where.stop :].numel() == 0 or difference[where.stop :].min() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared_modulation", [False, True])
def test_every_parameter_gets_a_gradient(kind: str, shared_modulation: bool) -> None:
    model = tiny_transformer(kind, shared_modulation=shared_modulation).train()
    model(torch.tensor([0, 3]), inputs_for(model)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_batch_do_not_see_each_other(kind: str) -> None:
    model = tiny_transformer(kind)
    labels, inputs = torch.tensor([0, 1, 3]), inputs_for(model, 3)
    together = logits_of(model, labels, inputs)
    for i in range(3):
        alone = logits_of(model, labels[i : i + 1], inputs[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ladder_of_one_scale_needs_no_inputs(kind: str) -> None:
    model = tiny_transformer(kind, sides=(2,))
    assert logits_of(model, torch.tensor([1]), torch.zeros(1, 0, 4)).shape == (1, 4, 16)


def test_embedding_scale_by_scale_is_what_the_joint_forward_embeds() -> None:
    model = tiny_transformer()
    labels, inputs = torch.tensor([0, 2]), inputs_for(model)
    seen = []
    model.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits_of(model, labels, inputs)
    embedding, _ = model.condition(labels)
    maps = [None]
    for side, where in list(zip(SIDES, scale_slices(SIDES), strict=True))[1:]:
        part = inputs[:, where.start - 1 : where.stop - 1]
        maps.append(part.transpose(1, 2).unflatten(2, (side, side)))
    pieces = [model.embed_scale(scale, embedding, part) for scale, part in enumerate(maps)]
    torch.testing.assert_close(torch.cat(pieces, 1), seen[0])


def test_embeddings_and_head_stay_in_float32_under_autocast() -> None:
    model = tiny_transformer()
    labels, inputs = torch.tensor([0, 2]), inputs_for(model)
    seen = []
    model.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = logits_of(model, labels, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = logits_of(model, labels, inputs)
    assert seen[0].equal(seen[1])
    assert actual.dtype == torch.float32
    assert not actual.equal(expected)  # the trunk does run in half precision
    torch.testing.assert_close(actual, expected, atol=0.2, rtol=0.1)


def test_bfloat16_training_reaches_every_weight_after_iterations_without_gradient() -> None:
    model = tiny_transformer(trunk=ImplicitTrunkConfig(num_pre=1, num_post=1, no_grad=(2, 2), grad=(2, 2)))
    model.train()
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(torch.tensor([0, 3]), inputs_for(model)).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in model.trunk.layer.parameters()]))
    assert torch.cosine_similarity(gradients[0], gradients[1], 0) > 0.98


def test_the_implicit_block_is_solved_closer_with_more_iterations() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        model.trunk.layer.cell.projection_out.weight.mul_(0.3)
    labels, inputs = torch.tensor([0, 3]), inputs_for(model)
    limit = logits_of(model, labels, inputs, iterations=200)
    errors = [float((logits_of(model, labels, inputs, iterations=n) - limit).norm()) for n in (1, 3, 9)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    adaptive = logits_of(model, labels, inputs, iterations=Adaptive(rtol=1e-5, max_steps=100))
    torch.testing.assert_close(adaptive, limit, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_independent_and_computes_the_same(kind: str) -> None:
    model = tiny_transformer(kind)
    twin = copy.deepcopy(model)
    labels, inputs = torch.tensor([0, 3]), inputs_for(model)
    assert logits_of(twin, labels, inputs).equal(logits_of(model, labels, inputs))
    drawn = []
    for one in (model.train(), twin.train()):
        drawn.append(one(labels, inputs, generator=torch.Generator().manual_seed(3)))
    assert drawn[0].equal(drawn[1])


# Saving


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_from_pretrained_round_trip(kind: str, tmp_path: Path) -> None:
    model = tiny_transformer(kind, shared_modulation=True, qk_norm=False, mlp_ratio=2.0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = NextScaleTransformer.from_pretrained(tmp_path).eval()
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    labels, inputs = torch.tensor([0, 3]), inputs_for(model)
    assert logits_of(loaded, labels, inputs).equal(logits_of(model, labels, inputs))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_loading_weights_of_another_trunk_is_an_error(tmp_path: Path) -> None:
    tiny_transformer("explicit").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"kind": "explicit"', '"kind": "implicit", "num_pre": 1'))
    config.write_text(config.read_text().replace('"num_pre": 1', '"num_pre": 1, "num_post": 1'))
    with pytest.raises(ValueError, match="missing: "):
        NextScaleTransformer.from_pretrained(tmp_path)


def test_loading_an_unknown_setting_or_trunk_is_an_error(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"qk_norm"', '"qknorm"'))
    with pytest.raises(ValueError, match="qknorm"):
        NextScaleTransformer.from_pretrained(tmp_path)
    config.write_text(text.replace('"num_pre"', '"num_before"'))
    with pytest.raises(ValueError, match="num_before"):
        NextScaleTransformer.from_pretrained(tmp_path)
    config.write_text(text.replace('"implicit"', '"recurrent"'))
    with pytest.raises(
        ValueError, match=r"trunk kind must be one of \['explicit', 'implicit'\].*'recurrent'"
    ):
        NextScaleTransformer.from_pretrained(tmp_path)


@given(
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(3, 6),
    st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True).map(sorted),
)
def test_a_config_survives_its_dictionary(kind: str, flag: bool, depth: int, sides: list[int]) -> None:
    config = tiny_config(kind, depth=depth, sides=sides, qk_norm=flag, shared_modulation=not flag)
    assert TransformerConfig.from_dict(config.to_dict()) == config
    assert NextScaleTransformer(config.to_dict()).config == config


# Errors


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), "expected classes 0 to 2, or 3 for none, got values from 0 to 4"),
        (torch.tensor([-1, 0]), "got values from -1 to 0"),
        (torch.tensor([0.0, 1.0]), r"integers of shape \(B,\), got torch.float32"),
        (torch.tensor([True, False]), "got torch.bool"),
        (torch.zeros(2, dtype=torch.complex64), "got torch.complex64"),
        (torch.tensor([0, 4], dtype=torch.uint16), "got values from 0 to 4"),
        (torch.tensor([[0, 1]]), r"got torch.int64 \(1, 2\)"),
        (torch.tensor(1), r"got torch.int64 \(\)"),
    ],
)
def test_wrong_labels_are_refused(labels: Tensor, message: str) -> None:
    model = tiny_transformer()
    with pytest.raises(ValueError, match=f"labels: .*{message}"):
        model(labels, inputs_for(model))


@pytest.mark.parametrize("shape", [(2, 14, 4), (2, 13, 5), (3, 13, 4), (13, 4)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"inputs: expected shape \(2, 13, 4\), got"):
        tiny_transformer()(torch.tensor([0, 1]), torch.zeros(shape))


@pytest.mark.parametrize(
    ("kind", "iterations", "error", "message"),
    [
        ("explicit", 3, ValueError, "an explicit trunk has none to choose, got 3"),
        ("explicit", Adaptive(), ValueError, "an explicit trunk has none to choose"),
        ("implicit", [1, 2, 3], TypeError, "all scales are solved together here"),
        ("implicit", (3, 1), TypeError, "all scales are solved together here"),
        ("implicit", 2.0, TypeError, "expected an int or viar.Adaptive, got 2.0"),
        ("implicit", 0, ValueError, "at least 1 iteration"),
        ("implicit", True, TypeError, "got True"),
    ],
)
def test_iterations_that_do_not_apply_are_refused(
    kind: str, iterations: Any, error: type[Exception], message: str
) -> None:
    model = tiny_transformer(kind)
    with pytest.raises(error, match=f"iterations: .*{message}"):
        logits_of(model, torch.tensor([0, 1]), inputs_for(model), iterations=iterations)


@pytest.mark.parametrize("iterations", [3, Adaptive()])
def test_iterations_are_not_the_callers_while_gradients_are_recorded(iterations: Any) -> None:
    model = tiny_transformer()
    with pytest.raises(ValueError, match=r"while gradients are recorded.*leave it at None or .*no_grad"):
        model(torch.tensor([0, 1]), inputs_for(model), iterations=iterations)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide width=16"),
        ({"depth": 2}, "trunk has 3 blocks .*more than depth=2"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"label_dropout": -0.1}, r"label_dropout must be in \[0, 1\)"),
        ({"sides": (2, 2)}, "sides must be positive and strictly rising"),
        ({"sides": ()}, "sides must be positive and strictly rising"),
        ({"sides": (0, 1)}, "sides must be positive and strictly rising"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config("implicit", **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_grad": (3, 2)}, "no_grad must be .*0 <= least <= most"),
        ({"no_grad": (-1, 2)}, "no_grad must be"),
        ({"grad": (0, 2)}, "grad must be .*1 <= least <= most"),
        ({"num_pre": -1}, "num_pre must be at least 0"),
        ({"num_post": -1}, "num_post must be at least 0"),
        ({"iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_trunk_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImplicitTrunkConfig(**settings)


def test_a_trunk_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"trunk must be .*ImplicitTrunkConfig, got 'implicit'"):
        TransformerConfig(trunk="implicit")


def test_defaults_follow_the_depth() -> None:
    config = TransformerConfig(depth=20)
    assert (config.width, config.num_heads) == (1280, 20)
    assert golden_config()["attn_l2_norm"] is config.qk_norm is True
