"""The README.md beside a saved model: what it is, what it was trained on and how, and how it is loaded.

Begins with metadata as the Hugging Face hub reads them from model cards. The licence is left to whoever
publishes the model, as `viar.weights.ship` does: nobody else can say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

KINDS = {  # of a model in words, by its tag
    "viar": "VIAR, a next-scale transformer with an implicit block",
    "var": "VAR, a next-scale transformer",
    "tokenizer": "A multi-scale residual tokenizer of images",
}
PAPERS = {"viar": "2605.01220", "var": "2404.02905", "tokenizer": "2404.02905"}  # of arXiv
CLASSES = {"viar": "NextScaleTransformer", "var": "NextScaleTransformer", "tokenizer": "Tokenizer"}
SETTINGS = ("steps", "batch_size", "lr", "weight_decay", "mixed_precision", "ema")  # of the training
LOSSES = ("loss", "perceptual", "adversarial")  # of a tokenizer
CLASSES_NAMED = 10

TEMPLATE = """---
{metadata}
---

# {title}

{parameters:,} parameters; arXiv [{paper}](https://arxiv.org/abs/{paper}). The settings are in config.json.

```python
from viar import {name}

model = {name}.from_pretrained("path/to/this/folder")
```
{training}{ending}"""
ENDING = """
## Licence

Not stated yet. Whoever publishes this model states it here, and as `license:` in the metadata above.
"""
TRAINING = """
## Training

{samples}{fingerprint}. All settings are in run.json, and how it went in the run's metrics.jsonl.

| setting | value |
| --- | --- |
{settings}

| figure | value |
| --- | --- |
{figures}
"""


def model_card(
    config: Mapping[str, Any], num_parameters: int, run: Mapping[str, Any] | None, ending: str = ENDING
) -> ModelCard:
    """The card of a model.

    Args:
        config: of the model, in plain values.
        num_parameters: of the model.
        run: what run.json has of its training; None where that is not known.
        ending: sections at the end, in Markdown, in place of that on the licence.
    """
    kind = "tokenizer" if "trunk" not in config else _trunk_kind(config["trunk"])
    tags = ["image-generation", kind, "model_hub_mixin", "pytorch_model_hub_mixin"]
    metadata = ModelCardData(library_name="viar", tags=tags)
    text = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=KINDS[kind],
        paper=PAPERS[kind],
        name=CLASSES[kind],
        parameters=num_parameters,
        training="" if run is None else _training(run),
        ending=ending,
    )
    return ModelCard(text)


def _trunk_kind(trunk: Mapping[str, Any]) -> str:
    return "viar" if trunk["kind"] == "implicit" else "var"


def _training(run: Mapping[str, Any]) -> str:
    """What a run tells of itself; what is nothing, such as no averaging, is left out."""
    data, train = run["data"], run["train"]
    settings: dict[str, Any] = {name: train[name] for name in SETTINGS if train.get(name)}
    if "seed" in train:  # also one of 0
        settings["seed"] = train["seed"]
    settings["augmentations"] = ", ".join(data.get("augmentations") or ["none"])
    settings |= {name: run[name] for name in LOSSES if run.get(name)}
    if names := run.get("class_names"):
        more = ", and so on" if len(names) > CLASSES_NAMED else ""
        settings["classes"] = f"{len(names):,}: {', '.join(names[:CLASSES_NAMED])}{more}"
    if "tokenizer" in run:
        settings["tokenizer (fingerprint)"] = run["tokenizer"]
    if run.get("origin"):
        settings["started from"] = run["origin"].get("source")
    return TRAINING.format(
        samples=f"{data['images']:,} {'rows of tokens' if data.get('are_tokens') else 'images'}",
        fingerprint=f" (fingerprint `{data['fingerprint']}`)" if "fingerprint" in data else "",
        settings=rows(settings),
        # Seconds are the machine's, not the model's.
        figures=rows({name: value for name, value in run["result"].items() if name != "seconds"}),
    )


def rows(values: Mapping[str, Any]) -> str:
    """Rows of a table of Markdown with two columns, names and values."""
    return "\n".join(f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
