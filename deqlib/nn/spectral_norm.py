"""Spectral normalisation for cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from .._autocast import without_autocast
from .._checks import check_generator, check_instance, check_integer, check_number, plain
from .._scope import current
from .._torch import is_func_active
from ._copying import make_copyable

M = TypeVar("M", bound=nn.Module)

_START = 30  # power iterations before the first use
_OUTPUT_SECOND = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OUTPUT_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def spectral_norm(
    module: M,
    norm: float = 0.9,
    *,
    at_most: bool = False,
    num_iterations: int = 1,
    generator: torch.Generator | None = None,
) -> M:
    """Scale the weight matrices in a cell to a spectral norm, for as long as they train.

    Every weight W of a linear layer, convolution, transposed convolution or `nn.MultiheadAttention` in
    `module` is replaced by W * norm / sigma(W), with sigma the largest singular value, estimated by power
    iteration. (Miyato et al. 2018, arXiv 1802.05957.) `torch.nn.utils.parametrizations.spectral_norm`
    iterates at every access of the weight, so a cell changes from one evaluation to the next. Here the
    iteration advances once a solve, in training; within a solve, backward pass included, the weight is one
    function of its parameter. In `eval()`, and outside a solve, it does not advance.

    The estimate is at most sigma, so norms may exceed `norm` by what the iteration has not yet found: choose
    it below 1. Of a convolution it is the norm of the kernel as an (outputs, rest) matrix, as in the paper;
    the norm of the convolution may be up to the root of the kernel's places larger (3 for 3 x 3). Attention
    weights are scaled (query, key and value as one matrix where PyTorch keeps them as one), but dot-product
    attention itself has no Lipschitz constant (Kim et al. 2021, arXiv 2006.04710).

    Cost: two products of the weight with a vector a solve, one and a scaling an evaluation. `state_dict` has
    the names of PyTorch's parametrization. Unlike it, the module can be pickled whole, and a deep copy is
    independent: `remove_spectral_norm` of one of the two leaves the other as it is.

    Args:
        module: changed in place.
        norm: the spectral norm, above 0.
        at_most: scale down only: W * min(1, norm / sigma(W)).
        num_iterations: power iterations a solve.
        generator: draws the start of the power iteration, on the CPU; `None` uses PyTorch's default.

    Returns:
        `module`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: there is nothing to normalise in it, a weight is normalised already, is not initialised,
            or is zero without `at_most`.
    """
    check_instance("spectral_norm", nn.Module, "a module", module=module)
    check_number("spectral_norm", 0, open_minimum=True, norm=norm)
    norm = plain(norm)
    check_instance("spectral_norm", bool, "True or False", at_most=at_most)
    check_generator("spectral_norm", generator)
    check_integer("spectral_norm", 1, num_iterations=num_iterations)
    weights = list(_weights(module))
    if not weights:
        raise ValueError(
            "spectral_norm: expected a module with linear layers, convolutions or attention in it, "
            f"got {type(module).__name__} without any"
        )
    # All of them are looked at before one is changed.
    found = []
    for path, owner, name, axis in weights:
        weight: Tensor = getattr(owner, name)
        if _find(owner, name) is not None:
            raise ValueError(
                f"spectral_norm: {path}.{name} is normalised already; call remove_spectral_norm first"
            )
        if isinstance(weight, UninitializedParameter):
            raise ValueError(
                f"spectral_norm: {path}.{name} has no values yet; run the module once before normalising it"
            )
        # On the meta device there are no values; they come with a state dict, and the vectors with them.
        if not (at_most or weight.is_meta or bool(weight.any())):
            raise ValueError(
                f"spectral_norm: {path}.{name} is zero and cannot be scaled to norm {norm}; use at_most=True"
            )
        scaled = _SpectralNorm(weight.detach(), axis, norm, at_most, num_iterations, generator)
        found.append((owner, name, scaled.train(owner.training)))
    for owner, name, scaled in found:
        parametrize.register_parametrization(owner, name, scaled)
        make_copyable(owner)
    return module


def remove_spectral_norm(module: M) -> M:
    """Undo `spectral_norm`: the weights of `module` become plain parameters with their scaled values.

    Raises:
        TypeError: it is no module.
        ValueError: nothing in it is normalised, or a weight has other parametrizations too.
    """
    check_instance("remove_spectral_norm", nn.Module, "a module", module=module)
    found = [(owner, name) for _, owner, name, _ in _weights(module) if _find(owner, name) is not None]
    if not found:
        raise ValueError(f"remove_spectral_norm: nothing in {type(module).__name__} is normalised")
    for owner, name in found:
        if len(owner.parametrizations[name]) > 1:  # type: ignore[index]
            raise ValueError(f"remove_spectral_norm: {name} has other parametrizations; remove those first")
    for owner, name in found:
        parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
    return module


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    """Path, owner, name and output axis of the weights to normalise."""
    for path, owner in module.named_modules():
        if isinstance(owner, _OUTPUT_FIRST):
            yield path, owner, "weight", 0
        elif isinstance(owner, _OUTPUT_SECOND):
            yield path, owner, "weight", 1
        elif isinstance(owner, nn.MultiheadAttention):
            yield from ((path, owner, name, 0) for name in _ATTENTION if getattr(owner, name) is not None)


def _find(owner: nn.Module, name: str) -> _SpectralNorm | None:
    """The normalisation of a weight, if it has one."""
    if not parametrize.is_parametrized(owner, name):
        return None
    chain = owner.parametrizations[name]  # type: ignore[index]
    return next((part for part in chain if isinstance(part, _SpectralNorm)), None)


class _SpectralNorm(nn.Module):
    """The parametrization; `_u` and `_v` estimate the leading singular vectors."""

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        axis: int,
        norm: float,
        at_most: bool,
        num_iterations: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.axis, self.norm, self.at_most, self.num_iterations = axis, norm, at_most, num_iterations
        matrix = self._matrix(weight)
        start = torch.randn(matrix.shape[1], generator=generator, device="cpu").to(matrix)
        self.register_buffer("_u", matrix.new_zeros(matrix.shape[0]))
        self.register_buffer("_v", _unit(start))
        self._advance(matrix, _START)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, scaled."""
        # Autocast would take the products in half precision.
        with without_autocast(weight.device.type):
            matrix = self._matrix(weight)
            u, v = self._of_solve(matrix)
            sigma = torch.dot(u, torch.mv(matrix, v))
            scale = self.norm / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
            if self.at_most:
                scale = scale.clamp_max(1)
            return weight * scale.to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        """What is assigned to the weight is kept and scaled when it is used."""
        return value

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"norm={self.norm}, at_most={self.at_most}"

    def _of_solve(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of the solve under way."""
        scope = current.scope
        # A function transform may have wrapped the weight and the buffers; neither a buffer nor the scope
        # may hold what ends with the transform.
        if scope is None or (self not in scope and not torch.compiler.is_compiling() and is_func_active()):
            return self._vectors()
        return scope.once(self, lambda: self._begin(matrix.detach()))

    def _begin(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            self._advance(matrix, self.num_iterations)
        return self._vectors()

    def _vectors(self) -> tuple[Tensor, Tensor]:
        """Copies, since a later solve changes the buffers in place, of length 1 in the type computed in."""
        return _unit(_wide(self._u)), _unit(_wide(self._v))

    @torch.no_grad()
    def _advance(self, matrix: Tensor, num_iterations: int) -> None:
        """Improve the buffers, in place, so that replicas and DDP keep sharing them."""
        v = _wide(self._v)
        for _ in range(num_iterations):
            u = _unit(torch.mv(matrix, v))
            found = _unit(torch.mv(matrix.mT, u))
            # A matrix that is zero or not finite has no singular vector to move to; the weight may change
            # again, so the last one is kept.
            v = torch.where(found.norm() > 0, found, v)
        self._u.copy_(torch.where(u.isfinite().all(), u, _wide(self._u)))
        self._v.copy_(v)

    def _matrix(self, weight: Tensor) -> Tensor:
        """(outputs, rest), at least float32."""
        return _wide(weight).movedim(self.axis, 0).flatten(1)


def _unit(vector: Tensor) -> Tensor:
    return nn.functional.normalize(vector, dim=0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
