"""VAR and VIAR: image generation scale by scale, with an explicit or an implicit transformer trunk.

`Tokenizer` turns images into token maps of rising size, `NextScaleTransformer` predicts each map from the
ones before, `generate`, `generate_series` and `edit` put them to work; `load_official` reads the published
checkpoints, `load_shipped` what comes with the package.
"""

from . import early

early.prepare()  # before seconds of imports

from deqlib import EquilibriumCache  # noqa: E402

try:
    from .checkpoints.convert import export_official, load_official
    from .generation.editing import box_mask, edit
    from .generation.inference import prepare_inference
    from .generation.report import GenerationReport, ScaleReport
    from .generation.sampling import generate, sample_tokens
    from .generation.scalewise import Sample
    from .generation.series.series import SeriesReport, generate_series
    from .generation.settings import Sampling
    from .model.cache import IterateCache
    from .model.config import ExplicitTrunkConfig, ImplicitTrunkConfig, TokenizerConfig, TransformerConfig
    from .model.implicit import ImplicitTrunk
    from .model.schedule import Adaptive, Budget
    from .model.transformer import NextScaleTransformer
    from .model.trunk import ExplicitTrunk
    from .tokenizer import Tokenizer
    from .weights import load_shipped
except ModuleNotFoundError as error:
    # The files come with deqlib, what they need does not.
    raise ModuleNotFoundError(
        f"viar needs more packages than deqlib does ({error}); pip install 'deqlib[viar]'", name=error.name
    ) from error

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
    "Sampling",
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
    "load_shipped",
    "prepare_inference",
    "sample_tokens",
]
