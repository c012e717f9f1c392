"""The cases of the suite `viar` that look at trained models of MNIST."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import viar
from benchmarks.case import Row, Run
from benchmarks.suites.viar import convergence, editing, frontier, mnist
from benchmarks.suites.viar.convergence import Evaluation
from benchmarks.suites.viar.models import random_tokenizer, random_transformer
from viar.data import ImageData
from viar.training import TOKENIZERS, TRANSFORMERS

CPU = torch.device("cpu")
QUICK = Run(CPU, 1, True)


def as_read(rows: Any) -> list[Row]:
    """As they come back from a file."""
    found: list[Row] = json.loads(json.dumps(list(rows), allow_nan=False))
    return found


# The models


def test_all_models_are_of_one_training_and_the_judge_sees_the_pictures_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str, int]] = []
    judged: list[ImageData] = []

    def trained_by(recipe: Any, material: Any, name: str, *, seed: int, run: Run) -> Any:
        assert recipe == mnist.TRANSFORMERS[f"mnist-{name}"]
        asked.append((recipe.data, name, seed))
        return SimpleNamespace(model=torch.nn.Linear(1, 1))

    def judge(data: ImageData, **_: Any) -> torch.nn.Module:
        judged.append(data)
        return torch.nn.Linear(1, 1)

    def material(data: str, augment: int, quick: bool) -> Any:
        return SimpleNamespace(tokenizer=few.tokenizer)

    few = mnist.trained_mnist(QUICK)
    stand_ins = {
        "trained_by": trained_by,
        "judge": judge,
        "material_of": material,
        "load_data": lambda *_: few.data,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(mnist, name, stand_in)
    full = Run(CPU, 7, False)
    found = mnist.trained_mnist(full)
    assert mnist.trained_mnist(full) is found  # for every point the same
    assert asked == [("mnist", name, mnist.SEED) for name in mnist.RECIPES.values()]
    assert judged == [few.data] == [found.data]
    assert found.viar is not few.viar


def test_held_out_pictures_are_spread_over_all_classes_and_there_are_no_more_than_all() -> None:
    trained = mnist.trained_mnist(QUICK)
    _, labels = mnist.held_out(trained, 12)
    assert len(labels) == 12
    assert len(labels.unique()) == 10
    images, labels = mnist.held_out(trained, 1000)
    assert labels.equal(trained.data.validation.labels)
    assert images.equal(trained.data.validation.images)


# Editing


def a_mask(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers).bool().view(5, 5)


masks = st.lists(st.integers(0, 1), min_size=25, max_size=25).filter(lambda bits: 0 < sum(bits) < 25)


@given(numbers=masks, ring=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_seam_is_what_a_walk_over_all_pixels_and_their_neighbours_finds(
    numbers: list[int], ring: int, seed: int
) -> None:
    kept = a_mask(numbers)
    generator = torch.Generator().manual_seed(seed)
    edited, real = torch.rand(2, 2, 3, 5, 5, generator=generator)
    places = [(row, column) for row in range(5) for column in range(5)]
    hidden = [place for place in places if not kept[place]]
    near = [
        (r, c)
        for r, c in places
        if kept[r, c] and any(max(abs(r - y), abs(c - x)) <= ring for y, x in hidden)
    ]
    pairs = [
        ((r, c), (y, x)) for r, c in places if kept[r, c] for y, x in hidden if abs(r - y) + abs(c - x) == 1
    ]

    def jump(images: Tensor) -> float:
        return float(
            torch.stack([(images[..., r, c] - images[..., y, x]).abs() for (r, c), (y, x) in pairs]).mean()
        )

    errors = torch.stack([(edited - real)[..., row, column].abs() for row, column in near])
    found = editing.seam(edited, real, kept, ring)
    assert found.ring == pytest.approx(float(errors.mean()), rel=1e-5)
    assert found.jump == pytest.approx(jump(edited), rel=1e-5)
    assert found.untouched == pytest.approx(jump(real), rel=1e-5)


@pytest.mark.parametrize(
    ("kept_becomes", "hidden_becomes", "error"),
    [
        (0.4, 0.4, 0.0),  # as it was
        (0.4, 0.7, 0.3),  # an edge, and no kept pixel lost
        (0.5, 0.5, 0.1),  # no edge, and kept pixels off by so much
        (0.5, 0.8, 0.4),  # both
    ],
)
def test_an_edge_and_lost_pixels_add_up_to_the_error_of_the_seam(
    kept_becomes: float, hidden_becomes: float, error: float
) -> None:
    kept = viar.box_mask(editing.CENTRE, 8).bool()
    real = torch.full((2, 3, 8, 8), 0.4)
    edited = torch.full_like(real, hidden_becomes).where(~kept, kept_becomes)
    assert editing.seam(edited, real, kept, 1).error == pytest.approx(error, abs=1e-6)


def test_a_seam_that_is_smoother_than_the_picture_was_is_no_error_and_far_pixels_are_no_part_of_it() -> None:
    kept = viar.box_mask(editing.CENTRE, 8).bool()
    real = torch.zeros(1, 3, 8, 8).where(~kept, 1.0)
    edited = torch.ones(1, 3, 8, 8)
    edited[..., 0, :] = 0.0
    found = editing.seam(edited, real, kept, 1)
    assert (found.untouched, found.jump, found.error) == (1.0, 0.0, 0.0)


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_another_class_is_never_the_own_one_and_all_others_come_in_turn(labels: list[int]) -> None:
    own = torch.tensor(labels)
    asked = editing.other_classes(own, 5)
    assert not (asked == own).any()
    assert 0 <= asked.min() <= asked.max() < 5
    turns = ((asked - own) % 5).tolist()
    assert turns == [1 + i % 4 for i in range(len(labels))]


def test_a_strip_comes_back_as_the_pictures_side_by_side() -> None:
    images = torch.rand(3, 1, 4, 4).expand(-1, 3, -1, -1)
    found = torch.from_numpy(editing.unrolled(editing.strip(images)).copy())
    assert found.shape == (4, 12)
    assert found.equal(torch.cat(list(images[:, 0].mul(255).round().byte()), 1))


def test_pictures_are_edited_as_the_task_says_and_what_was_kept_has_no_say_in_the_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Tensor, Tensor, Tensor, str]] = []

    def edit(
        model: Any, tokenizer: Any, images: Tensor, mask: Tensor, labels: Tensor, *, keep: str, **_: Any
    ) -> Tensor:
        calls.append((images, mask, labels, keep))
        return images.where(~mask.bool() if keep == "codes" else mask.bool(), 0.2)

    monkeypatch.setattr(viar, "edit", edit)
    trained = mnist.trained_mnist(QUICK)
    own = mnist.held_out(trained, 12)[1]
    for task in editing.TASKS:
        calls.clear()
        rows = as_read(editing.build(QUICK, task, 12))
        assert [keep for *_, keep in calls] == ["codes", "codes", "features", "features"]
        for images, mask, labels, _ in calls:
            assert images.shape == (12, 3, 32, 32)
            assert 0 <= images.min() <= images.max() <= 1
            assert mask[8:24, 8:24].unique().tolist() == [float(task == editing.OUTPAINTING)]
            assert mask.sum() == (256 if task == editing.OUTPAINTING else 768)
            assert labels.equal(own) == (task != editing.OTHER_CLASS)
        found = {row["contender"]: row for row in rows}
        spoilt, changed = (found[f"VIAR, {way}"] for way in ("published way", "ours"))
        assert spoilt["region_distance"] == pytest.approx(found[editing.REAL]["region_distance"], rel=1e-6)
        assert changed["region_distance"] > 1.001 * found[editing.REAL]["region_distance"]
        assert spoilt["ring"] > 0 == changed["ring"]
        assert found[editing.REAL]["seam_error"] == 0


def test_the_bars_of_editing_are_those_of_inpainting_by_viar() -> None:
    def judged(kept: float, error: float) -> list[Any]:
        names = [editing.REAL, "VIAR, published way", "VAR, ours", editing.JUDGED]
        rows = [
            {"task": task, "contender": name, "class_consistency": 0.5, "seam_error": 0.1}
            for task in editing.TASKS
            for name in names
        ]
        for row in rows:
            if (row["task"], row["contender"]) == (editing.INPAINTING, editing.JUDGED):
                row |= {"class_consistency": kept, "seam_error": error}
        return editing.bars(rows)

    assert [bar.verdict for bar in judged(0.93, 0.049)] == ["pass", "pass"]
    assert [bar.verdict for bar in judged(0.91, 0.051)] == ["FAIL", "FAIL"]
    assert judged(0.91, 0.03)[1].value == pytest.approx(0.3)
    assert [bar.verdict for bar in editing.bars([])] == ["not measured"] * 2


# Convergence


def contraction(factor: float, evaluations: int, tokens: int = 4) -> list[Evaluation]:
    """z <- z* + factor (z - z*) in the direction across z*, from as far as z* is long; (3, tokens, 2)."""
    states = [torch.tensor([1.0, factor**n]).expand(3, tokens, 2) for n in range(evaluations + 1)]
    return [Evaluation(z, image) for z, image in pairwise(states)]


def test_a_contraction_has_its_known_residuals_cosines_and_evaluations() -> None:
    solves = [contraction(0.5, convergence.EVALUATIONS), contraction(0.5, convergence.EVALUATIONS)]
    ((side, row),) = convergence.by_scale(solves).items()
    assert side == 2
    residuals = [0.5**n / 2 / math.sqrt(1 + 0.25 ** (n + 1)) for n in range(convergence.EVALUATIONS)]
    assert row["residual"] == pytest.approx(residuals, rel=1e-4)
    assert row["cosine"] == pytest.approx([1 / math.sqrt(1 + 0.25 ** (n + 1)) for n in range(24)], rel=1e-4)
    for tolerance in convergence.TOLERANCES:
        first = next(n for n, value in enumerate(residuals, start=1) if value <= tolerance)
        assert row[f"evaluations_{tolerance:g}"] == first
        assert row[f"arrived_{tolerance:g}"] == 1


def test_a_solve_that_never_arrives_counts_all_evaluations_and_stays_where_it_ended() -> None:
    early = contraction(0.5, 3, tokens=1)
    row = convergence.by_scale([early])[1]
    assert row["residual"][2:] == [row["residual"][2]] * (convergence.EVALUATIONS - 2)
    assert (row["evaluations_0.01"], row["arrived_0.01"]) == (convergence.EVALUATIONS, 0)


def test_the_plain_iteration_is_seen_state_by_state_and_a_warm_start_begins_elsewhere() -> None:
    trained = mnist.trained_mnist(QUICK)
    starts: dict[bool, list[Tensor]] = {}
    for warm in (False, True):
        sampling = viar.Sampling(iterations=3, warm_start=warm, cfg=0, top_k=1)
        with convergence.evaluations(trained.viar) as solves:
            sample = viar.sample_tokens(trained.viar, trained.tokenizer, [3], sampling, measure=True)
        assert [solve[0].z_BlC.shape[1] for solve in solves] == [1, 4, 9, 16, 36, 64]
        for solve, report in zip(solves, sample.scales, strict=True):
            assert len(solve) == 3
            assert all(after.z_BlC.equal(before.image_BlC) for before, after in pairwise(solve))
            last = convergence.relative_residual(solve[-1])
            assert float(last) == pytest.approx(report.residual, rel=1e-4)
        starts[warm] = [solve[0].z_BlC for solve in solves]
    same = [a.equal(b) for a, b in zip(starts[False], starts[True], strict=True)]
    assert same == [True] + [False] * 5


def test_all_scales_count_by_their_tokens_and_solvers_meet_the_same_equations() -> None:
    plain, anderson = (as_read(convergence.build(QUICK, name, "input", 3)) for name in ("Picard", "Anderson"))
    *scales, together = plain
    tokens = [1, 4, 9, 16, 36, 64]
    assert [row["contender"] for row in scales] == [f"{side} x {side}" for side in (1, 2, 3, 4, 6, 8)]
    for name in ("evaluations_0.01", "arrived_0.001"):
        mean = sum(t * row[name] for t, row in zip(tokens, scales, strict=True)) / sum(tokens)
        assert together[name] == pytest.approx(mean)
    assert together["residual"][0] == pytest.approx(anderson[-1]["residual"][0], rel=1e-2)
    assert min(anderson[-1]["residual"]) != min(together["residual"])
    assert len(together["cosine"]) == convergence.EVALUATIONS
    assert together["cosine"][-1] == pytest.approx(1)


# The frontier


def a_contender(name: str, evaluations: float, size: int, distances: list[float]) -> list[Row]:
    """One row a seed."""
    row = {"contender": name, "evaluations": evaluations, "bytes": size, "cache_bytes": 1}
    return [
        {**row, "frechet": distance, "class_consistency": 1.0, "memorisation": 1.0} for distance in distances
    ]


def test_a_var_counts_as_lost_to_unless_viar_is_as_good_at_no_more_than_its_cost() -> None:
    rows = [
        *a_contender("VAR, 4 blocks", 4, 10, [5.0, 5.0, 5.0]),
        *a_contender("VAR, 6 blocks", 6, 20, [4.0, 4.0, 4.0]),
        *a_contender("VAR, 8 blocks", 8, 30, [3.0, 3.0, 3.0]),
        *a_contender("VIAR, 2", 6, 11, [0.0, 4.0, 9.0]),  # the middle one counts
        *a_contender("VIAR, 4", 8, 11, [3.6, 3.6, 3.6]),
    ]
    evaluations, memory = frontier.bars(rows)
    assert (evaluations.value, memory.value) == (2, 2)
    assert evaluations.note == "VAR, 4 blocks (no VIAR there); VAR, 8 blocks (1.20 x)"
    assert memory.note == "VAR, 4 blocks (no VIAR there); VAR, 8 blocks (1.20 x)"
    assert evaluations.limit == frontier.MOST_LOST
    cheaper = [*rows, *a_contender("VIAR, 1", 4, 10, [5.0, 5.0, 5.0])]
    assert [bar.value for bar in frontier.bars(cheaper)] == [1, 1]


def test_evaluations_of_a_token_are_explicit_blocks_and_those_of_its_scale() -> None:
    model = random_transformer(TRANSFORMERS["digits-viar"].model, CPU)
    tokenizer = random_tokenizer(TOKENIZERS["digits"].model, CPU)
    trunk, sides = model.config.trunk, model.config.sides
    assert isinstance(trunk, viar.ImplicitTrunkConfig)
    counts = [3, *[1] * (len(sides) - 1)]
    material: Any = SimpleNamespace(tokenizer=tokenizer)
    contender = frontier.Contender(model, material, {"iterations": counts})
    images, evaluations, cache_bytes = contender.judged(torch.tensor([0, 1, 1]), 0)
    tokens = [side**2 for side in sides]
    inside = sum(count * number for count, number in zip(counts, tokens, strict=True)) / sum(tokens)
    assert evaluations == pytest.approx(trunk.num_pre + trunk.num_post + inside)
    assert contender.work(evaluations) == pytest.approx(evaluations + inside / 3 + 1 / 6)
    assert len(images) == 3
    assert cache_bytes > 0
    var = random_transformer(TRANSFORMERS["digits-var"].model, CPU)
    contender = frontier.Contender(var, material, {"iterations": None})
    assert contender.judged(torch.tensor([0]), 0)[1] == var.config.depth == contender.work(var.config.depth)
