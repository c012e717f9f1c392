"""Tokens on disk: what is in the files, that they are the same whatever happens, and training from them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ending_images import Ending
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_cli import call
from test_train import Interrupted, assert_same, fresh_transformer, pictures, settings
from tiny_models import tiny_config, tiny_tokenizer, tiny_transformer, uniform

import viar.commands.cli
import viar.data.shard_writer
import viar.data.shards
from viar import NextScaleTransformer, Tokenizer
from viar.data import (
    AugmentedImages,
    Batch,
    ImageData,
    ImageFolder,
    TokenizedImages,
    TokenShards,
    from_rows,
    is_shards,
    load_data,
    rows_of,
    tokenize,
    write_shards,
)
from viar.training import train_transformer
from viar.training.settings import describe_data

PATIENCE = 120.0  # seconds after which a process is taken to hang


class Cropped:
    """Images cut at random by PyTorch's own generator, as those of a folder are."""

    def __init__(self, count: int) -> None:
        self.images, self.labels = uniform(count, 3, 9, 9) * 2 - 1, torch.arange(count) % 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Any) -> Batch:
        cut = []
        for index in indices:
            top, left = (int(torch.randint(4, ())) for _ in range(2))
            cut.append(self.images[index, :, top : top + 6, left : left + 6])
        return torch.stack(cut), self.labels[torch.as_tensor(indices)]


def data(count: int = 23, held: int = 5) -> ImageData:
    return ImageData(Cropped(count), pictures(held), 3)


def write(folder: Path, images: ImageData | None = None, **changes: Any) -> Any:
    given = {"origin": {"data": "here"}, "shard_size": 10, "batch_size": 4, **changes}
    return write_shards(tiny_tokenizer(), data() if images is None else images, folder, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is in a folder


def test_rows_are_the_tokens_of_seeded_crops_in_order(tmp_path: Path) -> None:
    report = write(tmp_path, crops=2, seed=3)
    assert (report.rows, report.made, report.found) == ((46, 5), 6, 0)
    names = [*(f"train-{i:05d}" for i in range(5)), "validation-00000"]
    assert set(files(tmp_path)) == {"shards.json", *(f"{n}.{e}" for n in names for e in ("npy", "sha256"))}
    rows, images, tokenizer = TokenShards(tmp_path), Cropped(23), tiny_tokenizer()
    assert len(rows) == 46
    tokens, labels = rows.__getitems__(range(46))
    assert (tokens.shape, tokens.dtype, labels.dtype) == ((46, 14), torch.int64, torch.int64)
    for row in range(46):
        torch.manual_seed(3 * 1_000_003 + row)
        image, label = images.__getitems__([row % 23])
        assert tokens[row].equal(torch.cat(tokenizer.encode(image), 1)[0])
        assert labels[row] == label
    assert not tokens[:23].equal(tokens[23:])  # other crops
    held, _ = TokenShards(tmp_path, "validation").__getitems__(range(5))
    assert held.equal(torch.cat(tokenizer.encode(pictures(5).images), 1))


@given(st.lists(st.integers(-23, 22), min_size=1, max_size=30))
def test_any_rows_come_in_the_order_asked_for(indices: list[int]) -> None:
    rows = test_any_rows_come_in_the_order_asked_for.rows
    everything, labels = rows.__getitems__(range(23))
    some, own = rows.__getitems__(indices)
    assert some.equal(everything[indices])
    assert own.equal(labels[indices])


@pytest.fixture(autouse=True, scope="module")
def _rows(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rows")
    write(folder)
    test_any_rows_come_in_the_order_asked_for.rows = TokenShards(folder)


@pytest.mark.parametrize(("codes", "dtype"), [(16, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_a_token_takes_no_more_bytes_than_it_needs(codes: int, dtype: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(codebook_size=codes)
    with torch.no_grad():  # the last code is one of those that are chosen
        tokenizer.quantizer.codebook.weight[: codes - 8] += 100
    images = ImageData(pictures(6), pictures(2), 3)
    write_shards(tokenizer, images, tmp_path, origin={})
    table = np.load(tmp_path / "train-00000.npy")
    assert table.dtype["tokens"].base == dtype
    tokens, _ = TokenShards(tmp_path).__getitems__(range(6))
    assert tokens.equal(torch.cat(tokenizer.encode(pictures(6).images), 1))
    assert int(tokens.max()) >= codes - 8


def test_writing_neither_reads_nor_moves_the_global_generator(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        write_shards(tokenizer, data(), tmp_path / name, origin={})
        assert torch.get_rng_state().equal(before)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_pickle_of_rows_holds_names_and_not_numbers(tmp_path: Path) -> None:
    write(tmp_path, shard_size=1000)
    rows = TokenShards(tmp_path)
    size = len(pickle.dumps(rows))
    expected = rows.__getitems__([3, 1])
    assert len(pickle.dumps(rows)) == size
    twin = pickle.loads(pickle.dumps(rows))
    assert all(a.equal(b) for a, b in zip(twin.__getitems__([3, 1]), expected, strict=True))


# Going on


@pytest.mark.parametrize("calls", [1, 2, 5, 9, 13])
def test_an_interrupted_folder_goes_on_to_the_same_bytes(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole", crops=2)
    replacing, begun = viar.data.shard_writer.replacing, []

    def interrupting(path: Path, **settings: Any) -> Any:
        begun.append(path)
        if len(begun) == calls:
            raise Interrupted
        return replacing(path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(viar.data.shard_writer, "replacing", interrupting)
        with pytest.raises(Interrupted):
            write(tmp_path / "parts", crops=2)
    if calls > 1:
        with pytest.raises(ValueError, match=r"files of the (train|validation) split are missing or damaged"):
            TokenShards(tmp_path / "parts"), TokenShards(tmp_path / "parts", "validation")
    report = write(tmp_path / "parts", crops=2)
    assert report.made + report.found == 6
    assert report.found == max(0, (calls - 2) // 2)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_damaged_file_is_named_and_made_again(tmp_path: Path) -> None:
    write(tmp_path)
    whole = files(tmp_path)
    for spoil in (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".sha256").unlink(),
        lambda path: path.with_suffix(".sha256").write_text("0" * 64),
    ):
        spoil(tmp_path / "train-00001.npy")
        with pytest.raises(ValueError, match=r"1 of the 3 files .* the first of them train-00001.npy"):
            TokenShards(tmp_path).verify()
        assert write(tmp_path).made == 1
        assert files(tmp_path) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"crops": 2}, "crops: 1 there, 2 now"),
        ({"shard_size": 11}, "shard_size: 10 there, 11 now"),
        ({"batch_size": 5}, "batch_size: 4 there, 5 now"),
        ({"origin": {"data": "there"}}, "origin: {'data': 'here'} there, {'data': 'there'} now"),
        ({"images": data(22)}, "images: .23, 5. there, .22, 5. now"),
    ],
)
def test_a_folder_of_other_settings_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **changes)
    assert files(tmp_path) == before


def test_a_folder_of_another_tokenizer_or_of_something_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"made with other settings.*tokenizer: "):
        write_shards(
            tiny_tokenizer(1),
            data(),
            tmp_path / "tokens",
            origin={"data": "here"},
            shard_size=10,
            batch_size=4,
        )
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder for the tokens, found a file"):
        write(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(ValueError, match="holds something else than tokens"):
        write(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "sides": 3}'])
def test_settings_that_cannot_be_read_are_named(text: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "shards.json").write_text(text)
    for work in (lambda: TokenShards(tmp_path), lambda: write(tmp_path)):
        with pytest.raises(ValueError, match=r"shards.json: unreadable"):
            work()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops": 0}, "crops must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"rank": 2, "num_ranks": 2}, r"expected a rank in \[0, 2\), got 2"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        (
            {"crops": 2, "images": ImageData(pictures(), pictures(), 3)},
            "crops: expected 1 for images that are the same whenever they are drawn, got 2; name aug",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


# Several processes


def test_ranks_make_files_of_their_own_and_together_the_same(tmp_path: Path) -> None:
    write(tmp_path / "whole", crops=2)
    for rank in (2, 0, 1):
        report = write(tmp_path / "parts", crops=2, rank=rank, num_ranks=3)
        assert (report.made, report.found) == (2, 0)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    report = write(tmp_path / "parts", crops=2, rank=1, num_ranks=3)
    assert (report.rows, report.made, report.found) == ((46, 5), 0, 2)


class Ends:
    """Both ends of a pipe, of which another process has one."""

    def __init__(self, *, broken: bool = False) -> None:
        self.told, self.broken = list[Any](), broken

    def send(self, thing: Any) -> None:
        if self.broken:
            raise BrokenPipeError
        self.told.append(thing)


def test_what_a_process_does_is_make_its_files_and_tell_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viar.data.shard_writer.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    write(tmp_path / "whole")
    write(tmp_path / "parts", rank=1, num_ranks=4)
    found = TokenShards(tmp_path / "whole").settings
    shards = [("train", name, rows) for name, rows in found.shards("train")]
    work = viar.data.shard_writer._Work(tiny_tokenizer(), data(), tmp_path / "parts", found)
    told = Ends()
    viar.data.shard_writer._make_apart(told, work, shards[::2], torch.device("cpu"))  # type: ignore[arg-type]
    assert told.told == ["file", "file", "done"]
    write(tmp_path / "parts", rank=3, num_ranks=4)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    told = Ends(broken=True)  # whom it would tell was killed: it ends after the file that it is at
    (tmp_path / "parts" / "train-00002.npy").unlink()
    (tmp_path / "parts" / "train-00000.npy").unlink()
    viar.data.shard_writer._make_apart(told, work, shards[::2], torch.device("cpu"))  # type: ignore[arg-type]
    assert [path.name for path in sorted(tmp_path.glob("parts/train*.npy"))] == [
        "train-00000.npy",
        "train-00001.npy",
    ]
    told, broken = Ends(), dataclasses.replace(work, folder=tmp_path / "nowhere")
    viar.data.shard_writer._make_apart(told, broken, shards[:1], torch.device("cpu"))  # type: ignore[arg-type]
    assert isinstance(told.told[0], FileNotFoundError)


@pytest.mark.slow
def test_processes_make_the_same_bytes_as_one(tmp_path: Path) -> None:
    images = ImageData(AugmentedImages(pictures(30), ["rotate"]), pictures(5), 3)
    reports = [write(tmp_path / str(n), images, crops=2, processes=n) for n in (1, 2)]
    assert reports[0] == reports[1]
    assert files(tmp_path / "1") == files(tmp_path / "2")


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_told_where_it_was_started(tmp_path: Path) -> None:
    missing = ImageFolder([(tmp_path / f"{n}.png", 0) for n in range(30)], 6, train=False)
    with pytest.raises(FileNotFoundError, match=r"0.png: no such file"):
        write(tmp_path / "a", ImageData(missing, missing, 3), processes=2)
    with pytest.raises(BrokenProcessPool, match="ended before its work did"):
        write(tmp_path / "b", ImageData(Ending(30), pictures(5), 3), processes=2)


def test_files_half_written_by_killed_processes_are_tidied_up_by_whom_they_belong_to(tmp_path: Path) -> None:
    names = ["shards.json", *(f"train-0000{n}.{ending}" for n in range(3) for ending in ("npy", "sha256"))]
    tmp_path.joinpath("diary.txt.partial").touch()
    for name in names:
        tmp_path.joinpath(f"{name}.elsewhere-7.partial").touch()
    write(tmp_path, rank=1, num_ranks=4)  # of four files the second
    left = {path.name.partition(".elsewhere")[0] for path in tmp_path.glob("*.elsewhere-7.partial")}
    assert left == {name for name in names if "00001" not in name}
    write(tmp_path)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["diary.txt.partial"]


# Opening


def test_opening_reads_no_rows_and_reading_maps_the_files_that_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    mapped, memmap = list[str](), np.memmap
    monkeypatch.setattr(np, "memmap", lambda path, *how: mapped.append(path.name) or memmap(path, *how))
    monkeypatch.setattr(viar.data.shards, "file_digest", None)  # it would be called in vain
    rows = TokenShards(tmp_path)
    assert not mapped
    rows.__getitems__([21, 20, 22])
    assert mapped == ["train-00002.npy"]
    rows.__getitems__([3, 20])
    assert mapped == ["train-00002.npy", "train-00000.npy"]


def test_each_rank_verifies_files_of_its_own(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    rows = TokenShards(tmp_path)
    rows.verify(0, 2)
    for rank, num_ranks in ((1, 2), (0, 1)):
        with pytest.raises(ValueError, match=r"1 of the 3 files .* the first of them train-00001.npy"):
            rows.verify(rank, num_ranks)
    with pytest.raises(ValueError, match=r"missing or damaged, the first of them train-00001.npy"):
        train_transformer(fresh_transformer(), tiny_tokenizer(), rows, tmp_path / "run", settings())


def test_a_folder_of_an_earlier_release_is_read_and_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path)
    told = tmp_path / "shards.json"
    found = json.loads(told.read_text())
    assert (found.pop("class_names"), found.pop("augmentations")) == ([], [])
    found.pop("sha256")
    told.write_text(json.dumps(found))
    assert len(TokenShards(tmp_path)) == 23
    (tmp_path / "train-00001.npy").unlink()
    named = dataclasses.replace(data(), class_names=("a", "b", "c"))
    assert write(tmp_path, named).made == 1
    assert json.loads(told.read_text()) == found
    changed = ImageData(AugmentedImages(Cropped(23), ["flip"]), pictures(5), 3)
    with pytest.raises(ValueError, match=r"augmentations: \[\] there, \['flip'\] now"):
        write(tmp_path, changed)


def test_what_images_went_through_and_what_classes_are_called_is_kept(tmp_path: Path) -> None:
    images = AugmentedImages(pictures(9), ["flip", "shift"])
    write(tmp_path, ImageData(images, pictures(5), 3, ("cat", "dog", "owl")), crops=3, seed=5)
    rows = TokenShards(tmp_path)
    assert rows.settings.class_names == ("cat", "dog", "owl")
    assert rows.settings.augmentations == ("shift", "flip")
    assert describe_data(rows)["augmentations"] == ("shift", "flip")
    tokens, labels = rows.__getitems__(range(27))
    for row in range(27):
        image, label = rows_of(images, [row], 5)
        assert tokens[row].equal(torch.cat(tiny_tokenizer().encode(image), 1)[0])
        assert labels[row] == label
    other = ImageData(AugmentedImages(pictures(9), ["shift"]), pictures(5), 3, ("cat", "dog", "owl"))
    with pytest.raises(ValueError, match=r"augmentations: \['shift', 'flip'\] there, \['shift'\] now"):
        write(tmp_path, other, crops=3, seed=5)


# Training


def test_training_from_rows_is_training_from_the_images_bit_for_bit(tmp_path: Path) -> None:
    tokenizer, images = tiny_tokenizer(), pictures()
    write(tmp_path / "tokens", ImageData(images, pictures(3), 3))
    rows = TokenShards(tmp_path / "tokens")
    models = []
    for name, source in (("images", images), ("rows", rows)):
        model = fresh_transformer()
        train_transformer(model, tokenizer, source, tmp_path / name, settings(workers=int(name == "rows")))
        models.append(model)
    assert_same(*models)


def test_a_batch_of_rows_is_the_batch_of_its_images(tmp_path: Path) -> None:
    tokenizer, images = tiny_tokenizer(), pictures()
    write(tmp_path, ImageData(images, pictures(3), 3))
    made = from_rows(tokenizer, *TokenShards(tmp_path).__getitems__([4, 2]))
    for a, b in zip(made, TokenizedImages(tokenizer, images).__getitems__([4, 2]), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"codes in \[0, 16\)"):
        from_rows(tokenizer, torch.full((1, 14), 16), torch.zeros(1))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"seed": 1}, "its fingerprint is [0-9a-f]{32}, theirs [0-9a-f]{32}"),
        ({"codebook_size": 32}, "its codebook_size is 32, theirs 16"),
        ({"sides": (1, 3)}, r"its sides is \(1, 3\), theirs \(1, 2, 3\)"),
    ],
)
def test_tokens_of_another_tokenizer_are_refused_before_training(
    tokenizer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "tokens")
    own = tiny_tokenizer(**tokenizer)
    sizes = {name: value for name, value in tokenizer.items() if name != "seed"}
    model = NextScaleTransformer(tiny_config(**sizes))
    with pytest.raises(ValueError, match=f"tokens of another tokenizer .{message}"):
        train_transformer(model, own, TokenShards(tmp_path / "tokens"), tmp_path / "run", settings())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_tokens_of_another_number_of_classes_are_refused(num_classes: int, tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    model = tiny_transformer(num_classes=num_classes)
    with pytest.raises(ValueError, match=f"tokens of 3 classes, the model has {num_classes}"):
        train_transformer(
            model, tiny_tokenizer(), TokenShards(tmp_path / "tokens"), tmp_path / "run", settings()
        )


# The command


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a `tokenizer`, hardly trained, and `pictures` of three classes."""
    folder = tmp_path_factory.mktemp("saved")
    short = ("--train.steps", 2, "--train.batch-size", 16, "--augment", 0)
    code, _, errors = call("train-tokenizer", "digits", "--out", folder / "tokenizer", *short)
    assert code == 0, errors
    for index, pixels in enumerate((uniform(36, 12, 14, 3) * 255).byte().numpy()):
        path = folder / "pictures" / "abc"[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def test_the_command_writes_what_the_command_train_reads(saved: Path, tmp_path: Path) -> None:
    command = ("tokenize", "--tokenizer", saved / "tokenizer", "--data", "digits", "--out", tmp_path / "t")
    code, output, errors = call(*command)
    assert (code, errors) == (0, "")
    assert "1612 rows of tokens to train on and 185 held out" in " ".join(output.split())
    assert "2 files made now, 0 were there" in " ".join(output.split())
    assert "0 files made now, 2 were there" in " ".join(call(*command)[1].split())
    assert is_shards(tmp_path / "t")
    small = ("--train.steps", 2, "--train.batch-size", 16, "--model.width", 16, "--model.num-heads", 2)
    train = ("train", "digits-viar", "--tokenizer", saved / "tokenizer", *small, "--model.depth", 3)
    for name, source in (("tokens", tmp_path / "t"), ("images", "digits")):
        code, output, errors = call(*train, "--data", source, "--out", tmp_path / name)
        assert code == 0, errors
    one, two = (NextScaleTransformer.from_pretrained(tmp_path / name) for name in ("tokens", "images"))
    assert_same(one, two)
    for flags, message in (
        (("--augment", 2), "--augment: "),
        (("--model.num-classes", 9), "has 10 classes, got 9; leave the flag"),
        (("--model.num-classes", 11), "has 10 classes, got 11; leave the flag"),
    ):
        code, _, errors = call(*train, "--data", tmp_path / "t", "--out", tmp_path / "x", *flags)
        assert (code, errors.count("viar:")) == (2, 1)
        assert message in errors
        assert not (tmp_path / "x").exists()


def test_the_command_takes_crops_of_a_folder_and_says_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    command = ("tokenize", "--tokenizer", saved / "tokenizer", "--data", saved / "pictures")
    code, output, errors = call(*command, "--out", tmp_path / "t", "--crops", 3, "--shard-size", 50)
    assert (code, errors) == (0, "")
    source = load_data(str(saved / "pictures"), 8)
    assert len(TokenShards(tmp_path / "t")) == 3 * len(source.train)
    tokens, labels = TokenShards(tmp_path / "t", "validation").__getitems__(range(len(source.validation)))
    codec = Tokenizer.from_pretrained(saved / "tokenizer").eval()
    for row, image in enumerate(range(len(source.validation))):
        one, label = source.validation.__getitems__([image])
        assert tokens[row].equal(tokenize(codec, one, label)[1][0])
        assert labels[row] == label
    for flags, message in (
        (("--crops", 2, "--shard-size", 50), "crops: 3 there, 2 now"),
        (("--crops", 0), "crops must be at least 1, got 0"),
        (("--augment", 1), "augment"),
        (("--device", "tpu"), "--device"),
        (("--tokenizer", tmp_path / "nowhere"), "nowhere"),
        (("--data", tmp_path / "nowhere"), "nowhere"),
    ):
        code, output, errors = call(*command, "--out", tmp_path / "t", *flags)
        assert code == 2
        assert message in errors + output
        assert "Traceback" not in errors
    mine = tmp_path / "pictures"  # in which a picture takes another's place
    shutil.copytree(saved / "pictures", mine)
    begun = (*command[:3], "--data", mine, "--out", tmp_path / "mine")
    assert call(*begun)[0] == 0
    first = min(mine.glob("*/*"))
    first.rename(first.with_name("another" + first.suffix))
    code, _, errors = call(*begun)
    assert code == 2
    assert "tokens made with other settings" in errors
    with pytest.raises(ValueError, match="source: "):  # tokens are not pictures
        load_data(str(tmp_path / "t"), 8)
