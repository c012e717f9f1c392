"""VAR and VIAR: image generation scale by scale, with an explicit or an implicit transformer trunk.

`Tokenizer` turns images into token maps of rising size, `NextScaleTransformer` predicts each map from the
ones before, `generate`, `generate_series` and `edit` put them to work; `load_official` reads the published
checkpoints.
"""

from .cache import EquilibriumCache, IterateCache
from .config import ExplicitTrunkConfig, ImplicitTrunkConfig, TokenizerConfig, TransformerConfig
from .convert import export_official, load_official
from .editing import box_mask, edit
from .inference import prepare_inference
from .iterations import Adaptive, Budget
from .report import GenerationReport, ScaleReport
from .sampling import Sample, generate, sample_tokens
from .series import SeriesReport, generate_series
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
    "SeriesReport",
    "Tokenizer",
    "TokenizerConfig",
    "TransformerConfig",
    "box_mask",
    "edit",
    "export_official",
    "generate",
    "generate_series",
    "load_official",
    "prepare_inference",
    "sample_tokens",
]
