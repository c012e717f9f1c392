"""Tokenizer: published numbers, the ladder of scales, training signals, saving and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_reference import (
    golden_images,
    golden_tensors,
    golden_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from viar.model.config import TokenizerConfig
from viar.model.scales import scale_slices
from viar.tokenizer import MultiScaleQuantizer, Tokenizer
from viar.tokenizer.quantizer import perplexity, phi_index
from viar.training import reconstruction_loss
from viar.training.losses import tokenizer_loss

SMALL = TokenizerConfig(
    sides=(1, 2, 3),
    codebook_size=16,
    code_channels=4,
    base_channels=4,
    multipliers=(1, 2),
    num_residual_blocks=1,
    num_groups=2,
)


def small(seed: int = 0, **changes: object) -> Tokenizer:
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TokenizerConfig(**{**SMALL.to_dict(), **changes}))
    for parameter in tokenizer.parameters():
        if parameter.ndim == 4:  # some convolutions start as nothing or as the identity
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
    # The default codes are near zero; these are as large as the features.
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    return tokenizer


def images_for(tokenizer: Tokenizer, batch: int = 2, seed: int = 0) -> Tensor:
    side = tokenizer.config.image_side
    return torch.rand((batch, 3, side, side), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def features_for(quantizer: MultiScaleQuantizer, batch: int = 2, seed: int = 0) -> Tensor:
    shape = (batch, quantizer.codebook.embedding_dim, quantizer.sides[-1], quantizer.sides[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Published numbers


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return golden_tensors()


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    return golden_tokenizer()


@pytest.fixture(scope="module")
def tokens(golden: dict[str, Tensor], published: Tokenizer) -> list[Tensor]:
    return [golden["tokens"][:, where] for where in scale_slices(published.config.sides)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_features_match_the_published_program(published: Tokenizer, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        close(published.features(golden_images()), golden["features"])


def test_tokens_match_the_published_program(published: Tokenizer, golden: dict[str, Tensor]) -> None:
    assert torch.cat(published.encode(golden_images()), dim=1).equal(golden["tokens"].long())


def test_f_hat_matches_the_published_program(
    published: Tokenizer, golden: dict[str, Tensor], tokens: list[Tensor]
) -> None:
    with torch.no_grad():
        close(published.quantizer.decode_tokens(tokens), golden["f_hat"])
        close(published.quantizer.quantize(golden["features"]).f_hat, golden["f_hat"])


def test_teacher_input_matches_the_published_program(
    published: Tokenizer, golden: dict[str, Tensor], tokens: list[Tensor]
) -> None:
    close(published.next_scale_inputs(tokens), golden["teacher_input"])


@pytest.mark.parametrize(("scales", "name"), [(4, "reconstruction"), (1, "reconstruction_scale0")])
def test_images_match_the_published_program(
    published: Tokenizer, golden: dict[str, Tensor], tokens: list[Tensor], scales: int, name: str
) -> None:
    close(published.decode(tokens[:scales]), golden[name])


# Scales


@pytest.mark.parametrize(
    ("num_scales", "num_phi", "expected"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),  # scale 2 is half way between two ticks
        (14, 4, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (4, 4, [0, 1, 2, 3]),
        (5, 2, [0, 0, 0, 1, 1]),  # the middle is a tie: the lower one
        (4, 1, [0, 0, 0, 0]),
        (3, 0, [0, 1, 2]),
        (1, 4, [0]),
    ],
)
def test_scales_share_refinements_by_the_nearest_tick(
    num_scales: int, num_phi: int, expected: list[int]
) -> None:
    assert [phi_index(scale, num_scales, num_phi) for scale in range(num_scales)] == expected


@st.composite
def tokenizers(draw: st.DrawFn) -> Tokenizer:
    sides = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True))
    return small(
        seed=draw(st.integers(0, 99)),
        sides=tuple(sorted(sides)),
        multipliers=tuple(draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3))),
        patch=draw(st.integers(1, 3)),
        num_phi=draw(st.sampled_from([0, 1, 2, 4])),
        codebook_size=draw(st.integers(1, 20)),
        code_channels=draw(st.integers(1, 5)),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tokenizers(), st.integers(1, 3))
def test_any_ladder_round_trips_shapes_and_sums(tokenizer: Tokenizer, batch: int) -> None:
    config = tokenizer.config
    images = images_for(tokenizer, batch)
    tokens = tokenizer.encode(images)
    assert [tuple(t.shape) for t in tokens] == [(batch, side * side) for side in config.sides]
    assert all(t.dtype == torch.int64 for t in tokens)

    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    for scales in range(1, len(tokens)):
        assert tokenizer.decode(tokens[:scales]).shape == images.shape

    with torch.no_grad():
        quantized = tokenizer.quantizer.quantize(tokenizer.features(images))
        summed = tokenizer.quantizer.decode_tokens(tokens)
    assert all(a.equal(b) for a, b in zip(quantized.tokens, tokens, strict=True))
    torch.testing.assert_close(summed, quantized.f_hat, atol=1e-5, rtol=1e-5)
    length = sum(side * side for side in config.sides)
    assert quantized.vectors.shape == (batch * length, config.code_channels)
    inputs = tokenizer.next_scale_inputs(tokens)
    assert inputs.shape == (batch, length - config.sides[0] ** 2, config.code_channels)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(tokenizers())
def test_tokens_of_an_image_do_not_depend_on_its_batch(tokenizer: Tokenizer) -> None:
    images = images_for(tokenizer, batch=3)
    together = tokenizer.encode(images)
    for index in range(3):
        alone = tokenizer.encode(images[index : index + 1])
        assert all(a[index].equal(b[0]) for a, b in zip(together, alone, strict=True))


def test_tokens_are_the_nearest_codes_of_what_earlier_scales_left() -> None:
    quantizer = small().quantizer
    features = features_for(quantizer)
    rest = features
    for scale, tokens in enumerate(quantizer.encode(features)):
        side = quantizer.sides[scale]
        vectors = F.adaptive_avg_pool2d(rest, side).flatten(2).transpose(1, 2)
        distances = (vectors[:, :, None] - quantizer.codebook.weight).norm(dim=-1)
        assert tokens.equal(distances.argmin(-1))
        added = quantizer.accumulate(torch.zeros_like(rest), quantizer.embed(tokens), scale)
        rest = rest - added.detach()


def test_accumulating_scale_by_scale_gives_teacher_inputs_and_f_hat() -> None:
    quantizer = small().quantizer
    tokens = quantizer.encode(features_for(quantizer))
    f_hat = torch.zeros(2, 4, 3, 3)
    inputs = []
    for scale, tokens_Bl in enumerate(tokens):
        f_hat = quantizer.accumulate(f_hat, quantizer.embed(tokens_Bl), scale)
        if scale < 2:
            inputs.append(quantizer.next_input(f_hat, scale).flatten(2).transpose(1, 2))
    torch.testing.assert_close(torch.cat(inputs, dim=1), quantizer.next_scale_inputs(tokens))
    torch.testing.assert_close(f_hat, quantizer.decode_tokens(tokens))


def test_quantizer_is_unchanged_by_autocast() -> None:
    quantizer = small().quantizer
    features = features_for(quantizer)
    expected = quantizer.quantize(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = quantizer.quantize(features)
        inputs = quantizer.next_scale_inputs(actual.tokens)
    assert actual.f_hat.equal(expected.f_hat)
    assert actual.loss.equal(expected.loss)
    assert inputs.equal(quantizer.next_scale_inputs(expected.tokens))


# Patches


def test_a_patch_gives_a_position_the_pixels_of_a_square_and_takes_them_back() -> None:
    tokenizer = small(patch=2, multipliers=(1,))
    seen = {}
    tokenizer.encoder.conv_in.register_forward_pre_hook(lambda _, given: seen.update(stem=given[0]))
    tokenizer.decoder.conv_out.register_forward_hook(lambda _, __, out: seen.update(out=out))
    images = images_for(tokenizer)
    with torch.no_grad():
        made = tokenizer(images).reconstruction
    assert images.shape == made.shape == (2, 3, 6, 6)
    for channel in range(3):
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            place = 4 * channel + 2 * row + column
            assert seen["stem"][:, place].equal(images[:, channel, row::2, column::2])
            assert seen["out"][:, place].equal(made[:, channel, row::2, column::2])


def test_images_are_as_large_as_scales_patches_and_levels_make_them() -> None:
    sides = {patch: small(patch=patch).config.image_side for patch in (1, 2, 5)}
    assert sides == {1: 6, 2: 12, 5: 30}
    names = small(patch=2).state_dict().keys()
    assert names == small().state_dict().keys()


def test_settings_of_a_tokenizer_without_patches_are_those_of_earlier_releases() -> None:
    assert "patch" not in SMALL.to_dict()
    assert TokenizerConfig.from_dict(SMALL.to_dict()).patch == 1
    config = TokenizerConfig(patch=2)
    assert TokenizerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("patch", [0, -1])
def test_a_patch_without_pixels_is_refused(patch: int) -> None:
    with pytest.raises(ValueError, match=f"patch must be at least 1, got {patch}"):
        TokenizerConfig(patch=patch)


# Training


def test_encoder_and_decoder_start_as_linear_maps() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(SMALL)
    for block in tokenizer.modules():
        if type(block).__name__ in ("ResidualBlock", "AttentionBlock"):
            x = torch.randn(2, block.norm1.num_channels if hasattr(block, "norm1") else 8, 3, 3)
            with torch.no_grad():
                assert block(x).equal(block.shortcut(x) if hasattr(block, "shortcut") else x)


def test_a_scale_starts_by_adding_the_codes_nearest_to_what_was_left() -> None:
    torch.manual_seed(0)
    quantizer = Tokenizer(SMALL).quantizer
    tokens = [torch.arange(9).view(1, 9)]
    codes = quantizer.codebook.weight.T.unflatten(1, (4, 4)).flatten(1)[:, :9].view(1, 4, 3, 3)
    added = quantizer.accumulate(torch.zeros(1, 4, 3, 3), quantizer.embed(tokens[0]), 2)
    torch.testing.assert_close(added, codes)


def test_gradient_goes_straight_through_the_quantizer() -> None:
    quantizer = small().quantizer
    features = features_for(quantizer).requires_grad_()
    f_hat = quantizer.quantize(features).f_hat
    probe = torch.randn(f_hat.shape, generator=torch.Generator().manual_seed(1))
    (f_hat * probe).sum().backward()
    assert features.grad is not None
    assert features.grad.equal(probe)
    assert quantizer.codebook.weight.grad is None


def test_loss_and_its_gradients_match_a_direct_computation() -> None:
    quantizer = small(commitment=0.3).quantizer
    features = features_for(quantizer).requires_grad_()
    output = quantizer.quantize(features)
    names = ["features", *(name for name, _ in quantizer.named_parameters())]
    wanted = [features, *quantizer.parameters()]
    actual = torch.autograd.grad(output.loss, wanted, allow_unused=True)

    sums = [quantizer.decode_tokens(output.tokens[: count + 1]) for count in range(3)]
    loss = sum(
        0.3 * (f_hat.detach() - features).square().mean() + (f_hat - features.detach()).square().mean()
        for f_hat in sums
    )
    torch.testing.assert_close(output.loss, loss / 3)
    expected = torch.autograd.grad(loss / 3, wanted, allow_unused=True)
    for name, a, b in zip(names, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_training_forward_reaches_every_parameter() -> None:
    tokenizer = small(num_phi=0)
    images = images_for(tokenizer)
    output = tokenizer(images)
    (reconstruction_loss(images, output.reconstruction, "l1+l2+edges") + output.loss).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_usage_is_a_moving_average_updated_in_training_only() -> None:
    quantizer = small().quantizer
    first, second = features_for(quantizer, seed=1), features_for(quantizer, seed=2)

    def hits(features: Tensor) -> Tensor:
        return torch.stack([t.flatten().bincount(minlength=16) for t in quantizer.encode(features)]).float()

    quantizer.eval()
    quantizer.quantize(first)
    assert not quantizer.usage.any()
    assert quantizer.codebook_usage() == [0.0] * 3
    quantizer.train()
    quantizer.quantize(first)
    assert quantizer.usage.equal(hits(first))
    quantizer.quantize(second)
    torch.testing.assert_close(quantizer.usage, 0.99 * hits(first) + 0.01 * hits(second))


def test_codebook_usage_counts_codes_above_three_percent_of_a_uniform_share() -> None:
    quantizer = small(codebook_size=4).quantizer
    quantizer.usage.copy_(
        torch.tensor([[100.0, 100, 100, 100], [398, 2, 0, 0], [392.0, 4, 4, 0]])
    )  # a uniform share is 100 hits a scale
    assert quantizer.codebook_usage() == [1.0, 0.25, 0.75]
    assert quantizer.total_codebook_usage() == 1.0


def batch_vectors(images: int, seed: int = 0) -> Tensor:
    """As of a batch: (images * 14, 4), scale by scale."""
    return torch.randn((images * 14, 4), generator=torch.Generator().manual_seed(seed))


def test_revival_replaces_dead_codes_and_only_those() -> None:
    quantizer = small(codebook_size=4).quantizer
    quantizer.usage.copy_(torch.tensor([[10.0, 0, 2, 0], [10.0, 0, 10, 0], [8.0, 0, 40, 0]]))
    before = quantizer.codebook.weight.detach().clone()
    vectors = batch_vectors(1) + 10
    revived = quantizer.revive_dead_codes(vectors, threshold=0.1, generator=torch.Generator().manual_seed(0))
    after = quantizer.codebook.weight.detach()
    assert revived == 2
    assert after[[0, 2]].equal(before[[0, 2]])
    rows = [(vectors == after[code]).all(1).nonzero().flatten().tolist() for code in (1, 3)]
    assert [len(row) for row in rows] == [1, 1]
    assert rows[0] != rows[1]
    assert quantizer.usage[:, [1, 3]].equal(torch.tensor([[3.0, 3], [5, 5], [12, 12]]))
    again = quantizer.revive_dead_codes(vectors, threshold=0.1, generator=torch.Generator().manual_seed(0))
    assert again == 0


def test_revival_with_few_vectors_leaves_the_rest_for_later() -> None:
    quantizer = small(codebook_size=32).quantizer
    quantizer.usage[:, 0] = 100
    vectors = batch_vectors(1)
    assert quantizer.revive_dead_codes(vectors, threshold=0.1, generator=torch.Generator()) == 14
    assert (quantizer.codebook.weight[:, None] == vectors).all(-1).any(1).sum() == 14


def test_codes_are_revived_where_vectors_are_far_from_all_others() -> None:
    quantizer = small(codebook_size=2).quantizer
    with torch.no_grad():
        quantizer.codebook.weight.zero_()
    quantizer.usage[:, 0] = 100
    vectors = torch.zeros(14, 4)
    vectors[9] = 1.0  # all others are met exactly
    assert quantizer.revive_dead_codes(vectors, generator=torch.Generator().manual_seed(0)) == 1
    assert quantizer.codebook.weight[1].equal(vectors[9])


@pytest.mark.parametrize("bad", [1, 14])
def test_vectors_that_are_not_finite_become_no_codes(bad: int) -> None:
    quantizer = small(codebook_size=4).quantizer
    quantizer.usage[:, 0] = 100
    codes, usage = quantizer.codebook.weight.detach().clone(), quantizer.usage.clone()
    vectors = batch_vectors(1)
    vectors[:bad] = torch.nan
    assert quantizer.revive_dead_codes(vectors, threshold=0.1, generator=torch.Generator()) == 0
    quantizer.init_codebook(vectors, generator=torch.Generator())
    assert quantizer.codebook.weight.equal(codes)
    assert quantizer.usage.equal(usage)


def test_nothing_is_dead_before_training() -> None:
    quantizer = small().quantizer
    vectors = batch_vectors(1)
    assert quantizer.revive_dead_codes(vectors, threshold=1.0, generator=torch.Generator()) == 0


def test_the_codebook_starts_from_data_and_without_a_past() -> None:
    quantizer = small().quantizer
    features = features_for(quantizer, batch=8)
    vectors = quantizer.quantize(features).vectors
    assert quantizer.usage.any()
    quantizer.init_codebook(vectors, generator=torch.Generator().manual_seed(1))
    assert not quantizer.usage.any()
    assert quantizer.codebook.weight.requires_grad
    first = quantizer.codebook.weight.detach().clone()
    for seed, same in ((1, True), (2, False)):
        quantizer.init_codebook(vectors, generator=torch.Generator().manual_seed(seed))
        assert quantizer.codebook.weight.equal(first) is same


def test_a_scale_of_one_vector_an_image_gets_codes_as_one_of_many_does() -> None:
    quantizer = small(codebook_size=2, sides=(1, 3)).quantizer
    few, many = torch.tensor([1.0, 0, 0, 0]).repeat(6, 1), torch.zeros(54, 4)
    many[::2, 1] = 0.5  # their error is half of that of a first scale without a code of its own
    quantizer.init_codebook(torch.cat([few, many]), generator=torch.Generator().manual_seed(0))
    codes = quantizer.codebook.weight.detach()
    torch.testing.assert_close(codes[codes[:, 0].argmax()], few[0])


def test_what_is_left_after_each_scale_is_a_share_of_the_features() -> None:
    quantizer = small().quantizer
    features = features_for(quantizer)
    output = quantizer.quantize(features)
    sums = [quantizer.decode_tokens(output.tokens[:count]) for count in (1, 2, 3)]
    expected = [(features - f_hat).square().sum() / features.square().sum() for f_hat in sums]
    torch.testing.assert_close(output.left, torch.stack(expected).detach())
    assert not output.left.requires_grad


def test_perplexity_is_the_number_of_codes_that_share_the_hits() -> None:
    hits = torch.tensor([[4.0, 0, 0, 0], [3, 3, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    torch.testing.assert_close(perplexity(hits), torch.tensor([1.0, 2, 4, 1]))
    torch.testing.assert_close(perplexity(torch.tensor([1.0, 3])), torch.tensor(4 / 3**0.75))


@pytest.mark.parametrize(("kind", "expected"), [("l1", 0.5), ("l2", 0.25), ("l1+l2", 0.75), ("edges", 0.0)])
def test_reconstruction_loss_of_a_constant_error(kind: str, expected: float) -> None:
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    loss = reconstruction_loss(images, images + 0.5, kind)
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_edge_loss_of_a_ramp_grows_with_the_pooling() -> None:
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)  # neighbours differ by 1, then 2, then 4
    torch.testing.assert_close(
        reconstruction_loss(torch.zeros_like(ramp), ramp, "edges"), torch.tensor(7 / 3)
    )


def test_a_few_steps_of_training_lower_the_loss() -> None:
    tokenizer = small()
    images = images_for(tokenizer, batch=4)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        output = tokenizer(images)
        loss = reconstruction_loss(images, output.reconstruction) + output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_the_first_part_of_a_batch_changes_codes_and_later_ones_keep_them() -> None:
    tokenizer = small(codebook_size=32)
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight[8:] = 1e4  # out of reach
    parts = [(images,) for images in images_for(tokenizer, batch=8).split(4)]
    starts, revives = (
        tokenizer_loss(tokenizer, kind="l1", revive_every=2, init_codebook=start, seed=0)
        for start in (True, False)
    )
    for step_loss, step in ((revives, 1), (starts, 0)):
        before = tokenizer.quantizer.codebook.weight.detach().clone()
        _, first = step_loss(tokenizer, parts[0], step)
        after = tokenizer.quantizer.codebook.weight.detach().clone()
        assert not after.equal(before)
        _, last = step_loss(tokenizer, parts[1], step)
        assert tokenizer.quantizer.codebook.weight.equal(after)
        assert last.get("revived") is first.get("revived")
    with pytest.raises(ValueError, match="revive_every must be at least 1, got 0"):
        tokenizer_loss(tokenizer, kind="l1", revive_every=0, init_codebook=True, seed=0)


# Saving


def test_save_and_from_pretrained_round_trip(tmp_path: Path) -> None:
    tokenizer = small(num_phi=2, phi_ratio=0.25, sides=(1, 3))
    tokenizer(images_for(tokenizer))  # fills the usage buffer
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.config == tokenizer.config
    assert loaded.state_dict().keys() == tokenizer.state_dict().keys()
    for key, value in tokenizer.state_dict().items():
        assert loaded.state_dict()[key].equal(value), key
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_loading_incomplete_weights_is_an_error(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_residual_blocks": 1', '"num_residual_blocks": 2'))
    with pytest.raises(ValueError, match="missing: "):
        Tokenizer.from_pretrained(tmp_path)


def test_loading_an_unknown_setting_is_an_error(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"dropout"', '"drop_out"'))
    with pytest.raises(ValueError, match="drop_out"):
        Tokenizer.from_pretrained(tmp_path)


# Errors


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 6, 6),
        torch.zeros(2, 1, 6, 6),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 3, 6, 5),
        torch.zeros(2, 3, 6, 6, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be floating point of shape \(B, 3, 6, 6\), got"):
        small().encode(images)


def good_tokens() -> list[Tensor]:
    return [torch.zeros(2, side * side, dtype=torch.long) for side in (1, 2, 3)]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "1 to 3 tensors.*got 0 scales"),
        (torch.zeros(2, 14, dtype=torch.long), "got Tensor"),
        ([*good_tokens(), torch.zeros(2, 16, dtype=torch.long)], "got 4 scales"),
        ([good_tokens()[1]], r"tokens\[0\] must have shape \(2, 1\), got \(2, 4\)"),
        ([good_tokens()[0], good_tokens()[1][:1]], r"tokens\[1\] must have shape \(2, 4\), got \(1, 4\)"),
        ([torch.zeros(2, 1)], r"tokens\[0\] must be int64 or int32, got torch.float32"),
        ([torch.tensor(0)], r"tokens\[0\] must have shape"),
        ([torch.full((2, 1), 16)], r"tokens\[0\] must be codes in \[0, 16\), got 16 to 16"),
        ([torch.full((2, 1), -1)], r"tokens\[0\] must be codes in \[0, 16\)"),
    ],
)
def test_wrong_tokens_are_refused(tokens: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().decode(tokens)


def test_teacher_inputs_need_all_scales() -> None:
    with pytest.raises(ValueError, match="list of 3 tensors, one a scale, got 2 scales"):
        small().next_scale_inputs(good_tokens()[:2])


def test_wrong_feature_maps_scales_and_vectors_are_refused() -> None:
    tokenizer = small()
    quantizer = tokenizer.quantizer
    f_hat = torch.zeros(1, 4, 3, 3)
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"features must be .*\(B, 4, 3, 3\), got .*\(1, 4, 2, 2\)"):
        quantizer.encode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="f_hat must be"):
        tokenizer.decode_f_hat(torch.zeros(4, 3, 3))
    with pytest.raises(ValueError, match=r"embeddings must have shape \(1, 4, 2, 2\) at scale 1"):
        quantizer.accumulate(f_hat, f_hat, 1)
    with pytest.raises(ValueError, match=r"scale must be in \[0, 3\), got 3"):
        quantizer.accumulate(f_hat, f_hat, 3)
    with pytest.raises(ValueError, match=r"scale must be in \[0, 2\), got 2"):
        quantizer.next_input(f_hat, 2)
    with pytest.raises(ValueError, match="vectors must be those of whole images, 14 of each, got 30"):
        quantizer.init_codebook(torch.zeros(30, 4), generator=generator)
    with pytest.raises(ValueError, match="N at least 16, got"):
        quantizer.init_codebook(torch.zeros(15, 4), generator=generator)
    with pytest.raises(ValueError, match="N at least 1, got"):
        quantizer.revive_dead_codes(torch.zeros(3, 5), generator=generator)


def test_wrong_losses_are_refused() -> None:
    images = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"kind must be .*'l1', 'l2', 'edges'.* got \['lpips'\]"):
        reconstruction_loss(images, images, "l1+lpips")
    with pytest.raises(ValueError, match="reconstruction must have the shape of images"):
        reconstruction_loss(images, images[:, :1])
