"""Generation, editing and training on a device, against the CPU; see the fixture `device`."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import assert_near, never_waiting
from rich.console import Console
from tiny_models import tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor, nn

from viar import (
    Adaptive,
    Budget,
    NextScaleTransformer,
    Sampling,
    Tokenizer,
    edit,
    generate,
    generate_series,
    prepare_inference,
    sample_tokens,
)
from viar.data import TensorImages
from viar.training import TrainConfig, cross_entropy, train_tokenizer, train_transformer, validation_loss

pytestmark = [
    pytest.mark.gpu,
    # PyTorch has much to say about a GPU that is no fault of the code under test.
    pytest.mark.filterwarnings("default::UserWarning", "error::deqlib.NonConvergenceWarning"),
]

LABELS = [0, 1, 2, 3, 0, 1]  # 3: of no class
KINDS = ("explicit", "implicit")
by_kind = pytest.mark.parametrize("kind", KINDS)
FIXED: dict[str, dict[str, Any]] = {
    "as configured": {},
    "the most likely token": {"top_k": 1},
    "all tokens, without guidance": {"top_k": None, "top_p": None, "cfg": 0.0},
    "guidance reused": {"guidance_reuse": 1, "cfg": 3.0},
    "falling counts": {"iterations": (4, 2)},
    "a budget": {"iterations": Budget(evaluations=9)},
    "a warm start": {"iterations": 2, "warm_start": True},
    "a cache of iterates": {"iterations": (3, 2), "cache": "iterate"},
}
SETTINGS = {**FIXED, "adaptive": {"iterations": Adaptive(rtol=1e-2)}}


def cases(settings: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    """Both trunks with all settings that they take."""
    of_implicit = ("iterations", "warm_start", "cache")
    found = [
        pytest.param(kind, chosen, id=f"{kind}, {name}")
        for kind in KINDS
        for name, chosen in settings.items()
        if kind == "implicit" or not any(key in chosen for key in of_implicit)
    ]
    return pytest.mark.parametrize(("kind", "chosen"), found)


def pair(
    kind: str, device: torch.device | str = "cpu", **changes: Any
) -> tuple[NextScaleTransformer, Tokenizer]:
    """The same models on every device."""
    return tiny_transformer(kind, **changes).to(device), tiny_tokenizer().to(device)


# Generation ----------------------------------------------------------------------------------------------


@cases(SETTINGS)
def test_tokens_are_those_of_the_cpu(kind: str, chosen: dict[str, Any], device: torch.device) -> None:
    sampling = Sampling(seed=3, **chosen)
    expected, found = (sample_tokens(*pair(kind, where), LABELS, sampling) for where in ("cpu", device))
    assert all(tokens.device.type == device.type for tokens in found.tokens)
    both = expected.certain & found.certain.cpu()
    assert both.sum() >= len(LABELS) - 2
    for ours, theirs in zip(found.tokens, expected.tokens, strict=True):
        assert ours.cpu()[both].equal(theirs[both])
    assert_near(found.f_hat.cpu()[both], expected.f_hat[both], 1e-4)


@by_kind
def test_mixtures_of_codes_are_those_of_the_cpu(kind: str, device: torch.device) -> None:
    expected, found = (
        generate(*pair(kind, where), LABELS, seed=3, more_smooth=True) for where in ("cpu", device)
    )
    assert_near(found, expected, 1e-3)


@by_kind
def test_images_with_a_report_are_those_without(kind: str, device: torch.device) -> None:
    models = pair(kind, device)
    images, report = generate(*models, LABELS, seed=3, return_report=True)
    assert_near(generate(*models, torch.tensor(LABELS, device=device), seed=3), images, 1e-5)
    assert images.device.type == device.type
    assert len(report.scales) == 3
    assert all(scale.seconds > 0 for scale in report.scales)


@by_kind
def test_an_image_does_not_depend_on_its_batch(kind: str, device: torch.device) -> None:
    models, sampling = pair(kind, device), Sampling(seed=1)
    together = sample_tokens(*models, LABELS, sampling)
    assert together.certain.sum() >= len(LABELS) - 1
    for start, stop in ((0, 1), (1, 3), (3, 6)):
        part = sample_tokens(*models, LABELS[start:stop], sampling, first_index=start)
        both = part.certain & together.certain[start:stop]
        for ours, theirs in zip(part.tokens, together.tokens, strict=True):
            assert ours[both].equal(theirs[start:stop][both])


def test_a_series_is_the_same_files_in_batches_of_any_size(device: torch.device, tmp_path: Path) -> None:
    found = []
    for batch_size in (1, 4, 7):
        folder = tmp_path / str(batch_size)
        console = Console(file=io.StringIO())
        generate_series(*pair("implicit", device), folder, 7, batch_size=batch_size, console=console)
        found.append({path.name: path.read_bytes() for path in folder.glob("*.png")})
    assert len(found[0]) == 7
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_kind
def test_weights_of_half_precision_say_nearly_the_same(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    labels, inputs, _ = batch("cpu")
    with torch.no_grad():
        expected = tiny_transformer(kind)(labels, inputs)
        model, tokenizer = pair(kind, device)
        prepare_inference(model, tokenizer, dtype=dtype)
        assert model.trunk.weight_type == dtype
        assert_near(model(labels.to(device), inputs.to(device)), expected, 0.1)
    images = generate(model, tokenizer, LABELS)
    assert images.shape == (6, 3, 6, 6)
    assert ((images >= 0) & (images <= 1)).all()


def agreeing(ours: Tensor, theirs: Tensor) -> int:
    """In how many samples they are the same up to rounding; a code as near as another may be either."""
    return int(((ours.cpu() - theirs).abs().flatten(1).amax(1) < 1e-3).sum())


def test_the_tokenizer_reads_and_draws_as_on_the_cpu(device: torch.device) -> None:
    images = uniform(6, 3, 6, 6) * 2 - 1
    expected, here = tiny_tokenizer(), tiny_tokenizer().to(device)
    tokens = here.encode(images.to(device))
    assert agreeing(torch.cat(tokens, 1), torch.cat(expected.encode(images), 1)) >= 5
    assert_near(here.decode(tokens), expected.decode([t.cpu() for t in tokens]), 1e-4)
    assert_near(here.next_scale_inputs(tokens), expected.next_scale_inputs([t.cpu() for t in tokens]), 1e-4)


@pytest.mark.parametrize("keep", ["features", "codes"])
@by_kind
def test_an_edited_picture_is_that_of_the_cpu(kind: str, keep: str, device: torch.device) -> None:
    images, mask = uniform(6, 3, 6, 6), torch.ones(6, 6)
    mask[2:5, 1:4] = 0
    expected, found = (
        edit(*pair(kind, where), images.to(where), mask.to(where), LABELS, keep=keep)
        for where in ("cpu", device)
    )
    assert found.device.type == device.type
    assert agreeing(found, expected) >= 4
    # A mask that lies on the host serves too.
    again = edit(*pair(kind, device), images.to(device), mask, LABELS, keep=keep)
    assert_near(again, found, 1e-5)


# Training ------------------------------------------------------------------------------------------------


def batch(device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, inputs and targets of a few pictures, computed on the CPU."""
    labels, tokenizer = torch.arange(12) % 3, tiny_tokenizer()
    images = uniform(12, 3, 6, 6) * 0.4 - 0.9 + 0.6 * labels.view(-1, 1, 1, 1)
    tokens = tokenizer.encode(images)
    return labels.to(device), tokenizer.next_scale_inputs(tokens).to(device), torch.cat(tokens, 1).to(device)


def loss_of(model: NextScaleTransformer, seed: int = 5) -> Tensor:
    """In training mode, with the depth that the seed says."""
    device, dtype = model.pos_embed.device, model.pos_embed.dtype
    labels, inputs, targets = batch(device)
    generator = torch.Generator().manual_seed(seed)
    return cross_entropy(model.train()(labels, inputs.to(dtype), generator=generator), targets)


def gradients(model: NextScaleTransformer, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@by_kind
def test_gradients_are_those_of_float64_on_the_cpu(kind: str, device: torch.device) -> None:
    exact, here = tiny_transformer(kind).double(), tiny_transformer(kind).to(device)
    expected, found = loss_of(exact), loss_of(here)
    assert_near(found, expected, 1e-5)
    assert_near(gradients(here, found), gradients(exact, expected), 1e-3)


@by_kind
def test_a_mean_loss_of_pictures_is_that_of_the_cpu(kind: str, device: torch.device) -> None:
    data = TensorImages(uniform(8, 3, 6, 6) * 2 - 1, torch.arange(8) % 3)
    expected, found = (validation_loss(*pair(kind, where), data, batch_size=5) for where in ("cpu", device))
    assert abs(found - expected) < 0.02 * expected  # a code as near as another may be either


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_kind
def test_training_under_autocast_learns(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    model = tiny_transformer(kind).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=256.0)
    exact, losses = float(loss_of(model, 0).detach()), []
    for step in range(4):
        with torch.autocast(device.type, dtype=dtype):
            loss = loss_of(model, step)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - exact) < 0.05 * exact
    assert losses[-1] < 0.9 * losses[0]


@by_kind
def test_a_step_that_overflows_is_left_out(kind: str, device: torch.device) -> None:
    model = tiny_transformer(kind).to(device)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60)
    with torch.autocast(device.type, dtype=torch.float16):
        loss = loss_of(model)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**59
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_learns_on_the_device(
    precision: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        if precision == "fp16":
            pytest.skip("fp16 is refused on a CPU")
    data = TensorImages(
        uniform(24, 3, 6, 6) * 0.2 - 0.9 + 0.6 * (torch.arange(24) % 3).view(-1, 1, 1, 1),
        torch.arange(24) % 3,
    )
    steps = 24 if precision == "fp16" else 8  # the scaler leaves out the first ones
    config = TrainConfig(steps=steps, batch_size=24, lr=1e-2, mixed_precision=precision, save_every=1e9)
    console = Console(file=io.StringIO())
    tokenizer = tiny_tokenizer()
    train_tokenizer(tokenizer, data, tmp_path / "tokenizer", config, revive_every=2, console=console)
    model = tiny_transformer()
    before = validation_loss(model, tiny_tokenizer(), data)
    train_transformer(model, tiny_tokenizer(), data, tmp_path / "model", config, console=console)
    assert model.pos_embed.device.type == device.type
    assert validation_loss(model, tiny_tokenizer().to(device), data) < 0.95 * before
    for kind, folder in ((Tokenizer, "tokenizer"), (NextScaleTransformer, "model")):
        loaded: nn.Module = kind.from_pretrained(tmp_path / folder)
        assert next(loaded.parameters()).device.type == "cpu"


def test_a_state_goes_from_one_device_to_the_other(device: torch.device, tmp_path: Path) -> None:
    def step(model: NextScaleTransformer, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    here = tiny_transformer().to(device)
    optimizer = torch.optim.AdamW(here.parameters(), lr=1e-3)
    step(here, optimizer)
    file = tmp_path / "state.pt"
    torch.save({"model": here.state_dict(), "optimizer": optimizer.state_dict()}, file)
    here.save_pretrained(tmp_path / "model")
    there = NextScaleTransformer.from_pretrained(tmp_path / "model")
    assert_near(there.state_dict(), here.state_dict(), 0)
    other = torch.optim.AdamW(there.parameters(), lr=1e-3)
    other.load_state_dict(torch.load(file, map_location="cpu")["optimizer"])
    step(here, optimizer)
    step(there, other)
    assert_near(there.state_dict(), here.state_dict(), 1e-3)


# What must not wait --------------------------------------------------------------------------------------


@pytest.fixture
def labels_are_the_hosts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where the host may read them, they are not: that is no wait."""
    if device.type == "cpu":
        monkeypatch.setattr(NextScaleTransformer, "check_labels", lambda self, labels: None)


@pytest.mark.usefixtures("labels_are_the_hosts")
@cases({**FIXED, "mixtures": {"more_smooth": True}})
def test_generation_by_fixed_counts_never_waits(
    kind: str, chosen: dict[str, Any], device: torch.device
) -> None:
    models = pair(kind, device)
    generate(*models, LABELS, **chosen)  # libraries are loaded
    with never_waiting(device):
        generate(*models, LABELS, **chosen)


@pytest.mark.usefixtures("labels_are_the_hosts")
@by_kind
def test_a_step_of_training_never_waits(kind: str, device: torch.device) -> None:
    model = tiny_transformer(kind, drop_path=0.2, label_dropout=0.5).to(device).train()
    labels, inputs, targets = batch(device)

    def step() -> None:
        cross_entropy(model(labels, inputs), targets).backward()

    step()
    with never_waiting(device):
        step()
