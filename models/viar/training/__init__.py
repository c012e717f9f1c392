"""Training of tokenizer and transformer."""

from .adapt import adapt_tokenizer, adapt_transformer, check_adaptable
from .adversarial import AdversarialConfig
from .config import TrainConfig
from .health import cell_health
from .loop import check_device
from .losses import cross_entropy, loss_terms, reconstruction_loss, validation_loss
from .perceptual import FeatureDistance, lpips_distance
from .recipes import TOKENIZERS, TRANSFORMERS, TokenizerRecipe, TransformerRecipe
from .train import train_tokenizer, train_transformer
from .validation import tokenizer_validation

__all__ = [
    "TOKENIZERS",
    "TRANSFORMERS",
    "AdversarialConfig",
    "FeatureDistance",
    "TokenizerRecipe",
    "TrainConfig",
    "TransformerRecipe",
    "adapt_tokenizer",
    "adapt_transformer",
    "cell_health",
    "check_adaptable",
    "check_device",
    "cross_entropy",
    "loss_terms",
    "lpips_distance",
    "reconstruction_loss",
    "tokenizer_validation",
    "train_tokenizer",
    "train_transformer",
    "validation_loss",
]
