"""What is measured: models with random weights of real shape, and the trained models of the demo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from viar import ImplicitTrunkConfig, NextScaleTransformer, Tokenizer, TokenizerConfig, TransformerConfig
from viar.data import ImageData, load_data
from viar.demo import DemoConfig, run_demo
from viar.evaluate import Classifier

DIGITS_SAMPLING = {"cfg": 1.5, "top_k": None, "top_p": 0.96}  # of the demo


@torch.no_grad()
def random_transformer(
    config: TransformerConfig, device: torch.device, seed: int = 0
) -> NextScaleTransformer:
    """In evaluation mode, with weights large enough that every part matters.

    The published initial weights all but switch attention off. Nothing is allocated twice.
    """
    with torch.device("meta"):
        model = NextScaleTransformer(config)
    model.to_empty(device=device)
    buffers = dict(NextScaleTransformer(replace(config, width=2, num_heads=1)).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 0.1 if parameter.dim() == 1 or name.endswith("log_scale") else parameter.shape[-1] ** -0.5
        parameter.normal_(std=std, generator=generator)
    return model.eval().requires_grad_(False)


def random_tokenizer(config: TokenizerConfig, device: torch.device, seed: int = 0) -> Tokenizer:
    """In evaluation mode, with codes as large as features are."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(config)
    nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    return tokenizer.to(device).eval().requires_grad_(False)


def num_bytes(module: nn.Module) -> int:
    """Parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True)
class Trained:
    """Models trained on digits, and who judges their images.

    Attributes:
        folder: holds tokenizer, viar, var and classifier, as the demo leaves them.
        device: where they are.
    """

    folder: Path
    tokenizer: Tokenizer
    viar: NextScaleTransformer
    var: NextScaleTransformer
    classifier: Classifier
    data: ImageData
    device: torch.device

    @classmethod
    def load(cls, folder: Path, device: torch.device, console: Console) -> Trained:
        """From a folder of the demo, which runs if there is none."""
        if not (folder / "classifier" / "classifier.safetensors").exists() or not all(
            (folder / name / "model.safetensors").exists() for name in ("tokenizer", "viar", "var")
        ):
            console.print(f"{folder} holds no trained models: the demo trains them")
            run_demo(DemoConfig(out=folder), console)
        tokenizer = Tokenizer.from_pretrained(folder / "tokenizer").to(device).eval()
        viar, var = (
            NextScaleTransformer.from_pretrained(folder / name).to(device).eval() for name in ("viar", "var")
        )
        data = load_data("digits", tokenizer.config.image_side)
        classifier = Classifier(data.num_classes, tokenizer.config.image_side)
        classifier.load(folder / "classifier" / "classifier.safetensors").to(device).eval()
        return cls(folder, tokenizer, viar, var, classifier, data, device)


@dataclass(frozen=True)
class Case:
    """A VIAR and its tokenizer of some shape, and how they are sampled."""

    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    batch: int
    iterations: int | tuple[int, int] = 10
    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96

    @classmethod
    def of(
        cls,
        transformer: TransformerConfig,
        batch: int,
        iterations: int | tuple[int, int],
        *,
        real_coder: bool,
    ) -> Case:
        """With the published tokenizer; unless `real_coder`, with a coder that is small and quickly made."""
        small = {} if real_coder else {"base_channels": 32, "multipliers": (1,)}
        tokenizer = TokenizerConfig(
            **small,
            sides=transformer.sides,
            codebook_size=transformer.codebook_size,
            code_channels=transformer.code_channels,
        )
        return cls(transformer, tokenizer, batch, iterations)

    def labels(self, device: torch.device) -> torch.Tensor:
        """Classes in turn."""
        return torch.arange(self.batch, device=device) % self.transformer.num_classes


def implicit(num_pre: int, num_post: int) -> ImplicitTrunkConfig:
    """A trunk with so many explicit blocks."""
    return ImplicitTrunkConfig(num_pre=num_pre, num_post=num_post)
