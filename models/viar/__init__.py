"""VAR and VIAR: image generation scale by scale, with an explicit or an implicit transformer trunk.

`Tokenizer` turns images into token maps of rising size, `NextScaleTransformer` predicts each map from the
ones before, `generate` and `edit` put them to work.
"""

from .cache import EquilibriumCache, IterateCache
from .config import ExplicitTrunkConfig, ImplicitTrunkConfig, TokenizerConfig, TransformerConfig
from .editing import edit
from .inference import prepare_inference
from .iterations import Adaptive, Budget
from .report import GenerationReport, ScaleReport
from .sampling import Sample, generate, sample_tokens
from .tokenizer import Tokenizer
from .transformer import NextScaleTransformer
from .trunk import ExplicitTrunk, ImplicitTrunk

__all__ = [
    "Adaptive",
    "Budget",
    "EquilibriumCache",
    "ExplicitTrunk",
    "ExplicitTrunkConfig",
    "GenerationReport",
    "ImplicitTrunk",
    "ImplicitTrunkConfig",
    "IterateCache",
    "NextScaleTransformer",
    "Sample",
    "ScaleReport",
    "Tokenizer",
    "TokenizerConfig",
    "TransformerConfig",
    "edit",
    "generate",
    "prepare_inference",
    "sample_tokens",
]
