"""Arguments of another kind than expected, and tensors that do not go together: told before PyTorch would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import deqlib
from deqlib import nn as implicit
from deqlib import regularizers, testing
from deqlib.diagnostics import saved_bytes
from deqlib.testing import strategies

X = torch.zeros(3, 4)
WORDS = np.array(["warn", "ignore"])  # compared with a word it is an array, too


def _streamed(samples: Any, **settings: Any) -> list[deqlib.Solution]:
    layer = deqlib.ImplicitLayer(lambda z, x, **named: 0.5 * z + x)
    with torch.no_grad():
        return list(deqlib.loops.solve_stream(layer, samples, batch_size=2, **settings))


CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: deqlib.fixed_point(None, X), TypeError, "fixed_point: f must be callable, got NoneType"),
    (lambda: deqlib.fixed_point(lambda z: z.to_sparse(), X), TypeError, "the output must be dense"),
    (lambda: deqlib.Picard(damping=10**30), ValueError, "damping must be a float"),
    (lambda: deqlib.Anderson(memory=2**63), ValueError, "memory must be below"),
    (lambda: deqlib.Stopping().towards(3, 0.5), TypeError, "end must be a deqlib.Stopping"),
    (lambda: deqlib.Poisson(3).draw(3, None), TypeError, "shape must be a tuple"),
    (lambda: deqlib.Poisson(3).draw((3,), 7), TypeError, "generator must be a torch.Generator"),
    (lambda: regularizers.jacobian_penalty(3, X), TypeError, "cell must be callable"),
    (lambda: regularizers.correction_loss(3, torch.sum), TypeError, "states must be a sequence"),
    (lambda: saved_bytes(3), TypeError, "compute must be callable"),
    (lambda: saved_bytes(lambda: X, exclude=X), TypeError, "exclude must be a list of tensors"),
    (lambda: implicit.spectral_norm(X), TypeError, "module must be a module"),
    (lambda: implicit.remove_spectral_norm(3), TypeError, "module must be a module"),
    (
        lambda: implicit.StableInjection(4)(X, X[:, :2]),
        ValueError,
        r"the input must have shape \(\.\.\., 4\)",
    ),
    (lambda: implicit.StableInjection(4)(X, X[:2]), ValueError, "the input must go with a state of shape"),
    (lambda: implicit.StableInjection(4)(X, X.double()), TypeError, "the input must be torch.float32"),
    (lambda: implicit.StableInjection(4)(X.long(), X), TypeError, "the state must be floating point"),
    (lambda: implicit.MonotoneCell(4)(X, X[:2]), ValueError, "the input must go with a state of shape"),
    (lambda: implicit.MonotoneCell(4)(X, X.to("meta")), ValueError, "on meta"),
    (lambda: implicit.MonotoneCell(4)(X.half(), X), TypeError, "the input must be no wider"),
    (lambda: deqlib.causal_mask(X, X[0]), ValueError, "keys must have shape"),
    (lambda: deqlib.causal_mask(X, X, X[:, 0]), TypeError, "first must hold integers"),
    (lambda: testing.mlp(batch=1.5), TypeError, "mlp: batch must be an int"),
    (lambda: testing.mlp(gain=float("nan")), ValueError, "mlp: gain must be in"),
    (lambda: testing.mlp(dtype=torch.int64), ValueError, "mlp: dtype must be a floating-point type"),
    (lambda: testing.linear([]), ValueError, "at least one eigenvalue"),
    (lambda: deqlib.FailurePolicy(action=WORDS), ValueError, "action must be one of"),
    (lambda: deqlib.Reversible(on_drift=WORDS), ValueError, "on_drift must be one of"),
    (lambda: deqlib.Anderson(kind=WORDS), ValueError, "kind must be one of"),
    (lambda: deqlib.NewtonKrylov(derivative=WORDS), ValueError, "derivative must be one of"),
    (lambda: deqlib.PhantomGradient(form=WORDS), ValueError, "form must be one of"),
    (lambda: deqlib.StochasticJFB(per=WORDS), ValueError, "per must be one of"),
    (lambda: deqlib.Stopping(keep=WORDS), ValueError, "keep must be one of"),
    (lambda: deqlib.Stopping(rtol=1e308), ValueError, r"rtol must be in \[0, 1e\+38\]"),
    (lambda: deqlib.Stopping(atol=1e39), ValueError, r"atol must be in \[0, 1e\+38\]"),
    (
        lambda: deqlib.fixed_point(lambda z, step: z, X, solver=deqlib.Picard(), with_step=True, kwargs=1),
        TypeError,
        "fixed_point: kwargs must be a dict with names",
    ),
    (lambda: _streamed([X], kwargs={1: X}), TypeError, "solve_stream: kwargs must be a dict with names"),
    (lambda: _streamed([X], kwargs=[1]), TypeError, "solve_stream: kwargs must be a dict with names"),
    (lambda: _streamed([X.to_sparse()]), TypeError, "got a tensor of layout torch.sparse_coo in sample 0"),
    (lambda: strategies.states(dtypes=[3]), TypeError, "states: dtypes must be a type"),
]


@pytest.mark.parametrize(("call", "kind", "words"), CASES, ids=range(len(CASES)))
def test_what_does_not_fit_is_named(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


@torch.no_grad()
def test_a_cache_says_which_sequences_there_are() -> None:
    cache = deqlib.EquilibriumCache(4)
    cache.open(1)
    with pytest.raises(TypeError, match="keys must be a tensor"):
        cache.update(None, None)  # type: ignore[arg-type]
    cache.update(torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 1, 3))
    with pytest.raises(ValueError, match="rows must be sequences 0 to 1, got values from 0 to 2"):
        cache.reorder(torch.tensor([0, 2]))
    cache.reorder(torch.tensor([1, 1, 0]))


def test_what_fits_is_taken_as_before() -> None:
    nobody = testing.transformer(batch=0)
    assert nobody.f(nobody.z0).shape == nobody.z0.shape
    assert implicit.StableInjection(4)(X, X[:1]).shape == X.shape
    assert implicit.MonotoneCell(4)(X, X.bfloat16()).shape == X.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert implicit.StableInjection(4)(X, X.bfloat16()).shape == X.shape
