"""Valid calls of everything public in viar, for the fuzzer to spoil."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from calls import Target
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from targets_deqlib import defaults, made_by, squares
from tiny_models import (
    SIDES,
    TOKENIZER,
    tiny_config,
    tiny_tokenizer,
    tiny_transformer,
    uniform,
)
from torch import Tensor, nn

import viar
from viar import data, evaluation, training
from viar.checkpoints import convert
from viar.data import TensorImages
from viar.evaluation import Moments
from viar.generation import choice
from viar.model import scales, schedule
from viar.tokenizer import Discriminator, MultiScaleQuantizer

SIDE, CLASSES = 6, 3
QUIET = Console(quiet=True)


@cache
def tokenizer() -> viar.Tokenizer:
    return tiny_tokenizer()


@cache
def model(kind: str = "implicit") -> viar.NextScaleTransformer:
    return tiny_transformer(kind)


@cache
def classifier() -> evaluation.Classifier:
    torch.manual_seed(0)
    return evaluation.Classifier(CLASSES, 8, 2).eval()


@cache
def folder() -> Path:
    """With everything that functions read: models, pictures, a reference, shards."""
    made = Path(tempfile.mkdtemp(prefix="inputs-"))
    tokenizer().save_pretrained(made / "tokenizer")
    model().save_pretrained(made / "model")
    save_file(viar.export_official(model()), made / "official.safetensors")
    Image.new("RGB", (SIDE, SIDE), "red").save(made / "picture.png")
    Image.linear_gradient("L").point(lambda grey: 255 * (grey > 99)).save(made / "mask.png")
    for label in range(2):
        (made / "pictures" / f"class{label}").mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8), (40 * label, 90 * index, 7)).save(
                made / "pictures" / f"class{label}" / f"{index}.png"
            )
    evaluation.save_reference(_reference(), made / "reference.npz")
    data.write_shards(tokenizer(), _image_data(), made / "shards", origin={}, console=QUIET)
    return made


def fresh(name: str) -> Path:
    """A path where nothing is."""
    return Path(tempfile.mkdtemp(dir=folder().parent, prefix="inputs-out-")) / name


def images(side: int = SIDE, count: int = 4) -> Tensor:
    return uniform(count, 3, side, side)


def labels(count: int = 4) -> Tensor:
    return torch.arange(count) % CLASSES


def _transformer(config: Any) -> Any:
    # Of the published size where nothing is said, which takes longer than a call may.
    return None if isinstance(config, dict) and not config else viar.NextScaleTransformer(config)


def _rows(side: int = SIDE) -> TensorImages:
    return TensorImages(images(side) * 2 - 1, labels())


@cache
def _image_data(side: int = SIDE) -> data.ImageData:
    return data.ImageData(_rows(side), _rows(side), CLASSES)


@cache
def _reference() -> evaluation.Reference:
    return evaluation.data_reference(_image_data(8), classifier())


def _all_of(made: data.ImageFolder) -> Any:
    return made.__getitems__(range(len(made))) if len(made) else None


def tokens() -> list[Tensor]:
    return [torch.zeros(2, side * side, dtype=torch.int64) for side in SIDES]


def features(count: int = 6) -> Tensor:
    return uniform(count, 3)


def moments() -> Moments:
    return Moments.of(features())


def _sampling() -> dict[str, Any]:
    return {"iterations": 2, "cfg": 1.5, "top_k": 5, "top_p": 0.9, "seed": 0, "first_index": 0}


CONFIGS = [
    made_by(viar.TokenizerConfig, **{**vars(TOKENIZER)}),
    made_by(viar.TransformerConfig, **{**vars(tiny_config())}),
    made_by(viar.ImplicitTrunkConfig),
    made_by(viar.ExplicitTrunkConfig),
    made_by(viar.Sampling),
    made_by(viar.Adaptive),
    made_by(viar.Budget, evaluations=6),
    made_by(training.TrainConfig, "viar.training.TrainConfig", steps=2),
    made_by(training.AdversarialConfig, "viar.training.AdversarialConfig", weight=0.1),
    made_by(evaluation.JudgeRecipe, "viar.evaluation.JudgeRecipe"),
    made_by(
        data.ShardSettings,
        "viar.data.ShardSettings",
        tokenizer="0" * 64,
        sides=SIDES,
        codebook_size=16,
        num_classes=3,
        origin={},
        images=(4, 4),
        crops=1,
        seed=0,
        shard_size=8,
        batch_size=2,
    ),
    Target(
        "viar.TokenizerConfig.from_dict",
        viar.TokenizerConfig.from_dict,
        lambda: {"values": TOKENIZER.to_dict()},
    ),
    Target(
        "viar.TransformerConfig.from_dict",
        viar.TransformerConfig.from_dict,
        lambda: {"values": tiny_config().to_dict()},
    ),
]
MODELS = [
    Target("viar.Tokenizer", viar.Tokenizer, lambda: {"config": TOKENIZER.to_dict()}, share=0.5),
    Target(
        "viar.NextScaleTransformer",
        _transformer,
        lambda: {"config": tiny_config().to_dict()},
        share=0.5,
    ),
    Target("viar.ExplicitTrunk", viar.ExplicitTrunk, lambda: {"config": tiny_config("explicit")}, share=0.5),
    Target("viar.ImplicitTrunk", viar.ImplicitTrunk, lambda: {"config": tiny_config()}, share=0.5),
    Target(
        "viar.tokenizer.Discriminator",
        Discriminator,
        lambda: defaults(Discriminator, image_side=16, base_channels=4),
        share=0.5,
    ),
    Target(
        "viar.tokenizer.MultiScaleQuantizer", MultiScaleQuantizer, lambda: {"config": TOKENIZER}, share=0.5
    ),
    Target("viar.Tokenizer.forward", lambda x: tokenizer()(x), lambda: {"x": images()}),
    Target("viar.Tokenizer.encode", lambda x: tokenizer().encode(x), lambda: {"x": images()}),
    Target("viar.Tokenizer.decode", lambda x: tokenizer().decode(x), lambda: {"x": tokens()}),
    Target(
        "viar.Tokenizer.decode_f_hat",
        lambda x: tokenizer().decode_f_hat(x),
        lambda: {"x": uniform(2, 4, 3, 3)},
    ),
    Target(
        "viar.Tokenizer.next_scale_inputs",
        lambda x: tokenizer().next_scale_inputs(x),
        lambda: {"x": tokens()},
    ),
    Target(
        "viar.NextScaleTransformer.forward",
        torch.no_grad()(lambda **given: model()(**given)),
        lambda: {
            "labels": labels(2),
            "inputs": tokenizer().next_scale_inputs(tokens()),
            "iterations": 2,
            "return_penalty": True,
        },
    ),
    Target(
        "viar.NextScaleTransformer.check_labels", lambda x: model().check_labels(x), lambda: {"x": labels()}
    ),
    Target(
        "viar.Tokenizer.from_pretrained",
        viar.Tokenizer.from_pretrained,
        lambda: {"pretrained_model_name_or_path": folder() / "tokenizer"},
        share=0.3,
    ),
    Target(
        "viar.NextScaleTransformer.from_pretrained",
        viar.NextScaleTransformer.from_pretrained,
        lambda: {"pretrained_model_name_or_path": folder() / "model"},
        share=0.3,
    ),
    Target(
        "viar.Tokenizer.save_pretrained",
        lambda x: tokenizer().save_pretrained(x),
        lambda: {"x": fresh("saved")},
        share=0.2,
    ),
    Target(
        "viar.prepare_inference",
        lambda **given: viar.prepare_inference(**given),
        lambda: {
            "model": tiny_transformer(),
            "tokenizer": tiny_tokenizer(),
            "dtype": torch.bfloat16,
            "compile": False,
            "graphs": False,
        },
        share=0.3,
    ),
]
GENERATION = [
    Target(
        "viar.generate",
        viar.generate,
        lambda: {
            "model": model(),
            "tokenizer": tokenizer(),
            "labels": [0, 1],
            **_sampling(),
            "cache": "equilibrium",
            "warm_start": False,
            "guidance_reuse": 0,
            "more_smooth": False,
            "return_report": True,
        },
        work=("iterations",),
    ),
    Target(
        "viar.generate, of VAR",
        viar.generate,
        lambda: {"model": model("explicit"), "tokenizer": tokenizer(), "labels": labels(2), "seed": 1},
    ),
    Target(
        "viar.sample_tokens",
        viar.sample_tokens,
        lambda: {
            "model": model(),
            "tokenizer": tokenizer(),
            "labels": labels(2),
            "sampling": viar.Sampling(iterations=1),
            "first_index": 0,
            "measure": False,
        },
    ),
    Target(
        "viar.sample_tokens, replace and hold",
        viar.sample_tokens,
        lambda: {
            "model": model("explicit"),
            "tokenizer": tokenizer(),
            "labels": labels(2),
            "replace": lambda scale, x: x,
            "hold": lambda scale, x: x,
        },
    ),
    Target(
        "viar.edit",
        viar.edit,
        lambda: {
            "model": model(),
            "tokenizer": tokenizer(),
            "images": images(count=2),
            "mask": torch.ones(6, 6).tril(),
            "labels": labels(2),
            "sampling": viar.Sampling(iterations=1),
            "first_index": 0,
            "keep": "features",
            "border": 1,
        },
    ),
    Target("viar.box_mask", viar.box_mask, lambda: {"box": (0.1, 0.1, 0.6, 0.7), "side": 8}, work=("side",)),
    Target(
        "viar.generate_series",
        viar.generate_series,
        lambda: {
            "model": model(),
            "tokenizer": tokenizer(),
            "folder": fresh("series"),
            "num": 2,
            "sampling": viar.Sampling(iterations=1),
            "labels": (0, 1),
            "formats": ("png", "npz"),
            "batch_size": 2,
            "console": QUIET,
        },
        work=("num",),
        share=0.15,
    ),
    Target(
        "viar.model.schedule.iteration_schedule",
        schedule.iteration_schedule,
        lambda: {"iterations": (3, 1), "num_scales": 3},
        work=("num_scales",),
    ),
    Target("viar.model.scales.block_causal", scales.block_causal, lambda: {"sides": SIDES}, work=("sides",)),
    Target(
        "viar.model.scales.block_causal_mask",
        scales.block_causal_mask,
        lambda: {"sides": SIDES},
        work=("sides",),
    ),
    Target("viar.IterateCache", viar.IterateCache, lambda: {"sides": SIDES, "iterations": (3, 2, 2)}),
    Target(
        "viar.generation.choice.choose",
        choice.choose,
        lambda: {
            "logits_BlV": uniform(2, 3, 5),
            "noise": choice.TokenNoise.of_images(2, 0, 0, torch.device("cpu")),
            "first_position": 0,
            "top_k": 3,
            "top_p": 0.9,
        },
    ),
    Target("viar.load_shipped", viar.load_shipped, lambda: {"name": "mnist"}, share=0.1),
    Target(
        "viar.weights.ship",
        viar.weights.ship,
        lambda: {
            "model": folder() / "model",
            "tokenizer": folder() / "tokenizer",
            "told": folder() / "told.json",
            "name": "mnist",
            "root": fresh("weights"),
        },
        share=0.3,
    ),
    Target(
        "viar.load_official",
        viar.load_official,
        lambda: {"path_or_state_dict": viar.export_official(model()), "sides": SIDES, "num_heads": 2},
        share=0.5,
    ),
    Target(
        "viar.load_official, of a file",
        viar.load_official,
        lambda: {"path_or_state_dict": folder() / "official.safetensors", "sides": SIDES, "num_heads": 2},
        share=0.5,
    ),
    Target("viar.export_official", viar.export_official, lambda: {"model": model()}, share=0.3),
    Target(
        "viar.checkpoints.convert.convert_checkpoint",
        convert.convert_checkpoint,
        lambda: {
            "source": folder() / "official.safetensors",
            "out": fresh("converted"),
            "sides": SIDES,
            "num_heads": 2,
            "overwrite": False,
        },
        share=0.3,
    ),
    Target("viar.checkpoints.convert.describe", convert.describe, lambda: {"model": model()}, share=0.2),
]
DATA = [
    Target(
        "viar.data.read_picture",
        data.read_picture,
        lambda: {"path": folder() / "picture.png", "side": 8},
        work=("side",),
    ),
    Target(
        "viar.data.read_mask",
        data.read_mask,
        lambda: {"path": folder() / "mask.png", "side": 8, "size": (256, 256)},
        work=("side",),
    ),
    Target(
        "viar.data.cut_square",
        data.cut_square,
        lambda: {"image": Image.new("RGB", (9, 7)), "side": 6, "at_random": True},
        work=("side",),
    ),
    Target(
        "viar.data.save_picture", data.save_picture, lambda: {"image": images()[0], "path": fresh("a.png")}
    ),
    Target(
        "viar.data.save_grid",
        data.save_grid,
        lambda: {
            "images": images(),
            "path": fresh("a.png"),
            "columns": 2,
            "least_side": 12,
            "row_names": ("a", "b"),
        },
        work=("columns", "least_side"),
    ),
    Target(
        "viar.data.save_edit",
        data.save_edit,
        lambda: {"before": images()[0], "mask": torch.ones(6, 6), "after": images(), "path": fresh("a.png")},
    ),
    Target(
        "viar.data.load_data",
        data.load_data,
        lambda: {
            "source": str(folder() / "pictures"),
            "image_side": 8,
            "augment": 0,
            "augmentations": ("flip",),
        },
        work=("image_side", "augment"),
    ),
    Target(
        "viar.data.TensorImages",
        data.TensorImages,
        lambda: {"images": images(), "labels": labels(), "augmentations": ()},
    ),
    Target(
        "viar.data.AugmentedImages",
        data.AugmentedImages,
        lambda: {"data": _rows(), "names": ("flip", "shift")},
    ),
    Target(
        "viar.data.augmented",
        data.augmented,
        lambda: {"data": _rows(), "copies": 1, "names": ("flip", "shift")},
        work=("copies",),
    ),
    Target("viar.data.rows_of", data.rows_of, lambda: {"data": _rows(), "rows": [0, 5, 2], "seed": 3}),
    Target(
        "viar.data.all_batches",
        lambda **given: list(data.all_batches(**given)),
        lambda: {"data": _rows(), "batch_size": 3},
    ),
    Target(
        "viar.data.EndlessBatches",
        lambda **given: next(iter(data.EndlessBatches(**given))),
        lambda: defaults(data.EndlessBatches, size=4, batch_size=2, seed=0),
        work=("batch_size",),
    ),
    Target(
        "viar.data.ImageFolder",
        lambda **given: _all_of(data.ImageFolder(**given)),
        lambda: {"files": [(folder() / "picture.png", 0)], "image_side": 6, "train": False},
        work=("image_side",),
    ),
    Target(
        "viar.data.TokenShards", data.TokenShards, lambda: {"folder": folder() / "shards", "split": "train"}
    ),
    Target("viar.data.is_shards", data.is_shards, lambda: {"folder": folder() / "shards"}),
    Target(
        "viar.data.write_shards",
        data.write_shards,
        lambda: {
            "tokenizer": tokenizer(),
            "data": _image_data(),
            "folder": fresh("shards"),
            "origin": {},
            "crops": 1,
            "seed": 0,
            "shard_size": 8,
            "batch_size": 2,
            "rank": 0,
            "num_ranks": 1,
            "console": QUIET,
        },
        work=("crops",),
        share=0.2,
    ),
    Target(
        "viar.data.tokenize",
        data.tokenize,
        lambda: {"tokenizer": tokenizer(), "images": images() * 2 - 1, "labels": labels()},
    ),
    Target(
        "viar.data.from_rows",
        data.from_rows,
        lambda: {
            "tokenizer": tokenizer(),
            "tokens_BL": torch.zeros(2, 14, dtype=torch.int64),
            "labels": labels(2),
        },
    ),
    Target(
        "viar.data.TokenizedImages",
        data.TokenizedImages,
        lambda: {"tokenizer": tokenizer(), "data": _rows(), "batch_size": 2},
    ),
]
TRAINING = [
    Target(
        "viar.training.adapt_transformer",
        training.adapt_transformer,
        lambda: {"trained": model(), "config": tiny_config(num_classes=5)},
        share=0.3,
    ),
    Target(
        "viar.training.adapt_tokenizer",
        training.adapt_tokenizer,
        lambda: {"trained": tokenizer(), "config": TOKENIZER},
        share=0.3,
    ),
    Target(
        "viar.training.tokenizer_validation",
        training.tokenizer_validation,
        lambda: {"model": tokenizer(), "data": _rows(), "batch_size": 2},
        share=0.5,
    ),
    Target(
        "viar.training.validation_loss",
        training.validation_loss,
        lambda: {
            "model": model(),
            "tokenizer": tokenizer(),
            "data": _rows(),
            "iterations": 2,
            "batch_size": 2,
        },
        work=("iterations",),
        share=0.5,
    ),
    Target(
        "viar.training.cross_entropy",
        training.cross_entropy,
        lambda: {"logits_BLV": uniform(2, 3, 5), "targets_BL": torch.zeros(2, 3, dtype=torch.int64)},
    ),
    Target(
        "viar.training.cell_health",
        training.cell_health,
        lambda: {
            "model": model(),
            "batch": data.tokenize(tokenizer(), images() * 2 - 1, labels()),
            "iterations": 2,
        },
        work=("iterations",),
        share=0.3,
    ),
    Target(
        "viar.training.reconstruction_loss",
        training.reconstruction_loss,
        lambda: {"images": images(), "reconstruction": images() / 2, "kind": "l1+edges"},
    ),
    Target("viar.training.loss_terms", training.loss_terms, lambda: {"kind": "l1+edges"}),
    Target(
        "viar.training.FeatureDistance",
        training.FeatureDistance,
        lambda: {"features": classifier().features()},
    ),
    Target(
        "viar.training.check_device", training.check_device, lambda: {"config": training.TrainConfig(steps=1)}
    ),
    Target(
        "viar.training.train_tokenizer",
        training.train_tokenizer,
        lambda: {
            "tokenizer": tiny_tokenizer(),
            "data": _rows(),
            "folder": fresh("run"),
            "config": training.TrainConfig(steps=1, batch_size=2, trackers=()),
            "loss": "l1",
            "revive_every": 1,
            "init_codebook": True,
            "console": QUIET,
        },
        share=0.03,
    ),
    Target(
        "viar.training.train_transformer",
        training.train_transformer,
        lambda: {
            "model": tiny_transformer(),
            "tokenizer": tokenizer(),
            "data": _rows(),
            "folder": fresh("run"),
            "config": training.TrainConfig(steps=1, batch_size=2, trackers=()),
            "class_names": (),
            "console": QUIET,
        },
        share=0.03,
    ),
]
EVALUATION = [
    Target(
        "viar.evaluation.Classifier",
        evaluation.Classifier,
        lambda: {"num_classes": 3, "image_side": 8, "width": 2},
    ),
    Target(
        "viar.evaluation.train_classifier",
        evaluation.train_classifier,
        lambda: {
            "classifier": evaluation.Classifier(3, 8, 2),
            "data": _rows(8),
            "steps": 1,
            "batch_size": 2,
            "lr": 1e-3,
            "seed": 0,
            "console": QUIET,
        },
        work=("steps", "batch_size"),
        share=0.3,
    ),
    Target(
        "viar.evaluation.judge",
        evaluation.judge,
        lambda: {
            "data": _image_data(8),
            "cache": fresh("judges"),
            "console": QUIET,
            "recipe": evaluation.JudgeRecipe(width=2, steps=1),
        },
        share=0.1,
    ),
    Target(
        "viar.evaluation.evaluate_images",
        evaluation.evaluate_images,
        lambda: {"images": images(8), "labels": labels(), "reference": _reference()},
    ),
    Target(
        "viar.evaluation.data_reference",
        evaluation.data_reference,
        lambda: {"data": _image_data(8), "judge": classifier(), "network": None, "name": "a"},
        share=0.5,
    ),
    Target(
        "viar.evaluation.with_held_out",
        evaluation.with_held_out,
        lambda: {"reference": _reference(), "data": _image_data(8), "judge": classifier()},
        share=0.5,
    ),
    Target(
        "viar.evaluation.read_reference",
        evaluation.read_reference,
        lambda: {
            "source": str(folder() / "reference.npz"),
            "network": evaluation.judge_network(classifier()),
            "image_side": 8,
            "sha256": None,
        },
        share=0.5,
        work=("image_side",),
    ),
    Target(
        "viar.evaluation.save_reference",
        evaluation.save_reference,
        lambda: {"reference": _reference(), "path": fresh("reference.npz")},
    ),
    Target(
        "viar.evaluation.find_pictures",
        evaluation.find_pictures,
        lambda: {"path": folder() / "pictures", "image_side": 8},
        work=("image_side",),
    ),
    Target("viar.evaluation.judge_network", evaluation.judge_network, lambda: {"classifier": classifier()}),
    Target(
        "viar.evaluation.extractor_network",
        evaluation.extractor_network,
        lambda: {"extractor": lambda x: x.flatten(1), "name": "a"},
    ),
    Target(
        "viar.evaluation.features_of",
        evaluation.features_of,
        lambda: {"network": evaluation.judge_network(classifier()), "batches": [images(8), images(8)]},
    ),
    Target(
        "viar.evaluation.Moments",
        Moments,
        lambda: {"count": 4, "mean": moments().mean, "covariance": moments().covariance},
    ),
    Target("viar.evaluation.Moments.of", Moments.of, lambda: {"features": features()}),
    Target(
        "viar.evaluation.frechet_distance",
        evaluation.frechet_distance,
        lambda: {"a": moments(), "b": moments()},
    ),
    Target(
        "viar.evaluation.kernel_distance",
        evaluation.kernel_distance,
        lambda: {"a": features(), "b": features(4)},
    ),
    Target(
        "viar.evaluation.inception_score",
        evaluation.inception_score,
        lambda: {"probabilities": features().softmax(1), "split_size": 3, "seed": 0},
    ),
    Target(
        "viar.evaluation.precision_recall",
        evaluation.precision_recall,
        lambda: {"real": features(), "generated": features(), "k": 2},
    ),
    Target(
        "viar.evaluation.memorisation",
        evaluation.memorisation,
        lambda: {"images": images(), "training": images(), "held_out": images() / 2},
    ),
    Target(
        "viar.evaluation.nearest_distances",
        evaluation.nearest_distances,
        lambda: {"images": images(), "reference": images()},
    ),
    Target(
        "viar.evaluation.accuracy",
        evaluation.accuracy,
        lambda: {"classifier": classifier(), "data": _rows(8), "batch_size": 3},
    ),
    Target(
        "viar.evaluation.psnr",
        evaluation.psnr,
        lambda: {"images_BCHW": images(16), "reconstruction_BCHW": images(16) / 2},
    ),
    Target(
        "viar.evaluation.ssim",
        evaluation.ssim,
        lambda: {"images_BCHW": images(16), "reconstruction_BCHW": images(16) / 2},
    ),
    Target(
        "viar.evaluation.class_consistency",
        evaluation.class_consistency,
        lambda: {"classifier": classifier(), "images": images(8), "labels": labels()},
    ),
    Target(
        "viar.evaluation.inpainting_consistency",
        evaluation.inpainting_consistency,
        lambda: {
            "classifier": _any_side,
            "model": model(),
            "tokenizer": tokenizer(),
            "data": _rows(),
            "mask": torch.ones(6, 6).tril(),
            "sampling": viar.Sampling(iterations=1),
            "keep": "features",
            "border": 1,
            "batch_size": 4,
        },
        share=0.5,
    ),
    Target(
        "viar.evaluation.balanced_labels",
        evaluation.balanced_labels,
        lambda: {"num_classes": 3, "per_class": 2},
        work=("num_classes", "per_class"),
    ),
    Target(
        "viar.evaluation.seconds_of",
        evaluation.seconds_of,
        lambda: {"tasks": [lambda: None], "repeats": 2},
        work=("repeats",),
    ),
    Target(
        "viar.evaluation.training_bytes",
        evaluation.training_bytes,
        lambda: {"model": _LINEAR, "loss": lambda: squares(_LINEAR(torch.ones(2, 2)))},
    ),
]
_LINEAR = nn.Linear(2, 2)
_any_side = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
TARGETS = [*CONFIGS, *MODELS, *GENERATION, *DATA, *TRAINING, *EVALUATION]

# Public, and not called with arguments of a user's: why not.
NOT_CALLED = {
    "Evaluation, Features, FeatureNetwork, FolderReport, GenerationReport, ImageData, Pictures": "given",
    "Quality, QuantizerOutput, Reference, Sample, ScaleReport, SeriesReport, ShardReport, Skipped": "given",
    "TokenizerOutput, TokenizerRecipe, TransformerRecipe": "given",
    "EquilibriumCache": "deqlib's",
    "AUGMENTATIONS, Batch, BatchedDataset, Extractor, JUDGE, SHIPPED, TokenBatch": "names",
    "TOKENIZERS, TRANSFORMERS": "names",
    "HubImages, inception_network, lpips_distance": "of packages that need not be there",
    "check_adaptable, shipped_folder": "behind others that are called",
}
