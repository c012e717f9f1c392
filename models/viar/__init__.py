"""VAR and VIAR: image generation scale by scale, with an explicit or an implicit transformer trunk.

`Tokenizer` turns images into token maps of rising size, `NextScaleTransformer` predicts each map from the
ones before, `generate` and `edit` put them to work.
"""

from .cache import EquilibriumCache, IterateCache
from .config import ExplicitTrunkConfig, ImplicitTrunkConfig, TokenizerConfig, TransformerConfig
from .convert import export_official, load_official
from .editing import edit
from .iterations import Adaptive
from .sampling import Sample, generate, sample_tokens
from .tokenizer import Tokenizer
from .transformer import NextScaleTransformer
from .trunk import ExplicitTrunk, ImplicitTrunk

__all__ = [
    "Adaptive",
    "EquilibriumCache",
    "ExplicitTrunk",
    "ExplicitTrunkConfig",
    "ImplicitTrunk",
    "ImplicitTrunkConfig",
    "IterateCache",
    "NextScaleTransformer",
    "Sample",
    "Tokenizer",
    "TokenizerConfig",
    "TransformerConfig",
    "edit",
    "export_official",
    "generate",
    "load_official",
    "sample_tokens",
]
