"""Random command lines over a folder of models, pictures and broken files, with values right and wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_tokenizer, tiny_transformer

from viar import export_official
from viar.data import load_data, write_shards

SIDES = (1, 2, 4)
Value = tuple[object, ...]  # what stands behind a flag; nothing for a switch


@dataclass(frozen=True)
class Flag:
    """A flag with values that are right by themselves, and values that never are."""

    name: str
    right: Sequence[Value]
    wrong: Sequence[Value] = ()


@dataclass(frozen=True)
class Line:
    """A command line.

    Attributes:
        arguments: of `viar`.
        out: what it is to write, if anything.
        is_wrong: whether one of its values can never be right.
    """

    arguments: tuple[str, ...]
    out: Path | None
    is_wrong: bool


def write_pictures(folder: Path, classes: int, side: int = 8, count: int = 4) -> None:
    generator = np.random.default_rng(classes)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index}.png")


def make_world(world: Path) -> None:
    """Models, data, and everything that is no model."""
    tiny_transformer(sides=SIDES).save_pretrained(world / "viar")
    tiny_transformer("explicit", sides=SIDES).save_pretrained(world / "var")
    tiny_tokenizer(sides=SIDES).save_pretrained(world / "tokenizer")
    tiny_tokenizer(sides=(1, 2, 3)).save_pretrained(world / "smaller")
    tiny_tokenizer(sides=SIDES, codebook_size=8).save_pretrained(world / "coarser")
    for classes in (2, 3, 4):
        write_pictures(world / f"data{classes}", classes)
    for name, seed in {"tokens": 0, "foreign_tokens": 1}.items():
        images = load_data(str(world / "data3"), SIDES[-1] * 2)
        write_shards(tiny_tokenizer(seed, sides=SIDES), images, world / name, origin={})
    shutil.copytree(world / "tokens", world / "damaged_tokens")
    rows = world / "damaged_tokens" / "train-00000.npy"
    rows.write_bytes(rows.read_bytes()[:-1])
    torch.save(export_official(tiny_transformer(sides=SIDES)), world / "viar.pth")
    (world / "unfinished" / "state").mkdir(parents=True)
    (world / "empty").mkdir()
    (world / "series").mkdir()
    (world / "series" / "series.json").write_text("{}")
    (world / "note.txt").write_text("nothing to see")
    for name, text in {"cut": '{"depth": 3,', "list": "[1, 2]", "foreign": '{"hidden_size": 8}'}.items():
        shutil.copytree(world / "viar", world / name)
        (world / name / "config.json").write_text(text)
    for name, size in {"short": 100, "bare": 0}.items():
        shutil.copytree(world / "viar", world / name)
        weights = world / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])
    shutil.copytree(world / "viar", world / "others")
    save_file({"a": torch.zeros(2)}, world / "others" / "model.safetensors")
    shutil.copytree(world / "viar", world / "wider")
    values = json.loads((world / "wider" / "config.json").read_text())
    (world / "wider" / "config.json").write_text(json.dumps({**values, "width": 32}))
    (world / "cut.pth").write_bytes((world / "viar.pth").read_bytes()[:100])
    (world / "classifier").mkdir()
    save_file({"layers.0.weight": torch.zeros(2)}, world / "classifier" / "classifier.safetensors")
    Image.new("RGB", (8, 8), "red").save(world / "picture.png")
    Image.new("L", (8, 8), 255).save(world / "mask.png")
    (world / "broken.png").write_bytes((world / "picture.png").read_bytes()[:40])


NO_MODELS = ["unfinished", "empty", "series", "note.txt", "cut", "list", "foreign", "short", "bare", "others"]
NO_MODELS += ["wider", "cut.pth", "classifier", "tokens", "nowhere/at/all", "nobody/nothing", "data3", ""]
NUMBERS = [("nan",), ("-1",), ("inf",), ("many",), ("1e400",)]
COUNTS = [("0",), ("-3",), ("2.5",), ("nan",), ("99999999999999999999999",), ()]

SAMPLING = [
    Flag("--iterations", [(2,), (3, 1), (3, 2, 2)], [(0,), (1, 2, 3, 4), (-1, 2), ("x",), (10**23,), ()]),
    Flag("--adaptive", [(0.1,)], NUMBERS),
    Flag("--budget", [(9,)], COUNTS),
    Flag("--cfg", [(0,), (3,)], NUMBERS),
    Flag("--top-k", [(3,), ("None",)], [("0",), ("-3",), ("2.5",), ()]),
    Flag("--top-p", [(0.5,), ("None",)], [*NUMBERS, ("0",), ("1.5",)]),
    Flag("--seed", [(5,)], [("-1",), ("99999999999999999999999",), ("1.5",)]),
    Flag("--cache", [("iterate",)], [("both",)]),
    Flag("--guidance-reuse", [(1,)], [("7",), ("-1",)]),
    Flag("--batch-size", [(2,)], COUNTS),
    Flag(
        "--device",
        [("cpu",), ("auto",)],
        [("mps",), ("xpu",), ("cuda:7",), ("meta",), ("cpu:3",), ("gpu",), ("",), ("hpu",)],
    ),
    Flag("--dtype", [("bfloat16",)], [("float8",)]),
    Flag("--more-smooth", [()]),
    Flag("--no-such-flag", [], [("1",)]),
]
TRAINING = [
    Flag("--train.steps", [(1,), (2,)], [("0",), ("-1",), ("x",)]),
    Flag("--train.batch-size", [(4,)], COUNTS),
    Flag("--train.accumulate", [(2,)], [("3",), ("0",), ("-1",)]),
    Flag("--train.lr", [(1e-3,)], [*NUMBERS, ("0",)]),
    Flag("--train.betas", [(0.9, 0.9)], [("nan", "0.9"), ("1", "2"), ("0.9",)]),
    Flag("--train.weight-decay", [(0, 0)], [("-1", "0"), ("0", "nan")]),
    Flag("--train.clip", [(1,)], [("0",), ("nan",), ("-2",)]),
    Flag("--train.mixed-precision", [("no",)], [("fp16",), ("fp8",), ("",)]),
    Flag("--train.seed", [(3,)], [("-1",), ("4294967296",), ("99999999999999999999999",)]),
    Flag("--train.workers", [(0,)], [("-1",)]),
    Flag("--train.save-every", [(1,)], [("0",), ("nan",)]),
    Flag("--train.sample-every", [(0,), (1,)], [("-1",), ("0.5",), ("x",), ()]),
    Flag("--augment", [(0,)], [("-1",), ("2",)]),
    Flag("--no-such-flag", [], [("1",)]),
]
OUT_OF_PLACE = ["note.txt", "note.txt/inside", "/proc/nobody/x", "viar", "series", "tokens"]
COMMANDS = ["train-tokenizer", "train", "tokenize", "generate", "evaluate", "edit", "app", "convert", "demo"]


def draw_line(world: Path, number: int) -> Line:
    """The command line of a number, the same for the same number."""
    random = Random(number)
    command = random.choice(COMMANDS)
    out = world / "out" / str(number)
    flags, positional, out_flag = _flags_of(command, world, out, random)
    if out_flag is not None:
        flags.append((Flag("--out", [(out_flag,)], [(world / name,) for name in OUT_OF_PLACE]), True))
    # One wrong value at most: it alone is to be found, and no other hides it.
    wrong = random.choice(flags)[0].name if random.random() < 0.6 else ""
    arguments: list[object] = [command, *positional]
    is_wrong = False
    for flag, always in flags:
        if flag.name == wrong and flag.wrong:
            arguments += [flag.name, *random.choice(flag.wrong)]
            is_wrong = True
        elif flag.right and (always or random.random() < 0.2):
            arguments += [flag.name, *random.choice(flag.right)]
    return Line(tuple(map(str, arguments)), out_flag, is_wrong)


def _flags_of(
    command: str, world: Path, out: Path, random: Random
) -> tuple[list[tuple[Flag, bool]], list[object], Path | None]:
    """Flags, each with whether it is always given, what stands without a flag, and what is to be written."""

    def models(*names: str) -> list[Value]:
        return [(world / name,) for name in names]

    nothing = [(str(world / name) if name else "",) for name in NO_MODELS]
    data = Flag("--data", models("data3"), [*models("nowhere", "empty", "note.txt", "viar"), ("svhn",)])
    model = Flag("--model", models("viar", "viar", "viar.pth", "var"), [*nothing, *models("tokenizer")])
    tokenizer = Flag("--tokenizer", models("tokenizer"), [*nothing, *models("viar", "smaller", "coarser")])
    sampling = [(flag, False) for flag in SAMPLING]
    if command in ("train-tokenizer", "train"):
        return _training_flags(command, world, out, data, tokenizer, nothing)
    if command == "tokenize":
        own = [
            (Flag("--crops", [(1,), (2,)], COUNTS), False),
            (Flag("--augment", [(0,)], [("-1",), ("2",)]), False),
            (Flag("--augmentations", [("flip", "crop"), ("rotate",)], [("flop",), ("flip", "flip")]), False),
            (Flag("--processes", [(1,)], COUNTS), False),
            (Flag("--shard-size", [(4,)], COUNTS), False),
            (Flag("--batch-size", [(2,)], COUNTS), False),
            (
                Flag("--seed", [(5,)], [("-1",), ("4294967296",), ("99999999999999999999999",), ("1.5",)]),
                False,
            ),
            *((flag, False) for flag in SAMPLING if flag.name in ("--device", "--no-such-flag")),
        ]
        images = Flag("--data", data.right, [*data.wrong, *models("tokens")])
        any_sizes = Flag(
            "--tokenizer", models("tokenizer", "smaller", "coarser"), [*nothing, *models("viar")]
        )
        return [(any_sizes, True), (images, True), *own], [], out
    if command == "generate":
        series = random.random() < 0.4
        own = [
            (Flag("--labels", [(0, 2), (3,)], [("7",), ("-1",), ("x",), ()]), False),
            (Flag("--num", [(2,)], COUNTS) if series else Flag("--per-class", [(1,)], COUNTS), True),
            (Flag("--report", [()]), False),
        ]
        target = out if series else out.with_suffix(".png")
        return [(model, True), (tokenizer, True), *own, *sampling], [], target
    if command == "evaluate":
        wrong = Flag("--data", data.right, [*data.wrong, *models("data2", "data4"), ("digits",)])
        per_class = Flag("--per-class", [(1,)], COUNTS)
        sampling = [(flag, always) for flag, always in sampling if flag.name != "--more-smooth"]
        sampling.append((Flag("--more-smooth", [], [()]), False))
        return [(model, True), (tokenizer, True), (wrong, True), (per_class, True), *sampling], [], None
    if command == "edit":
        boxes = [(0.2, 0.2, 0.9, 0.9)], [(0.9, 0, 0.1, 1), ("nan", 0, 1, 1), (0, 0, 2, 2), (0, 1)]
        own = [
            (
                Flag("--image", models("picture.png"), models("broken.png", "no.png", "note.txt", "viar")),
                True,
            ),
            (Flag("--label", [(1,), (3,)], [("9",), ("-1",), ("x",), ("99999999999999999999999",)]), True),
            random.choice(
                [
                    (Flag("--box", *boxes), True),
                    (Flag("--mask", models("mask.png"), models("broken.png", "no.png")), True),
                ]
            ),
            (Flag("--border", [(1,)], [("-1",), ("x",)]), False),
            (Flag("--keep", [("codes",)], [("pixels",)]), False),
            (Flag("--num", [(2,)], COUNTS), False),
        ]
        return [(model, True), (tokenizer, True), *own, *sampling], [], out.with_suffix(".png")
    if command == "app":
        own = [
            (Flag("--var", models("var", "viar"), [*nothing, *models("tokenizer")]), True),
            (Flag("--var-tokenizer", tokenizer.right, tokenizer.wrong), True),
            (Flag("--host", [("127.0.0.1",)], [("192.0.2.1",), ("a host",)]), False),
            (Flag("--port", [], [("0",), ("65536",), ("-1",), ("many",), ()]), False),
            *((flag, False) for flag in SAMPLING if flag.name in ("--device", "--dtype", "--no-such-flag")),
        ]
        return [(model, True), (tokenizer, True), *own], [], None
    if command == "convert":
        source = random.choice(["viar", "viar.pth"] * 4 + [*filter(None, NO_MODELS)])
        target = random.choice([out, out.with_suffix(".pth"), out.with_suffix(".safetensors")])
        own = [
            (Flag("--sides", [SIDES], [(2, 1), (0,), ()]), False),
            (Flag("--num-heads", [(2,)], COUNTS), False),
        ]
        return own, [world / source, target], None
    own = [
        (Flag("--steps", [(1,)], COUNTS), False),
        (Flag("--per-class", [(1,)], COUNTS), False),
        (Flag("--iterations", [(1, 2)], [(0,), (-1, 2), (10**23,), ()]), False),
        (Flag("--seed", [(1,)], [("-1",), ("99999999999999999999999",)]), False),
        *((flag, False) for flag in SAMPLING if flag.name in ("--cfg", "--top-k", "--top-p")),
    ]
    return own, [], out


def _training_flags(
    command: str, world: Path, out: Path, data: Flag, tokenizer: Flag, nothing: list[Value]
) -> tuple[list[tuple[Flag, bool]], list[object], Path | None]:
    training = [(flag, flag.name in ("--train.steps", "--train.batch-size")) for flag in TRAINING]
    own: dict[str, list[tuple[Flag, bool]]] = {
        "train-tokenizer": [
            (Flag("--loss", [("l1",), ("l2+edges",)], [("lpips",), ("",), ("l1+",)]), False),
            (Flag("--model.base-channels", [(4,)], [("0",), ("3",), ("-4",)]), True),
            (Flag("--model.num-groups", [(2,)], [("0",), ("3",), ("-1",)]), True),
            (Flag("--model.sides", [SIDES], [(3, 2), (), (0,), ("x",)]), True),
            (Flag("--model.dropout", [(0.1,)], NUMBERS), False),
            (Flag("--model.commitment", [(0.5,)], NUMBERS), False),
            (
                Flag("--from", [(world / "tokenizer",)], [*nothing, (world / "viar",), (world / "coarser",)]),
                False,
            ),
        ],
        "train": [
            (tokenizer, True),
            (Flag("--model.width", [(16,)], [("15",), ("0",), ("-16",)]), True),
            (Flag("--model.num-heads", [(2,)], [("3",), ("0",)]), True),
            (Flag("--model.depth", [(3,)], [("1",), ("0",)]), True),
            (Flag("--model.sides", [SIDES], [(3, 2), (), (1, 2)]), True),
            (Flag("--model.codebook-size", [(16,)], [("8",), ("0",)]), True),
            (Flag("--model.code-channels", [(4,)], [("8",), ("-1",)]), True),
            (Flag("--model.num-classes", [(3,)], [("2",), ("4",), ("10",), ("0",)]), False),
            (Flag("--model.mlp-ratio", [(4,)], [*NUMBERS, ("0",)]), False),
            (Flag("--model.trunk.grad", [(1, 2)], [(2, 1), (0, 0), (1,)]), False),
            (Flag("--model.trunk.residual-weight", [(0,)], NUMBERS), False),
            (
                Flag("--from", [(world / "viar",)], [*nothing, (world / "var",), (world / "tokenizer",)]),
                False,
            ),
        ],
    }
    if command == "train":
        tokens = [(world / name,) for name in ("foreign_tokens", "damaged_tokens")]
        data = Flag("--data", [*data.right, (world / "tokens",)], [*data.wrong, *tokens])
    recipe = {"train-tokenizer": "digits", "train": "digits-viar"}[command]
    seconds = (Flag("--train.seconds", [("None",)], [("0",), ("nan",), ("-1",)]), True)
    augment = [
        (Flag("--augment", [(0,)], [("-1",), ("2",)]), True),
        (Flag("--augmentations", [("flip",), ("crop",)], [("flop",)]), False),
    ]
    augment = [] if command == "train" else augment
    training = [entry for entry in training if not augment or entry[0].name != "--augment"]
    return [(data, True), seconds, *augment, *own[command], *training], [recipe], out


def did_what_was_asked(line: Line, output: str) -> bool:
    """Whether a command that ended well left what it is for."""
    command, out = line.arguments[0], line.out
    if command in ("train-tokenizer", "train"):
        assert out is not None
        return (out / "model.safetensors").exists() and '"steps"' in output
    if command == "tokenize":
        assert out is not None
        return (out / "train-00000.npy").exists() and "rows of tokens" in output
    if command == "generate":
        assert out is not None
        return out.is_file() or ((out / "series.json").exists() and "images in" in output)
    if command == "evaluate":
        return '"validation_loss"' in output
    if command == "edit":
        assert out is not None
        return out.with_stem(f"{out.stem}-strip").exists()
    if command == "convert":
        return Path(line.arguments[2]).exists()
    return True
