"""Published checkpoints: golden numbers from files, sizes, both directions, errors, and the command."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_reference import (
    golden_config,
    golden_images,
    golden_labels,
    golden_state,
    golden_tensors,
    golden_tokenizer_config,
    official_shapes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import enlarge, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor

import viar.checkpoints.convert
import viar.commands.cli
from viar import (
    ExplicitTrunkConfig,
    ImplicitTrunkConfig,
    NextScaleTransformer,
    Tokenizer,
    TokenizerConfig,
    TransformerConfig,
    export_official,
    load_official,
)
from viar.checkpoints.official import official_names
from viar.model.config import SIDES_256, SIDES_512
from viar.model.scales import block_causal_mask, scale_ids

State = dict[str, Tensor]
VAE, VAR, VIAR = "vae_ch160v4096z32.pth", "var_d16.pth", "viar.pth"
SIDES = tuple(golden_config()["patch_nums"])


def write(state: Any, path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def load_golden(kind: str, path: Path | None = None, **arguments: Any) -> Any:
    """The tiny model from its tensors, or from a file that is written with them first."""
    state = golden_state(kind)
    arguments |= {"sides": SIDES} if kind == "vae" else {}
    return load_official(state if path is None else write(state, path), **arguments)


def same(actual: State, expected: State) -> None:
    """Equal names in equal order, types and bits."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].equal(tensor), name


# Golden numbers, from files


@pytest.mark.parametrize("file", ["vae.pth", "vae.safetensors"])
def test_the_tokenizer_of_a_file_gives_the_published_tokens(file: str, tmp_path: Path) -> None:
    tokenizer = load_golden("vae", tmp_path / file)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.config == golden_tokenizer_config()
    golden = golden_tensors()
    tokens = tokenizer.encode(golden_images())
    assert torch.cat(tokens, 1).equal(golden["tokens"].long())
    torch.testing.assert_close(tokenizer.decode(tokens), golden["reconstruction"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(("kind", "rounds"), [("var", None), ("viar", "0.1"), ("viar", "2.3")])
def test_the_transformer_of_a_file_gives_the_published_logits(
    kind: str, rounds: str | None, ending: str, tmp_path: Path
) -> None:
    model = load_golden(kind, tmp_path / f"{kind}.{ending}")
    assert isinstance(model, NextScaleTransformer)
    golden, iterations = golden_tensors(), None if rounds is None else sum(map(int, rounds.split(".")))
    with torch.no_grad():
        logits = model(golden_labels(), golden["teacher_input"], iterations)
    expected = golden[f"{kind}.logits" if rounds is None else f"{kind}.logits.{rounds}"]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


def test_settings_of_a_transformer_are_read_off_its_tensors() -> None:
    config = golden_config()
    common = {
        "width": config["embed_dim"],
        "num_heads": config["num_heads"],
        "sides": SIDES,
        "codebook_size": config["vocab_size"],
        "code_channels": config["z_channels"],
        "num_classes": config["num_classes"],
    }
    assert load_golden("var").config == TransformerConfig(depth=config["depth"], **common)
    trunk = ImplicitTrunkConfig(num_pre=config["pre_depth"], num_post=config["post_depth"])
    # Narrower than 64 a block: as deep as it must be.
    assert load_golden("viar").config == TransformerConfig(depth=4, trunk=trunk, **common)


# Published sizes, without their weights


def published(checkpoint: str) -> State:
    """Shapes of a published checkpoint, with the values that its settings are read from."""
    shapes = official_shapes(checkpoint).items()
    return {name: torch.empty(shape, device="meta") for name, shape in shapes} | (
        {} if checkpoint == VAE else {"lvl_1L": scale_ids(SIDES_256)[None]}
    )


@pytest.mark.parametrize(
    ("checkpoint", "config", "parameters"),
    [
        (VAE, TokenizerConfig(), 108_948_355),
        (VAR, TransformerConfig(depth=16), 310_283_520),
        ("var_d30.pth", TransformerConfig(depth=30), 2_010_020_356),
        (VIAR, TransformerConfig(depth=30, trunk=ImplicitTrunkConfig()), 770_884_426),
    ],
)
def test_published_checkpoints_have_every_tensor_and_no_other(
    checkpoint: str, config: TokenizerConfig | TransformerConfig, parameters: int
) -> None:
    model = load_official(published(checkpoint))
    assert model.config == config
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    shapes = official_shapes(checkpoint)
    exported = export_official(model)
    assert list(exported.items()) == [(name, exported[name]) for name in shapes]  # in their order
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == shapes


def test_sides_without_values_are_told_by_the_number_of_positions() -> None:
    state = published(VAR)
    state["lvl_1L"] = state["lvl_1L"].to("meta")
    assert load_official(state).config.sides == SIDES_256
    short = {name: tensor[:, :30] if name == "pos_1LC" else tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"lvl_1L, .* is missing or has no values; give sides"):
        load_official(short)


def test_a_tokenizer_of_another_ladder_is_told_its_sides() -> None:
    tokenizer = load_official(published(VAE), sides=SIDES_512)
    assert tokenizer.config == TokenizerConfig(sides=SIDES_512)


# What is loaded


@pytest.mark.parametrize("kind", ["vae", "var", "viar"])
@pytest.mark.parametrize("source", ["memory", "m.pth", "m.safetensors"])
def test_a_loaded_model_is_whole(kind: str, source: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = load_golden(kind, None if source == "memory" else tmp_path / source)
    assert torch.get_rng_state().equal(before)
    assert not any(module.training for module in model.modules())
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter.is_contiguous()
        assert parameter.dtype == torch.float32
    fresh = type(model)(model.config)
    buffers, expected = dict(model.named_buffers()), dict(fresh.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.device.type == "cpu"
        assert buffer.equal(expected[name]), name
    if kind == "viar":
        inputs = uniform(2, 29, model.config.code_channels)
        for each in (model, fresh):
            enlarge(torch.manual_seed(0) and each.train())
        torch.manual_seed(1)
        logits = model(golden_labels(), inputs)
        torch.manual_seed(1)
        torch.testing.assert_close(logits, fresh(golden_labels(), inputs))


def test_the_default_device_does_not_matter(tmp_path: Path) -> None:
    path = write(golden_state("viar"), tmp_path / "viar.pth")
    with torch.device("meta"):
        model = load_official(path)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
    same(export_official(model), golden_state("viar"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_are_float32_whatever_the_file_holds(dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in golden_state("var").items()}  # lvl_1L too
    expected = {
        name: stored[name].to(tensor.dtype) for name, tensor in golden_state("var").items()
    }  # int64 again
    same(export_official(load_official(stored)), expected)


def test_tensors_of_another_layout_become_contiguous() -> None:
    state = {
        name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in golden_state("vae").items()
    }
    model = load_official(state, sides=SIDES)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    same(export_official(model), golden_state("vae"))


@torch.no_grad()
def zero(model: torch.nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.zero_()


@pytest.mark.parametrize("kind", ["vae", "viar"])
def test_a_model_shares_nothing_with_the_state_dict(kind: str) -> None:
    state = golden_state(kind)
    model = load_official(state, sides=SIDES)
    zero(model)
    same(state, golden_state(kind))


@pytest.mark.parametrize("file", ["var.pth", "var.safetensors"])
def test_training_a_loaded_model_leaves_the_file_alone(file: str, tmp_path: Path) -> None:
    path = write(golden_state("var"), tmp_path / file)
    before = path.read_bytes()
    zero(load_official(path))
    assert path.read_bytes() == before


def test_files_from_before_archives_load(tmp_path: Path) -> None:
    torch.save(golden_state("var"), tmp_path / "var.pth", _use_new_zipfile_serialization=False)
    same(export_official(load_official(tmp_path / "var.pth")), golden_state("var"))


# Wrappings


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {
            "trainer": {"config": {"x": 1}, "vae_local": golden_state("vae"), "var_wo_ddp": state}
        },
        lambda state: {"epoch": 3, "args": {"depth": 6}, "var_wo_ddp": state},
        lambda state: {"vae_local": state},
        lambda state: {"optimizer": {}, "model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    ],
)
def test_wrappings_and_prefixes_are_taken_off(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    expected = golden_state("var")
    same(export_official(load_official(wrap(golden_state("var")))), expected)
    same(export_official(load_official(write(wrap(golden_state("var")), tmp_path / "var.pth"))), expected)


def test_a_prefix_that_only_some_names_have_stays() -> None:
    state = golden_state("var")
    state["module.head.bias"] = state.pop("head.bias")
    with pytest.raises(ValueError, match=r"1 missing: head.bias \(64,\)\n  1 unexpected: module.head.bias"):
        load_official(state)


# Both directions


ladders = st.sampled_from([(1,), (1, 2), (1, 3), (2, 3, 5), (1, 2, 3, 4, 5)])
tokenizer_configs = st.builds(
    TokenizerConfig,
    sides=ladders,
    codebook_size=st.sampled_from([3, 16]),
    code_channels=st.sampled_from([2, 5]),
    base_channels=st.sampled_from([32, 64]),
    multipliers=st.sampled_from([(1,), (2,), (1, 1), (1, 2), (2, 1, 3)]),
    num_residual_blocks=st.sampled_from([1, 2]),
    num_phi=st.sampled_from([0, 1, 2, 4, 11]),
)
trunks = st.one_of(
    st.just(ExplicitTrunkConfig()),
    st.builds(ImplicitTrunkConfig, num_pre=st.integers(0, 2), num_post=st.integers(0, 2)),
)


@st.composite
def transformer_configs(draw: st.DrawFn) -> TransformerConfig:
    trunk = draw(trunks)
    qk_norm = draw(st.booleans())
    deep = st.integers(1, 12) if isinstance(trunk, ExplicitTrunkConfig) else st.none()
    return TransformerConfig(
        depth=draw(deep) or trunk.num_pre + 1 + trunk.num_post,
        width=draw(st.sampled_from([8, 24])),
        num_heads=draw(st.sampled_from([1, 2, 4])),
        sides=draw(ladders),
        codebook_size=draw(st.sampled_from([3, 16])),
        code_channels=draw(st.sampled_from([2, 5])),
        num_classes=draw(st.integers(1, 5)),
        mlp_ratio=draw(st.sampled_from([1.0, 2.6, 4.0])),
        qk_norm=qk_norm,
        shared_modulation=draw(st.booleans()),
        trunk=trunk,
    )


def told(config: TransformerConfig) -> dict[str, Any]:
    """Settings as the tensors tell them: a ratio as hidden units."""
    return config.to_dict() | {"mlp_ratio": round(config.mlp_ratio * config.width)}


@settings(max_examples=25, deadline=None)
@given(transformer_configs())
def test_transformers_come_back_bit_for_bit(config: TransformerConfig) -> None:
    model = enlarge(NextScaleTransformer(config))
    exported = export_official(model)
    assert set(official_names(model).values()) - {None} == set(model.state_dict())
    expected = copy.deepcopy(exported)
    loaded = load_official(exported, num_heads=None if config.qk_norm else config.num_heads)
    assert told(loaded.config) == told(config)
    same(export_official(loaded), expected)
    same(loaded.state_dict(), model.state_dict())


@settings(max_examples=15, deadline=None)
@given(tokenizer_configs)
def test_tokenizers_come_back_bit_for_bit(config: TokenizerConfig) -> None:
    tokenizer = Tokenizer(config)
    tokenizer.quantizer.usage.copy_(uniform(*tokenizer.quantizer.usage.shape))
    exported = export_official(tokenizer)
    assert set(official_names(tokenizer).values()) == set(tokenizer.state_dict())
    loaded = load_official(exported, sides=config.sides)
    assert loaded.config == config
    same(export_official(loaded), exported)
    same(loaded.state_dict(), tokenizer.state_dict())


@pytest.mark.parametrize("kind", ["vae", "var", "viar"])
def test_published_state_dicts_come_back_in_order(kind: str) -> None:
    same(export_official(load_golden(kind)), golden_state(kind))


@pytest.mark.parametrize(
    ("num_phi", "names"),
    [
        (0, ["quant_resi.0", "quant_resi.1", "quant_resi.2"]),
        (1, ["quant_resi.qresi"]),
        (2, ["quant_resi.qresi_ls.0", "quant_resi.qresi_ls.1"]),
    ],
)
def test_each_way_of_sharing_refinements_has_its_names(num_phi: int, names: list[str]) -> None:
    config = TokenizerConfig(sides=(1, 2, 3), base_channels=32, multipliers=(1,), num_phi=num_phi)
    with torch.device("meta"):
        exported = export_official(Tokenizer(config))
    found = [name for name in exported if name.startswith("quantize.quant_resi.") and name.endswith(".bias")]
    assert found == [f"quantize.{name}.bias" for name in names]


def test_shared_modulation_takes_the_published_names() -> None:
    names = list(export_official(tiny_transformer("explicit", shared_modulation=True)))
    where = names.index("shared_ada_lin.1.weight")
    block = ["shared_ada_lin.1.bias", "blocks.0.ada_gss", "blocks.0.attn.scale_mul_1H11"]
    assert names[where - 1 : where + 4] == ["lvl_embed.weight", "shared_ada_lin.1.weight", *block]


def test_depth_of_a_viar_is_its_width_in_heads_of_64() -> None:
    trunk = ImplicitTrunkConfig(num_pre=1, num_post=0)
    with torch.device("meta"):
        model = NextScaleTransformer(TransformerConfig(depth=3, trunk=trunk))
    assert load_official(export_official(model)).config.depth == 3
    with torch.device("meta"):
        model = NextScaleTransformer(TransformerConfig(depth=7, width=192, num_heads=3, trunk=trunk))
    assert load_official(export_official(model)).config.depth == 3


def test_heads_without_a_learned_scale_are_64_wide_unless_told() -> None:
    state = export_official(tiny_transformer("explicit", qk_norm=False, width=128))
    assert load_official(state).config.num_heads == 2
    assert load_official(state, num_heads=8).config.num_heads == 8
    narrow = export_official(tiny_transformer("implicit", qk_norm=False))
    with pytest.raises(ValueError, match=r"num_heads: no tensor tells .* width 16 .* of 64; give num_heads"):
        load_official(narrow)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the width 16, got 3"):
        load_official(narrow, num_heads=3)


def test_a_trunk_that_the_published_programs_do_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viar.checkpoints.convert, "PUBLISHED_TRUNKS", (ExplicitTrunkConfig,))
    with pytest.raises(ValueError, match="no trunk of ImplicitTrunkConfig; use save_pretrained"):
        export_official(tiny_transformer("implicit"))
    export_official(tiny_transformer("explicit"))


def test_export_refuses_what_the_published_program_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"has num_groups=32, .* got 2; use save_pretrained"):
        export_official(tiny_tokenizer())
    other = TokenizerConfig(sides=(1,), base_channels=32, multipliers=(1,), phi_ratio=0.2)
    with pytest.raises(ValueError, match=r"has phi_ratio=0.5, .* got 0.2"):
        export_official(Tokenizer(other))
    with pytest.raises(TypeError, match="expected a Tokenizer or a NextScaleTransformer, got Linear"):
        export_official(torch.nn.Linear(1, 1))


# Errors


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("must not exist",)


def garbage(path: Path) -> None:
    path.write_bytes(b"hello, this is no checkpoint")


def empty(path: Path) -> None:
    path.touch()


def half_a_file(path: Path) -> None:
    write(golden_state("var"), path)
    path.write_bytes(path.read_bytes()[:10_000])


def other_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b")


def other_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("make", [garbage, empty, half_a_file, other_archive, other_pickle])
def test_a_file_that_is_no_checkpoint_is_refused(
    make: Callable[[Path], None], ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    make(path)
    with pytest.raises(ValueError, match=r"a\.(pth: not a checkpoint|safetensors: not a safetensors file)"):
        load_official(path)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_file_is_named_and_not_run(
    archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Code()}, "a.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=r"a\.pth: holds \w+\.mkdir, which is code and not a tensor"):
        load_official("a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_pickled_model_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    torch.save(tiny_transformer(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"holds viar\.model\.transformer\.NextScaleTransformer, "):
        load_official(tmp_path / "a.pth")


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        load_official(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="a folder, expected a file; read folders with from_pretrained"):
        load_official(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.zeros(1)], "the state dict: expected a dictionary of tensors, got list"),
        ({}, "expected a dictionary of tensors, got an empty one"),
        ({"model": {}}, "got an empty one"),
        (
            {"weights": {"a": torch.zeros(1)}},
            "expected tensors alone, found other values under weights",
        ),
        ({"a": torch.zeros(1), "epoch": 3}, "found other values under epoch"),
        ({"a": torch.zeros(1)}, r"expected the published names .*, found a; from_pretrained reads"),
    ],
)
def test_values_that_are_no_published_state_dict_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_official(values)


def test_all_that_is_wrong_with_the_tensors_is_in_one_message() -> None:
    state = golden_state("viar")
    del state["head.bias"], state["pre_blocks.1.ffn.fc2.weight"]
    state["head.weight"] = torch.zeros(64, 63)
    state["ema"] = torch.zeros(2, 3)
    state["class_emb.weight"] = state["class_emb.weight"].to(torch.int8)
    state["lvl_embed.weight"] = torch.zeros(64)
    state["implicit_block.attn.zero_k_bias"] = torch.ones(64)
    state["attn_bias_for_masking"] = torch.zeros(1, 1, 30, 30)
    with pytest.raises(ValueError, match="the state dict: not the tensors of") as caught:
        load_official(state)
    head, *lines = str(caught.value).split("\n")
    assert (
        "(kind VIAR, blocks 2 + implicit + 1, depth 4, width 64, heads 4, classes 10, sides 1 2 3 4" in head
    )
    assert lines == [
        "  2 missing: pre_blocks.1.ffn.fc2.weight (64, 256), head.bias (64,)",
        "  1 unexpected: ema (2, 3)",
        "  2 of another shape: lvl_embed.weight: expected (4, 64), found (64,), "
        "head.weight: expected (64, 64), found (64, 63)",
        "  1 of another type: class_emb.weight: expected floating point, found torch.int8",
        "  2 of another value than scales, mask and absent key biases have: attn_bias_for_masking, "
        "implicit_block.attn.zero_k_bias",
    ]


def test_long_lists_end_in_a_count() -> None:
    state = golden_state("var") | {f"extra.{i}": torch.zeros(1) for i in range(30)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.3.")}
    with pytest.raises(ValueError, match="13 missing: ") as caught:
        load_official(state)
    _, missing, unexpected = str(caught.value).split("\n")
    assert missing.endswith(", and 5 more")
    assert unexpected.startswith("  30 unexpected: extra.0 (1,), extra.1 (1,)")
    assert unexpected.endswith("extra.7 (1,), and 22 more")


@pytest.mark.parametrize("kind", ["vae", "var", "viar"])
def test_any_missing_tensor_is_named(kind: str) -> None:
    state = golden_state(kind)
    names = list(state)
    first, last = names[:10], names[-12:]
    for name in [*first, *names[10:-12:50], *last]:
        short = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(ValueError, match=rf"{name}.* is missing|1 missing: {name} "):
            load_official(short, sides=SIDES)


@pytest.mark.parametrize(
    ("kind", "changes", "arguments", "message"),
    [
        ("var", {"lvl_1L": torch.zeros(1, 30)}, {}, r"lvl_1L: expected p \* p tokens a scale.*runs \[30\]"),
        ("var", {"lvl_1L": 1 + scale_ids(SIDES)[None]}, {}, r"lvl_1L: .* runs \[1, 4, 9, 16\]"),
        ("var", {}, {"sides": (1, 2)}, r"sides: lvl_1L tells \(1, 2, 3, 4\), got \(1, 2\); leave it"),
        ("var", {}, {"num_heads": 8}, r"num_heads: blocks.0.attn.scale_mul_1H11 tells 4, got 8; leave it"),
        ("vae", {}, {}, r"sides: quantize.ema_vocab_hit_SV has 4 scales, got sides=\(1, 2, 3, 4, 5, .*give"),
        ("vae", {}, {"sides": (1, 2)}, r"has 4 scales, got sides=\(1, 2\); .* zeros of shape \(2, V\)"),
        ("vae", {}, {"sides": (4, 3, 2, 1)}, "sides must be positive and strictly rising"),
        ("vae", {}, {"sides": SIDES, "num_heads": 2}, "num_heads: this is a tokenizer, .* got 2"),
        (
            "vae",
            {"encoder.down.1.block.0.conv1.weight": torch.zeros(40, 32, 3, 3)},
            {"sides": SIDES},
            r"encoder.down: expected multiples of 32 channels \(conv_in\), found \[32, 40, 64, 64, 128\]",
        ),
    ],
)
def test_what_contradicts_the_tensors_is_refused(
    kind: str, changes: State, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_official(golden_state(kind) | changes, **arguments)


@given(st.permutations(SIDES), st.integers(0, 29))
@settings(max_examples=10, deadline=None)
def test_a_mask_of_another_order_is_refused(sides: list[int], changed: int) -> None:
    state = golden_state("var")
    mask = block_causal_mask(sides)
    mask[changed, 0] = ~mask[changed, 0]
    state["attn_bias_for_masking"] = torch.zeros(()).where(mask, -torch.inf)[None, None]
    with pytest.raises(ValueError, match=r"1 of another value than .*: attn_bias_for_masking$"):
        load_official(state)


# The command


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`viar convert` in this process: exit code, output, and errors on one line."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["viar", "convert", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            viar.commands.cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        output, errors = capsys.readouterr()
        return code, output, " ".join(errors.split())

    return run


Call = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("kind", "flags", "shown"),
    [
        ("vae", ["--sides", *SIDES], ["tokenizer", "64", "32 32 64 64 128", "1 2 3 4", "64 of 16 channels"]),
        ("var", [], ["VAR", "6", "64", "4", "10", "1 2 3 4"]),
        ("viar", [], ["VIAR", "2 + implicit + 1"]),
    ],
)
def test_the_command_converts_to_a_folder_and_back(
    kind: str, flags: list[object], shown: list[str], call: Call, tmp_path: Path
) -> None:
    source, folder = write(golden_state(kind), tmp_path / "a.pth"), tmp_path / "new" / "folder"
    code, output, errors = call(source, folder, *flags)
    assert (code, errors) == (0, "")
    rows = [line.split("│")[1:3] for line in output.splitlines() if "│" in line]
    table = {name.strip(): value.strip() for name, value in rows}
    model = (Tokenizer if kind == "vae" else NextScaleTransformer).from_pretrained(folder)
    assert set(shown) <= set(table.values())
    assert table["parameters"] == f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    same(export_official(model), golden_state(kind))
    assert folder.stat().st_mode & 0o777 == tmp_path.joinpath("new").stat().st_mode & 0o777

    for name, read in (("b.pth", torch.load), ("b.safetensors", load_file)):
        assert call(folder, tmp_path / name)[0] == 0
        state, expected = read(tmp_path / name), golden_state(kind)
        same({key: state[key] for key in expected}, expected)
        assert state.keys() == expected.keys()
    assert list(torch.load(tmp_path / "b.pth")) == list(expected)
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "new", "b.pth", "b.safetensors"}


def test_the_command_passes_on_the_number_of_heads(call: Call, tmp_path: Path) -> None:
    state = export_official(tiny_transformer(qk_norm=False))
    source = write(state, tmp_path / "a.safetensors")
    code, _, errors = call(source, tmp_path / "out")
    assert code == 2
    assert "give num_heads" in errors
    assert call(source, tmp_path / "out", "--num-heads", 4)[0] == 0
    assert NextScaleTransformer.from_pretrained(tmp_path / "out").config.num_heads == 4


def test_the_command_overwrites_only_when_told(call: Call, tmp_path: Path) -> None:
    var, viar_ = (write(golden_state(kind), tmp_path / f"{kind}.pth") for kind in ("var", "viar"))
    folder, file = tmp_path / "folder", tmp_path / "b.pth"
    folder.mkdir()  # empty: free to take
    assert call(var, folder)[0] == 0
    (folder / "notes.txt").write_text("kept")
    assert call(folder, file)[0] == 0
    before = {path: path.read_bytes() for path in (file, *folder.iterdir())}
    for arguments in ((viar_, folder), (folder, file)):
        code, _, errors = call(*arguments)
        assert code == 2
        assert f"out: {arguments[1]} exists; give another name, or overwrite (--overwrite)" in errors
    assert before == {path: path.read_bytes() for path in (file, *folder.iterdir())}

    assert call(viar_, folder, "--overwrite")[0] == 0
    assert (folder / "notes.txt").read_text() == "kept"
    assert call(folder, file, "--overwrite")[0] == 0
    assert list(tmp_path.glob(".*")) == []  # nothing of it is left beside
    same(torch.load(file), golden_state("viar"))


def test_what_a_killed_conversion_left_beside_its_folder_is_gone_after_the_next(
    call: Call, tmp_path: Path
) -> None:
    source, out = write(golden_state("viar"), tmp_path / "a.pth"), tmp_path / "out"
    assert call(source, out)[0] == 0
    (tmp_path / ".out.partial").mkdir()  # killed when the folder was there, and before it tidied up
    (tmp_path / ".out.partial.lock").touch()
    assert call(source, out, "--overwrite")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "out"}


def test_the_command_takes_the_folder_one_stands_in(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, here = write(golden_state("var"), tmp_path / "a.pth"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert call(source, ".")[0] == 0
    assert {"config.json", "model.safetensors"} <= {path.name for path in Path().iterdir()}


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_interrupted_conversion_leaves_everything_as_it_was(
    overwrite: bool, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(golden_state("var"), tmp_path / "a.pth")
    call(source, tmp_path / "folder")
    out = tmp_path / "b.safetensors"
    if overwrite:
        out.write_text("before")

    def interrupted(tensors: State, path: Path) -> None:
        path.write_text("half")
        raise ValueError("no space left")

    monkeypatch.setattr(viar.checkpoints.convert, "save_tensors", interrupted)
    names = {path.name for path in tmp_path.iterdir()}
    assert call(tmp_path / "folder", out, "--overwrite")[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == names
    assert not overwrite or out.read_text() == "before"


def test_the_command_ends_with_a_message_where_it_cannot_convert(call: Call, tmp_path: Path) -> None:
    source, folder, odd = write(golden_state("var"), tmp_path / "a.pth"), tmp_path / "f", tmp_path / "odd"
    assert call(source, folder)[0] == 0
    odd.mkdir()
    (odd / "config.json").write_text("{}")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((folder / "config.json").read_text())
    save_file({"head.bias": torch.zeros(64)}, damaged / "model.safetensors")
    for arguments, message in [
        ((tmp_path / "none.pth", tmp_path / "x"), "none.pth: no such file"),
        ((source, tmp_path / "x.pth"), "out: a checkpoint becomes a folder, got"),
        ((source, source, "--overwrite"), "out: a checkpoint becomes a folder, got"),
        ((folder, tmp_path / "x"), "out: a folder becomes a file ending in .safetensors or .pth, got"),
        ((folder, tmp_path / "x.pth", "--num-heads", 4), "has them; leave them"),
        ((folder, tmp_path / "x.pth", "--sides", 1, 2), "has them; leave them"),
        ((odd, tmp_path / "x.pth"), "expected config.json and model.safetensors, found no model.safetensors"),
        ((damaged, tmp_path / "x.pth"), "damaged: not a model of this package: its weights are not those"),
    ]:
        code, _, errors = call(*arguments)
        assert code == 2
        assert message in errors
    (tmp_path / "file").touch()
    code, _, errors = call(source, tmp_path / "file", "--overwrite")
    assert (code, "is a file; give another name" in errors) == (2, True)
    (tmp_path / "d.pth").mkdir()
    code, _, errors = call(folder, tmp_path / "d.pth", "--overwrite")
    assert (code, "is a folder; give another name" in errors) == (2, True)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.pth").exists()


def test_help_of_the_command_lists_its_flags(call: Call) -> None:
    code, output, _ = call("--help")
    assert code == 0
    for flag in ("SOURCE OUT", "--sides", "--num-heads", "--overwrite"):
        assert flag in output
