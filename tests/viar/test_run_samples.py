"""Pictures of a running training: what is on them, and that the training does not feel them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_train import (
    Interrupted,
    assert_same,
    fresh_tokenizer,
    fresh_transformer,
    interrupt_at,
    logged,
    pictures,
    settings,
)
from tiny_models import tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor, nn

import viar.training.loop
from viar import generate
from viar.data import TensorImages, save_grid
from viar.training import TrainConfig, train_tokenizer, train_transformer
from viar.training.samples import RunSamples, generated, reconstructed, undisturbed

Run = Callable[[Path, TrainConfig], nn.Module]


def run_transformer(folder: Path, config: TrainConfig, kind: str = "implicit") -> nn.Module:
    model = fresh_transformer() if kind == "implicit" else fresh_transformer(kind=kind)
    train_transformer(model, tiny_tokenizer(), pictures(), folder, config)
    return model


def run_explicit(folder: Path, config: TrainConfig) -> nn.Module:
    return run_transformer(folder, config, "explicit")


def run_tokenizer(folder: Path, config: TrainConfig) -> nn.Module:
    tokenizer = fresh_tokenizer()
    train_tokenizer(tokenizer, pictures(), folder, config, revive_every=2, held_out=pictures(20))
    return tokenizer


RUNS = pytest.mark.parametrize(
    "run", [run_transformer, run_explicit, run_tokenizer], ids=lambda function: function.__name__
)


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "samples").iterdir())}


def png(images: Tensor, columns: int, path: Path) -> bytes:
    save_grid(images, path, columns=columns)
    return path.read_bytes()


@RUNS
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "mixed_precision": "bf16", "workers": 1}])
def test_a_run_with_pictures_is_the_run_without_bit_for_bit(
    run: Run, changes: dict[str, Any], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    with_pictures = run(tmp_path / "with", settings(steps=5, sample_every=1, **changes))
    torch.set_rng_state(before)
    without = run(tmp_path / "without", settings(steps=5, sample_every=0, **changes))
    assert_same(with_pictures, without)
    assert logged(tmp_path / "with") == logged(tmp_path / "without")
    assert list(drawn(tmp_path / "with")) == [f"step-{step:06d}.png" for step in range(1, 6)]
    assert not (tmp_path / "without" / "samples").exists()


@RUNS
def test_a_run_that_goes_on_draws_the_pictures_of_one_that_was_never_interrupted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(steps=6, save_every=1e-9, sample_every=2)
    expected = run(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, viar.training.loop, "set_progress", after=False)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", config)
    assert list(drawn(tmp_path / "parts")) == ["step-000002.png", "step-000004.png"]
    assert_same(run(tmp_path / "parts", config), expected)
    assert drawn(tmp_path / "parts") == drawn(tmp_path / "whole")


def test_a_grid_shows_a_row_a_class_of_the_model_as_it_is_then(tmp_path: Path) -> None:
    model = run_transformer(tmp_path / "run", settings(steps=4, sample_every=2))
    labels = torch.arange(3).repeat_interleave(4)
    images = generate(model.eval(), tiny_tokenizer(), labels)
    assert drawn(tmp_path / "run")["step-000004.png"] == png(images, 4, tmp_path / "expected.png")
    shorter = run_transformer(tmp_path / "shorter", settings(steps=4, sample_every=3))
    assert_same(shorter, model)
    assert list(drawn(tmp_path / "shorter")) == ["step-000003.png"]


def test_of_many_classes_the_first_ten_are_drawn() -> None:
    images, columns, _ = generated(tiny_tokenizer())(tiny_transformer(num_classes=40))
    assert (len(images), columns) == (40, 4)


@pytest.mark.parametrize("count", [1, 5, 30])
def test_reconstructions_stand_below_their_originals_scale_by_scale(count: int) -> None:
    data = TensorImages(uniform(count, 3, 6, 6) * 2 - 1, torch.zeros(count))
    tokenizer = tiny_tokenizer()
    images, columns, names = reconstructed(data)(tokenizer)
    assert columns == min(count, 8)
    assert names == ["original", "to 1 x 1", "to 2 x 2", "to 3 x 3"]
    originals, *below = images.split(columns)
    chosen = [int((data.images.add(1).div(2) - one).abs().flatten(1).amax(1).argmin()) for one in originals]
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    tokens = tokenizer.encode(data.images[chosen])
    for num_scales, row in enumerate(below, start=1):
        torch.testing.assert_close(row, tokenizer.decode(tokens[:num_scales]).add(1).div(2))
    assert len(below) == 3


def test_without_held_out_images_a_tokenizer_draws_nothing(tmp_path: Path) -> None:
    config = settings(steps=2, sample_every=1)
    train_tokenizer(fresh_tokenizer(), pictures(), tmp_path / "a", config)
    nothing = TensorImages(torch.zeros(0, 3, 6, 6), torch.zeros(0))
    train_tokenizer(fresh_tokenizer(), pictures(), tmp_path / "b", config, held_out=nothing)
    assert not list(tmp_path.glob("*/samples"))


def test_a_new_run_removes_the_pictures_of_one_before_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for name in ("step-000009.png", "step-mine.png", "notes.txt"):
        (tmp_path / "samples" / name).touch()
    run_transformer(tmp_path, settings(steps=2, sample_every=2))
    assert list(drawn(tmp_path)) == ["notes.txt", "step-000002.png", "step-mine.png"]


def test_drawing_leaves_modes_generators_and_counts_as_they_were(tmp_path: Path) -> None:
    tokenizer = fresh_tokenizer().train()
    tokenizer.decoder.eval()  # frozen by its owner
    modes = [module.training for module in tokenizer.modules()]
    usage, state = tokenizer.quantizer.usage.clone(), torch.get_rng_state()

    def draw(model: nn.Module) -> Any:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.randn(3)
        return reconstructed(pictures())(model)

    RunSamples(tmp_path / "samples", draw, 1, 0).look(tokenizer, 1)
    assert [module.training for module in tokenizer.modules()] == modes
    assert tokenizer.quantizer.usage.equal(usage)
    assert torch.get_rng_state().equal(state)
    assert torch.is_grad_enabled()
    with pytest.raises(Interrupted), undisturbed(tokenizer):
        raise Interrupted
    assert [module.training for module in tokenizer.modules()] == modes


def test_a_picture_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Image.Image, file: Any, *_: Any) -> None:
        file.write(b"half")
        raise Interrupted

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(Interrupted):
        run_transformer(tmp_path, settings(steps=2, sample_every=1))
    assert list((tmp_path / "samples").iterdir()) == []
