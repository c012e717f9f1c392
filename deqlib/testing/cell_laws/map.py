# ruff: noqa: D102  # the name of a test says what it is about
"""The map: how much it contracts, and its gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..._scope import entered
from ..._torch import tree_map
from ...fixed_point import fixed_point
from ...stopping import Stopping
from .base import Evaluation, demand
from .output import OutputLaws
from .trees import flat, is_finite, moved, named_tensors, weighted_sum

_SLACK = 1e-3  # relative, between a contraction that is promised and one that is measured
_PATH = 6  # points of a solve that the contraction is measured at
_POWER = 4  # evaluations that look for the direction which grows most, at each of them


class MapLaws(OutputLaws):
    """How much the map contracts, and its gradients."""

    def test_it_contracts(self) -> None:
        self._require(self._output_fault, self._repetition_fault, self._writing_fault)
        found, where = self._measured_contraction()
        if self.contraction is None:
            pytest.skip(f"`contraction` is not promised; measured {found:.3g} {where}")
        assert found <= self.contraction * (1 + _SLACK), (
            f"||f(a) - f(b)|| / ||a - b|| should be at most {self.contraction:g}, measured {found:.3g} "
            f"{where}; scale the weights that act on z down, or bound them by deqlib.nn.spectral_norm; or "
            "raise `contraction` on the test class (None: not promised)"
        )

    def test_gradients_reach_state_inputs_and_parameters_and_are_finite(self) -> None:
        self._require(self._output_fault, self._writing_fault)
        if not self.differentiable:
            pytest.skip("`differentiable` is False: not promised")
        demand(self._gradient_fault())

    def _gradient_fault(self) -> str | None:
        """What gradients do not reach, or where they are not finite."""
        setup = self._setup()
        z, inputs, tensors = self._recorded(setup, with_state=True)
        with torch.enable_grad():
            loss = weighted_sum(setup.image((z, inputs)))
            found: tuple[Tensor | None, ...] = (None,) * len(tensors)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, tuple(tensors.values()), allow_unused=True)
        without = [name for name, gradient in zip(tensors, found, strict=True) if gradient is None]
        spoilt = [n for n, g in zip(tensors, found, strict=True) if g is not None and not g.isfinite().all()]
        advice = "set `differentiable = False` on the test class if that is not promised"
        if without:
            return (
                f"gradients should reach the state, inputs and parameters, but not {', '.join(without)}; "
                f"look for detach(), .data, no_grad or what is never used, freeze what is not trained, or "
                f"{advice}"
            )
        if spoilt:
            return (
                f"gradients should be finite, but not those of {', '.join(spoilt)}; look for divisions, "
                f"roots and norms at zero, or {advice}"
            )
        return None

    def _recorded(
        self, setup: Evaluation, *, with_state: bool
    ) -> tuple[Any, tuple[Any, ...], dict[str, Tensor]]:
        """The state and the inputs as leaves of the tape, and all tensors that gradients should reach."""

        def leaf(x: Any) -> Any:
            is_float = isinstance(x, Tensor) and x.is_floating_point()
            return x.detach().clone().requires_grad_() if is_float else x

        z = tree_map(leaf, setup.z) if with_state else setup.z
        inputs = tuple(tree_map(leaf, x) for x in setup.inputs)
        named = (named_tensors("z", z) if with_state else {}) | named_tensors("inputs", inputs)
        if isinstance(setup.cell, nn.Module):
            named |= dict(setup.cell.named_parameters())
        return z, inputs, {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def _measured_contraction(self) -> tuple[float, str]:
        """The largest ratio found, and where."""
        setup = self._setup()
        path: list[Any] = [setup.z]

        def spied(z: Any, *inputs: Any) -> Any:
            path.append(tree_map(torch.clone, z))
            return setup.cell(z, *inputs)

        with torch.no_grad(), entered(setup.scope):
            fixed_point(spied, setup.z0, setup.inputs, stopping=Stopping(max_steps=24), on_failure="ignore")
        path = [z for z in path if is_finite(z)]
        chosen = sorted({round(k * (len(path) - 1) / (_PATH - 1)) for k in range(_PATH)})
        images = {k: setup.image((path[k], setup.inputs)) for k in chosen}
        worst, where = 0.0, "everywhere"
        for k in chosen:
            place = f"near evaluation {k} of a solve" if k else "near a random point"
            pairs = [(path[j], images[j]) for j in chosen if j < k]
            found = [self._ratio(path[k], images[k], z, fz) for z, fz in pairs[-1:]]
            found += self._grown(setup, path[k], images[k])
            # A ratio that is not a number is one of no bound.
            largest = max(math.inf if math.isnan(ratio) else ratio for ratio in found)
            if largest > worst:
                worst, where = largest, place
        return worst, where

    def _grown(self, setup: Evaluation, z: Any, fz: Any) -> list[float]:
        """Ratios at a point, at two distances, in directions that come nearer to the one that grows most."""
        small = max(1e-3, math.sqrt(torch.finfo(self._dtype()).eps))
        found = []
        for share in (small, 0.3):
            direction = tree_map(lambda leaf: moved(torch.zeros_like(leaf), 1.0, setup.generator), z)
            for _ in range(_POWER):
                length = share * torch.maximum(self._norms(z), self._norms(fz))
                length = torch.where(length > 0, length, share) / self._norms(direction).clamp_min(1e-300)
                near = tree_map(lambda leaf, d, by=length: leaf + _scaled(d, by), z, direction)
                image = setup.image((near, setup.inputs))
                found.append(self._ratio(near, image, z, fz))
                direction = tree_map(torch.sub, image, fz)
                if not is_finite(direction) or not (self._norms(direction) > 0).all():
                    break
        return found

    def _ratio(self, a: Any, fa: Any, b: Any, fb: Any) -> float:
        """The largest of all samples."""
        apart = self._norms(tree_map(torch.sub, a, b))
        ratio = self._norms(tree_map(torch.sub, fa, fb)) / apart
        ratio = ratio[apart > 0]
        return float(ratio.max()) if len(ratio) else 0.0

    def _norms(self, tree: Any) -> Tensor:
        """Of each sample, (B,); of all together, as often, where samples depend on one another."""
        norms: Tensor = flat(tree).norm(dim=1)
        return norms if self.independent else norms.norm().expand(len(norms))


def _scaled(leaf: Tensor, by: Tensor) -> Tensor:
    """Every sample of a leaf times its factor, (B,)."""
    return leaf * by.view(-1, *[1] * (leaf.dim() - 1)).to(leaf)
