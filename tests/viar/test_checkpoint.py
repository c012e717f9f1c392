"""The state of a run on disk: whole after any interruption, and refused where a byte of it is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

import viar.training.checkpoint
from viar.training.checkpoint import Checkpoint


class Counter:
    """Stands for anything that is registered."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def training(folder: Path, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Counter, Checkpoint]:
    torch.manual_seed(seed)
    accelerator = Accelerator()
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    counter = Counter()
    checkpoint = Checkpoint(accelerator, [model], [optimizer], folder / "state", every=1.0, seed=0)
    checkpoint.register(counter)
    return model, optimizer, counter, checkpoint


def step(model: nn.Module, optimizer: torch.optim.Optimizer, counter: Counter) -> None:
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    counter.count += 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """Folder with a state, and what the weights are two steps later."""
    folder = tmp_path_factory.mktemp("saved")
    *parts, checkpoint = training(folder, 0)
    step(*parts)
    checkpoint.state.step = 1
    checkpoint.save()
    step(*parts)
    step(*parts)
    return folder, [p.detach() for p in parts[0].parameters()]


def test_weights_moments_generators_and_what_is_registered_go_on(
    saved: tuple[Path, list[torch.Tensor]],
) -> None:
    folder, expected = saved
    model, optimizer, counter, checkpoint = training(folder, 1)
    assert checkpoint.restore() == []
    assert (checkpoint.state.step, counter.count) == (1, 1)
    step(model, optimizer, counter)
    step(model, optimizer, counter)
    assert all(p.equal(q) for p, q in zip(model.parameters(), expected, strict=True))


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@pytest.mark.parametrize("name", ["state.pt", "state.sha256"])
def test_a_flipped_bit_is_found(
    name: str, share: float, bit: int, saved: tuple[Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    whole, damaged = saved[0] / "state", tmp_path / "state"
    damaged.mkdir(exist_ok=True)
    for path in whole.iterdir():
        held = bytearray(path.read_bytes())
        if path.name == name:
            held[int(share * len(held))] ^= 1 << bit
        (damaged / path.name).write_bytes(held)
    with pytest.raises(ValueError, match=r"expected the state of this run, .* damaged files \(.*remove that"):
        training(tmp_path, 0)[-1].restore()


@pytest.mark.parametrize("name", ["state.pt", "state.sha256"])
def test_a_missing_file_is_named(name: str, saved: tuple[Path, list[torch.Tensor]], tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    for path in (saved[0] / "state").iterdir():
        if path.name != name:
            (tmp_path / "state" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=f"damaged files .*{name}"):
        training(tmp_path, 0)[-1].restore()


def test_a_state_is_on_the_disk_before_it_takes_the_place_of_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, checkpoint = training(tmp_path, 0)
    checkpoint.save()
    seen: list[str] = []
    rename = Path.rename

    def noted_rename(path: Path, target: Any) -> Path:
        seen.append(f"{path.name} to {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(viar.training.checkpoint, "flush", lambda path: seen.append(path.name))
    monkeypatch.setattr(Path, "rename", noted_rename)
    checkpoint.save()
    moves = ["state to state.old", tmp_path.name, "state.new to state", tmp_path.name]
    assert seen == ["state.pt", "state.sha256", "state.new", *moves]


def test_generators_of_processes_that_a_state_does_not_know_begin_elsewhere(
    saved: tuple[Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    """As a second process finds them, where the state was saved by one."""
    *_, checkpoint = training(saved[0], 0)
    started = torch.get_rng_state()
    held = torch.load(saved[0] / "state" / "state.pt", weights_only=True)
    drawn = []
    for known in ([], held["generators"]):
        checkpoint._put({**held, "generators": known})
        drawn.append(torch.rand(5))
    torch.set_rng_state(started)
    drawn.append(torch.rand(5))
    assert not any(a.equal(b) for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2])))
