"""Folders of pictures: what is a class, what is held out, and that everything else is said."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len

from viar.data import FolderReport, ImageFolder, load_data
from viar.data.dataset import ImageData
from viar.data.report import Skipped


def put(root: Path, *names: str, shade: int = 0) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(path)


def load(root: Path) -> ImageData:
    return load_data(str(root), 8)


def files(data: Any, root: Path) -> dict[str, int]:
    assert isinstance(data, ImageFolder)
    return {str(path.relative_to(root)): label for path, label in data.files}


def report_of(root: Path) -> FolderReport:
    report = load(root).report
    assert report is not None
    return report


def reasons(root: Path) -> dict[str, str]:
    return {str(one.path): one.reason for one in report_of(root).skipped}


def series(folder: str, count: int) -> list[str]:
    return [f"{folder}/{index:02}.png" for index in range(count)]


# train/, val/ and test/


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "test"])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_train_and_val_are_used_as_such(train: str, val: str, tmp_path: Path) -> None:
    put(tmp_path, *series(f"{train}/cat", 4), *series(f"{train}/dog/old", 3), *series(f"{val}/dog", 2))
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert files(data.train, tmp_path) == dict.fromkeys(series(f"{train}/cat", 4), 0) | dict.fromkeys(
        series(f"{train}/dog/old", 3), 1
    )
    assert files(data.validation, tmp_path) == dict.fromkeys(series(f"{val}/dog", 2), 1)
    report = report_of(tmp_path)
    assert (report.train_counts, report.validation_counts) == ((4, 3), (0, 2))
    assert report.notes == (f"{val}/ has no pictures of 1 classes: cat", f"{val}/ is held out")


def test_test_is_left_out_beside_val(tmp_path: Path) -> None:
    put(tmp_path, *series("train/a", 4), *series("val/a", 2), *series("test/a", 3), *series("test", 1))
    data = load(tmp_path)
    assert (len(data.train), len(data.validation)) == (4, 2)
    left_out = reasons(tmp_path)
    assert set(left_out) == {*series("test/a", 3), *series("test", 1)}
    assert set(left_out.values()) == {"in test/, which is not used beside val/"}


def test_a_train_alone_is_split_like_a_folder_of_classes(tmp_path: Path) -> None:
    put(tmp_path, *series("train/a", 12), *series("train/b", 5), *series("test", 2))
    (tmp_path / "val").mkdir()
    data = load(tmp_path)
    assert (len(data.train), len(data.validation), data.class_names) == (10 + 4, 2 + 1, ("a", "b"))
    notes = report_of(tmp_path).notes
    assert any("test/ has no class folders: some of train/ are held out" in note for note in notes)
    assert reasons(tmp_path)["test/00.png"] == "in no class folder"
    assert reasons(tmp_path)["val"] == "without a picture in it, so no class"


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        (
            ["train/a/1.png", "val/b/1.png"],
            "val/ has the class 'b', which has no pictures in train/; the classes",
        ),
        (["train/Cat/1.png", "val/cat/1.png"], "val/ has the class 'cat', .* in train/; it has 'Cat'; the"),
        (["train/1.png", "val/1.png"], "pictures lie directly in train/; put those of each class into a sub"),
        (["train/1.png"], "pictures lie directly in train/"),
        (
            ["train/a/1.png", "val/1.png"],
            "pictures lie directly in val/; put them into sub-folders named like",
        ),
        (["val/a/1.png"], "no pictures in train/, but in val/; give the folder in which the classes lie"),
        (
            ["train/a/1.png", "val/a/1.png", "other/1.png"],
            "other/ lies beside train/ and is none of train/, val/",
        ),
        (
            ["train/a/1.png", "val/a/1.png", "validation/a/1.png"],
            "val/ and validation/ are both val/; leave one",
        ),
        (["1.png", "2.png"], r"pictures lie directly in it \(2\); put those of each class into a sub-folder"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(pictures: list[str], words: str, tmp_path: Path) -> None:
    put(tmp_path, *pictures)
    with pytest.raises(ValueError, match=rf"source: expected one of .*, got {tmp_path}.*: {words}"):
        load(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, *series("bus", 3), *series("train", 3), *series("val", 3))
    data = load(tmp_path)
    assert data.class_names == ("bus", "train", "val")
    assert report_of(tmp_path).notes == (
        "train/ is taken as a class, for it lies beside bus/",
        "val/ is taken as a class, for it lies beside bus/",
    )


# What is left out


def test_hidden_empty_and_foreign_things_are_left_out_with_a_word(tmp_path: Path) -> None:
    put(tmp_path, *series("cat", 12), *series("dog", 12), "cat/deep/er/x.png", "stray.png")
    put(tmp_path, "cat/.hidden.png", ".ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", "dog/._00.png")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    for name in ("Thumbs.db", "dog/desktop.ini", "dog/.DS_Store", "dog/a.JXL", "dog/README", "cat/zero.png"):
        (tmp_path / name).touch()
    (tmp_path / "cat" / "text.jpg").write_text("no picture")
    (tmp_path / "cat" / "link.png").symlink_to("gone.png")
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    (tmp_path / "dog" / "again.png").symlink_to("00.png")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog")
    served = files(data.train, tmp_path) | files(data.validation, tmp_path)
    assert served == dict.fromkeys([*series("cat", 12), "cat/deep/er/x.png"], 0) | dict.fromkeys(
        [*series("dog", 12), "dog/again.png"], 1
    )
    found = reasons(tmp_path)
    hidden = {name for name, reason in found.items() if reason == "hidden or left behind by a program"}
    assert hidden == {
        "cat/.hidden.png",
        ".ipynb_checkpoints",
        "__MACOSX",
        "dog/._00.png",
        "Thumbs.db",
        "dog/desktop.ini",
        "dog/.DS_Store",
    }
    others = {name: reason for name, reason in found.items() if name not in hidden}
    expected = {
        "cat/link.png": "a link to gone.png, which is not there",
        "cat/loop": "a link to a folder that it lies in",
        "cat/text.jpg": "is no picture that can be read",
        "cat/zero.png": "an empty file is no picture",
        "dog/README": "without an ending, which is not read",
        "dog/a.JXL": "with the ending .jxl, which is not read",
        "dog/pipe.png": "no regular file",
        "empty": "without a picture in it, so no class",
        "stray.png": "in no class folder",
    }
    assert others.keys() == expected.keys()
    for name, words in expected.items():
        assert words in others[name]


def test_every_kind_that_is_read_counts_whatever_case_its_ending_has(tmp_path: Path) -> None:
    for ending in ("tif", "TIFF", "gif", "webp", "jfif", "Jpg", "ppm", "pgm", "bmp", "png", "avif"):
        name = f"a.{ending}"
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "a" / name)
    data = load(tmp_path)
    assert len(data.train) + len(data.validation) == 11
    assert report_of(tmp_path).skipped == ()


def test_the_only_picture_of_a_class_is_learnt_from(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "b/0.png", "c/0.png")
    data = load(tmp_path)
    assert (len(data.train), len(data.validation)) == (3, 0)
    assert report_of(tmp_path).notes == ("nothing is held out, for no class has more than one picture",)
    put(tmp_path, "c/1.png")
    assert [len(part) for part in (load(tmp_path).train, load(tmp_path).validation)] == [3, 1]


def test_frames_are_counted(tmp_path: Path) -> None:
    put(tmp_path, *series("a", 3))
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "a" / "b.gif", save_all=True, append_images=frames[1:])
    assert report_of(tmp_path).notes == ("1 with several frames or pages: the first of each is used",)


def test_names_that_differ_in_case_only_are_said(tmp_path: Path) -> None:
    put(tmp_path, *series("Cat", 2), *series("cat", 2))
    assert load(tmp_path).class_names == ("Cat", "cat")
    assert "Cat, cat differ in case only and are 2 classes" in report_of(tmp_path).notes


def test_accents_are_one_name_however_a_file_system_spells_them(tmp_path: Path) -> None:
    together, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    put(tmp_path, *series(f"train/{apart}", 2), *series(f"val/{together}", 1), *series("train/cafz", 1))
    assert load(tmp_path).class_names == (together, "cafz") or load(tmp_path).class_names == (
        "cafz",
        together,
    )
    assert report_of(tmp_path).validation_counts == tuple(
        int(name == together) for name in load(tmp_path).class_names
    )
    put(tmp_path, *series(f"train/{together}", 1))
    with pytest.raises(ValueError, match=r"two folders are called .* rename one"):
        load(tmp_path)


def test_the_order_is_that_of_names_and_not_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, *series("b", 12), *series("a", 12), *series("\u00e4 \u00f6", 3))
    forward, listed = load(tmp_path), os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listed(folder))[::-1])
    backward = load(tmp_path)
    for one, other in ((forward.train, backward.train), (forward.validation, backward.validation)):
        assert list(files(one, tmp_path).items()) == list(files(other, tmp_path).items())
    assert forward.report == backward.report


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "which is not there"),
        ("file.txt", "which is no folder"),
        ("foreign", "found 2 with the ending .jxl"),
    ],
)
def test_a_source_that_has_no_pictures_says_what_it_has(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "foreign" / "a").mkdir(parents=True)
    for index in range(2):
        (tmp_path / "foreign" / "a" / f"{index}.jxl").touch()
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ValueError, match="got '', which is not there"):
        load_data("", 8)


def test_folders_that_must_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *series("a", 3), *series("shut", 3))
    listed = os.listdir
    shut = tmp_path / "shut"

    def refusing(folder: Path) -> list[str]:
        if folder == shut:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refusing)
    assert load(tmp_path).class_names == ("a",)
    assert reasons(tmp_path)["shut"] == "cannot be opened (Permission denied)"
    shut = tmp_path
    with pytest.raises(PermissionError, match=f"{tmp_path}: Permission denied"):
        load(tmp_path)


def test_a_file_that_breaks_while_training_is_named(tmp_path: Path) -> None:
    put(tmp_path, *series("a", 20))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(
        tmp_path / "a" / "bad.jpg"
    )
    whole = (tmp_path / "a" / "bad.jpg").read_bytes()
    (tmp_path / "a" / "bad.jpg").write_bytes(whole[:1500])  # its header is as it was
    data = load(tmp_path)
    assert len(data.train) + len(data.validation) == 21
    assert isinstance(data.train, ImageFolder)
    part = data.train if tmp_path / "a" / "bad.jpg" in dict(data.train.files) else data.validation
    with pytest.raises(ValueError, match=r"bad.jpg: is broken \(image file is truncated.*\); mend or remove"):
        part.__getitems__(range(len(part)))


# The report


def test_the_report_reads_well(tmp_path: Path) -> None:
    put(tmp_path, *series("cat", 12), *series("dog", 5))
    for index in range(5):
        (tmp_path / "cat" / f"note {index}.txt").touch()
    (tmp_path / "dog" / "bad.png").touch()
    text = str(report_of(tmp_path)).removeprefix(f"{tmp_path}: ")
    assert " ".join(text.split()) == (
        "2 classes, 14 pictures to learn from, 3 held out classes: cat 10 + 2, dog 4 + 1 left out: 6 "
        "5 with the ending .txt, which is not read: cat/note 0.txt, cat/note 1.txt, cat/note 2.txt and 2 "
        "more 1 an empty file is no picture that can be read; save it again: dog/bad.png"
    )


@given(
    names=st.lists(st.text(min_size=1, max_size=150), min_size=1, max_size=30),
    reason=st.text(min_size=1, max_size=300),
)
def test_the_report_is_narrow_and_can_be_printed_whatever_things_are_called(
    names: list[str], reason: str
) -> None:
    counts = tuple(range(1, len(names) + 1))
    skipped = tuple(Skipped(Path(name.replace("\0", "x") or "x"), reason) for name in names)
    text = str(FolderReport(Path("r" * 150), tuple(names), counts, counts, skipped, (reason,)))
    assert max(map(cell_len, text.split("\n"))) <= 100
    assert "\r" not in text
    text.encode()


def test_file_names_that_are_no_text_can_be_printed(tmp_path: Path) -> None:
    put(tmp_path, *series("a", 3))
    for name in (b"\xff\xfe.png", b"new\nline.txt", b"\x1b[31mred.gif"):
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/" + name)).touch()
    text = str(report_of(tmp_path))
    text.encode()
    assert r"\udcff\udcfe.png" in text
    assert r"new\nline.txt" in text
    assert "\x1b" not in text


# The law: nothing is silent

FOLDERS = ("", "a", "b c", "\u00e9", ".x", "a/deep", "train", "train/a", "train/b", "val", "val/a", "test")
THINGS = ("picture", "broken", "empty", "hidden", "foreign", "link to nothing", "folder")


@given(
    tree=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "a",
                    "b c",
                    "\u00e9",
                    ".x",
                    "train",
                    "val",
                    "test",
                    "a/deep",
                    "train/a",
                    "train/b",
                    "val/a",
                    "",
                ]
            ),
            st.sampled_from(THINGS),
        ),
        max_size=14,
    )
)
def test_every_file_is_served_with_its_label_or_is_in_the_report(
    tree: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    shades: dict[Path, int] = {}
    written: set[Path] = set()
    for index, (folder, thing) in enumerate(tree):
        (root / folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{index}.png"
        if thing == "picture":
            put(root, str(path), shade=10 * index)
            shades[path] = 10 * index
        elif thing == "broken":
            (root / path).write_bytes(b"\x89PNG\r\n\x1a\nxx")
        elif thing == "empty":
            (root / path).touch()
        elif thing == "hidden":
            path = path.with_name(f".{path.name}")
            put(root, str(path))
        elif thing == "foreign":
            path = path.with_suffix(".xyz")
            (root / path).touch()
        elif thing == "link to nothing":
            (root / path).symlink_to("gone")
        else:
            (root / path).mkdir()
            continue
        written.add(path)
    try:
        data = load_data(str(root), 8)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert str(root) in refused
        in_parts = any(path.parts[0] in ("train", "val", "test") for path in shades)
        in_classes = any(len(path.parts) > 1 and not path.parts[0].startswith(".") for path in shades)
        assert in_parts or not in_classes
        return
    assert data.report is not None
    served: dict[Path, int] = {}
    for part in (data.train, data.validation):
        images, labels = part.__getitems__(range(len(part))) if len(part) else ([], [])
        for image, label, (path, _) in zip(images, labels, part.files, strict=True):
            served[path.relative_to(root)] = int(label)
            assert ((image + 1) * 127.5 - shades[path.relative_to(root)]).abs().max() < 0.6
            assert data.class_names[int(label)] in path.relative_to(root).parts[:2]
    said = {one.path for one in data.report.skipped}
    assert all(one.reason for one in data.report.skipped)
    for path in written:
        assert (path in served) != any(above in said for above in (path, *path.parents)), path
    assert len(served) == sum(data.report.train_counts) + sum(data.report.validation_counts)
