"""What is measured: models with random weights of real shape, and trained models of 8 x 8 digits."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from viar import (
    ExplicitTrunkConfig,
    ImplicitTrunkConfig,
    NextScaleTransformer,
    Sample,
    Sampling,
    Tokenizer,
    TokenizerConfig,
    TransformerConfig,
    sample_tokens,
)
from viar.data import ImageData, load_data
from viar.evaluation import Classifier, train_classifier
from viar.generation.sampling import decode_images
from viar.training import TOKENIZERS, TRANSFORMERS, train_tokenizer, train_transformer

from ...case import Run
from ...measure import marked

DIGITS = Path("runs/benchmarks/digits")  # tokenizer, viar, var and classifier, trained once
AT_ONCE = 250  # images of digits that are made at a time; has no influence
DIGITS_SAMPLING: dict[str, Any] = {"cfg": 1.5, "top_k": None, "top_p": 0.96}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A shape that takes next to no time, and what it has for an implicit trunk.
QUICK_BLOCKS = {"num_pre": 1, "num_post": 1}
QUICK: dict[str, Any] = {
    "width": 32,
    "num_heads": 2,
    "sides": (1, 2, 3),
    "codebook_size": 64,
    "code_channels": 8,
    "num_classes": 10,
}


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
    with device:
        tokenizer = Tokenizer(config)
    nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    return tokenizer.eval().requires_grad_(False)


def descend(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
    """Move the weights of a module by the gradient of a loss, as the training loop does."""
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def num_bytes(module: nn.Module) -> int:
    """Parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True)
class Trained:
    """Models of digits, and who judges their images."""

    tokenizer: Tokenizer
    viar: NextScaleTransformer
    var: NextScaleTransformer
    classifier: Classifier
    data: ImageData
    device: torch.device

    def samples(self, model: NextScaleTransformer, labels: Tensor, **settings: Any) -> list[Sample]:
        """One image a label, sampled by `DIGITS_SAMPLING`, `AT_ONCE` at a time."""
        sampling = Sampling(**settings, **DIGITS_SAMPLING)
        return [
            sample_tokens(model, self.tokenizer, labels[start : start + AT_ONCE], sampling, first_index=start)
            for start in range(0, len(labels), AT_ONCE)
        ]

    def images(self, samples: list[Sample]) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        return torch.cat([decode_images(self.tokenizer, sample) for sample in samples])


def digits_folder(run: Run) -> Path:
    """Holds tokenizer, viar, var and classifier: trained ones, or untrained stand-ins."""
    if run.quick:
        return _stand_ins()
    if not _classifier(DIGITS).exists():  # it comes last
        print(f"{DIGITS} holds no trained models: they are trained now, which takes minutes")
        train_digits(DIGITS)
    return DIGITS


def train_digits(folder: Path) -> None:
    """Train tokenizer, viar, var and classifier there by the recipes of digits; what is there goes on."""
    console, codec = Console(quiet=True), TOKENIZERS["digits"]
    data = load_data("digits", codec.model.image_side)
    changed = load_data("digits", codec.model.image_side, augment=codec.augment)
    if not _is_trained(folder / "tokenizer"):
        torch.manual_seed(codec.train.seed)
        train_tokenizer(
            Tokenizer(codec.model),
            changed.train,
            folder / "tokenizer",
            codec.train,
            loss=codec.loss,
            console=console,
        )
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    for name in ("viar", "var"):
        recipe, into = TRANSFORMERS[f"digits-{name}"], folder / name
        if not _is_trained(into):
            torch.manual_seed(recipe.train.seed)
            model = NextScaleTransformer(recipe.model)
            train_transformer(model, tokenizer, data.train, into, recipe.train, console=console)
    torch.manual_seed(0)
    classifier = Classifier(data.num_classes, codec.model.image_side)
    train_classifier(classifier, data.train, console=console)
    _classifier(folder).parent.mkdir(exist_ok=True)
    classifier.save(_classifier(folder))


def _is_trained(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def _classifier(folder: Path) -> Path:
    return folder / "classifier" / "classifier.safetensors"


@cache
def _stand_ins() -> Path:
    """In a folder that goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="viar_untrained_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    cpu, codec = torch.device("cpu"), TOKENIZERS["digits"].model
    random_tokenizer(codec, cpu).save_pretrained(folder / "tokenizer")
    for name in ("viar", "var"):
        random_transformer(TRANSFORMERS[f"digits-{name}"].model, cpu).save_pretrained(folder / name)
    _classifier(folder).parent.mkdir()
    torch.manual_seed(0)
    classifier = Classifier(TRANSFORMERS["digits-viar"].model.num_classes, codec.image_side)
    classifier.save(_classifier(folder))
    return folder


def trained_digits(run: Run) -> Trained:
    """The models of `digits_folder`, on the device of the run; the same ones for every point."""
    return _loaded(digits_folder(run), run.device)


@cache
def _loaded(folder: Path, device: torch.device) -> Trained:
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer").to(device).eval()
    viar, var = (
        NextScaleTransformer.from_pretrained(folder / name).to(device).eval() for name in ("viar", "var")
    )
    data = load_data("digits", tokenizer.config.image_side)
    classifier = Classifier(data.num_classes, tokenizer.config.image_side)
    classifier.load(_classifier(folder)).to(device).eval()
    return Trained(tokenizer, viar, var, classifier, data, device)


@dataclass(frozen=True)
class Shape:
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
    ) -> Shape:
        """With the published tokenizer; unless `real_coder`, with a coder that is small and quickly made."""
        small: dict[str, Any] = {} if real_coder else {"base_channels": 32, "multipliers": (1,)}
        tokenizer = TokenizerConfig(
            **small,
            sides=transformer.sides,
            codebook_size=transformer.codebook_size,
            code_channels=transformer.code_channels,
        )
        return cls(transformer, tokenizer, batch, iterations)

    @property
    def sampling(self) -> dict[str, Any]:
        """Of `viar.Sampling`; `viar.generate` takes them too."""
        return {"iterations": self.iterations, "cfg": self.cfg, "top_k": self.top_k, "top_p": self.top_p}

    def labels(self, device: torch.device) -> Tensor:
        """Classes in turn."""
        return torch.arange(self.batch, device=device) % self.transformer.num_classes


def gigabytes(size: int | None) -> str:
    """Bytes in words; "-" where nothing was measured."""
    return "-" if size is None else f"{size / 1e9:.2f}"


def mark_cell(model: NextScaleTransformer) -> None:
    """Have every evaluation of the implicit block's cell marked for a profile, in place."""
    trunk: Any = model.trunk
    cell = trunk.layer.cell
    cell.forward = marked(cell.forward)


def written(iterations: int | str | list[int]) -> str:
    """A schedule in words."""
    return " to ".join(map(str, iterations)) if isinstance(iterations, list) else str(iterations)


def published(model: str, depth: int, run: Run, **trunk: Any) -> TransformerConfig:
    """The published shape of a model, which a quick run has next to nothing of.

    Args:
        model: VAR or VIAR.
        depth: D; the model is 64 D wide.
        run: whether it is quick.
        **trunk: of `ImplicitTrunkConfig`, where the model is VIAR.
    """
    changes, blocks = (QUICK, QUICK_BLOCKS) if run.quick else ({}, {})
    explicit = ExplicitTrunkConfig()
    chosen = ImplicitTrunkConfig(**{**blocks, **trunk}) if model == "VIAR" else explicit
    return TransformerConfig(depth=depth, trunk=chosen, **changes)


def implicit(num_pre: int, num_post: int) -> ImplicitTrunkConfig:
    """A trunk with so many explicit blocks."""
    return ImplicitTrunkConfig(num_pre=num_pre, num_post=num_post)
