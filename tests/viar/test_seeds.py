"""Seeds of a step or an epoch: always the same ones, and different where they can be."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from viar.seeds import STRIDE, seed_at

SEEDS, INDICES = st.integers(0, 2**32 - 1), st.integers(0, STRIDE - 1)


def first_number(seed: int) -> int:
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))


def test_published_runs_keep_their_seeds() -> None:
    assert [seed_at(seed, index) for seed, index in ((0, 7), (1, 0), (3, 5))] == [7, 1_000_003, 3_000_014]


@given(SEEDS, INDICES, SEEDS, INDICES)
def test_places_of_runs_shorter_than_the_stride_have_seeds_of_their_own(
    seed: int, index: int, other_seed: int, other_index: int
) -> None:
    same = (seed, index) == (other_seed, other_index)
    assert (seed_at(seed, index) == seed_at(other_seed, other_index)) == same


def test_a_longer_run_repeats_the_seeds_of_the_next() -> None:
    assert seed_at(4, STRIDE + 9) == seed_at(5, 9)


@given(SEEDS, SEEDS)
def test_runs_start_differently_although_a_generator_keeps_32_bits(seed: int, other: int) -> None:
    assert first_number(seed_at(seed, 0)) == first_number(seed_at(seed, 0) % 2**32)
    assert (seed_at(seed, 0) % 2**32 == seed_at(other, 0) % 2**32) == (seed == other)
