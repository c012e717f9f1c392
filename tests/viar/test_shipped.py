"""The models that come with the package: whole, used where none are given, and how they are made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_broken_pictures import call
from tiny_models import tiny_tokenizer, tiny_transformer

import viar
from viar.data import load_data
from viar.evaluation import accuracy, judge, judge_network
from viar.files import file_digest
from viar.pretrained import fingerprint
from viar.weights import SHIPPED, load_shipped, ship, shipped_folder
from viar.weights.making import DATA

MOST_BYTES = 8_000_000  # of all that is shipped
TOLD = {"command": "viar train", "figures": {"class consistency": 0.5}}


def checksums(card: Path) -> dict[str, str]:
    """SHA-256 by name of the file, as a card tells them."""
    return dict(re.findall(r"^\| `([\w.]+)` \| `([0-9a-f]{64})` \|$", card.read_text(), re.M))


# What is there


@pytest.mark.parametrize("name", SHIPPED)
def test_the_bytes_of_shipped_models_are_those_that_their_cards_tell(name: str) -> None:
    for part in ("tokenizer", "transformer"):
        folder = shipped_folder(name) / part
        told = checksums(folder / "README.md")
        assert told.keys() == {path.name for path in folder.iterdir()} - {"README.md"}
        assert told == {file: file_digest(folder / file) for file in told}
        assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        card = (folder / "README.md").read_text()
        assert DATA[name] in card
        assert "| seed |" in card


def test_shipped_models_are_small() -> None:
    paths = list(shipped_folder(SHIPPED[0]).parent.rglob("*"))
    assert sum(path.stat().st_size for path in paths if path.is_file()) <= MOST_BYTES


def test_the_judge_of_the_shipped_models_pictures_comes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viar.evaluation.judging.train_classifier", None)  # would fail if it was called
    data = load_data("mnist", 32)
    shipped = judge(data)
    assert judge_network(shipped).name == "judge 3c1f72a4169b"  # by which the cards' figures are measured
    assert accuracy(shipped, data.validation) >= 0.97


def test_a_shipped_model_loads_in_float32_and_generates() -> None:
    model, tokenizer = load_shipped()
    assert not model.training
    assert not tokenizer.training
    assert {p.dtype for p in (*model.parameters(), *tokenizer.parameters())} == {torch.float32}
    assert model.config.num_classes == 10
    images = viar.generate(model, tokenizer, [3, 8], iterations=1)
    assert images.shape == (2, 3, 32, 32)
    assert images.std() > 0.1  # ink on paper


def test_a_name_that_is_not_shipped_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="name: expected one of mnist, got 'imagenet'"):
        load_shipped("imagenet")


# The command line


def test_commands_without_a_checkpoint_use_the_shipped_models_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, errors = call("generate", "--per-class", 1, "--iterations", 1)
    assert code == 0
    assert errors.startswith("the VIAR of handwritten digits (mnist) that comes with the package")
    assert not output.startswith("the VIAR")
    with Image.open("samples.png") as image:
        assert image.height > 10 * 32  # a row a class
    edit = ("edit", "--image", "samples.png", "--label", 3, "--box", 0, 0, 0.5, 0.5, "--iterations", 1)
    code, output, errors = call(*edit)
    assert code == 0
    assert errors.startswith("the VIAR of handwritten digits (mnist) that comes with the package")


@pytest.mark.parametrize("command", ["generate", "edit", "evaluate"])
@pytest.mark.parametrize("given", ["--model", "--tokenizer"])
def test_a_model_without_its_tokenizer_or_the_reverse_is_refused(
    command: str, given: str, tmp_path: Path
) -> None:
    flags: tuple[object, ...] = (given, tmp_path)
    if command == "edit":
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        flags += ("--image", tmp_path / "a.png", "--label", 1, "--box", 0, 0, 1, 1)
        flags += ("--out", tmp_path / "b.png")
    if command == "generate":
        flags += ("--out", tmp_path / "b.png")
    code, _, errors = call(command, *flags)
    assert code == 2
    assert errors.startswith(f"viar: {given}: given without --")
    assert errors.count("\n") == 1


# How they are made


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Any]:
    """What `ship` takes: runs of tiny models in name, and what is told of them."""
    tokenizer, model = tiny_tokenizer(), tiny_transformer()
    about = {"data": {"images": 24}, "train": {"steps": 2, "seed": 0}, "result": {"steps": 2, "seconds": 1.0}}
    for name, trained in {"tokenizer": tokenizer, "model": model}.items():
        trained.save_pretrained(tmp_path / name)
        run = about | ({} if name == "tokenizer" else {"tokenizer": fingerprint(tokenizer)})
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    told = tmp_path / "told.json"
    told.write_text(json.dumps({"tokenizer": TOLD, "transformer": TOLD}))
    return {"model": tmp_path / "model", "tokenizer": tmp_path / "tokenizer", "told": told, "name": "mnist"}


def test_two_runs_become_shipped_models_and_the_same_ones_the_same_bytes(
    runs: dict[str, Any], tmp_path: Path
) -> None:
    folder = ship(**runs, root=tmp_path / "weights")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = {
        f"{part}/{name}"
        for part in ("tokenizer", "transformer")
        for name in ("README.md", "config.json", "model.safetensors", "run.json")
    }
    assert {str(path.relative_to(folder)) for path in before} == names
    trained = load_file(runs["model"] / "model.safetensors")
    shipped = load_file(folder / "transformer" / "model.safetensors")
    assert all(shipped[name].equal(tensor.bfloat16()) for name, tensor in trained.items())
    loaded = viar.NextScaleTransformer.from_pretrained(folder / "transformer")
    assert loaded.pos_embed.dtype == torch.float32
    card = (folder / "tokenizer" / "README.md").read_text()
    for words in ("viar train\n", "| class consistency | 0.5 |", "| seed | 0 |", DATA["mnist"]):
        assert words in card
    assert checksums(folder / "tokenizer" / "README.md").keys() == {
        "config.json",
        "model.safetensors",
        "run.json",
    }
    ship(**runs, root=tmp_path / "weights")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda runs: runs.update(name="svhn"), "name: expected one of mnist, got 'svhn'"),
        (lambda runs: (runs["model"] / "run.json").write_text("{}"), "model: .* holds no finished run"),
        (lambda runs: (runs["tokenizer"] / "run.json").unlink(), "tokenizer: .* holds no finished run"),
        (lambda runs: runs["told"].write_text('{"tokenizer": {"figures": {}}}'), "told: .* lacks command"),
        (
            lambda runs: tiny_tokenizer(seed=1).save_pretrained(runs["tokenizer"]),
            "tokenizer: .* was not trained on tokens of",
        ),
    ],
    ids=["name", "unfinished", "no-run", "told", "tokens"],
)
def test_what_cannot_be_shipped_is_refused(
    spoil: Any, message: str, runs: dict[str, Any], tmp_path: Path
) -> None:
    spoil(runs)
    with pytest.raises(ValueError, match=message):
        ship(**runs, root=tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
