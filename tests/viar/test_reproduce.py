"""The published evaluation as a dry run, at a tiny size: every step of the command, and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import call

from viar import ImplicitTrunkConfig, Sampling, TokenizerConfig, TransformerConfig, load_official
from viar.commands import reproduce, stand_ins
from viar.evaluation import published
from viar.training import TOKENIZERS, TRANSFORMERS

SIZES: dict[str, Any] = {"codebook_size": 8, "code_channels": 4}
# The published ladder and groups, which no checkpoint tells; images of 16 x 16.
TOKENIZER = TokenizerConfig(base_channels=32, multipliers=(1,), num_residual_blocks=1, **SIZES)
MODEL = TransformerConfig(depth=3, width=16, num_heads=2, num_classes=3, **SIZES)
IMPLICIT = ImplicitTrunkConfig(num_pre=1, num_post=1)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and features small enough for seconds, and no Inception, whatever is on this machine."""
    model = dataclasses.replace(TRANSFORMERS["imagenet256-viar"], model=MODEL)
    var = dataclasses.replace(TRANSFORMERS["imagenet256-var-d16"], model=MODEL)
    viar = dataclasses.replace(model, model=dataclasses.replace(MODEL, trunk=IMPLICIT))
    monkeypatch.setitem(TRANSFORMERS, "imagenet256-viar", viar)
    monkeypatch.setitem(TRANSFORMERS, "imagenet256-var-d16", var)
    monkeypatch.setitem(
        TOKENIZERS, "imagenet256", dataclasses.replace(TOKENIZERS["imagenet256"], model=TOKENIZER)
    )
    monkeypatch.setattr(stand_ins, "SIZES", (6, 4))
    monkeypatch.setattr(stand_ins, "PLACES", 2)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")


def test_a_dry_run_goes_through_all_of_it_and_measures_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    code, output, errors = call("reproduce", "--dry-run", "--out", out, "--iterations", 2)
    assert code == 0, errors
    assert output.count("DRY RUN: weights and reference are random, so the figures mean nothing") == 2
    assert "a made-up network takes its place" in output
    record = json.loads((out / "figures.json").read_text())
    assert record["dry_run"]
    assert record["num"] == 4
    assert record["network"] == "stand-in"
    model = out / "stand-ins" / "viar" / "transformer.pth"
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert record["files"]["--model"] == {"name": "transformer.pth", "sha256": digest}
    assert {"--tokenizer", "--reference"} < set(record["files"])
    assert all(record["figures"][name] is not None for name in reproduce.NAMES)
    settings = json.loads((out / "images" / "series.json").read_text())
    assert settings["iterations"] == [2] * 10
    assert settings["cache"] == "iterate"
    assert (out / "images" / "samples_4x16x16x3.npz").exists()

    monkeypatch.setattr(reproduce, "read_reference", lambda *_: pytest.fail("measured twice"))
    code, again, errors = call("reproduce", "--dry-run", "--out", out, "--iterations", 2)
    assert code == 0, errors
    assert "figures were there" in again


def test_the_files_of_a_dry_run_are_evaluated_as_published_ones_are(tmp_path: Path) -> None:
    """The same files, given by their flags: another way to the same images, and to the same figures."""
    dry, out = tmp_path / "dry", tmp_path / "out"
    code, _, errors = call("reproduce", "--dry-run", "--shape", "var-d16", "--out", dry)
    assert code == 0, errors
    made = dry / "stand-ins" / "var-d16"
    files = ("--model", made / "transformer.pth", "--tokenizer", made / "tokenizer.pth")
    files += ("--reference", dry / "stand-ins" / "reference.npz")
    weights = tmp_path / "inception.pth"
    weights.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "inception_network", lambda *_: stand_ins.stand_in_network())
        digest = hashlib.sha256((made / "transformer.pth").read_bytes()).hexdigest()
        run = ("reproduce", *files, "--out", out, "--num", 4, "--inception", weights, "--sha256", digest[:12])
        code, output, errors = call(*run, "--dtype", "bfloat16", "--batch-size", 4)
        assert code == 0, errors
        assert "DRY RUN" not in output
        code, _, errors = call(*run[:-1], "0123456789")
        assert code == 2
        assert "--sha256: expected a file with '0123456789', got --model " in errors
        patch.setattr(reproduce, "generate_series", lambda *_, **__: pytest.fail("images before a check"))
        np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3), network=np.array("stand-in"))
        code, _, errors = call(*run[:5], "--reference", tmp_path / "narrow.npz", *run[7:])
        assert code == 2
        assert "viar: --reference: " in errors
        assert "narrow.npz: expected mu of 6 features, as stand-in sees them, got 3" in errors
    figures = [json.loads((folder / "figures.json").read_text())["figures"] for folder in (dry, out)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "--model: expected viar.pth from https://huggingface.co/mobiushy/VIAR"),
        (("--model", "a.pth"), "--tokenizer: expected vae_ch160v4096z32.pth from https://"),
        (("--dry-run", "--model", "a.pth"), "--model: a dry run makes its own files"),
        (("--dry-run", "--num", 3), "num must be at least 4, got 3"),
        (("--dry-run", "--more-smooth"), "Unrecognized options: --more-smooth"),
        (("--shape", "viar"), "--shape: only with --dry-run"),
        (("--dry-run", "--sha256", "00ff"), "--sha256: a dry run makes its own files"),
        (
            ("--model", "a.pth", "--tokenizer", "b.pth", "--reference", "c.npz"),
            "--inception: ",
        ),
    ],
)
def test_what_is_missing_is_named_with_where_it_is(
    flags: tuple[object, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = call("reproduce", *flags)
    assert code == 2
    assert told in errors
    assert not list(tmp_path.iterdir())


def test_a_published_file_has_the_bytes_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / published.TOKENIZER
    with pytest.raises(ValueError, match=r"--tokenizer: no file .*; it is at https://huggingface\.co/"):
        published.checked_digests({"--tokenizer": path})
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"--tokenizer: expected vae_.* to have the SHA-256 7c3ec27a"):
        published.checked_digests({"--tokenizer": path})
    digest = hashlib.sha256(b"other").hexdigest()
    found = dataclasses.replace(published.FILES[published.TOKENIZER], sha256=digest)
    monkeypatch.setitem(published.FILES, published.TOKENIZER, found)
    assert published.checked_digests({"--tokenizer": path}) == {"--tokenizer": digest}


def test_published_figures_stand_beside_published_settings_alone(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    config = dataclasses.replace(MODEL, trunk=IMPLICIT)
    model = load_official(stand_ins.stand_in_checkpoints(folder, config, TOKENIZER)[0])
    sampling = reproduce.as_published(Sampling(seed=5), model)
    assert (sampling.iterations, sampling.cache) == (10, "iterate")
    assert reproduce.published_figures(model, sampling)["fid"] == 2.16
    assert reproduce.published_figures(model, dataclasses.replace(sampling, iterations=2)) == {"fid": 2.39}
    for change in ({"iterations": [10] * 10}, {"cache": "equilibrium"}, {"top_k": 600}, {"cfg": 3.0}):
        assert reproduce.published_figures(model, dataclasses.replace(sampling, **change)) == {}
