"""The README.md beside a saved model: what it says, and that it is the user's once it is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from test_train import run_tokenizer, run_transformer, settings
from tiny_models import tiny_tokenizer, tiny_transformer

from viar import NextScaleTransformer
from viar.cards import model_card


@pytest.mark.parametrize(
    ("model", "tag", "name"),
    [
        (tiny_transformer("implicit"), "viar", "NextScaleTransformer"),
        (tiny_transformer("explicit"), "var", "NextScaleTransformer"),
        (tiny_tokenizer(), "tokenizer", "Tokenizer"),
    ],
    ids=["viar", "var", "tokenizer"],
)
def test_a_card_says_what_a_model_is_and_claims_no_licence(
    model: Any, tag: str, name: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "viar"
    assert tag in card.data.tags
    assert card.data.license is None
    assert f"{name}.from_pretrained(" in card.text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card.text
    assert "push" not in card.text
    assert "## Training" not in card.text


@pytest.mark.parametrize("run", [run_transformer, run_tokenizer], ids=lambda f: f.__name__)
def test_the_card_of_a_run_has_its_data_settings_and_figures(run: Any, tmp_path: Path) -> None:
    run(tmp_path, settings(steps=2))
    text = (tmp_path / "README.md").read_text()
    kept = json.loads((tmp_path / "run.json").read_text())
    assert f"24 images (fingerprint `{kept['data']['fingerprint']}`)" in text
    assert "| batch size | 8 |" in text
    assert "| augmentations | none |" in text
    assert ("| loss | l1+l2 |" in text) == (run is run_tokenizer)
    assert "| ema |" not in text  # none was asked for
    assert "| seconds |" not in text  # the same run has the same card, wherever it ran
    del kept["result"]["seconds"]
    for name, value in kept["result"].items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        assert f"| {name.replace('_', ' ')} | {shown} |" in text


def test_the_card_of_a_model_of_tokens_counts_rows_and_names_classes(tmp_path: Path) -> None:
    run = {
        "data": {"images": 3600, "augmentations": ["crop", "flip"], "are_tokens": True},
        "train": {"weight_decay": [0.05, 0.08]},
        "class_names": [f"c{number}" for number in range(12)],
        "result": {"weights": "the last weights"},
    }
    text = model_card(tiny_transformer().config.to_dict(), 1, run).text
    assert "3,600 rows of tokens." in text
    assert "| augmentations | crop, flip |" in text
    assert "| weight decay | 0.05, 0.08 |" in text
    assert "| classes | 12: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, and so on |" in text


def test_a_card_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_a_model_that_could_not_be_saved_to_its_end_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "model")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for folder in (tmp_path / "model", tmp_path / "other"):
            with pytest.raises(OSError, match="No space left"):
                tiny_transformer(seed=1).save_pretrained(folder)
    assert not list((tmp_path / "other").iterdir())
    loaded = NextScaleTransformer.from_pretrained(tmp_path / "model")
    assert all(p.equal(q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
