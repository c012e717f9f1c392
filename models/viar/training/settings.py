"""What a run was started with: kept as run.json in its folder, and compared before the run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..checksums import read_json
from ..data import (
    AugmentedImages,
    Batch,
    BatchedDataset,
    HubImages,
    ImageFolder,
    TensorImages,
    TokenShards,
)
from ..determinism import is_deterministic
from ..files import replacing
from ..model.config import TokenizerConfig, TransformerConfig
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .config import TrainConfig

FILE = "run.json"
# Where a run ends, how its work is spread and kept, and how it is followed: all else decides what the run
# would have become.
FREE = {
    "train.steps",
    "train.seconds",
    "train.accumulate",
    "train.sharding",
    "train.checkpoint_activations",
    "train.workers",
    "train.save_every",
    "train.sample_every",
    "train.validate_every",
    "train.patience",
    "train.max_skipped",
    "train.compile",
    "train.trackers",
    "deterministic",
    "origin.source",
}


def run_settings(
    model: NextScaleTransformer | Tokenizer,
    data: BatchedDataset[Batch] | TokenShards,
    config: TrainConfig,
    **others: Any,
) -> dict[str, Any]:
    """All that decides what a run becomes, in plain values.

    Args:
        model: what is trained; its settings count, not its weights.
        data: what it is trained on.
        config: settings of the training.
        others: further plain values that count, by name.
    """
    kind = "tokenizer" if isinstance(model, Tokenizer) else "transformer"
    settings: dict[str, Any] = {"kind": kind, "model": model.config.to_dict(), "train": asdict(config)}
    if is_deterministic():  # absent else: a run of an earlier release goes on
        settings["deterministic"] = True
    plain: dict[str, Any] = json.loads(json.dumps({**settings, "data": describe_data(data), **others}))
    return plain


def describe_data(data: BatchedDataset[Batch] | TokenShards) -> dict[str, Any]:
    """How many images there are, what they go through and, where they tell it, a hash of what they are.

    That is the numbers of pixels in memory, the names of files, the rows of a data set of the hub, and the
    settings of tokens on disk.

    Args:
        data: images (B, 3, H, W) with labels, or their tokens.
    """
    if isinstance(data, AugmentedImages):
        return {**describe_data(data.data), "augmentations": data.augmentations}
    about = {"images": len(data), "augmentations": getattr(data, "augmentations", ())}
    digest = hashlib.sha256()
    if isinstance(data, TensorImages):
        for tensor in (data.images, data.labels):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    elif isinstance(data, ImageFolder):
        root = os.path.commonpath([path.parent for path, _ in data.files]) if data.files else ""
        names = [(os.path.relpath(path, root), label) for path, label in data.files]
        digest.update(json.dumps([data.image_side, sorted(names)]).encode())
    elif isinstance(data, TokenShards):
        about |= {"augmentations": data.settings.augmentations, "are_tokens": True}
        settings = {name: value for name, value in asdict(data.settings).items() if value != ()}
        digest.update(json.dumps(settings, sort_keys=True).encode())
    elif isinstance(data, HubImages):
        digest.update(json.dumps([data.name, data.image_side, data.rows]).encode())
    else:
        return about
    return {**about, "fingerprint": digest.hexdigest()[:32]}


def compare_settings(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """What to say before a run in `folder` goes on with other settings than it was started with.

    What `FREE` lists may be another: where the run ends, how its work is spread and kept, and how it is
    followed. So may be the number of processes, which is no setting.

    Args:
        folder: of the run; one without a state is a run that starts anew.
        settings: from `run_settings`.

    Returns:
        Lines of text.

    Raises:
        ValueError: other settings differ, each of which the message names with both values; run.json is
            damaged.
    """
    if not any((folder / name).is_dir() for name in ("state", "state.old")):
        return []
    path = folder / FILE
    if not path.exists():
        return [f"{folder} has no {FILE}: what its run was started with is not known, and not compared"]
    try:
        found = _flat(_completed(read_json(path), settings))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected the settings of a run, found a damaged file ({error}); give another folder"
        ) from error
    now = _flat(settings)
    if found.get("kind") != now["kind"]:  # no other setting would be the same
        found, now = {"kind": found.get("kind")}, {"kind": now["kind"]}
    differ = [name for name in {**found, **now} if found.get(name) != now.get(name)]
    listed = {
        name: f"{name}: {_short(found.get(name))} there, {_short(now.get(name))} now" for name in differ
    }
    if refused := [text for name, text in listed.items() if name not in FREE]:
        raise ValueError(
            f"{folder} holds an interrupted run that was started with other settings; give another folder, "
            f"or these settings as they were: {'; '.join(refused)}"
        )
    return [f"the run goes on with another {text}" for text in listed.values()]


def keep_settings(
    folder: Path, settings: Mapping[str, Any], result: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write run.json, and return what is in it.

    Args:
        folder: of the run.
        settings: from `run_settings`.
        result: how the run ended; default: it has not yet.
    """
    with replacing(folder / FILE) as file:
        kept = dict(settings) if result is None else {**settings, "result": result}
        file.write(json.dumps(kept, indent=1).encode())
    return kept


def _completed(settings: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run of an earlier release, with what it had for settings that came later.

    That is their default; what is only kept, and decides nothing, is as it is now.
    """
    kept = {name: now[name] for name in ("class_names", "origin") if name in now}
    config = TokenizerConfig if settings["kind"] == "tokenizer" else TransformerConfig
    known = {field.name: field.default for field in fields(TrainConfig)}
    model, train = config.from_dict(settings["model"]).to_dict(), {**known, **settings["train"]}
    data = {"augmentations": (), **settings.get("data", {})}
    completed = {**kept, **settings, "model": model, "train": train, "data": data}
    plain: dict[str, Any] = json.loads(json.dumps(completed))
    plain.pop("result", None)  # no setting, and there where a run was killed after it was written
    return plain


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-16:]}"
