"""Copies, pickles, averages and state dicts of the models of viar, at every moment."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pickles import restored
from tiny_models import IMPLICIT, SIDES, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import viar
from viar import NextScaleTransformer, Sampling, Tokenizer, generate, prepare_inference, sample_tokens
from viar.evaluation import Classifier
from viar.tokenizer.discriminator import Discriminator
from viar.training import FeatureDistance

KINDS: dict[str, Callable[[], nn.Module]] = {
    "tokenizer": tiny_tokenizer,
    "explicit": lambda: tiny_transformer("explicit", drop_path=0.3),
    "implicit": lambda: tiny_transformer("implicit", drop_path=0.3, label_dropout=0.5),
    "identity": lambda: tiny_transformer("implicit", trunk=replace(IMPLICIT, projection="identity")),
    "shared modulation": lambda: tiny_transformer("implicit", shared_modulation=True),
    "no attention scale": lambda: tiny_transformer("explicit", qk_norm=False),
    "classifier": lambda: Classifier(3, 8).eval(),
    "features": lambda: FeatureDistance(Classifier(3, 8).eval().features()),
    "discriminator": lambda: Discriminator(8, base_channels=4),
}
MODELS = [kind for kind in KINDS if kind not in ("tokenizer", "classifier", "features", "discriminator")]
LABELS = torch.tensor([0, 2])


def images(side: int) -> Tensor:
    return uniform(2, 3, side, side) * 2 - 1


def run(model: nn.Module) -> Tensor:
    """The output, with all that is random drawn from one seed."""
    torch.manual_seed(5)
    if isinstance(model, Tokenizer):
        return model(images(6)).reconstruction
    if isinstance(model, Classifier | Discriminator):
        return model(images(8))
    if isinstance(model, FeatureDistance):
        return model(images(8), images(8).flip(0))
    tokens = uniform(2, sum(side * side for side in SIDES) - 1, 4)
    return model(LABELS, tokens)


def made(model: nn.Module) -> Any:
    """What the model is for, under no gradient."""
    with torch.no_grad():
        if isinstance(model, NextScaleTransformer):
            return generate(model, tiny_tokenizer(), LABELS)
        return model.decode(model.encode(images(6))) if isinstance(model, Tokenizer) else run(model)


# What may happen to a model before it is copied


def generation(model: nn.Module) -> Any:
    training = model.training
    result = made(model.eval())
    model.train(training)
    return result


def training_step(model: nn.Module) -> None:
    training = model.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run(model.train()).square().sum().backward()
    optimizer.step()
    model.zero_grad()
    model.train(training)


def prepared(model: nn.Module) -> None:
    if isinstance(model, NextScaleTransformer):
        prepare_inference(model)
    elif isinstance(model, Tokenizer):
        prepare_inference(tiny_transformer(), model)


def frozen(model: nn.Module) -> None:
    model.requires_grad_(False).requires_grad_(True)


HAPPENINGS = (run, generation, training_step, prepared, frozen)


def check_twin(model: nn.Module, twin: nn.Module) -> None:
    kept = copy.deepcopy(model.state_dict())
    assert run(twin).equal(run(model))
    assert generation(twin).equal(generation(model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    # In training mode the tokenizer counts the use of its codes.
    assert all(v.equal(kept[name]) for name, v in model.state_dict().items() if not name.endswith("usage"))
    assert not run(twin).equal(run(model))


def check_twins(kind: str, happenings: Any, protocol: int | None) -> None:
    model = KINDS[kind]()
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    held = [happening(model) for happening in happenings]
    assert list(model.state_dict()) == keys
    assert abs(len(pickle.dumps(model)) - size) <= 8  # strides of another memory layout have other digits
    check_twin(model, copy.deepcopy(model))
    check_twin(model, restored(model, protocol))
    del held


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_makes_the_same_after_all_that_may_happen(kind: str) -> None:
    check_twins(kind, HAPPENINGS, None)


@given(st.sampled_from(list(KINDS)), st.lists(st.sampled_from(HAPPENINGS), max_size=3), st.integers(2, 5))
def test_a_twin_makes_the_same_whatever_happened_before(
    kind: str, happenings: list[Callable[[nn.Module], Any]], protocol: int
) -> None:
    check_twins(kind, happenings, protocol)


@pytest.mark.slow
def test_a_compiled_model_is_copied_without_what_the_compiler_made() -> None:
    model = tiny_transformer()
    size = len(pickle.dumps(model))
    prepare_inference(model, compile="eager")
    expected = generation(model)
    assert len(pickle.dumps(model)) < size + 2000  # PyTorch marks modules that it has seen
    for twin in (copy.deepcopy(model), restored(model, None)):
        assert generation(twin).equal(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_follows_its_model(kind: str) -> None:
    model = KINDS[kind]()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.25), use_buffers=True)
    average.update_parameters(model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        training_step(model)
        average.update_parameters(model)
        for name, value in model.state_dict().items():
            expected[name].lerp_(value, 0.75)
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    if kind in MODELS:
        assert generation(average.module).shape == (2, 3, 6, 6)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_without_values_takes_a_state_dict(kind: str, wrap: bool, assign: bool) -> None:
    model = KINDS[kind]()
    with torch.device("meta"):
        twin = type(model)(model.config) if kind in [*MODELS, "tokenizer"] else KINDS[kind]()
    outer = nn.Sequential(twin) if wrap else twin
    if not assign:
        outer.to_empty(device="cpu")
    prefix = "0." if wrap else ""
    outer.load_state_dict({prefix + name: v for name, v in model.state_dict().items()}, assign=assign)
    assert run(outer.eval()[0] if wrap else outer.eval()).equal(run(model))
    assert {t.device.type for t in [*twin.parameters(), *twin.buffers()]} == {"cpu"}


def test_the_default_device_does_not_matter_to_a_state_dict() -> None:
    model = tiny_transformer()
    twin = tiny_transformer(seed=1)
    with torch.device("meta"):
        twin.load_state_dict(model.state_dict())
    assert run(twin).equal(run(model))


@pytest.mark.parametrize("kind", MODELS)
def test_weights_that_were_loaded_in_inference_mode_are_trained(kind: str) -> None:
    model = KINDS[kind]()
    with torch.inference_mode():
        model.load_state_dict(KINDS[kind]().state_dict())
    run(model.train()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_that_is_filled_by_hand_has_its_mask_too() -> None:
    model = tiny_transformer()
    with torch.device("meta"):
        twin = NextScaleTransformer(model.config)
    twin.to_empty(device="cpu")
    with torch.no_grad():
        for own, other in zip(twin.parameters(), model.parameters(), strict=True):
            own.copy_(other)
    assert run(twin.eval()).equal(run(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*MODELS, "tokenizer"])
def test_a_model_of_another_type_works_as_a_whole(kind: str, dtype: torch.dtype) -> None:
    model = KINDS[kind]()
    twin = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        expected, actual = run(model), run(twin)
    eps = torch.finfo(dtype).eps
    assert (actual - expected).norm() < max(1e-5, 40 * eps) * expected.norm()
    if isinstance(model, NextScaleTransformer):
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        sample = sample_tokens(twin, tiny_tokenizer().to(dtype), LABELS, Sampling(top_k=1))
        assert sample.f_hat.isfinite().all()
    assert generation(twin).isfinite().all()
    run(twin).float().sum().backward()


def test_weights_below_float32_are_trained_and_measured_at_once() -> None:
    model = tiny_transformer()
    prepare_inference(model, dtype=torch.bfloat16)
    logits = run(model)
    assert logits.dtype == torch.float32
    logits.sum().backward()


@pytest.mark.parametrize(
    "value",
    [
        Sampling(iterations=viar.Adaptive(), cfg=2.0),
        viar.Budget(evaluations=9),
        viar.Adaptive(rtol=0.1),
        tiny_transformer().config,
        tiny_tokenizer().config,
    ],
    ids=lambda value: type(value).__name__,
)
def test_settings_are_equal_to_their_copies(value: Any) -> None:
    assert copy.deepcopy(value) == value
    for protocol in range(2, 6):
        assert pickle.loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("cache", ["equilibrium", "iterate"])
def test_a_copied_cache_goes_on_by_itself(cache: str) -> None:
    model = tiny_transformer()
    schedule = model.trunk.schedule(3, cache=cache)
    memory = model.trunk.new_cache(cache, schedule)
    embedding, cond = model.condition(LABELS)
    modulations = {name: m.detach() for name, m in model.trunk.modulate(cond).items()}
    with torch.no_grad():
        first = model.trunk(
            model.embed_scale(0, embedding, None), modulations, cache=memory, iterations=schedule[0]
        )
        assert first.x_BLC.shape == (2, 1, 16)
        twins = [memory, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))]
        x = model.embed_scale(1, embedding, uniform(2, 4, 2, 2))
        one, two, three = (
            model.trunk(x, modulations, cache=twin, iterations=schedule[1]).x_BLC for twin in twins
        )
    assert one.equal(two)
    assert one.equal(three)


def test_a_sample_is_copied_whole() -> None:
    sample = sample_tokens(tiny_transformer(), tiny_tokenizer(), LABELS, measure=True)
    for twin in (copy.deepcopy(sample), pickle.loads(pickle.dumps(sample))):
        assert twin.f_hat.equal(sample.f_hat)
        assert twin.scales == sample.scales


@pytest.mark.slow
def test_a_model_works_in_another_process() -> None:
    models = [KINDS[kind]() for kind in ("implicit", "tokenizer")]
    for model in models:
        training_step(model)
        model.share_memory()
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(numbers_of, models)
    for model, numbers in zip(models, found, strict=True):
        assert torch.tensor(numbers).equal(generation(model))


def numbers_of(model: nn.Module) -> Any:
    torch.set_num_threads(1)
    return generation(model).tolist()


def test_every_module_of_the_package_is_among_those_tested() -> None:
    tested = {kind for make in KINDS.values() for module in make().modules() for kind in type(module).__mro__}
    found = []
    for info in pkgutil.walk_packages(viar.__path__, "viar."):
        if info.name.endswith("__main__"):
            continue
        if info.name == "viar.app.page":  # no models; needs gradio, which is not there
            continue
        module = importlib.import_module(info.name)
        found += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == info.name]
    modules = [c for c in found if issubclass(c, nn.Module)]
    assert len(modules) > 8
    assert [c.__name__ for c in modules if c not in tested] == []
