"""Trunks: all scales at once and scale by scale are the same thing; caches; draws in training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import IMPLICIT, SIDES, enlarge, tiny_config, tiny_transformer, uniform
from torch import Tensor, nn

import viar.model.implicit
import viar.model.trunk
from deqlib import Anderson, Broyden, Picard, Solver
from viar import (
    Adaptive,
    ImplicitTrunk,
    ImplicitTrunkConfig,
    IterateCache,
    NextScaleTransformer,
    TransformerConfig,
)
from viar.model.execution import CPU_CHUNK, row_chunks
from viar.model.scales import block_causal, scale_slices
from viar.model.transformer import build_trunk
from viar.model.trunk import ExplicitTrunk, Trunk, TrunkOutput

Case = tuple[Trunk, Tensor, Tensor]  # trunk in float64, tokens of all scales, what modulates


@st.composite
def cases(draw: st.DrawFn, kind: str = "implicit", contraction: float = 1.0) -> Case:
    """A trunk, and tokens for it; the implicit block feels its state `contraction` times as much."""
    sides = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True).map(sorted))
    sizes: dict[str, Any] = {
        "sides": sides,
        "qk_norm": draw(st.booleans()),
        "shared_modulation": draw(st.booleans()),
        "depth": 4,
        "width": 8,
    }
    if kind == "implicit":
        num_pre, num_post = draw(st.integers(0, 1)), draw(st.integers(0, 1))
        sizes["trunk"] = ImplicitTrunkConfig(num_pre=num_pre, num_post=num_post)
    torch.manual_seed(draw(st.integers(0, 999)))
    config = tiny_config(kind, **sizes)
    trunk = enlarge(build_trunk(config)).double().eval()
    if isinstance(trunk, ImplicitTrunk):
        with torch.no_grad():
            trunk.layer.cell.projection_in.weight[:, :8].mul_(contraction)  # the half that meets the state
    batch, width = draw(st.integers(1, 3)), 8
    tokens = torch.randn(batch, sum(side * side for side in sides), width, dtype=torch.float64)
    shape = (batch, 6, width) if config.shared_modulation else (batch, width)
    return trunk, tokens, torch.randn(shape, dtype=torch.float64)


def call(trunk: Trunk, x: Tensor, cond: Tensor, **settings: Any) -> TrunkOutput:
    return trunk(x, trunk.modulate(cond), **settings)


@torch.no_grad()
def jointly(trunk: Trunk, x: Tensor, cond: Tensor, iterations: Any) -> Tensor:
    return call(trunk, x, cond, causal=block_causal(trunk.sides), iterations=iterations).x_BLC


@torch.no_grad()
def scale_by_scale(
    trunk: Trunk, x: Tensor, cond: Tensor, iterations: Any, cache: str, warm_start: bool = False
) -> Tensor:
    schedule = trunk.schedule(iterations, cache=cache, warm_start=warm_start)
    memory, displacement, parts = trunk.new_cache(cache, schedule), None, []
    for where, count in zip(scale_slices(trunk.sides), schedule, strict=True):
        output = call(trunk, x[:, where], cond, cache=memory, iterations=count, displacement=displacement)
        displacement = output.solve.displacement if warm_start else None
        parts.append(output.x_BLC)
    return torch.cat(parts, 1)


def limit(trunk: Trunk, x: Tensor, cond: Tensor) -> Tensor:
    """Where joint iterations end; the few cases in which they have not are put aside."""
    end = jointly(trunk, x, cond, 30)
    assume(end.allclose(jointly(trunk, x, cond, 22), atol=1e-12, rtol=0))
    return end


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@given(cases("explicit"))
def test_the_explicit_trunk_gives_the_same_with_and_without_a_cache(case: Case) -> None:
    trunk, x, cond = case
    close(scale_by_scale(trunk, x, cond, None, "equilibrium"), jointly(trunk, x, cond, None))


@given(cases(), st.integers(1, 4))
def test_joint_iterations_equal_as_many_at_every_scale_with_the_iterate_cache(case: Case, count: int) -> None:
    trunk, x, cond = case
    close(scale_by_scale(trunk, x, cond, count, "iterate"), jointly(trunk, x, cond, count))


@given(cases(), st.integers(1, 4))
def test_the_two_caches_agree_on_the_first_scale_whatever_the_count(case: Case, count: int) -> None:
    trunk, x, cond = case
    first = trunk.sides[0] ** 2
    iterate, equilibrium = (scale_by_scale(trunk, x, cond, count, c) for c in ("iterate", "equilibrium"))
    close(iterate[:, :first], equilibrium[:, :first])


@given(cases(contraction=0.02))
def test_at_convergence_the_equilibrium_cache_equals_the_joint_solve(case: Case) -> None:
    trunk, x, cond = case
    close(scale_by_scale(trunk, x, cond, 30, "equilibrium"), limit(trunk, x, cond))


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=lambda s: type(s).__name__)
def test_every_solver_finds_the_joint_fixed_point_scale_by_scale(solver: Solver) -> None:
    @given(cases(contraction=0.02))
    def check(case: Case) -> None:
        trunk, x, cond = case
        adaptive = Adaptive(rtol=1e-12, max_steps=60, solver=solver)
        cached = scale_by_scale(trunk, x, cond, adaptive, "equilibrium")
        close(cached, limit(trunk, x, cond))
        close(jointly(trunk, x, cond, adaptive), cached)

    check()


def a_case(**changes: Any) -> Case:
    torch.manual_seed(0)
    trunk = enlarge(build_trunk(tiny_config("implicit", **changes))).double().eval()
    return trunk, torch.randn(2, 14, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)


def test_far_from_convergence_the_two_caches_differ_on_later_scales() -> None:
    trunk, x, cond = a_case()
    iterate, equilibrium = (scale_by_scale(trunk, x, cond, 2, c) for c in ("iterate", "equilibrium"))
    assert (iterate - equilibrium)[:, 1:].abs().amax() > 1e-3


def test_a_scale_of_a_schedule_gets_its_own_count() -> None:
    trunk, x, cond = a_case()
    counts = [4, 2, 1]
    for cache in ("iterate", "equilibrium"):
        calls = count_evaluations(trunk, lambda c=cache: scale_by_scale(trunk, x, cond, counts, c))
        assert calls == [(1, 4), (4, 2), (9, 1)]  # tokens and evaluations


def test_adaptive_spends_less_where_the_tolerance_is_loose_and_stops_at_its_cap() -> None:
    trunk, x, cond = a_case()
    with torch.no_grad():
        trunk.layer.cell.projection_in.weight[:, :16].mul_(0.3)

    def evaluations(adaptive: Adaptive) -> int:
        calls = count_evaluations(trunk, lambda: scale_by_scale(trunk, x, cond, adaptive, "equilibrium"))
        return sum(count for _, count in calls)

    loose, tight = (evaluations(Adaptive(rtol=rtol, max_steps=99)) for rtol in (1e-1, 1e-6))
    assert loose < tight
    # a solve of n steps evaluates n + 1 times, and once more for keys and values
    assert evaluations(Adaptive(rtol=0.0, max_steps=5)) == 3 * 7


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=lambda s: type(s).__name__)
def test_the_solver_asked_for_is_the_one_that_runs(solver: Solver) -> None:
    trunk, x, cond = a_case()
    plain, other = (Adaptive(rtol=0.0, max_steps=4, solver=s) for s in (Picard(), solver))
    for solve in (jointly, lambda *args: scale_by_scale(*args, "equilibrium")):
        assert not solve(trunk, x, cond, plain).allclose(solve(trunk, x, cond, other), atol=1e-3)


def test_the_layer_starts_from_what_the_blocks_before_it_put_out() -> None:
    trunk, x, cond = a_case(trunk=ImplicitTrunkConfig(num_pre=0, num_post=0))
    cell = trunk.layer.cell
    modulation, causal = cell.block.modulate(cond), block_causal(SIDES)
    z = x
    with torch.no_grad():
        for _ in range(3):
            both = torch.cat([z, x], -1)  # as published: the state first
            hidden = nn.functional.gelu(cell.projection_in(both), approximate="tanh")
            z = cell.block(cell.projection_out(hidden), modulation, causal)
    close(jointly(trunk, x, cond, 3), z)


def count_evaluations(trunk: ImplicitTrunk, run: Any) -> list[tuple[int, int]]:
    """Evaluations of the cell in each solve, told apart by their number of tokens."""
    counts: dict[int, int] = {}

    def counted(_: Any, inputs: tuple[Any, ...]) -> None:
        counts[inputs[0].shape[1]] = counts.get(inputs[0].shape[1], 0) + 1

    handle = trunk.layer.cell.register_forward_pre_hook(counted)
    run()
    handle.remove()
    return sorted(counts.items())


# Draws in training


def draws_of(
    trunk: ImplicitTrunk, calls: int, generator: torch.Generator | None = None
) -> list[tuple[int, int]]:
    """Evaluations without and with gradient of each of so many training calls."""
    x, cond, causal = torch.randn(1, 14, 16), torch.randn(1, 16), block_causal(SIDES)
    draws: list[tuple[int, int]] = []

    def counted(*_: Any) -> None:
        free, taped = draws[-1]
        draws[-1] = (free, taped + 1) if torch.is_grad_enabled() else (free + 1, taped)

    handle = trunk.layer.cell.register_forward_pre_hook(counted)
    for _ in range(calls):
        draws.append((0, 0))
        call(trunk, x, cond, causal=causal, generator=generator)
    handle.remove()
    return draws


PUBLISHED = ImplicitTrunkConfig(num_pre=0, num_post=0)  # 0 to 10 without gradient, 1 to 12 with


def training_trunk(trunk: ImplicitTrunkConfig = PUBLISHED) -> ImplicitTrunk:
    return tiny_transformer(trunk=trunk).trunk.train()


def test_counts_in_training_come_from_the_generator_of_the_call_alone() -> None:
    trunk = training_trunk()
    generator = torch.Generator().manual_seed(5)
    expected = [
        (
            int(torch.randint(0, 11, (), generator=generator)),
            int(torch.randint(1, 13, (), generator=generator)),
        )
        for _ in range(6)
    ]
    generator.manual_seed(5)
    torch.manual_seed(123)
    assert draws_of(trunk, 6, generator) == expected
    generator.manual_seed(5)
    torch.manual_seed(321)
    assert draws_of(trunk, 6, generator) == expected
    assert draws_of(trunk, 6, generator) != expected  # the generator went on


def test_without_a_generator_counts_come_from_that_of_pytorch() -> None:
    trunk = training_trunk()
    torch.manual_seed(1)
    first = draws_of(trunk, 8)
    assert len(set(first)) > 3
    torch.manual_seed(1)
    assert draws_of(trunk, 8) == first


def test_counts_reach_both_ends_of_their_ranges() -> None:
    trunk = training_trunk(ImplicitTrunkConfig(num_pre=0, num_post=0, no_grad=(1, 2), grad=(2, 3)))
    draws = draws_of(trunk, 40)
    assert {free for free, _ in draws} == {1, 2}
    assert {taped for _, taped in draws} == {2, 3}


def test_training_draws_leave_the_global_generator_alone() -> None:
    trunk = training_trunk()
    before = torch.get_rng_state()
    settings = {"causal": block_causal(SIDES), "generator": torch.Generator()}
    call(trunk, torch.zeros(1, 14, 16), torch.zeros(1, 16), **settings)
    assert torch.get_rng_state().equal(before)


def saved_bytes(no_grad: int, grad: int) -> int:
    trunk = training_trunk(
        ImplicitTrunkConfig(num_pre=0, num_post=0, no_grad=(no_grad, no_grad), grad=(grad, grad))
    )
    x, cond = torch.randn(2, 14, 16), torch.randn(2, 16)
    total = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call(trunk, x, cond, causal=block_causal(SIDES))
    return total


def test_iterations_without_gradient_keep_no_activations() -> None:
    assert saved_bytes(0, 2) == saved_bytes(10, 2)
    one, two, three = (saved_bytes(0, n) for n in (1, 2, 3))
    assert three - two == two - one > 0


# Caches


def bytes_after(trunk: Trunk, iterations: Any, kind: str, dtype: torch.dtype = torch.float32) -> int:
    trunk = trunk.to(dtype)
    memory = trunk.new_cache(kind, schedule := trunk.schedule(iterations))
    assert memory.num_bytes == 0
    x, cond = torch.randn(2, 14, 16, dtype=dtype), torch.randn(2, 16, dtype=dtype)
    sizes = []
    with torch.no_grad():
        for where, count in zip(scale_slices(SIDES), schedule, strict=True):
            call(trunk, x[:, where], cond, cache=memory, iterations=count)
            sizes.append(memory.num_bytes)
    assert len(set(sizes)) == 1  # allocated once, at the final size
    return sizes[-1]


# keys and values, 2 samples, 16 wide, float32; 1 + 4 + 9 tokens
TOKEN = 2 * 2 * 16 * 4


def test_the_explicit_trunk_keeps_one_set_a_block() -> None:
    trunk = tiny_transformer("explicit").trunk
    assert isinstance(trunk, ExplicitTrunk)
    assert bytes_after(trunk, None, "equilibrium") == 3 * 14 * TOKEN
    assert bytes_after(trunk, None, "equilibrium", torch.float64) == 2 * 3 * 14 * TOKEN


@pytest.mark.parametrize("iterations", [1, 7, (5, 1), [1, 2, 3], Adaptive(max_steps=3)])
def test_the_equilibrium_cache_does_not_grow_with_iterations(iterations: Any) -> None:
    assert bytes_after(tiny_transformer().trunk, iterations, "equilibrium") == 3 * 14 * TOKEN


@pytest.mark.parametrize(
    ("iterations", "sets"),  # tokens an iteration sees, added up over iterations
    [(1, 14), (5, 5 * 14), ([3, 2, 1], 14 + 5 + 1), ([4, 4, 1], 14 + 3 * 5), ([2, 1, 1], 14 + 1)],
)
def test_the_iterate_cache_holds_what_each_iteration_of_each_scale_saw(iterations: Any, sets: int) -> None:
    assert bytes_after(tiny_transformer().trunk, iterations, "iterate") == (2 * 14 + sets) * TOKEN


def test_a_cache_serves_one_generation() -> None:
    trunk, x, cond = a_case()
    memory = trunk.new_cache("equilibrium", trunk.schedule(None))
    with torch.no_grad():
        for where in scale_slices(SIDES):
            call(trunk, x[:, where], cond, cache=memory)
        with pytest.raises(
            ValueError, match="cache: 1 tokens after 14 are more than its 14; make a new cache"
        ):
            call(trunk, x[:, :1], cond, cache=memory)


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_a_cache_is_refused_where_gradients_are_recorded(kind: str) -> None:
    trunk = tiny_transformer(kind).trunk
    memory = trunk.new_cache("equilibrium", trunk.schedule(None))
    with pytest.raises(ValueError, match=r"cache: .* call under torch.no_grad\(\)"):
        call(trunk, torch.randn(2, 1, 16), torch.randn(2, 16), cache=memory)


def test_a_cache_together_with_a_choice_of_what_is_seen_is_refused() -> None:
    trunk, x, cond = a_case()
    memory = trunk.new_cache("equilibrium", trunk.schedule(None))
    with torch.no_grad(), pytest.raises(ValueError, match=r"causal: .* give one of the two"):
        call(trunk, x[:, :1], cond, causal=block_causal((1,)), cache=memory)


@pytest.mark.parametrize("iterations", [3, Adaptive(rtol=1e-4, max_steps=30)])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_number_of_samples_computed_at_a_time_does_not_matter(
    iterations: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    trunk = enlarge(build_trunk(tiny_config())).double().eval()
    x, cond = torch.randn(5, 14, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    together = scale_by_scale(trunk, x, cond, iterations, "equilibrium")
    chunks = []
    for module in (viar.model.trunk, viar.model.implicit):
        monkeypatch.setattr(
            module,
            "row_chunks",
            lambda t: chunks.append(t) or [slice(i, min(i + rows, len(t))) for i in range(0, len(t), rows)],
        )
    close(scale_by_scale(trunk, x, cond, iterations, "equilibrium"), together)
    assert chunks


@pytest.mark.parametrize("shape", [(1, 1, 10), (7, 100, 1000), (64, 4, 64), (3, 500, 2000), (0, 4, 8)])
def test_chunks_of_samples_cover_the_batch_and_fit_the_caches_of_a_cpu(shape: tuple[int, ...]) -> None:
    chunks = list(row_chunks(torch.empty(shape)))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(shape[0]))
    for chunk in chunks:
        rows = chunk.stop - chunk.start
        assert rows <= 1 or rows * shape[1] * shape[2] <= CPU_CHUNK
    assert list(row_chunks(torch.empty(shape, device="meta"))) == [slice(0, shape[0])]


# Warm start


@given(cases(contraction=0.02))
def test_a_warm_start_ends_at_the_same_fixed_point(case: Case) -> None:
    trunk, x, cond = case
    warm = scale_by_scale(trunk, x, cond, 30, "equilibrium", warm_start=True)
    close(warm, limit(trunk, x, cond))


def test_a_warm_start_begins_where_the_scale_before_ended_relative_to_its_input() -> None:
    trunk, x, cond = a_case(trunk=ImplicitTrunkConfig(num_pre=0, num_post=0))
    starts = []
    trunk.layer.cell.register_forward_pre_hook(lambda _, inputs: starts.append(inputs[0].clone()))
    after = scale_by_scale(trunk, x, cond, 1, "equilibrium", warm_start=True)
    assert starts[0].equal(x[:, :1])
    moved = (after - x)[:, :1]  # of one token, so it is the same everywhere at the next scale
    close(starts[1], x[:, 1:5] + moved)
    moved = (after - x)[:, 1:5].transpose(1, 2).unflatten(2, (2, 2))
    moved = nn.functional.interpolate(moved, size=(3, 3), mode="bilinear")
    close(starts[2], x[:, 5:] + moved.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("kind", "cache"), [("explicit", "equilibrium"), ("implicit", "iterate")])
def test_a_warm_start_is_refused_where_it_has_no_meaning(kind: str, cache: str) -> None:
    trunk = tiny_transformer(kind).trunk
    with pytest.raises(ValueError, match="warm_start: "):
        trunk.schedule(None, cache=cache, warm_start=True)


# What a scale took


def test_evaluations_and_residuals_are_those_of_their_definition() -> None:
    trunk, x, cond = a_case(trunk=ImplicitTrunkConfig(num_pre=0, num_post=0))
    memory = trunk.new_cache("equilibrium", [3])
    states = []
    trunk.layer.cell.register_forward_hook(lambda _, inputs, z: states.append((inputs[0].clone(), z.clone())))
    with torch.no_grad():
        solve = call(trunk, x[:, :1], cond, cache=memory, iterations=3, measure=True).solve
    z, fz = (t.flatten(1) for t in states[-1])
    assert solve.evaluations.tolist() == [3, 3]
    torch.testing.assert_close(solve.residual.double(), (fz - z).norm(dim=1) / fz.norm(dim=1))


@pytest.mark.parametrize("iterations", [3, Adaptive(rtol=0.0, max_steps=4)])
def test_evaluations_are_those_of_the_cell_measured_or_not(iterations: Any) -> None:
    trunk, x, cond = a_case(trunk=ImplicitTrunkConfig(num_pre=0, num_post=0))
    calls: list[None] = []
    trunk.layer.cell.register_forward_pre_hook(lambda *_: calls.append(None))
    for measure in (False, True):
        calls.clear()
        memory = trunk.new_cache("equilibrium", [iterations])
        with torch.no_grad():
            output = call(trunk, x[:, :1], cond, cache=memory, iterations=iterations, measure=measure)
        assert output.solve.evaluations.tolist() == [len(calls)] * 2
        assert (output.solve.residual is not None) == measure


def test_adaptive_stops_each_sample_or_the_scale_as_a_whole() -> None:
    torch.manual_seed(0)
    trunk = (
        enlarge(build_trunk(tiny_config(trunk=ImplicitTrunkConfig(num_pre=0, num_post=0)))).double().eval()
    )
    with torch.no_grad():
        trunk.layer.cell.projection_in.weight[:, :16].mul_(0.3)
    x, cond = torch.randn(6, 1, 16, dtype=torch.float64), torch.randn(6, 16, dtype=torch.float64)

    def solve(**settings: Any) -> tuple[Tensor, Any]:
        memory, adaptive = (
            trunk.new_cache("equilibrium", [None]),
            Adaptive(rtol=1e-6, max_steps=50, **settings),
        )
        with torch.no_grad():
            output = call(trunk, x, cond, cache=memory, iterations=adaptive, measure=True)
        return output.x_BLC, output.solve

    (own, each), (shared, whole) = solve(), solve(per_sample=False)
    assert each.residual.max() < 1e-6
    assert len(whole.evaluations.unique()) == 1
    close(own, torch.cat([solve_one(trunk, x, cond, i) for i in range(6)]))
    torch.testing.assert_close(own, shared, atol=1e-4, rtol=1e-4)
    assert not own.equal(shared)


def solve_one(trunk: Trunk, x: Tensor, cond: Tensor, i: int) -> Tensor:
    memory = trunk.new_cache("equilibrium", [None])
    with torch.no_grad():
        adaptive = Adaptive(rtol=1e-6, max_steps=50)
        return call(trunk, x[i : i + 1], cond[i : i + 1], cache=memory, iterations=adaptive).x_BLC


def test_samples_computed_together_stop_without_waiting_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(viar.model.implicit, "row_chunks", lambda t: [slice(i, i + 1) for i in range(len(t))])
    trunk, x, cond = a_case(trunk=ImplicitTrunkConfig(num_pre=0, num_post=0))
    with torch.no_grad():
        trunk.layer.cell.projection_in.weight[:, :16].mul_(0.3)
    x, cond = torch.cat([x, 100 * x]), torch.cat([cond, cond])  # samples of different difficulty
    rows: list[int] = []
    trunk.layer.cell.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for per_sample, everybody in ((True, False), (False, True)):
        rows.clear()
        adaptive = Adaptive(rtol=1e-4, max_steps=50, per_sample=per_sample)
        with torch.no_grad():
            memory = trunk.new_cache("equilibrium", [adaptive])
            solve = call(trunk, x[:, :1], cond, cache=memory, iterations=adaptive, measure=True).solve
        assert sum(rows) == int(solve.evaluations.sum())
        assert (len(solve.evaluations.unique()) == 1) == everybody
        # The residual is that of each sample, also where the scale stopped as a whole.
        assert len(solve.residual.unique()) > 1


def test_what_does_not_go_with_a_cache_of_iterates_is_refused_at_once() -> None:
    trunk, x, cond = a_case()
    memory = trunk.new_cache("iterate", [1, 1, 1])
    with torch.no_grad():
        with pytest.raises(ValueError, match="'iterate' needs fixed counts, got Adaptive"):
            call(trunk, x[:, :1], cond, cache=memory, iterations=Adaptive())
        with pytest.raises(ValueError, match="warm_start: needs cache='equilibrium'"):
            call(trunk, x[:, :1], cond, cache=memory, iterations=1, displacement=x[:, :1])
        with pytest.raises(TypeError, match=r"iterations: expected one entry of `schedule`, got \(3, 2\)"):
            call(trunk, x[:, :1], cond, cache=memory, iterations=(3, 2))
    with pytest.raises(ValueError, match="iterations: expected 3 counts, one a scale"):
        trunk.new_cache("iterate", [3, 2])


@pytest.mark.parametrize("counts", [[1, 2, 3], [3, 3, 4], [2, 1, 2]])
def test_the_iterate_cache_refuses_counts_that_rise(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"iterations: .*do not rise.*use cache='equilibrium'"):
        tiny_transformer().trunk.new_cache("iterate", counts)


def test_the_iterate_cache_takes_counts_that_fall_or_stay() -> None:
    assert isinstance(tiny_transformer().trunk.new_cache("iterate", [3, 3, 1]), IterateCache)


@pytest.mark.parametrize(
    ("kind", "cache", "message"),
    [
        ("implicit", "iterates", r"expected one of \('equilibrium', 'iterate'\), got 'iterates'"),
        ("explicit", "iterates", r"expected one of \('equilibrium', 'iterate'\), got 'iterates'"),
        ("explicit", "iterate", "'iterate' needs an implicit trunk"),
    ],
)
def test_a_cache_that_does_not_exist_for_the_trunk_is_refused(kind: str, cache: str, message: str) -> None:
    trunk = tiny_transformer(kind).trunk
    with pytest.raises(ValueError, match=f"cache: {message}"):
        trunk.new_cache(cache, trunk.schedule(None))


def test_the_iterate_cache_refuses_adaptive_counts() -> None:
    trunk = tiny_transformer().trunk
    with pytest.raises(ValueError, match="cache: 'iterate' needs fixed counts, got Adaptive"):
        trunk.new_cache("iterate", trunk.schedule(Adaptive()))


def test_a_projection_that_starts_as_the_identity_passes_on_a_mix_of_state_and_input() -> None:
    """Beside 0.3 of the random weights that the same seed gives a published start."""
    made = {}
    for how in ("random", "identity"):
        torch.manual_seed(0)
        made[how] = NextScaleTransformer(tiny_config(trunk=replace(IMPLICIT, projection=how)))
    identity, random = made["identity"], made["random"]
    own, published = (dict(model.named_parameters()) for model in (identity, random))
    for name, weight in own.items():
        if not name.endswith(("projection_in.weight", "projection_out.weight")):
            assert torch.equal(weight, published[name]), name
    cell, start = identity.trunk.layer.cell, random.trunk.layer.cell
    through_in, through_out = (
        (ours.weight - 0.3 * theirs.weight).double()
        for ours, theirs in (
            (cell.projection_in, start.projection_in),
            (cell.projection_out, start.projection_out),
        )
    )
    z, u = uniform(5, 16, seed=1).double() - 0.5, uniform(5, 16, seed=2).double() - 0.5
    passed = F.gelu(torch.cat([z, u], 1) @ through_in.T, approximate="tanh") @ through_out.T
    torch.testing.assert_close(passed, 0.3 * z + 0.7 * u, rtol=0, atol=1e-6)


def test_another_start_of_the_projection_is_refused() -> None:
    with pytest.raises(ValueError, match="projection must be one of random, identity, got 'zero'"):
        ImplicitTrunkConfig(projection="zero")


def test_a_config_says_how_the_projection_starts_only_where_it_is_not_as_all_were_before() -> None:
    """So that models, runs and series of before stay what they were."""
    plain, changed = (tiny_config(trunk=replace(IMPLICIT, projection=how)) for how in ("random", "identity"))
    assert "projection" not in plain.to_dict()["trunk"]
    assert changed.to_dict()["trunk"]["projection"] == "identity"
    for config in (plain, changed):
        assert TransformerConfig.from_dict(config.to_dict()) == config
