"""The commands: where each is, what it does in a line, and examples.

A new command is a function in a file of its own and an entry of `COMMANDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A command, of which nothing is imported before it is asked for.

    Attributes:
        module: of this package, with the function `NAME_command`, NAME that of the command.
        summary: what it does, in a few words.
        examples: command lines, each with what it is for.
        reports: whether it has a result to tell, so that it takes `--json`.
        computes: whether bits of its result may hang on threads, so that it takes `--deterministic`.
    """

    module: str
    summary: str
    examples: tuple[tuple[str, str], ...]
    reports: bool = True
    computes: bool = False


# In the order that the help shows.
COMMANDS = {
    "train-tokenizer": Command(
        "train",
        "train a tokenizer from a recipe",
        (
            ("a minute on one core", "viar train-tokenizer digits --out runs/tokenizer"),
            (
                "what one on your pictures would need",
                "viar train-tokenizer emoji --data pictures --train.batch-size 16 --dry-run",
            ),
        ),
        computes=True,
    ),
    "tokenize": Command(
        "tokenize",
        "write the tokens of a data set, to train on",
        (
            (
                "four cuts of each picture",
                "viar tokenize --tokenizer runs/tokenizer --data pictures --out tokens --crops 4",
            ),
        ),
        computes=True,
    ),
    "train": Command(
        "train",
        "train a VAR or a VIAR from a recipe",
        (
            ("a small VIAR", "viar train digits-viar --tokenizer runs/tokenizer --out runs/viar"),
            (
                "a published VAR, on your pictures",
                "viar train imagenet256-var-d16 --from var_d16.pth --tokenizer vae_ch160v4096z32.pth "
                "--data pictures --out runs/mine",
            ),
        ),
        computes=True,
    ),
    "generate": Command(
        "generate",
        "generate images, into one PNG or a folder",
        (
            (
                "three digits, ten of each, by two iterations",
                "viar generate --labels 3 1 4 --iterations 2 --out digits.png",
            ),
            ("a thousand, numbered", "viar generate --num 1000 --format png --out samples"),
        ),
        computes=True,
    ),
    "evaluate": Command(
        "evaluate",
        "measure images beside real ones: FID and others",
        (
            ("the model that comes with the package", "viar evaluate --per-class 20 --iterations 4"),
            ("pictures that are made already", "viar evaluate --images samples --data mnist --json"),
        ),
        computes=True,
    ),
    "reproduce": Command(
        "reproduce",
        "repeat the published evaluation on ImageNet",
        (
            ("whether all of it runs here", "viar reproduce --dry-run --shape var-d16"),
            (
                "from the published files",
                "viar reproduce --model viar.pth --tokenizer vae_ch160v4096z32.pth --reference "
                "VIRTUAL_imagenet256_labeled.npz --dtype bfloat16",
            ),
        ),
        computes=True,
    ),
    "edit": Command(
        "edit",
        "make a part of a picture anew",
        (
            (
                "the upper half, four times",
                "viar edit --image digit.png --label 3 --box 0 0 0.5 1 --num 4 --out edited.png",
            ),
        ),
        computes=True,
    ),
    "app": Command(
        "app",
        "serve a web page that generates and in-paints",
        (("on a port of your choice, in a browser", "viar app --port 7900 --open"),),
    ),
    "convert": Command(
        "convert",
        "turn a published checkpoint into a folder, or back",
        (
            ("to a folder that the other commands read", "viar convert var_d16.pth runs/var-d16"),
            ("and to a file", "viar convert runs/var-d16 var.safetensors"),
        ),
    ),
    "demo": Command(
        "demo",
        "show the shipped model, then train one and measure it",
        (("a look, of few steps", "viar demo --steps 200 --per-class 10 --out runs/demo"),),
    ),
    "completion": Command(
        "completion",
        "print a script that completes commands and flags in a shell",
        (
            (
                "from the next bash on",
                "viar completion bash > ~/.local/share/bash-completion/completions/viar",
            ),
        ),
        reports=False,
    ),
}


def load(name: str) -> Callable[..., None]:
    """The function of a command.

    Args:
        name: of `COMMANDS`.
    """
    module = import_module(f".{COMMANDS[name].module}", __package__)
    command: Callable[..., None] = getattr(module, f"{name.replace('-', '_')}_command")
    return command
