from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deqlib import fixed_point
from deqlib.state import flatten


def identity(z: Any) -> Any:
    return z


def evaluate(cell: Any, z0: Any) -> Tensor:
    """One flat evaluation of a cell at z0."""
    f, flat = flatten(cell, z0)
    return f(flat)


@given(
    batch=st.integers(0, 4),
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4),
    dtypes=st.lists(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), min_size=4, max_size=4
    ),
)
def test_a_pytree_comes_back_as_it_went_in(
    batch: int, shapes: list[list[int]], dtypes: list[torch.dtype]
) -> None:
    leaves = [torch.randn(batch, *shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    tree = {"first": leaves[0], "rest": (leaves[1:], {})}
    f, flat = flatten(identity, tree)
    layout = f.layout
    assert flat.shape == (batch, sum(leaf[0:1].numel() for leaf in leaves) if batch else flat.shape[1])
    back = layout.unravel(flat)
    torch.testing.assert_close(back, tree, rtol=0, atol=0)
    assert torch.equal(layout.ravel(back), flat)


def test_a_flat_row_is_one_sample() -> None:
    z0 = (torch.arange(6.0).view(2, 3), 10 + torch.arange(8.0).view(2, 2, 2))
    _, flat = flatten(identity, z0)
    assert flat.tolist() == [[0, 1, 2, 10, 11, 12, 13], [3, 4, 5, 14, 15, 16, 17]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_in_float32_while_the_cell_sees_its_own_dtype(dtype: torch.dtype) -> None:
    seen = []
    f, flat = flatten(lambda z: (seen.append(z.dtype), z)[1], torch.ones(2, 3, dtype=dtype))
    assert flat.dtype == torch.float32
    assert f(flat).dtype == torch.float32
    assert seen == [dtype]
    assert f.layout.unravel(flat).dtype == dtype


def test_leaves_of_several_dtypes_share_the_widest() -> None:
    tree = (torch.ones(2, 3), torch.ones(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.bfloat16))
    assert flatten(identity, tree)[1].dtype == torch.float64


@pytest.mark.parametrize(
    ("z0", "error", "words"),
    [
        ((), ValueError, "at least one tensor"),
        ([1.0], TypeError, "every leaf of the state must be a tensor, got float"),
        (None, TypeError, "every leaf of the state must be a tensor, got NoneType"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            "floating-point dtype of 16 bits or more, got torch.int64",
        ),
        (
            torch.zeros(2, dtype=torch.complex64),
            TypeError,
            "floating-point dtype of 16 bits or more, got torch.complex64",
        ),
        (torch.tensor(1.0), ValueError, "first axis of the state is the batch"),
        ((torch.zeros(2, 3), torch.zeros(4, 3)), ValueError, "share the batch axis, got 2 and 4 samples"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), ValueError, "on one device, got cpu and meta"),
    ],
)
def test_a_starting_point_that_is_no_state_is_refused(z0: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^z0: .*{words}"):
        fixed_point(identity, z0)


@pytest.mark.parametrize(
    ("z0", "cell", "words"),
    [
        (torch.zeros(2, 3), lambda z: z[:, :2], r"expected \(2, 3\), got \(2, 2\)"),
        (torch.zeros(2, 3), lambda z: z.sum(0, keepdim=True), r"expected \(2, 3\), got \(1, 3\)"),
        (torch.zeros(2, 3), lambda z: z.double(), "expected torch.float32, got torch.float64"),
        (torch.zeros(2, 3), lambda z: z.bfloat16(), "expected torch.float32, got torch.bfloat16"),
        (torch.zeros(2, 3), lambda z: z.to("meta"), "expected cpu, got meta"),
        (torch.zeros(2, 3), lambda z: (z,), r"expected tensor, got \(tensor,\)"),
        (torch.zeros(2, 3), lambda z: {"h": z}, r"expected tensor, got \{h: tensor\}|\{'h': tensor\}"),
        ((torch.zeros(2, 3), torch.zeros(2)), lambda z: z[0], r"expected \(tensor, tensor\), got tensor"),
        ((torch.zeros(2, 3), torch.zeros(2)), lambda z: list(z), r"got \[tensor, tensor\]"),
        (
            (torch.zeros(2, 3), torch.zeros(2)),
            lambda z: (z[0], z[0]),
            r"leaf 1 .*expected \(2,\), got \(2, 3\)",
        ),
    ],
)
def test_a_cell_that_changes_its_state_is_refused_with_what_came_and_what_was_expected(
    z0: Any, cell: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=f"^cell: .*{words}"):
        fixed_point(cell, z0)


def test_a_cell_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^cell: the output must be a tensor, got NoneType"):
        fixed_point(lambda z: None, torch.zeros(2, 3))


def test_a_cell_may_return_another_dtype_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(lambda z: z.bfloat16(), torch.zeros(2, 3)).dtype == torch.float32


def test_a_registered_container_keeps_its_type_and_order() -> None:
    z0 = OrderedDict(b=torch.ones(2, 1), a=torch.zeros(2, 2))
    solution = fixed_point(lambda z: OrderedDict(b=0.5 * z["b"], a=0.5 * z["a"]), z0)
    assert type(solution.value) is OrderedDict
    assert list(solution.value) == ["b", "a"]


def test_the_starting_point_is_not_changed() -> None:
    z0 = torch.randn(3, 4)
    before = z0.clone()
    fixed_point(lambda z: torch.tanh(z) * 0.5 + 1, z0)
    assert torch.equal(z0, before)


def test_a_cell_that_changes_its_state_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^cell: the state must not be changed in place"):
        fixed_point(lambda z: z.mul_(0.5).add_(1), torch.zeros(2, 3))
    with torch.inference_mode():  # where PyTorch keeps no count of changes
        assert fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3)).converged.all()
