"""A cell that has exactly one fixed point, whatever training makes of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._autocast import without_autocast
from .._checks import check_integer, check_number, check_tensor, plain
from .._scope import current
from .._torch import is_func_active, times_written
from ._inputs import check_alike


class MonotoneCell(nn.Module):
    """A step towards z = relu(z W + x), W = (1 - margin) I - A A^T + B - B^T; z is relu(u) of the state u.

    The symmetric part of I - W is margin I + A A^T, so there is exactly one z for every x, all A and all B
    (Winston & Kolter 2020, arXiv 2006.08591, monotone operator networks), and it moves by at most
    ||x - y|| / margin where x moves to y. Nothing bounds A and B.

    The map z -> relu(z W + x) need not contract. This cell is a step of Peaceman-Rachford splitting,

        u <- |u| C + 2 a x V,    V = (I + a (I - W))^-1,    C = 2 V - I,

    with a = 1 / L and L a bound on ||I - W||. It contracts in the Euclidean norm, by ||C|| <=
    sqrt((L - margin) / (L + margin)) < 1. So the plain iteration arrives, and that of the adjoint too, which
    contracts alike. V is made once a solve; a step takes one product with a (width, width) matrix.

    What makes x of the layer's input stands before the layer, and `nn.ReLU` behind it: `nn.Sequential(
    nn.Linear(n, width), ImplicitLayer(MonotoneCell(width)), nn.ReLU())`.

    Args:
        width: of the state.
        margin: by which I - W is strongly monotone, above 0. The larger, the shorter are solves and the
            smoother is the layer.

    Shape:
        States and inputs (..., width).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.
    """

    def __init__(self, width: int, *, margin: float = 1.0) -> None:
        super().__init__()
        check_integer("MonotoneCell", 1, width=width)
        check_number("MonotoneCell", 0, open_minimum=True, margin=margin)
        self.width, self.margin = plain(width), plain(margin)
        self.symmetric = nn.Parameter(torch.empty(self.width, self.width))  # A
        self.skew = nn.Parameter(torch.empty(self.width, self.width))  # B
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A and B as `nn.Linear` does its weight, uniform up to 1 / sqrt(width)."""
        for parameter in (self.symmetric, self.skew):
            nn.init.uniform_(parameter, -(self.width**-0.5), self.width**-0.5)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        """The next state, of the shape of `u`.

        Raises:
            TypeError: they are no floating-point tensors, or the input is of a wider type.
            ValueError: state or input are not of this width, or do not go together.
        """
        for name, tensor in (("state", u), ("input", x)):
            check_tensor("MonotoneCell", **{name: tensor})
            if not tensor.is_floating_point():
                raise TypeError(f"MonotoneCell: the {name} must be floating point, got {tensor.dtype}")
            if tensor.shape[-1:] != (self.width,):
                raise ValueError(
                    f"MonotoneCell: expected a {name} of shape (..., {self.width}), got "
                    f"{tuple(tensor.shape)}; put nn.Linear(..., {self.width}) before the layer"
                )
        check_alike("MonotoneCell", u, x)
        if torch.promote_types(u.dtype, x.dtype) != u.dtype:
            raise TypeError(
                f"MonotoneCell: the input must be no wider than the state, {u.dtype}, got {x.dtype}"
            )
        step, resolvent = self._of_solve()
        reflected = u.abs()  # 2 relu(u) - u
        return 2 * (reflected + step.to(x.dtype) * x) @ resolvent.to(u.dtype) - reflected

    @property
    def weight(self) -> Tensor:
        """W, shape (width, width)."""
        identity = torch.eye(self.width, dtype=self.skew.dtype, device=self.skew.device)
        symmetric: Tensor = (1 - self.margin) * identity - self.symmetric @ self.symmetric.mT
        return symmetric + self.skew - self.skew.mT

    def _of_solve(self) -> tuple[Tensor, Tensor]:
        """a and V, kept for the solve under way where autograd does not record them."""
        scope = current.scope
        # What an evaluation records belongs to its own graph, which may be gone at the next. What a function
        # transform has wrapped ends with that.
        kept = scope is not None and not torch.is_grad_enabled()
        if not kept or (not torch.compiler.is_compiling() and is_func_active()):
            return self._resolvent()
        assert scope is not None
        # A scope may last longer than a solve, and weights change in it.
        return scope.once((self, *map(times_written, (self.symmetric, self.skew))), self._resolvent)

    def _resolvent(self) -> tuple[Tensor, Tensor]:
        """a, a number, and V, (width, width), in float32 or better."""
        with without_autocast(self.skew.device.type):  # half precision has no inverse
            weight = self.weight
            wide = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
            identity = torch.eye(self.width, dtype=wide, device=weight.device)
            excess = identity - weight.to(wide)
            step = 1 / _norm_bound(excess)
            # Unlike `inv` it does not ask the device whether it went well. It does: no singular value of what
            # is inverted is below 1.
            return step, torch.linalg.inv_ex(identity + step * excess).inverse

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"width={self.width}, margin={self.margin}"


def _norm_bound(matrix: Tensor) -> Tensor:
    """No less than the spectral norm of a (width, width) matrix, and no more than width^(1/16) times that.

    ||M||^8 <= ||(M^T M)^4||_F (Delattre et al. 2023, arXiv 2305.16173): products alone, no decomposition.
    """
    scale = torch.linalg.matrix_norm(matrix)  # so that powers neither overflow nor vanish
    power = matrix / scale
    power = power.mT @ power
    for _ in range(2):
        power = power @ power
    bound: Tensor = scale * torch.linalg.matrix_norm(power) ** (1 / 8)
    return bound
