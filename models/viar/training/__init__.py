"""Training of tokenizer and transformer."""

from .adapt import adapt_tokenizer, adapt_transformer, check_adaptable
from .config import TrainConfig
from .health import cell_health
from .loop import check_device
from .losses import cross_entropy, loss_terms, reconstruction_loss, validation_loss
from .presets import TOKENIZERS, TRANSFORMERS, TokenizerPreset, TransformerPreset
from .train import train_tokenizer, train_transformer

__all__ = [
    "TOKENIZERS",
    "TRANSFORMERS",
    "TokenizerPreset",
    "TrainConfig",
    "TransformerPreset",
    "adapt_tokenizer",
    "adapt_transformer",
    "cell_health",
    "check_adaptable",
    "check_device",
    "cross_entropy",
    "loss_terms",
    "reconstruction_loss",
    "train_tokenizer",
    "train_transformer",
    "validation_loss",
]
