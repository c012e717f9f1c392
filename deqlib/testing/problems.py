"""Fixed-point problems whose answers are known without solving them.

Every problem is made backwards: the fixed point is drawn first, the inputs of the cell are chosen so that
it is one. `rate` is the spectral radius of the Jacobian there, the factor by which Picard iteration
shrinks an error in the long run; where it is 1 or more, Picard does not converge.

`suite()` is the set that the benchmarks run; the constructors take sizes, types and seeds of your own.
They raise `TypeError` or `ValueError` for those that are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_instance, check_number, check_tensor
from ..state import AUTOMATIC, cut
from ._arguments import checked


@dataclass(frozen=True)
class Problem:
    """z = cell(z, *inputs) with a known answer.

    Attributes:
        name: what it is.
        cell: `cell(z, *inputs) -> z`; samples do not depend on one another.
        z0: where to start, (B, ...).
        inputs: of the cell. Those with B first differ from sample to sample, the others are shared.
        solution: the fixed point, (B, ...); `None` if there is none, or it is not known.
        rate: spectral radius of the Jacobian at the solution; `None` if not known in closed form.
    """

    name: str
    cell: Callable[..., Tensor]
    z0: Tensor
    inputs: tuple[Any, ...]
    solution: Tensor | None
    rate: float | None = None

    def f(self, z: Tensor) -> Tensor:
        """The map, inputs filled in."""
        image: Tensor = self.cell(z, *self.inputs)
        return image

    def residuals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Residual and relative residual of every sample at `z`, recomputed, (B,) each."""
        with torch.no_grad():
            fz = self.f(z)
            residual: Tensor = torch.linalg.vector_norm((fz - z).flatten(1), dim=1)
            scale: Tensor = torch.linalg.vector_norm(fz.flatten(1), dim=1)
            return residual, residual / scale

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Problem:
        """The same problem in another `dtype` or on another `device`; default as it is."""

        def move(x: Any) -> Any:
            return x.to(device=device, dtype=dtype) if isinstance(x, Tensor) else x

        return replace(
            self, z0=move(self.z0), inputs=tuple(map(move, self.inputs)), solution=move(self.solution)
        )

    def samples(self, rows: Sequence[int]) -> Problem:
        """The problem for the samples `rows` of the batch, in this order.

        Inputs whose first axis is as long as the batch are cut; so the others must not be.
        """
        index, batch = torch.tensor(rows, device=self.z0.device), len(self.z0)
        return replace(
            self,
            z0=self.z0[index],
            inputs=tuple(cut(x, AUTOMATIC, batch, index) for x in self.inputs),
            solution=None if self.solution is None else self.solution[index],
        )

    def requiring_grad(self) -> Problem:
        """The problem with copies of its inputs that gradients are recorded for."""

        def record(x: Any) -> Any:
            return x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x

        return replace(self, inputs=tuple(map(record, self.inputs)))


class _Draw:
    """Random tensors in float64 from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def signs(self, *shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.generator).to(torch.float64) * 2 - 1

    def orthogonal(self, width: int) -> Tensor:
        basis: Tensor = torch.linalg.qr(self.normal(width, width))[0]
        return basis

    def weight(self, *shape: int, gain: float = 1.0) -> Tensor:
        """Normal, scaled so that it keeps the size of what it multiplies, times `gain`."""
        return self.normal(*shape) * (gain / math.sqrt(shape[-2]))


def _make(
    name: str,
    cell: Callable[..., Tensor],
    solution: Tensor | None,
    inputs: tuple[Any, ...],
    rate: float | None,
    dtype: torch.dtype,
    z0: Tensor | None = None,
) -> Problem:
    if z0 is None:
        assert solution is not None
        z0 = torch.zeros_like(solution)
    return Problem(name, cell, z0, inputs, solution, rate).to(dtype)


def _affine_cell(z: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    return z @ matrix + x


@checked
def linear(
    spectrum: Tensor | list[float],
    *,
    batch: int = 4,
    non_normality: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    name: str = "linear",
) -> Problem:
    """f(z) = z A + x with the given real eigenvalues.

    Args:
        spectrum: eigenvalues of A, (D,).
        batch: B.
        non_normality: size of the entries above the diagonal of A's Schur form, relative to the largest
            eigenvalue: 0 makes A symmetric; with more, residuals may grow for long before they fall.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
        name: of the problem.

    Raises:
        TypeError, ValueError: no such spectrum.
    """
    if isinstance(spectrum, Tensor):
        check_tensor("linear", spectrum=spectrum)
    else:
        check_instance("linear", list, "a tensor or a list of numbers", spectrum=spectrum)
        for i, value in enumerate(spectrum):
            named: dict[str, Any] = {f"spectrum[{i}]": value}
            check_number("linear", -math.inf, **named)
    if isinstance(spectrum, Tensor) and (spectrum.dim() != 1 or spectrum.is_complex() or spectrum.is_meta):
        raise ValueError(
            f"linear: spectrum must be real, of shape (D,), got {spectrum.dtype} {tuple(spectrum.shape)}"
        )
    if not len(spectrum):
        raise ValueError("linear: spectrum must hold at least one eigenvalue, got none")
    draw, values = _Draw(seed), torch.as_tensor(spectrum, dtype=torch.float64)
    width, rate = len(values), float(values.abs().max())
    schur = torch.diag(values)
    if non_normality:
        schur = schur + torch.triu(draw.normal(width, width), 1) * (non_normality * rate / math.sqrt(width))
    basis = draw.orthogonal(width)
    matrix = basis @ schur @ basis.T
    solution = draw.normal(batch, width)
    return _make(name, _affine_cell, solution, (solution - solution @ matrix, matrix), rate, dtype)


@checked
def nearly_singular(
    *, batch: int = 4, width: int = 64, gap: float = 1e-2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Problem:
    """Linear, I - J nearly singular: one eigenvalue is 1 - `gap`, the others are spread over [-0.5, 0.5].

    Args:
        batch: B.
        width: D; states are (B, D).
        gap: distance of the largest eigenvalue from 1.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    spectrum = torch.linspace(-0.5, 0.5, width, dtype=torch.float64)
    spectrum[-1] = 1 - gap
    return linear(spectrum, batch=batch, dtype=dtype, seed=seed, name="nearly singular")


@checked
def expanding(
    *, batch: int = 4, width: int = 64, rate: float = 3.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Problem:
    """Linear with eigenvalues in [-rate, 0.5]: Picard diverges from a fixed point that exists.

    Args:
        batch: B.
        width: D; states are (B, D).
        rate: spectral radius, above 1.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    spectrum = torch.linspace(-rate, 0.5, width, dtype=torch.float64)
    return linear(spectrum, batch=batch, dtype=dtype, seed=seed, name="expanding")


@checked
def two_cycle(
    *, batch: int = 4, width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Problem:
    """f(z) = 2 z* - z: Picard alternates between two points for ever.

    Args:
        batch: B.
        width: D; states are (B, D).
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    solution = _Draw(seed).normal(batch, width)
    return _make("two-cycle", _reflection_cell, solution, (solution,), 1.0, dtype)


def _reflection_cell(z: Tensor, centre: Tensor) -> Tensor:
    return 2 * centre - z


@checked
def drift(*, batch: int = 4, width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """f(z) = z + x: no fixed point. No solver can succeed; all must say so.

    Args:
        batch: B.
        width: D; states are (B, D).
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    x = _Draw(seed).normal(batch, width)
    return _make("drift", _shift_cell, None, (x,), None, dtype, torch.zeros_like(x))


def _shift_cell(z: Tensor, x: Tensor) -> Tensor:
    return z + x


@checked
def explosion(
    *, batch: int = 4, width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Problem:
    """f(z) = z^2 + 1 + |x|: no fixed point, and iterates overflow within a few steps.

    Args:
        batch: B.
        width: D; states are (B, D).
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    x = _Draw(seed).normal(batch, width)
    return _make("explosion", _square_cell, None, (x,), None, dtype, torch.zeros_like(x))


def _square_cell(z: Tensor, x: Tensor) -> Tensor:
    return z.square() + 1 + x.abs()


@checked
def tanh_rnn(
    *,
    batch: int = 4,
    width: int = 64,
    rate: float = 0.9,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    name: str = "tanh RNN",
) -> Problem:
    """f(z) = tanh(z W + x), the recurrent cell.

    The entries of the solution are plus or minus 0.5, so the Jacobian there is 0.75 W: with W symmetric of
    eigenvalues in [-rate / 0.75, rate / 0.75], `rate` is exact.

    Args:
        batch: B.
        width: D; states are (B, D).
        rate: spectral radius of the Jacobian at the solution. Below 0.75 the cell contracts everywhere.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
        name: of the problem.
    """
    draw = _Draw(seed)
    basis = draw.orthogonal(width)
    matrix = basis @ torch.diag(torch.linspace(-1, 1, width, dtype=torch.float64) * (rate / 0.75)) @ basis.T
    solution = 0.5 * draw.signs(batch, width)
    x = torch.atanh(solution) - solution @ matrix
    return _make(name, _tanh_cell, solution, (x, matrix), rate, dtype)


def _tanh_cell(z: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    return torch.tanh(z @ matrix + x)


@checked
def monotone(
    *,
    batch: int = 4,
    width: int = 64,
    strength: float = 0.1,
    skew: float = 2.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """f(z) = relu(z W + x), W = (1 - strength) I - A^T A + B - B^T: a monotone operator network.

    There is one fixed point for every input, whatever the size of A and B (Winston & Kolter 2020,
    arXiv 2006.08591). Picard need not converge: eigenvalues of I - W are large, and complex where `skew` is.

    Args:
        batch: B.
        width: D; states are (B, D).
        strength: of monotonicity: no eigenvalue of the symmetric part of I - W is below it; above 0.
        skew: scale of B - B^T.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    draw = _Draw(seed)
    a, b = draw.weight(width, width), draw.weight(width, width, gain=skew / 2)
    matrix = (1 - strength) * torch.eye(width, dtype=torch.float64) - a.T @ a / 4 + b - b.T
    solution = torch.relu(draw.normal(batch, width))
    before = solution - (solution == 0) * draw.normal(batch, width).abs()  # what relu turns into it
    x = before - solution @ matrix
    return _make("monotone operator", _relu_cell, solution, (x, matrix), None, dtype)


def _relu_cell(z: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    return torch.relu(z @ matrix + x)


def _normed(
    name: str,
    update: Callable[..., Tensor],
    solution: Tensor,
    weights: tuple[Tensor, ...],
    injection: float,
    dtype: torch.dtype,
) -> Problem:
    """A problem for f(z) = norm(x + update(z, *weights)), the norm over the axes behind the tokens.

    With tokens y of mean 0 and variance 1, norm(a y) = a y / sqrt(a^2 + eps): that is the solution, and x
    is what the update leaves of a y. The larger a, `injection`, the less the update counts.
    """
    solution = _norm(injection * _norm(solution, eps=0.0))
    x = injection * _norm(solution, eps=0.0) - update(solution, *weights)
    return _make(name, _NormedCell(update), solution, (x, *weights), None, dtype)


def _norm(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Tokens (B, L, C) by LayerNorm, images (B, C, H, W) by GroupNorm with one group."""
    return F.layer_norm(z, z.shape[2:] if z.dim() == 3 else z.shape[1:], eps=eps)


@dataclass(frozen=True)
class _NormedCell:
    """f(z) = norm(x + update(z, *weights))."""

    update: Callable[..., Tensor]

    def __call__(self, z: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        return _norm(x + self.update(z, *weights))


@checked
def mlp(
    *,
    batch: int = 8,
    tokens: int = 16,
    width: int = 32,
    gain: float = 1.3,
    injection: float = 1.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    name: str = "MLP",
) -> Problem:
    """f(z) = LayerNorm(x + tanh(z W1) W2) on tokens.

    Args:
        batch: B.
        tokens: L.
        width: C; states are (B, L, C).
        gain: of the weights, relative to weights that keep the size of what they multiply.
        injection: size of the solution before the norm; the larger, the less the Jacobian.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
        name: of the problem.
    """
    draw = _Draw(seed)
    weights = (draw.weight(width, width, gain=gain), draw.weight(width, width, gain=gain))
    solution = draw.normal(batch, tokens, width)
    return _normed(name, _mlp_update, solution, weights, injection, dtype)


def _mlp_update(z: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return torch.tanh(z @ w1) @ w2


@checked
def mixer(
    *,
    batch: int = 8,
    tokens: int = 16,
    width: int = 32,
    gain: float = 0.8,
    injection: float = 1.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """f(z) = LayerNorm(x + token mixing + channel mixing): an MLP-Mixer block.

    (Tolstikhin et al. 2021, arXiv 2105.01601.)

    Args:
        batch: B.
        tokens: L.
        width: C; states are (B, L, C).
        gain: of the weights, as in `mlp`.
        injection: size of the solution before the norm, as in `mlp`.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    draw = _Draw(seed)
    weights = tuple(draw.weight(n, n, gain=gain) for n in (tokens, tokens, width, width))
    solution = draw.normal(batch, tokens, width)
    return _normed("mixer", _mixer_update, solution, weights, injection, dtype)


def _mixer_update(z: Tensor, t1: Tensor, t2: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    z = z + (F.gelu(z.mT @ t1) @ t2).mT
    return F.gelu(z @ c1) @ c2


@checked
def transformer(
    *,
    batch: int = 8,
    tokens: int = 16,
    width: int = 32,
    heads: int = 4,
    gain: float = 1.0,
    sharpness: float = 1.0,
    injection: float = 1.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    name: str = "transformer",
) -> Problem:
    """f(z) = LayerNorm(x + attention + MLP): a transformer block.

    Args:
        batch: B.
        tokens: L.
        width: C; states are (B, L, C).
        heads: of the attention; a divisor of `width`.
        gain: of the weights of values and MLP, as in `mlp`.
        sharpness: of those of queries and keys.
        injection: size of the solution before the norm, as in `mlp`.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
        name: of the problem.

    Raises:
        ValueError: `heads` is no divisor of `width`.
    """
    if width % heads:
        raise ValueError(f"transformer: heads must divide width={width}, got {heads}")
    draw = _Draw(seed)
    weights = (
        draw.weight(width, width, gain=sharpness),
        draw.weight(width, width, gain=sharpness),
        *(draw.weight(width, width, gain=gain) for _ in range(3)),
    )
    solution = draw.normal(batch, tokens, width)
    return _normed(name, _AttentionUpdate(heads), solution, weights, injection, dtype)


@dataclass(frozen=True)
class _AttentionUpdate:
    heads: int

    def __call__(self, z: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        query, key, value = (
            (z @ weight).view(*z.shape[:2], self.heads, len(weight) // self.heads).transpose(1, 2)
            for weight in (q, k, v)
        )
        # Spelled out: the fused kernel has no forward-mode derivative.
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        mixed: Tensor = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return mixed + F.gelu((z + mixed) @ w1) @ w2


@checked
def convolution(
    *,
    batch: int = 4,
    channels: int = 8,
    side: int = 8,
    gain: float = 1.0,
    injection: float = 1.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """f(z) = GroupNorm(x + conv(relu(conv(z)))) on images, as in multiscale DEQs.

    (Bai et al. 2020, arXiv 2006.08656.)

    Args:
        batch: B.
        channels: C.
        side: H and W; states are (B, C, H, W).
        gain: of the weights, as in `mlp`.
        injection: size of the solution before the norm, as in `mlp`.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    draw = _Draw(seed)
    shape = (channels, channels, 3, 3)
    scale = gain * math.sqrt(2 / (9 * channels))
    weights = (draw.normal(*shape) * scale, draw.normal(*shape) * scale)
    solution = draw.normal(batch, channels, side, side)
    return _normed("convolution", _convolution_update, solution, weights, injection, dtype)


def _convolution_update(z: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.conv2d(F.relu(F.conv2d(z, w1, padding=1)), w2, padding=1)


@checked
def mixed_difficulty(
    *,
    batch: int = 32,
    width: int = 64,
    easy: float = 0.3,
    hard: float = 0.95,
    num_hard: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """f(z) = rate * (z Q) + x, Q orthogonal: every sample converges at a rate of its own.

    The last `num_hard` samples have the rate `hard`, the others `easy`; a solver needs about
    log(easy) / log(hard) times the Picard steps for them.

    Args:
        batch: B.
        width: D; states are (B, D).
        easy: rate of most samples.
        hard: rate of the others.
        num_hard: how many they are.
        dtype: of the problem; it is made in float64.
        seed: of all that is random.
    """
    draw = _Draw(seed)
    rates = torch.full((batch, 1), easy, dtype=torch.float64)
    rates[batch - num_hard :] = hard
    basis = draw.orthogonal(width)
    solution = draw.normal(batch, width)
    inputs = (solution - rates * (solution @ basis), rates, basis)
    return _make("mixed difficulty", _rated_cell, solution, inputs, max(easy, hard), dtype)


def _rated_cell(z: Tensor, x: Tensor, rates: Tensor, basis: Tensor) -> Tensor:
    return rates * (z @ basis) + x


def suite() -> list[Problem]:
    """The problems of the solver benchmark: 16 thousand to 1 million numbers a batch, float32."""
    even = torch.linspace(-1, 1, 512, dtype=torch.float64)
    return [
        linear(0.9 * even, batch=32, name="linear 0.9"),
        linear(0.99 * even, batch=32, name="linear 0.99"),
        linear(0.9 * even, batch=32, non_normality=1.0, name="linear, non-normal"),
        nearly_singular(batch=32, width=512, gap=1e-2),
        expanding(batch=32, width=512),
        tanh_rnn(batch=64, width=1024),
        monotone(batch=32, width=512),
        mlp(batch=32, tokens=64, width=256, name="MLP 32x64x256"),
        mlp(batch=8, tokens=256, width=512, name="MLP 8x256x512"),
        mixer(batch=32, tokens=64, width=128),
        transformer(batch=16, tokens=64, width=128),
        transformer(batch=8, tokens=32, width=64, gain=1.07, name="transformer, hard"),
        convolution(batch=16, channels=32, side=16),
    ]
