"""Lloyd's algorithm with weights, and draws by weight, against known answers and plain searches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import viar.tokenizer.kmeans
from viar.tokenizer.kmeans import drawn_order, kmeans, nearest


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def error(vectors: Tensor, weights: Tensor, codes: Tensor) -> float:
    return float((weights * torch.cdist(vectors, codes).min(1).values.square()).sum())


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
def test_the_nearest_code_is_that_of_a_plain_search(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viar.tokenizer.kmeans, "AT_ONCE", at_once)
    vectors, codes = normal(0, 33, 5), normal(1, 7, 5)
    squares, indices = nearest(vectors, codes)
    expected = torch.cdist(vectors, codes).min(1)
    assert indices.equal(expected.indices)
    torch.testing.assert_close(squares, expected.values.square())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 6))
def test_in_the_end_every_code_is_the_weighted_mean_of_the_vectors_nearest_to_it(
    seed: int, num_codes: int
) -> None:
    vectors, weights = normal(seed, 40, 3), torch.rand(40, generator=seeded(seed + 1)) + 0.1
    codes = kmeans(vectors, weights, num_codes, generator=seeded(seed), iterations=60)
    owner = torch.cdist(vectors, codes).argmin(1)
    for code in range(num_codes):
        own, share = vectors[owner == code], weights[owner == code]
        torch.testing.assert_close(codes[code], (own * share[:, None]).sum(0) / share.sum())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 12))
def test_more_iterations_are_never_worse_while_all_codes_are_in_use(seed: int, num_codes: int) -> None:
    vectors, weights = normal(seed, 60, 3), torch.rand(60, generator=seeded(seed + 1)) + 0.1
    runs = [kmeans(vectors, weights, num_codes, generator=seeded(seed), iterations=n) for n in range(5)]
    errors = [error(vectors, weights, codes) for codes in runs]
    assert all(later <= earlier * 1.00001 for earlier, later in pairwise(errors))
    assert (runs[0][:, None] == vectors).all(-1).any(1).all()  # vectors, before the first iteration


def test_no_code_is_left_without_a_vector_where_there_are_vectors_enough() -> None:
    vectors = torch.cat([torch.zeros(50, 2), normal(0, 8, 2)])  # mostly one and the same
    codes = kmeans(vectors, torch.ones(58), 9, generator=seeded(0), iterations=20)
    assert error(vectors, torch.ones(58), codes) < 1e-6


def test_who_is_drawn_first_is_drawn_by_weight_and_nobody_twice() -> None:
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0])
    generator = seeded(0)
    orders = torch.stack([drawn_order(weights, generator) for _ in range(4000)])
    assert orders.sort(1).values.equal(torch.arange(4).expand(4000, 4))
    assert (orders[:, 3] == 1).all()  # of weight 0
    first = orders[:, 0].bincount(minlength=4) / 4000
    torch.testing.assert_close(first, weights / 8, atol=0.03, rtol=0)  # 3.9 standard deviations
