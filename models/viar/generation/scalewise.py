"""One batch of images on its way through the scales, and what comes out of it.

Shape letters: B images, K scales of side p_k, l = p_k^2 tokens of the scale at hand, V codebook, C width,
Z code channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kinds import check_tensor
from ..model.scales import scale_slices
from ..model.schedule import Adaptive
from ..model.transformer import NextScaleTransformer
from ..model.trunk import ScaleSolve
from ..tokenizer import Tokenizer
from .choice import TokenNoise, choose, mix
from .guidance import Guidance, guidance_ramp
from .report import ScaleReport
from .settings import Sampling

# (scale, sampled embeddings (B, Z, p_k, p_k)) -> embeddings to go on with
Replace = Callable[[int, Tensor], Tensor]
# (scale, f_hat (B, Z, p_K, p_K) with that scale added) -> f_hat to go on with
Hold = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """What the sampler made.

    Attributes:
        tokens: sampled tokens, K tensors (B, p_k^2); with `more_smooth` those of most weight in each mixture.
        f_hat: sum of all scales, (B, Z, p_K, p_K): what the image is decoded from. With `more_smooth` it is
            not that of the tokens, and there is no other trace of the mixtures.
        certain: (B,) bool, whether no token of an image hangs on rounding, see `viar.generation.choice`:
            computed in float32 in a batch of another size, it gets the same tokens. Nowhere with
            `more_smooth`, where an image is the same up to rounding.
        cache_bytes: keys and values held at the end, which is their peak; with graphs those of the batch that
            was captured.
        scales: what each scale took, if it was measured.
    """

    tokens: list[Tensor]
    f_hat: Tensor
    certain: Tensor
    cache_bytes: int
    scales: tuple[ScaleReport, ...] = ()


class Generation:
    """One batch of images on its way through the scales: all that a scale leaves to the next.

    Making one and running a scale waits for nothing and takes nothing from the host but sizes and settings,
    unless scales are measured or iterate to a tolerance: it can be captured, see `viar.generation.graphs`.

    Args:
        model: VAR or VIAR, in evaluation mode.
        tokenizer: whose quantizer sums the scales up.
        sampling: how to sample.
        schedule: its iterations of each scale.
        labels: (B,) classes, on the model's device.
        noise: of the images.
        measure: fill in `Sample.scales`; waits for the device at every scale.
    """

    def __init__(
        self,
        model: NextScaleTransformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        schedule: Sequence[int | Adaptive | None],
        labels: Tensor,
        noise: TokenNoise,
        *,
        measure: bool = False,
    ) -> None:
        self.sides, self.quantizer, self.sampling = model.config.sides, tokenizer.quantizer, sampling
        self.noise, self.measure = noise, measure
        self.predictor = _Predictor(model, sampling, schedule, labels, measure)
        self.certain = torch.full((len(labels),), not sampling.more_smooth, device=labels.device)
        self.f_hat = torch.zeros(
            len(labels), model.config.code_channels, self.sides[-1], self.sides[-1], device=labels.device
        )
        self.next_input: Tensor | None = None
        self.tokens: list[Tensor] = []
        self.reports: list[ScaleReport] = []

    def run(self, scale: int, replace: Replace | None = None, hold: Hold | None = None) -> None:
        """The tokens of one scale, and what the next is predicted from; scales come in order.

        Args:
            scale: k, from 0.
            replace: sees the embeddings sampled and returns those to go on with; default all.
            hold: the same with f_hat once they are added.

        Raises:
            ValueError: `replace` or `hold` give back something of another shape or on another device.
        """
        start = time.perf_counter()
        embeddings = self._draw(scale, self.predictor.predict(scale, self.next_input))
        f_hat = self.quantizer.accumulate(
            self.f_hat, replace(scale, embeddings) if replace else embeddings, scale
        )
        self.f_hat = hold(scale, f_hat) if hold else f_hat
        check_tensor("hold", self.f_hat)
        if self.f_hat.device != f_hat.device:
            raise ValueError(
                f"hold: expected a tensor on {f_hat.device} back, got one on {self.f_hat.device}"
            )
        if self.f_hat.shape != f_hat.shape:
            raise ValueError(f"hold: expected shape {tuple(f_hat.shape)} back, got {tuple(self.f_hat.shape)}")
        if scale < len(self.sides) - 1:
            self.next_input = self.quantizer.next_input(self.f_hat, scale)
        if self.measure:
            self.reports.append(self.predictor.report(scale, seconds_since(start, self.f_hat.device)))

    def _draw(self, scale: int, logits_BlV: Tensor) -> Tensor:
        """Embeddings (B, Z, p_k, p_k) of the tokens of a scale, which are kept."""
        sampling, first = self.sampling, scale_slices(self.sides)[scale].start
        candidates = (logits_BlV, self.noise, first, sampling.top_k, sampling.top_p)
        if sampling.more_smooth:
            mixture = mix(*candidates, progress=guidance_ramp(scale, len(self.sides)))
            self.tokens.append(mixture.tokens)
            return self.quantizer.embed_mixture(mixture.weights_BlV)
        choice = choose(*candidates)
        self.tokens.append(choice.tokens)
        self.certain &= choice.certain
        return self.quantizer.embed(choice.tokens)

    def sample(self) -> Sample:
        """What was made, by the scales that were run."""
        return Sample(self.tokens, self.f_hat, self.certain, self.cache_bytes, tuple(self.reports))

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.predictor.cache.num_bytes


class _Predictor:
    """What the model says of one scale after another: owns the cache and all that scales have in common."""

    def __init__(
        self,
        model: NextScaleTransformer,
        sampling: Sampling,
        schedule: Sequence[int | Adaptive | None],
        labels: Tensor,
        measure: bool,
    ) -> None:
        self.model, self.warm_start, self.measure = model, sampling.warm_start, measure
        self.schedule = schedule
        self.cache = model.trunk.new_cache(sampling.cache, schedule)
        self.guidance = Guidance(sampling.cfg, model.config.sides, len(labels), reuse=sampling.guidance_reuse)
        self.embedding_BC, cond = model.condition(self.guidance.labels(labels, model.null_class))
        self.modulations = model.trunk.modulate(cond.to(model.trunk.weight_type))
        self.head_modulation = model.modulate_head(self.embedding_BC)
        self.solve: ScaleSolve | None = None  # of the last scale

    def predict(self, scale: int, next_input: Tensor | None) -> Tensor:
        """Logits (B, l, V) of a scale from `MultiScaleQuantizer.next_input` of the one before."""
        model, samples = self.model, slice(self.guidance.num_samples(scale))
        if next_input is not None and self.guidance.num_samples(scale) > len(next_input):
            next_input = next_input.repeat(2, 1, 1, 1)
        x_BlC = model.embed_scale(scale, self.embedding_BC[samples], next_input)
        output = model.trunk(
            x_BlC,
            {name: modulation[:, samples] for name, modulation in self.modulations.items()},
            cache=self.cache,
            iterations=self.schedule[scale],
            displacement=self.solve.displacement if self.solve and self.warm_start else None,
            measure=self.measure,
        )
        self.solve = output.solve
        hidden_BlC = model.head_input(output.x_BLC, self.head_modulation[:, samples])
        return model.classify(self.guidance.guide(scale, hidden_BlC))

    def report(self, scale: int, seconds: float) -> ScaleReport:
        """What the last scale took."""
        solve = self.solve if self.solve and len(self.solve.evaluations) else None  # no samples: no mean
        return ScaleReport(
            side=self.model.config.sides[scale],
            evaluations=None if solve is None else float(solve.evaluations.double().mean()),
            residual=None if solve is None or solve.residual is None else float(solve.residual.max()),
            seconds=seconds,
            cache_bytes=self.cache.used_bytes,
        )


def seconds_since(start: float, device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
