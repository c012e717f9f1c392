"""Data sets of the Hugging Face hub as a source of images, from folders that its package reads."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from viar.data import HubImages, ImageFolder, load_data

NAMES = ["cat", "dog"]


def test_without_its_package_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"source: hub:ylecun/mnist: .*pip install 'deqlib\[hub\]'"):
        load_data("hub:ylecun/mnist", 8)


@pytest.fixture(scope="module")
def datasets() -> Any:
    return pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet(request: pytest.FixtureRequest) -> None:
    if "datasets" in request.fixturenames:
        request.getfixturevalue("datasets").disable_progress_bars()


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (12, 20, 3), dtype=np.uint8)) for _ in range(count)]


def table(datasets: Any, labels: list[Any], kind: Any = None, **columns: Any) -> Any:
    """Pictures with labels, and other columns: their kind and values."""
    kind = kind or datasets.ClassLabel(names=NAMES)
    values = {"image": pictures(len(labels)), "label": labels}
    kinds = {"image": datasets.Image(), "label": kind}
    for name, (own, some) in columns.items():
        kinds[name], values[name] = own, some
    wanted = {name: some for name, some in values.items() if some is not None}
    features = datasets.Features({name: kinds[name] for name in wanted})
    return datasets.Dataset.from_dict(wanted, features=features)


def test_pictures_are_served_as_those_of_a_folder(datasets: Any, tmp_path: Path) -> None:
    table(datasets, [i % 2 for i in range(30)]).save_to_disk(str(tmp_path / "saved"))
    files = [(tmp_path / f"{i:02d}.png", i % 2) for i in range(30)]
    for (path, _), picture in zip(files, pictures(30), strict=True):
        picture.save(path)
    data = load_data(f"hub:{tmp_path / 'saved'}", 8)
    assert (data.num_classes, data.class_names) == (2, ("cat", "dog"))
    assert (len(data.train), len(data.validation)) == (26, 4)
    assert isinstance(data.train, HubImages)
    assert isinstance(data.validation, HubImages)
    rows = [row for row, _ in data.train.rows + data.validation.rows]
    assert sorted(rows) == list(range(30))
    for part, train in ((data.train, True), (data.validation, False)):
        folder = ImageFolder([files[row] for row, _ in part.rows], 8, train=train)
        for one in (part, pickle.loads(pickle.dumps(part))):
            torch.manual_seed(3)
            images, labels = one.__getitems__(range(len(part)))
            torch.manual_seed(3)
            wanted, classes = folder.__getitems__(range(len(part)))
            assert images.equal(wanted)
            assert labels.equal(classes)
    assert "2 classes, 26 pictures to learn from, 4 held out" in " ".join(str(data.report).split())


def test_splits_say_what_is_held_out_and_rows_without_a_label_are_told(datasets: Any, tmp_path: Path) -> None:
    splits = {
        "train": table(datasets, [0, 1, 0, -1]),
        "test": table(datasets, [-1, -1]),
        "validation": table(datasets, [1, 0]),
        "extra": table(datasets, [0]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path))
    data = load_data(f"hub:{tmp_path}", 8)
    assert (len(data.train), len(data.validation)) == (3, 2)
    assert data.validation.__getitems__([0, 1])[1].tolist() == [1, 0]
    text = str(data.report)
    assert "the split extra is not used" in text
    assert "the split validation is held out" in text
    assert "1 without a label: train/3" in text
    del splits["validation"]
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    assert len(load_data(f"hub:{tmp_path / 'two'}", 8).validation) == 1  # test has no labels: one of train


def test_a_folder_that_load_dataset_reads_and_names_in_place_of_class_labels(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    labels = ["b", "a", "b", "a", "a"]
    table(datasets, labels, datasets.Value("string")).to_parquet(str(tmp_path / "a" / "train.parquet"))
    data = load_data(f"hub:{tmp_path / 'a'}", 8, augmentations=("flip", "crop"))
    assert data.class_names == ("a", "b")
    assert (len(data.train), len(data.validation)) == (3, 2)
    assert data.train.augmentations == ("crop", "flip")  # type: ignore[attr-defined]
    assert data.train.__getitems__([0, 2])[0].shape == (2, 3, 8, 8)
    assert not load_data(f"hub:{tmp_path / 'a'}", 8, augmentations=()).train.at_random  # type: ignore[attr-defined]


def test_what_cannot_be_told_is_refused_by_name(datasets: Any, tmp_path: Path) -> None:
    number = datasets.Value("int64")
    cases = {
        "one column of pictures among": table(datasets, [0], image=(datasets.Image(), None)),
        "no column of class labels": table(datasets, [0], label=(number, None)),
        "no split called train among test": datasets.DatasetDict(test=table(datasets, [0])),
        "the class 7 has no pictures in the split train": datasets.DatasetDict(
            train=table(datasets, [3, 4], number), test=table(datasets, [7], number)
        ),
        "expected classes as numbers or names": table(datasets, [0.5], datasets.Value("float32")),
    }
    for index, (message, found) in enumerate(cases.items()):
        found.save_to_disk(str(tmp_path / str(index)))
        with pytest.raises(ValueError, match=f"source: hub:.*{message}"):
            load_data(f"hub:{tmp_path / str(index)}", 8)
    with pytest.raises(ValueError, match=r"source: hub:.*nowhere: cannot be had"):
        load_data(f"hub:{tmp_path / 'nowhere'}", 8)


def test_which_of_several_labels_is_used_is_told(datasets: Any, tmp_path: Path) -> None:
    fine, coarse = datasets.ClassLabel(names=["x", "y"]), datasets.ClassLabel(names=["z"])
    columns = {"label": (fine, None), "fine": (fine, [1, 0]), "coarse": (coarse, [0, 0])}
    table(datasets, [0, 0], **columns).save_to_disk(str(tmp_path))
    data = load_data(f"hub:{tmp_path}", 8)
    assert data.class_names == ("x", "y")
    assert "labels are those of fine; not used: coarse" in str(data.report)


def test_a_broken_picture_is_named_with_its_row(datasets: Any, tmp_path: Path) -> None:
    found = table(datasets, [0, 1, 1])
    stored = found.cast_column("image", datasets.Image(decode=False))
    broken = [dict(one, bytes=one["bytes"][:60]) for one in stored["image"]]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": found.features["label"]})
    spoilt = datasets.Dataset.from_dict({"image": broken, "label": found["label"]}, features=features)
    spoilt.save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"train, row 0: is broken"):
        load_data(f"hub:{tmp_path}", 8).train.__getitems__([0])
