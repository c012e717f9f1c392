"""Arguments of another kind than a signature says are refused by name, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from viar.data import TensorImages, augmented
from viar.evaluation import Classifier, balanced_labels, class_consistency, kernel_distance
from viar.kinds import check_fields, check_kind, check_tensor, checked

MEANT = [
    (int, (3, np.int64(3)), (True, 3.0, "3", None, torch.tensor(3))),
    (float, (3, 0.5, np.float32(0.5)), (False, "0.5", 1j, None, torch.tensor(0.5))),
    (bool, (True, np.bool_(False)), (0, 1, "True", None)),
    (str, ("", "a"), (b"a", 1, None, Path("a"))),
    (Path, (Path("a"),), ("a", None)),
    (Tensor, (torch.zeros(2), torch.zeros(())), ([0.0], np.zeros(2), torch.eye(2).to_sparse(), None)),
    (int | None, (3, None), ("3", 2.5)),
    (Literal["a", "b"], ("a", "z"), (1, None)),  # which words there are is for the function to say
    (Sequence[int], ([1], (1, 2), range(3), np.arange(2)), (1, "12", [1.5], [True], {"a": 1})),
    (tuple[float, float], ((1, 2.0), [1, 2]), (1, ("a", 2), "ab")),
    (Sequence[Tensor], ([torch.zeros(1)],), ([1], torch.zeros(2))),
    (Mapping[str, Any], ({},), ([], None, "a")),
    (Iterable[Tensor], ([], iter(())), (3, None, "a")),
    (Callable[..., Any], (int, nn.Identity()), (3, None)),
    (nn.Module, (nn.Identity(),), (nn.Identity, None)),
    (Any, (3, None, object()), ()),
]
PAIRS = [(kind, value, True) for kind, right, _ in MEANT for value in right]
PAIRS += [(kind, value, False) for kind, _, wrong in MEANT for value in wrong]


@pytest.mark.parametrize(("kind", "value", "fits"), PAIRS, ids=range(len(PAIRS)))
def test_a_value_is_taken_where_it_is_of_its_kind(kind: Any, value: Any, fits: bool) -> None:
    if fits:
        return check_kind("it: expected", value, kind)
    with pytest.raises(TypeError, match=r"^it: expected .*, got "):
        check_kind("it: expected", value, kind)


@checked
def scale(image: Tensor, factor: float = 1.0, *, names: Sequence[str] = ()) -> Tensor:
    return image * factor


def test_a_function_names_the_argument_by_position_and_by_name() -> None:
    assert torch.equal(scale(torch.ones(2), np.float64(2)), torch.full((2,), 2.0))
    with pytest.raises(TypeError, match=r"^factor: expected a number, got 'x' \(str\)$"):
        scale(torch.ones(2), "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^names: expected Sequence\[str\], got 'ab' \(str\)$"):
        scale(torch.ones(2), names="ab")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'image'"):
        scale()  # type: ignore[call-arg]


@given(st.integers(2**63, 2**70))
def test_an_integer_that_no_tensor_holds_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="an integer that 64 bits hold"):
        balanced_labels(number, 1)
    with pytest.raises(ValueError, match="64 bits"):
        check_kind("sides: expected", (1, number), tuple[int, ...])


def test_numbers_of_numpy_among_settings_become_pythons() -> None:
    @dataclass(frozen=True)
    class Settings:
        count: int
        rate: float

    made = Settings(np.int64(3), np.float32(0.5))  # type: ignore[arg-type]
    check_fields(made)
    assert (type(made.count), type(made.rate)) == (int, float)


def test_a_tensor_without_numbers_is_told_from_one_with() -> None:
    check_tensor("it", torch.zeros(2, device="meta"))
    for value in (torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"^it: expected real numbers, got a tensor of"):
            check_tensor("it", value, has_numbers=True)
    with pytest.raises(ValueError, match="expected real numbers"):
        kernel_distance(torch.zeros(3, 2, device="meta"), torch.zeros(3, 2))


def test_names_of_no_augmentation_and_labels_of_no_image_are_refused() -> None:
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="augmentations: expected some of"):
        augmented(TensorImages(images, torch.zeros(2, dtype=torch.int64)), 1, ["turn"])
    with pytest.raises(ValueError, match="labels: expected integers, one an image"):
        TensorImages(images, torch.zeros(3, dtype=torch.int64))


def test_a_classifier_says_which_images_it_takes() -> None:
    classifier = Classifier(3, 8, 2)
    for images in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8).double(), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match=r"images: expected torch.float32 \(B, 3, 8, 8\) on cpu, got"):
            classifier(images)
    with pytest.raises(ValueError, match=r"classifier: expected logits \(B, N\) of 2 images"):
        class_consistency(nn.Identity(), torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
