"""Training of tokenizer and transformer."""

from .config import TrainConfig
from .losses import cross_entropy, reconstruction_loss, validation_loss
from .presets import TOKENIZERS, TRANSFORMERS, TokenizerPreset, TransformerPreset
from .train import train_tokenizer, train_transformer

__all__ = [
    "TOKENIZERS",
    "TRANSFORMERS",
    "TokenizerPreset",
    "TrainConfig",
    "TransformerPreset",
    "cross_entropy",
    "reconstruction_loss",
    "train_tokenizer",
    "train_transformer",
    "validation_loss",
]
