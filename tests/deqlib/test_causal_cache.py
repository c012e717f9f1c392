"""Decoding with a cache of keys and values, against loops over all tokens at once that have none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deqlib import (
    Anderson,
    Auto,
    Broyden,
    EquilibriumCache,
    ImplicitLayer,
    KeyValueCache,
    NewtonKrylov,
    Picard,
    Solver,
    Status,
    StepCache,
    Stopping,
    causal_mask,
)

HEADS, HEAD, VALUE = 2, 3, 4  # heads, width of keys, width of values
WIDTH = 5
SOLVERS = {
    "picard": Picard(),
    "anderson": Anderson(memory=3),
    "broyden": Broyden(memory=4),
    "newton": NewtonKrylov(memory=4),
    "auto": Auto(),
}
TIGHT = Stopping(rtol=1e-11, max_steps=100)


class Looped(torch.nn.Module):
    """A block z -> tanh(x + attention(z) + z V), one attention layer or two, contractive; float64."""

    def __init__(self, num_layers: int = 1, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.nn.Parameter:
            size = 0.6 / math.sqrt(shape[0])
            return torch.nn.Parameter(size * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.queries, self.keys = (weight(num_layers * WIDTH, HEADS * HEAD) for _ in range(2))
        self.values, self.out = weight(num_layers * WIDTH, HEADS * VALUE), weight(HEADS * VALUE, WIDTH)
        self.num_layers = num_layers

    def project(self, z: Tensor, weight: Tensor, layer: int) -> Tensor:
        return (z @ weight[layer * WIDTH : (layer + 1) * WIDTH]).unflatten(2, (HEADS, -1)).transpose(1, 2)

    def forward(
        self,
        z: Tensor,
        x: Tensor,
        cache: KeyValueCache | None = None,
        rows: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        for layer in range(self.num_layers):
            q, k, v = (self.project(z, w, layer) for w in (self.queries, self.keys, self.values))
            if cache is not None:
                k, v = cache.update(k, v, str(layer), slice(None) if rows is None else rows)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(q, k, first))
            z = torch.tanh(x + attended.transpose(1, 2).flatten(2) @ self.out)
        return z


def jointly(cell: Looped, x: Tensor, num_steps: int) -> Tensor:
    """So many plain steps from zero on all tokens at once, attention spelled out."""
    z = torch.zeros_like(x)
    hidden = torch.triu(torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype), 1)
    for _ in range(num_steps):
        for layer in range(cell.num_layers):
            q, k, v = (cell.project(z, w, layer) for w in (cell.queries, cell.keys, cell.values))
            weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(HEAD) + hidden, -1)
            z = torch.tanh(x + (weights @ v).transpose(1, 2).flatten(2) @ cell.out)
    return z.detach()


def decode(
    cell: Looped, x: Tensor, sizes: Sequence[int], cache: KeyValueCache, solver: Solver, stopping: Stopping
) -> Tensor:
    """Pieces of so many tokens, one after the other."""
    layer = ImplicitLayer(cell, solver=solver, stopping=stopping, on_failure="raise")
    with torch.no_grad():
        pieces = []
        for piece in x.split_with_sizes(list(sizes), 1):
            cache.open(piece.shape[1])
            pieces.append(layer(piece, cache))
        return torch.cat(pieces, 1)


def tokens(batch: int, number: int, seed: int = 0) -> Tensor:
    return torch.randn(
        batch, number, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


pieces = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(
    name=st.sampled_from(sorted(SOLVERS)),
    sizes=pieces,
    batch=st.integers(1, 3),
    num_layers=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_decoding_equals_the_joint_solve(
    name: str, sizes: list[int], batch: int, num_layers: int, seed: int
) -> None:
    cell, x = Looped(num_layers, seed), tokens(batch, sum(sizes), seed)
    decoded = decode(cell, x, sizes, EquilibriumCache(sum(sizes)), SOLVERS[name], TIGHT)
    assert (decoded - jointly(cell, x, 60)).abs().max() < 1e-9


@given(
    sizes=pieces,
    num_steps=st.integers(1, 6),
    batch=st.integers(1, 3),
    num_layers=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_a_set_a_step_equals_unrolling_far_from_convergence(
    sizes: list[int], num_steps: int, batch: int, num_layers: int, seed: int
) -> None:
    cell, x = Looped(num_layers, seed), tokens(batch, sum(sizes), seed)
    cache = StepCache(sum(sizes), num_steps=num_steps)
    decoded = decode(cell, x, sizes, cache, Picard(), Stopping.steps(num_steps))
    assert (decoded - jointly(cell, x, num_steps)).abs().max() < 1e-12


def test_one_set_is_another_way_to_the_same_point_and_not_the_same_iterates() -> None:
    cell, x = Looped(), tokens(2, 6)
    decoded = decode(cell, x, [1] * 6, EquilibriumCache(6), Picard(), Stopping.steps(2))
    assert (decoded - jointly(cell, x, 2)).abs().max() > 1e-4


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("compact", [False, True])
def test_what_stays_is_at_the_value_that_was_returned(name: str, compact: bool) -> None:
    cell, x = Looped(), tokens(4, 3) * torch.tensor([0.01, 0.3, 1, 100]).view(-1, 1, 1)
    layer = ImplicitLayer(cell, solver=SOLVERS[name], stopping=Stopping(rtol=1e-4), compact=compact)
    cache = EquilibriumCache(3)
    with torch.no_grad():
        cache.open(3, torch.empty(4, HEADS, 0, VALUE, dtype=torch.float64))
        solution = layer.solve(x, cache, torch.arange(4))
        assert solution.converged.all()
        assert not compact or solution.sample_nfe.min() < solution.nfe  # one did leave
        assert torch.equal(cache.slot("0")[1], cell.project(solution.value, cell.values, 0))


def test_finished_sequences_may_leave_the_batch() -> None:
    cell, x = Looped(), tokens(4, 5) * torch.tensor([0.01, 0.3, 1, 100]).view(-1, 1, 1)
    layer = ImplicitLayer(cell, stopping=TIGHT, compact=True, on_failure="raise")
    cache, found, spared = EquilibriumCache(5), [], 0
    with torch.no_grad():
        for piece in x.split(1, 1):
            cache.open(1)
            solution = layer.solve(piece, cache, torch.arange(4))
            spared += solution.nfe * 4 - int(solution.sample_nfe.sum())
            found.append(solution.value)
    assert spared > 0
    assert (torch.cat(found, 1) - jointly(cell, x, 60)).abs().max() < 1e-9


def test_memory_does_not_grow_with_steps_nor_with_tokens() -> None:
    cell, x, sizes = Looped(), tokens(2, 6), []
    for cache in (EquilibriumCache(6), StepCache(6, num_steps=8)):
        seen = set()
        for piece in x.split(2, 1):
            decode(cell, piece, [2], cache, Picard(), Stopping.steps(8))
            seen.add(cache.num_bytes)
        assert len(seen) == 1
        sizes += seen
    one_token = 2 * HEADS * (HEAD + VALUE) * 8  # 2 sequences, float64
    assert sizes == [6 * one_token, 8 * 6 * one_token]


@given(
    room=st.integers(1, 4), evicted=st.integers(1, 4), num_tokens=st.integers(1, 7), seed=st.integers(0, 99)
)
def test_an_evicted_prefix_is_no_longer_attended_to(
    room: int, evicted: int, num_tokens: int, seed: int
) -> None:
    """Against lists of keys and values, token by token, and a plain loop."""
    cell, x = Looped(seed=seed), tokens(2, num_tokens, seed)
    layer = ImplicitLayer(cell, solver=Picard(), stopping=TIGHT)
    cache, past = EquilibriumCache(room), []
    with torch.no_grad():
        for i in range(num_tokens):
            leaving = min(evicted, room) if cache.num_tokens == room else 0
            cache.evict(leaving)
            cache.open(1)
            decoded = layer(x[:, i : i + 1], cache)
            z = torch.zeros(2, 1, WIDTH, dtype=torch.float64)
            past = past[leaving:]
            for _ in range(40):
                q, k, v = (cell.project(z, w, 0) for w in (cell.queries, cell.keys, cell.values))
                ks, vs = (torch.cat(parts, 2) for parts in zip(*past, (k, v), strict=True))
                attended = torch.softmax(q @ ks.transpose(2, 3) / math.sqrt(HEAD), -1) @ vs
                z = torch.tanh(x[:, i : i + 1] + attended.transpose(1, 2).flatten(2) @ cell.out)
            past.append((k, v))
            assert (decoded - z).abs().max() < 1e-9
    assert (cache.num_tokens, cache.num_seen) == (len(past), num_tokens)
    assert cache.used_bytes == cache.num_tokens * 2 * HEADS * (HEAD + VALUE) * 8


@given(
    origins=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    per_step=st.booleans(),
    seed=st.integers(0, 99),
)
def test_beams_that_split_and_end_go_on_from_their_own_past(
    origins: list[list[int]], per_step: bool, seed: int
) -> None:
    cell = Looped(seed=seed)
    steps = Stopping.steps(4) if per_step else TIGHT
    cache = StepCache(8, num_steps=4) if per_step else EquilibriumCache(8)
    layer = ImplicitLayer(cell, solver=Picard(), stopping=steps)
    history = tokens(2, 1, seed)
    with torch.no_grad():
        cache.open(1)
        layer(history, cache)
        for i, origin in enumerate(origins):
            rows = torch.tensor(origin) % len(history)
            cache.reorder(rows)
            new = tokens(len(rows), 1, seed + i)
            history = torch.cat([history[rows], new], 1)
            cache.open(1)
            decoded = layer(new, cache)
            expected = jointly(cell, history, 4 if per_step else 60)[:, -1:]
            assert (decoded - expected).abs().max() < 1e-9


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_sequences_of_several_lengths_share_a_cache_padded_on_the_left(lengths: list[int], seed: int) -> None:
    cell, longest = Looped(seed=seed), max(lengths)
    x, first = tokens(len(lengths), longest + 2, seed), longest - torch.tensor(lengths)
    layer = ImplicitLayer(cell, solver=Picard(), stopping=TIGHT)
    cache, found = EquilibriumCache(longest + 2), []
    with torch.no_grad():
        for piece in x.split_with_sizes([longest, 1, 1], 1):
            cache.open(piece.shape[1])
            found.append(layer(piece, cache, None, first))
    for decoded, sequence, start in zip(torch.cat(found, 1), x, first.tolist(), strict=True):
        alone = jointly(cell, sequence[None, start:], 60)[0]
        assert (decoded[start:] - alone).abs().max() < 1e-9


def test_a_failed_sequence_spoils_no_other() -> None:
    cell, x = Looped(), tokens(3, 4)
    x[1, 2] = math.nan
    layer = ImplicitLayer(cell, stopping=TIGHT, on_failure="ignore")
    cache, found = EquilibriumCache(4), []
    with torch.no_grad():
        for piece in x.split(1, 1):
            cache.open(1)
            found.append(layer.solve(piece, cache))
    assert [int(s.status[1]) for s in found[:3]] == [Status.CONVERGED, Status.CONVERGED, Status.DIVERGED]
    others, decoded = [0, 2], torch.cat([s.value for s in found], 1)
    assert (decoded[others] - jointly(cell, x[others], 60)).abs().max() < 1e-9


def test_a_slot_holds_what_was_written_before_and_room_for_the_open_tokens() -> None:
    cache, like = EquilibriumCache(14), torch.empty(2, 3, 0, 4, dtype=torch.float64)
    parts = [[torch.randn(2, 3, tokens, 4).double() for _ in range(2)] for tokens in (1, 4)]
    with torch.no_grad():
        for count, (piece, number) in enumerate(zip(parts, (1, 4), strict=True), start=1):
            cache.open(number, like)
            for rows in (slice(0, 1), slice(1, 2)):
                for buffer, new in zip(cache.slot("a", rows), piece, strict=True):
                    buffer[:, :, -number:] = new[rows]
            for buffer, whole in zip(cache.slot("a"), zip(*parts[:count], strict=True), strict=True):
                assert buffer.dtype == torch.float64
                assert buffer.equal(torch.cat(whole, 2))
            cache.slot("b")[0].fill_(0)
        assert cache.slot("b")[0].shape == (2, 3, 5, 4)
        assert cache.slot("a", evaluation=1)[0].data_ptr() == cache.slot("a")[0].data_ptr()  # the same set
        assert cache.slot("a")[0][:, :, :1].equal(parts[0][0])
    one_token = 2 * 2 * 3 * 4 * 8  # keys and values, 2 sequences, 3 heads 4 wide, float64
    assert cache.num_bytes == 2 * 14 * one_token
    assert cache.used_bytes == 2 * 5 * one_token


@given(past=st.integers(0, 4), number=st.integers(1, 4), first=st.integers(0, 7))
def test_a_query_sees_itself_and_what_came_before_in_its_sequence(past: int, number: int, first: int) -> None:
    q, k, start = torch.zeros(1, 1, number, 2), torch.zeros(1, 1, past + number, 2), torch.tensor([first])
    places = [(query, range(past + number)) for query in range(past, past + number)]
    mask = causal_mask(q, k)
    seen = [[key <= query for key in keys] for query, keys in places]
    assert mask is None if number == 1 else mask.tolist() == seen
    padded = causal_mask(q, k, start)
    seen = [[first <= key <= query or key == query for key in keys] for query, keys in places]
    assert padded is not None
    assert padded.tolist() == [[seen]]


# Refusals


def test_a_beginning_for_each_sequence_is_wanted_or_none() -> None:
    q = torch.zeros(2, HEADS, 1, HEAD)
    with pytest.raises(ValueError, match=r"first must have shape \(B,\) = \(2,\), got \(1,\)"):
        causal_mask(q, q, torch.zeros(1))


def pair(batch: int = 2, number: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, HEADS, number, HEAD, dtype=dtype), torch.zeros(batch, HEADS, number, VALUE)


@torch.no_grad()
def opened(cache: KeyValueCache | None = None) -> KeyValueCache:
    cache = EquilibriumCache(3) if cache is None else cache
    cache.open(1)
    cache.update(*pair())
    return cache


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (pair(number=2), r"keys must be .* = \(2, 2, 1, 3\) in torch.float32 .* got \(2, 2, 2, 3\)"),
        (pair(batch=1), r"got \(1, 2, 1, 3\) .*`reorder` changes which sequences"),
        (pair(dtype=torch.float64), r"torch\.float32 on cpu, got \(2, 2, 1, 3\) in torch\.float64"),
        (pair()[::-1], r"keys must be .* got \(2, 2, 1, 4\)"),
    ],
)
def test_what_does_not_fit_what_is_there_is_refused(new: tuple[Tensor, Tensor], said: str) -> None:
    cache = opened()
    with torch.no_grad():
        cache.open(1)
        with pytest.raises(ValueError, match=said):
            cache.update(*new)


def test_more_tokens_than_there_is_room_for_are_refused() -> None:
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="cache: 3 tokens after 1 are more than its 3; make"),
    ):
        opened().open(3)


def test_tokens_that_a_layer_has_not_seen_are_no_silent_hole() -> None:
    cache = opened()
    with torch.no_grad():
        cache.open(1)  # and nobody is evaluated
        cache.open(1)
        with pytest.raises(ValueError, match="keys and values of 1 of the 2 tokens before; every layer"):
            cache.update(*pair())


def calls(cache: KeyValueCache, counts: tuple[int, ...]) -> None:
    for count in counts:
        cache.open(1)
        for _ in range(count):
            cache.update(*pair())


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((2, 3), r"layer '' has, for evaluation 3, keys and values of 0 of the 1 tokens before"),
        ((4,), r"evaluation 4 of layer '' .* sets for 3; .* Stopping\.steps\(3\)"),
    ],
)
def test_a_step_without_a_past_or_a_set_is_refused(counts: tuple[int, ...], said: str) -> None:
    cache = StepCache(9, num_steps=3)
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        calls(cache, counts)


def test_steps_may_fall_from_call_to_call() -> None:
    cache = StepCache(9, num_steps=3)
    with torch.no_grad():
        calls(cache, (3, 2, 2, 1))
    assert cache.used_bytes == (4 + 3 + 1) * 2 * HEADS * (HEAD + VALUE) * 4


def test_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"under torch\.no_grad\(\); to train, evaluate all tokens at once"):
        EquilibriumCache(3).open(1)
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        opened().update(*pair())


def test_products_in_forward_mode_are_refused_with_the_way_out() -> None:
    layer = ImplicitLayer(Looped(), solver=NewtonKrylov(derivative="jvp"), stopping=TIGHT)
    cache = EquilibriumCache(3)
    with torch.no_grad():
        cache.open(1)
        with pytest.raises(RuntimeError, match="derivative='difference'"):
            layer(tokens(1, 1), cache)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: EquilibriumCache(0), "EquilibriumCache: max_tokens must be at least 1, got 0"),
        (lambda: EquilibriumCache((1, 2)), "EquilibriumCache: max_tokens must be an int"),  # type: ignore[arg-type]
        (lambda: StepCache(4, num_steps=0), "StepCache: num_steps must be at least 1, got 0"),
        (lambda: opened().evict(2), "evict: num_tokens must be at most 1, all there are, got 2"),
        (lambda: opened().evict(-1), "num_tokens must be at least 0"),
        (lambda: opened().reorder([0]), "reorder: rows must be a tensor"),  # type: ignore[arg-type]
        (lambda: opened().reorder(torch.zeros(2)), r"integers of shape \(new B,\), got torch.float32 \(2,\)"),
        (lambda: opened().slot("a"), r"told; pass like"),
    ],
)
@torch.no_grad()
def test_what_is_asked_wrongly_is_told(call: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        call()


@pytest.mark.parametrize("rows", [[0, 2], torch.tensor([True, False, True, False])], ids=["list", "mask"])
def test_rows_that_are_no_places_of_sequences_are_refused(rows: Any) -> None:
    cache = EquilibriumCache(max_tokens=4)
    new = torch.zeros(4, 1, 1, 2)
    with torch.no_grad():
        cache.open(1)
        cache.update(new, new)
        with pytest.raises(TypeError, match=r"rows must be a slice or a tensor of integers .*nonzero"):
            cache.update(new[:2], new[:2], rows=rows)
