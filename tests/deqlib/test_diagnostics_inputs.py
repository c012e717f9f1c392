"""`diagnose` and `ablate` on what layers are given in practice: sparse matrices, odd inputs, own layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deqlib import (
    JFB,
    AdjointStart,
    ImplicitDifferentiation,
    ImplicitLayer,
    Picard,
    StochasticJFB,
    Stopping,
    fixed_point,
)
from deqlib.diagnostics import Diagnosis, ablate, diagnose, saved_bytes

NODES, WIDTH = 12, 4
FAST: dict[str, Any] = {"rounds": 0, "num_starts": 0, "solvers": ()}


@pytest.fixture(autouse=True)
def _sparse_csr_is_in_beta() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        torch.manual_seed(0)
        yield


class Cell(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, gain=0.6)

    def forward(self, z: Tensor, x: Tensor, *unused: Any) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Graph(Cell):
    """One sample whose nodes see one another."""

    def forward(self, z: Tensor, x: Tensor, adjacency: Any) -> Tensor:
        while not isinstance(adjacency, Tensor):
            adjacency = adjacency["A"] if isinstance(adjacency, dict) else adjacency[0]
        return torch.tanh(adjacency @ self.linear(z[0]) + x[0]).unsqueeze(0)


def adjacency() -> Tensor:
    dense = (torch.rand(NODES, NODES) < 0.3).float() + torch.eye(NODES)
    return dense / dense.sum(1, keepdim=True)


LAYOUTS = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nest", [lambda a: a, lambda a: {"A": a, "name": "road"}, lambda a: ([a, None],)])
def test_a_sparse_input_anywhere_is_measured_as_the_dense_one(layout: str, nest: Any) -> None:
    dense, x = adjacency(), torch.randn(1, NODES, WIDTH)
    layer = ImplicitLayer(Graph(), solver=Picard())
    sparse = LAYOUTS[layout](dense)
    expected = diagnose(layer, x, dense, **FAST)
    found = diagnose(layer, x, nest(sparse), **FAST)
    torch.testing.assert_close(found.spectral_radius, expected.spectral_radius, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.spectral_norm, expected.spectral_norm, rtol=1e-4, atol=0)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert one.cosine == pytest.approx(other.cosine, rel=1e-3)
    assert all(len(line) <= 100 for line in str(found).splitlines())
    table = ablate(layer, x, nest(sparse), rounds=1, solvers=[Picard()])
    assert [row.name for row in table.backwards] == [
        row.name for row in ablate(layer, x, dense, rounds=1, solvers=[Picard()]).backwards
    ]


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_the_gradient_of_a_sparse_input_is_compared_where_it_is_asked_for(layout: str) -> None:
    dense, x = adjacency(), torch.randn(1, NODES, WIDTH)
    sparse = LAYOUTS[layout](dense).requires_grad_()
    layer = ImplicitLayer(Graph(), solver=Picard())
    plain = diagnose(layer, x, LAYOUTS[layout](dense), **FAST)
    found = diagnose(layer, x, sparse, **FAST)
    assert found.gradients[0].input_error is not None
    assert found.gradients[0].input_error < 1e-2
    assert found.gradients[1].input_cosine != plain.gradients[1].input_cosine
    assert sparse.grad is None


def test_sparse_buffers_are_left_as_they_were_and_sparse_gradients_are_compared() -> None:
    class Embedded(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", adjacency().to_sparse())
            self.table = nn.Embedding(5, WIDTH, sparse=True)

        def forward(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
            mixed = torch.sparse.mm(self.adjacency, self.linear(z[0]))
            return torch.tanh(mixed + x[0] + self.table(index)[0]).unsqueeze(0)

    layer = ImplicitLayer(Embedded(), solver=Picard())
    before = layer.cell.adjacency
    found = diagnose(layer, torch.randn(1, NODES, WIDTH), torch.arange(NODES).unsqueeze(0) % 5, **FAST)
    assert layer.cell.adjacency is before
    assert found.gradients[0].error is not None
    assert found.gradients[0].error < 1e-2 < (found.gradients[1].error or 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_sparse_tensor_values_and_indices_are_kept(layout: str) -> None:
    sparse = LAYOUTS[layout](adjacency())
    x = torch.randn(NODES, WIDTH, requires_grad=True)
    parts = sum(t.untyped_storage().nbytes() for t in pieces(sparse))
    assert saved_bytes(lambda: sparse @ x) == parts
    assert saved_bytes(lambda: sparse @ x, exclude=[sparse]) == 0


def pieces(sparse: Tensor) -> list[Tensor]:
    if sparse.layout == torch.sparse_coo:
        return [sparse.coalesce().indices(), sparse.coalesce().values()]
    if sparse.layout == torch.sparse_csr:
        return [sparse.crow_indices(), sparse.col_indices(), sparse.values()]
    return [sparse.ccol_indices(), sparse.row_indices(), sparse.values()]


def test_what_a_subclass_wraps_is_kept() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(4, 4)], layout=torch.jagged)
    assert saved_bytes(lambda: (nested * nested.detach().clone().requires_grad_()).sum()) > 6 * 4 * 4
    assert saved_bytes(lambda: x.exp().sum()) == x.numel() * x.element_size()


@dataclass
class Options:
    scale: Tensor
    name: str


def test_inputs_of_any_kind_are_passed_on_and_modules_among_them_are_left_as_they_were() -> None:
    norm = nn.BatchNorm1d(WIDTH).train()
    before = norm.running_mean

    class Uses(Cell):
        def forward(self, z: Tensor, x: Tensor, *rest: Any) -> Tensor:
            nothing, text, module, number, options, kind = rest
            assert (nothing, text, number, kind) == (None, "same", 3, torch.float32)
            return super().forward(z, x) * options.scale + 0.01 * module(x)

    rest = (None, "same", norm, 3, Options(torch.tensor(0.5), "half"), torch.float32)
    found = diagnose(ImplicitLayer(Uses()), torch.randn(5, WIDTH), *rest, **FAST)
    assert found.gradients[0].worst_cosine > 0.999
    assert norm.running_mean is before
    assert bool((before == 0).all())


class Encoding(ImplicitLayer):
    """Encodes before it solves, and pools after."""

    def __init__(self, cell: Any, **settings: Any) -> None:
        super().__init__(cell, **settings)
        self.encoder = nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.encoder(x)).sum(1)


class Doubling(ImplicitLayer):
    def solve(self, x: Tensor, **settings: Any) -> Any:
        return super().solve(2 * x, **settings)


class Functional(ImplicitLayer):
    def forward(self, x: Tensor) -> Tensor:
        return fixed_point(self.cell, torch.ones_like(x), (x / 2,)).value


def test_a_layer_with_a_forward_of_its_own_is_measured_where_its_cell_begins() -> None:
    cell = Cell()

    def same(found: Diagnosis, x: Tensor) -> bool:
        expected = diagnose(ImplicitLayer(cell), x, **FAST)
        return torch.allclose(found.spectral_radius, expected.spectral_radius, rtol=1e-3)

    layer, x = Encoding(cell), torch.randn(4, 3)
    assert same(diagnose(layer, x, **FAST), layer.encoder(x).detach())
    wide = torch.randn(4, WIDTH)
    assert same(diagnose(Doubling(cell), wide, **FAST), 2 * wide)
    functional = diagnose(Functional(cell), wide, **FAST)
    assert same(functional, wide / 2)
    assert layer.cell is cell
    assert not cell._forward_pre_hooks
    bare = Encoding(lambda z, x: 0.5 * torch.tanh(z) + x)
    kept = bare.cell
    assert diagnose(bare, x, **FAST).width == ablate(bare, x, rounds=1).width == WIDTH
    assert bare.cell is kept


def test_what_a_cell_with_torch_func_inside_keeps_is_not_known_and_said() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        energy = lambda z: (0.5 * z.square() - x * z + 0.1 * z.cos()).sum()  # noqa: E731
        slope: Tensor = torch.func.grad(energy)(z)
        return z - 0.3 * slope

    found = diagnose(ImplicitLayer(cell), torch.randn(3, 2), **FAST)
    assert found.gradients[0].saved_bytes is None
    assert found.gradients[0].worst_cosine > 0.999
    assert "cannot be counted" in found.notes[-1]
    table = ablate(ImplicitLayer(cell), torch.randn(3, 2), rounds=1, solvers=[Picard()])
    assert "cannot be counted" in table.notes[-1]
    pytest.importorskip("matplotlib")
    table.plot()


def test_what_modes_hold_of_the_users_is_left_as_it_was() -> None:
    start, generator = AdjointStart(), torch.Generator()
    state = generator.get_state()
    guessed = start.guess(torch.ones(4, WIDTH))
    for mode in (ImplicitDifferentiation(warm_start=start), StochasticJFB(generator=generator)):
        layer = ImplicitLayer(Cell(), backward=mode)
        diagnose(layer, torch.randn(4, WIDTH), **FAST)
        ablate(layer, torch.randn(4, WIDTH), rounds=1, solvers=[Picard()])
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(start.guess(torch.ones(4, WIDTH)), guessed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_half_precision_and_a_single_sample_are_reported(dtype: torch.dtype, batch: int) -> None:
    layer = ImplicitLayer(Cell().to(dtype))
    x = torch.randn(batch, WIDTH).to(dtype)
    for found in (diagnose(layer, x, rounds=1), ablate(layer, x, rounds=1)):
        assert max(map(len, str(found).splitlines())) <= 100


# Keyword inputs -----------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Takes a mask by name; without it, another map."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.orthogonal_(self.linear.weight, gain=0.4)

    def forward(self, z: Tensor, x: Tensor, *, mask: Any = None) -> Tensor:
        image = torch.tanh(self.linear(z) + x)
        return image if mask is None else image * mask["keep"]


class Encoded(ImplicitLayer):
    """Gives its cell the mask by name, whatever it was given itself."""

    def forward(self, x: Tensor, *, scale: float) -> Any:  # type: ignore[override]
        return super().forward(scale * x, mask={"keep": torch.tensor([1.0, 0.0, 1.0, 0.5])})


def test_keyword_inputs_are_measured_as_the_same_inputs_by_position() -> None:
    torch.manual_seed(0)
    cell, x, mask = Masked(), torch.randn(3, 4), {"keep": torch.tensor([1.0, 0.0, 1.0, 0.5])}
    position = ImplicitLayer(lambda z, x, mask: cell(z, x, mask=mask))
    few: dict[str, Any] = {"rounds": 0, "num_starts": 1, "num_products": 6}
    wanted = diagnose(position, x, mask, **few)
    inits: list[Any] = []

    def init(x: Tensor, *, mask: Any) -> Tensor:
        inits.append(mask)
        return torch.zeros_like(x)

    by_name = diagnose(ImplicitLayer(cell, init=init), x, mask=mask, **few)
    inside = diagnose(Encoded(cell), x, scale=1.0, **few)
    assert torch.equal(inits[0]["keep"], mask["keep"])
    for found in (by_name, inside):
        assert torch.equal(found.spectral_radius, wanted.spectral_radius)
        assert [mode.input_cosine for mode in found.gradients] == [
            mode.input_cosine for mode in wanted.gradients
        ]
        assert found.gradients[0].cosine is not None  # parameters of the cell itself
    one = ablate(ImplicitLayer(cell), x, mask=mask, rounds=1, solvers=[Picard()], backwards=[JFB()])
    two = ablate(position, x, mask, rounds=1, solvers=[Picard()], backwards=[JFB()])
    assert one.solvers[0].curve == two.solvers[0].curve
    assert one.backwards[0].error == two.backwards[0].error
    assert not hasattr(ImplicitLayer(cell).cell, "cell")  # nothing was put around it


def test_what_is_no_layer_is_told_in_a_line_with_the_layers_in_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), ImplicitLayer(Masked()))
    for call in (diagnose, ablate):
        with pytest.raises(TypeError, match=r"got Sequential; the layers in it are '1': pass one") as caught:
            call(model, torch.ones(2, 4))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="got Linear; it holds none"):
        diagnose(nn.Linear(4, 4), torch.ones(2, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got Sequential$"):
        diagnose(ImplicitLayer(Masked()), torch.ones(2, 4), generator=model)  # type: ignore[arg-type]


def test_a_cell_that_depends_on_no_leaf_is_measured() -> None:
    found = diagnose(ImplicitLayer(lambda z, x: 0.5 * z + 1), torch.ones(3, 4), rounds=0, num_starts=0)
    assert found.precision.share.isnan().all()
    assert "off by" not in found.summary()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("wanted", [False, True])
def test_nested_inputs_are_measured(wanted: bool) -> None:
    parts = torch.nested.nested_tensor([torch.ones(2), torch.ones(4)], requires_grad=wanted)
    layer = ImplicitLayer(
        lambda z, x: torch.tanh(0.3 * z + x.to_padded_tensor(0.0, (2, 4))), init=lambda x: torch.zeros(2, 4)
    )
    found = diagnose(layer, parts, rounds=0, num_starts=0)
    assert found.gradients[0].input_cosine == (pytest.approx(1) if wanted else None)


# Absolute tolerances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Stopping(rtol=0, atol=1.0), Stopping(rtol=0.01, atol=1.0)])
def test_an_absolute_tolerance_is_told_and_tightened(rule: Stopping) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 4, bias=False)
    nn.init.orthogonal_(linear.weight, gain=0.95)
    layer = ImplicitLayer(lambda z, x: linear(z) + x, stopping=rule, solver=Picard())
    found = diagnose(layer, torch.randn(3, 4), rounds=0, num_starts=0)
    assert not any("no fixed point" in note for note in found.notes)
    text = " ".join(found.summary().split())
    assert "absolute residual 1e+00 within 50 steps" in text
    assert "0e+00" not in text
    assert f"Stopping(rtol={'0' if rule.rtol == 0 else '1e-0'}" in text
    assert "atol=1e-0" in text
    found.plot()
    ablate(layer, torch.randn(3, 4), rounds=1, solvers=[Picard()], backwards=[]).plot()
