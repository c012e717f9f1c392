"""Multi-scale residual VQ-VAE: images to tokens of K scales and back (arXiv 2404.02905)."""

from .discriminator import Discriminator
from .quantizer import MultiScaleQuantizer, QuantizerOutput
from .tokenizer import Tokenizer, TokenizerOutput

__all__ = ["Discriminator", "MultiScaleQuantizer", "QuantizerOutput", "Tokenizer", "TokenizerOutput"]
