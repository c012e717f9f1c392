"""Many images: the same files whatever makes them, in as many goes and processes as it takes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from tiny_models import tiny_tokenizer, tiny_transformer

import viar.generation.choice
import viar.generation.series.series
from viar import Adaptive, Sampling, prepare_inference, sample_tokens
from viar.files import LOCK, held
from viar.generation.series.folder import SeriesFolder
from viar.generation.series.maker import runs, whole_batches
from viar.generation.series.series import SeriesReport, generate_series
from viar.pretrained import fingerprint

NUM = 32
PATIENCE = 60.0  # seconds after which a process is taken to hang


def models(kind: str = "implicit") -> tuple[Any, Any]:
    return tiny_transformer(kind), tiny_tokenizer()


def make(folder: Path, num: int = NUM, *, kind: str = "implicit", **settings: Any) -> SeriesReport:
    console = Console(file=io.StringIO())
    return generate_series(*models(kind), folder, num, **{"console": console, **grouped(settings)})


def grouped(settings: dict[str, Any]) -> dict[str, Any]:
    """The same, with what is the sampler's in a `Sampling`."""
    names = {field.name for field in dataclasses.fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in settings.items() if name in names})
    return {"sampling": sampling, **{k: v for k, v in settings.items() if k not in names}}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pictures(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name.endswith(".png")}


def remove(folder: Path, *indices: int) -> None:
    for index in indices:
        (folder / f"{index:06d}.png").unlink()


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a series made one image at a time, by one process in one go."""
    folder = tmp_path_factory.mktemp("series") / "new"
    report = make(folder, batch_size=1)
    assert (report.num, report.made) == (NUM, NUM)
    return files(folder)


@contextmanager
def doubting(rounding: float) -> Iterator[None]:
    """Sampling that is certain of less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viar.generation.choice, "ROUNDING", rounding)
        yield


# What is in the folder


def test_a_series_is_numbered_pictures_their_settings_and_an_archive(series: dict[str, bytes]) -> None:
    archive = f"samples_{NUM}x6x6x3.npz"
    assert set(series) == {f"{i:06d}.png" for i in range(NUM)} | {"series.json", archive}
    with np.load(io.BytesIO(series[archive])) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
        assert arrays["arr_0"].shape == (NUM, 6, 6, 3)
        for index, pixels in enumerate(arrays["arr_0"]):
            with Image.open(io.BytesIO(series[f"{index:06d}.png"])) as image:
                assert (np.asarray(image) == pixels).all()
        assert arrays["arr_1"].tolist() == [index % 3 for index in range(NUM)]


def test_settings_are_told_in_the_form_that_older_series_have(series: dict[str, bytes]) -> None:
    told = json.loads(series["series.json"])
    machine = told.pop("machine")
    assert told.pop("sha256")
    assert machine.startswith("cpu ")
    assert list(told.items()) == [
        ("format", 1),
        ("cfg", 1.5),
        ("top_k", 900),
        ("top_p", 0.96),
        ("seed", 0),
        ("cache", "equilibrium"),
        ("warm_start", False),
        ("guidance_reuse", 0),
        ("iterations", [3, 3, 3]),
        ("labels", [0, 1, 2]),
        ("batch_size", "any"),
        ("compiled", False),
        ("model", told["model"]),
        ("tokenizer", told["tokenizer"]),
        ("torch", torch.__version__),
    ]
    only_where_asked = {"more_smooth"}  # which came later
    assert {field.name for field in dataclasses.fields(Sampling)} - only_where_asked <= set(told)


def test_the_fingerprint_of_a_model_is_of_its_config_and_every_weight() -> None:
    module = torch.nn.Linear(2, 1)
    module.config = SimpleNamespace(to_dict=lambda: {"width": 2})
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
        module.bias.fill_(3.0)
    assert fingerprint(module) == "58aa046efc845036322c8e829148e241"
    with torch.no_grad():
        module.bias.fill_(4.0)
    assert fingerprint(module) != "58aa046efc845036322c8e829148e241"


def test_pictures_are_what_the_sampler_and_the_decoder_make_alone(series: dict[str, bytes]) -> None:
    model, tokenizer = models()
    for index in (0, 1, 31):
        tokens = sample_tokens(model, tokenizer, [index % 3], first_index=index).tokens
        pixels = ((tokenizer.decode(tokens)[0] + 1) / 2 * 255).round().byte().permute(1, 2, 0)
        with Image.open(io.BytesIO(series[f"{index:06d}.png"])) as image:
            assert (np.asarray(image) == pixels.numpy()).all()
    assert len({series[f"{i:06d}.png"] for i in range(NUM)}) > NUM // 2


def test_labels_are_given_in_turn(tmp_path: Path) -> None:
    report = make(tmp_path, 5, labels=[2, 0], formats=("npz",))
    assert report.archive is not None
    with np.load(report.archive) as arrays:
        assert arrays["arr_1"].tolist() == [2, 0, 2, 0, 2]
        zeros = arrays["arr_0"]
    make(tmp_path / "b", 5, labels=[2, 1], formats=("npz",))
    with np.load(tmp_path / "b" / report.archive.name) as arrays:
        same = (arrays["arr_0"] == zeros).all((1, 2, 3)).tolist()
    assert same == [True, False, True, False, True]


@pytest.mark.parametrize("formats", [("png",), ("npz",)])
def test_only_the_formats_asked_for_stay(
    formats: tuple[str, ...], series: dict[str, bytes], tmp_path: Path
) -> None:
    report = make(tmp_path, formats=formats)
    kept = {name: data for name, data in series.items() if name.endswith((*formats, "json"))}
    assert files(tmp_path) == kept
    assert (report.archive is None) == (formats == ("png",))
    assert make(tmp_path, formats=formats).made == 0
    assert files(tmp_path) == kept


def test_the_archive_is_written_a_few_images_at_a_time(
    series: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viar.generation.series.folder, "READ_AT_ONCE", 7)
    make(tmp_path)
    assert files(tmp_path) == series


# The same files


@pytest.mark.parametrize("batch_size", [7, 64])
def test_the_batch_size_changes_nothing(batch_size: int, series: dict[str, bytes], tmp_path: Path) -> None:
    make(tmp_path, batch_size=batch_size)
    assert files(tmp_path) == series


def test_the_number_of_threads_changes_nothing(series: dict[str, bytes], tmp_path: Path) -> None:
    torch.set_num_threads(3)
    try:
        make(tmp_path, batch_size=16)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert files(tmp_path) == series


def test_pixels_and_doubtful_tokens_are_computed_on_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[int, set[int]] = {1: set(), 4: set()}
    sample = viar.generation.series.series.sample_tokens

    def noted(model: Any, tokenizer: Any, labels: Any, **settings: Any) -> Any:
        threads[len(labels)].add(torch.get_num_threads())
        return sample(model, tokenizer, labels, **settings)

    decode = viar.Tokenizer.decode

    def noted_decode(self: Any, tokens: Any) -> Any:
        threads[len(tokens[0])].add(torch.get_num_threads())
        return decode(self, tokens)

    monkeypatch.setattr(viar.generation.series.series, "sample_tokens", noted)
    monkeypatch.setattr(viar.Tokenizer, "decode", noted_decode)
    torch.set_num_threads(3)
    try:
        with doubting(1e9):
            make(tmp_path / "exact", 8, batch_size=4)
        assert threads == {1: {1}, 4: {3}}
        threads[4].clear()
        make(tmp_path / "adaptive", 8, batch_size=4, iterations=Adaptive())
        assert threads == {1: {1}, 4: {1}}
    finally:
        torch.set_num_threads(1)


def test_images_in_doubt_are_sampled_again_alone(
    series: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with doubting(1e9):
        assert make(tmp_path / "all", 16, batch_size=8).resampled == 16
    with doubting(0.05):
        assert 0 < make(tmp_path / "some", batch_size=16).resampled < NUM
    assert files(tmp_path / "some") == series
    assert pictures(files(tmp_path / "all")).items() <= series.items()

    # And tokens that a batch got wrong are never used, if it said so.
    sample = viar.generation.series.series.sample_tokens

    def wrong_in_batches(model: Any, tokenizer: Any, labels: Any, **settings: Any) -> Any:
        made = sample(model, tokenizer, labels, **settings)
        if len(labels) > 1:
            made.certain[::2] = False
            for tokens in made.tokens:
                tokens[::2] = 0
        return made

    monkeypatch.setattr(viar.generation.series.series, "sample_tokens", wrong_in_batches)
    assert make(tmp_path / "wrong", batch_size=10).resampled == NUM // 2
    assert files(tmp_path / "wrong") == series


@given(
    missing=st.sets(st.integers(0, 40)).map(sorted),
    batch_size=st.integers(1, 9),
)
def test_parts_cover_what_is_missing_once(missing: list[int], batch_size: int) -> None:
    parts = list(runs(missing, batch_size))
    assert [index for _, wanted in parts for index in wanted] == missing
    assert all(list(indices) == wanted and 0 < len(wanted) <= batch_size for indices, wanted in parts)
    batches = list(whole_batches(missing, batch_size))
    assert [index for _, wanted in batches for index in wanted] == missing
    for indices, wanted in batches:
        assert (len(indices), indices.start % batch_size) == (batch_size, 0)
        assert set(wanted) <= set(indices)


# Going on


def test_only_what_is_missing_or_broken_is_made(series: dict[str, bytes], tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / f"samples_{NUM}x6x6x3.npz").write_bytes(b"PK\3\4 cut off")
    remove(tmp_path, 0, 5, 6, NUM - 1)
    (tmp_path / "000010.png").write_bytes(series["000010.png"][:-5])
    (tmp_path / "000011.png").write_bytes(b"")
    Image.new("RGB", (7, 6)).save(tmp_path / "000012.png")
    Image.new("L", (6, 6)).save(tmp_path / "000013.png")
    kept = (tmp_path / "000014.png").stat().st_mtime_ns
    assert make(tmp_path, batch_size=4).made == 8
    assert files(tmp_path) == series
    assert (tmp_path / "000014.png").stat().st_mtime_ns == kept


def test_a_series_that_another_process_makes_is_left_to_it(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(ValueError, match="another process is at work in this folder"):
        make(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_larger_number_continues_the_series(series: dict[str, bytes], tmp_path: Path) -> None:
    make(tmp_path, 13)
    assert make(tmp_path, NUM).made == NUM - 13
    found = files(tmp_path)
    assert len(np.load(io.BytesIO(found.pop("samples_13x6x6x3.npz")))["arr_0"]) == 13
    assert found == series


def test_an_interruption_leaves_whole_pictures_only(
    series: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, calls = viar.generation.series.series.sample_tokens, []

    def interrupted(model: Any, tokenizer: Any, labels: Any, *arguments: Any, **settings: Any) -> Any:
        if len(labels) > 1:  # an image may be sampled again alone
            calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(model, tokenizer, labels, *arguments, **settings)

    monkeypatch.setattr(viar.generation.series.series, "sample_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, batch_size=10)
    left = files(tmp_path)
    assert len(left) == 21
    assert all(series[name] == data for name, data in left.items())
    monkeypatch.undo()
    assert make(tmp_path, batch_size=10).made == NUM - 20
    assert files(tmp_path) == series


def test_a_picture_that_cannot_be_written_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, file: Any, *_: Any) -> None:
        file.write(b"\x89PNG")
        assert not list(tmp_path.glob("*.png"))  # not under its name before it is whole
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        make(tmp_path)
    assert set(files(tmp_path)) == {"series.json"}


def test_a_folder_of_other_settings_is_refused_and_they_are_listed(
    series: dict[str, bytes], tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match="other settings") as refused:
        make(tmp_path, cfg=2.0, seed=3, labels=[1], iterations=(3, 1))
    for part in ("cfg: 1.5 there, 2.0 now", "seed: 0 there, 3 now", "labels: [0, 1, 2] there, [1] now"):
        assert part in str(refused.value)
    assert "iterations: [3, 3, 3] there, [3, 2, 1] now" in str(refused.value)
    assert "top_k" not in str(refused.value)
    model, tokenizer = models()
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    with pytest.raises(ValueError, match=r"as they were: model: \"\w+\" there, \"\w+\" now$"):
        generate_series(model, tokenizer, tmp_path, NUM)
    model, tokenizer = models()
    prepare_inference(model, compile="eager")
    with pytest.raises(ValueError, match="as they were: compiled: false there, true now"):
        generate_series(model, tokenizer, tmp_path, NUM)
    assert make(tmp_path, iterations=3, labels=(0, 1, 2)).made == 0  # the same in other words
    assert files(tmp_path) == series


def test_settings_that_made_nothing_yet_may_change(tmp_path: Path) -> None:
    make(tmp_path, 2, seed=1)
    remove(tmp_path, 0, 1)
    with pytest.raises(ValueError, match="seed"):
        make(tmp_path, 2)  # there is an archive
    (tmp_path / "samples_2x6x6x3.npz").unlink()
    assert make(tmp_path, 2).made == 2
    assert json.loads((tmp_path / "series.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"000003.png": b""}, "no series.json that tells"),
        ({"000003.png": b"", "series.json": b"{"}, "unreadable"),
        ({"000003.png": b"", "series.json": b"{}"}, "format: null there, 1 now"),
    ],
)
def test_pictures_of_unknown_origin_are_refused(
    there: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    for name, data in there.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
    assert files(tmp_path) == there


def test_a_picture_damaged_inside_is_named_and_made_again(tmp_path: Path) -> None:
    make(tmp_path, 4, formats=("png",))
    before, broken = files(tmp_path), tmp_path / "000002.png"
    data = bytearray(broken.read_bytes())
    data[40:50] = bytes(10)
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=r"000002.png: damaged .* remove it and run again"):
        SeriesFolder(tmp_path, 6).read(2)
    assert make(tmp_path, 4, formats=("png",)).made == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize("offset", [-400, -30])
def test_an_archive_that_is_damaged_inside_is_made_again(tmp_path: Path, offset: int) -> None:
    made = make(tmp_path, 4)
    before = files(tmp_path)
    assert made.archive is not None
    data = bytearray(made.archive.read_bytes())
    data[offset] ^= 1
    made.archive.write_bytes(data)
    make(tmp_path, 4)
    assert files(tmp_path) == before


# Where rounding decides


@pytest.mark.parametrize("case", ["bfloat16", "adaptive", "autocast"])
def test_below_float32_and_adaptive_batches_are_always_the_same(case: str, tmp_path: Path) -> None:
    model, tokenizer = models()
    reason = {"bfloat16": "weights in torch.bfloat16", "adaptive": "adaptive iterations"}.get(
        case, "autocast"
    )
    iterations = Adaptive(rtol=0.1) if case == "adaptive" else None
    if case == "bfloat16":
        model.trunk.bfloat16()
    forward = model.trunk.forward
    if case == "bfloat16":  # what is around the trunk stays in float32
        model.trunk.forward = lambda x, *a, **k: forward(x.bfloat16(), *a, **k)

    def run(folder: Path, num: int, **settings: Any) -> SeriesReport:
        settings = {"iterations": iterations, "console": Console(file=io.StringIO()), **settings}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
            return generate_series(model, tokenizer, folder, num, **grouped(settings))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 22, batch_size=8)
    run(parts, 5, batch_size=8)
    run(parts, 22, batch_size=8)
    (parts / "samples_5x6x6x3.npz").unlink()
    assert files(whole) == files(parts)
    remove(parts, 3, 17)
    assert run(parts, 22, batch_size=8).made == 2
    assert files(whole) == files(parts)
    assert reason in json.loads((whole / "series.json").read_text())["batch_size"]
    with pytest.raises(ValueError, match=rf"batch_size: \"8, because of {reason}.*\" there, \"4, because"):
        run(whole, 22, batch_size=4)


def test_reduced_matmul_precision_counts_as_below_float32(tmp_path: Path) -> None:
    try:
        torch.set_float32_matmul_precision("high")
        make(tmp_path, 2)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "matmul precision high" in json.loads((tmp_path / "series.json").read_text())["batch_size"]


def test_a_series_whose_batches_are_the_same_for_one_reason_is_refused_where_there_is_another(
    tmp_path: Path,
) -> None:
    make(tmp_path, 1, more_smooth=True)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match=r"batch_size: .*mixtures of codes.* there"):
            make(tmp_path, 2, more_smooth=True)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_backend_settings_are_put_back(tmp_path: Path) -> None:
    cudnn = torch.backends.cudnn
    before = (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)
    make(tmp_path, 1)
    assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == before


# Messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"labels": []}, "labels: expected at least one class"),
        ({"labels": [4]}, "labels: expected classes 0 to 2"),
        ({"formats": ()}, "formats: expected one or both of png, npz"),
        ({"formats": "png"}, "formats: expected one or both"),
        ({"formats": ("gif",)}, "gif"),
        ({"cfg": -1}, "cfg"),
        ({"seed": -1}, "seed"),
        ({"iterations": (1, 3), "cache": "iterate"}, "do not rise"),
    ],
)
def test_what_is_wrong_is_named_before_a_folder_is_made(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "new", **{"num": 2, **settings})
    assert not (tmp_path / "new").exists()


def test_models_in_training_mode_and_files_in_place_of_folders_are_refused(tmp_path: Path) -> None:
    model, tokenizer = models()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        generate_series(model.train(), tokenizer, tmp_path / "new", 2)
    with pytest.raises(ValueError, match=r"tokenizer.eval\(\)"):
        generate_series(model.eval(), tokenizer.train(), tmp_path / "new", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="found a file"):
        make(tmp_path / "file", 2)


# Processes


def start(folder: Path, manner: str) -> subprocess.Popen[str]:
    """`series_worker.py`, which is two processes; they print into one pipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = [sys.executable, str(Path(__file__).with_name("series_worker.py"))]
    return subprocess.Popen(
        [*worker, str(folder), str(port), str(NUM), manner],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(worker: subprocess.Popen[str]) -> str:
    """What it printed."""
    try:
        return worker.communicate(timeout=PATIENCE)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_and_one_that_goes_on_give_the_same_files(
    series: dict[str, bytes], tmp_path: Path
) -> None:
    worker, limit = start(tmp_path, "slow"), time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("*.png"))) < 9 and time.monotonic() < limit and worker.poll() is None:
        time.sleep(0.01)
    assert worker.poll() is None, end(worker)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()
    left = {name: data for name, data in files(tmp_path).items() if not name.endswith(("partial", LOCK))}
    assert 9 <= len(left) - 1 < NUM
    assert all(series[name] == data for name, data in left.items())
    report = make(tmp_path, batch_size=16)
    assert report.made == NUM - len(left) + 1
    assert files(tmp_path) == series


@pytest.mark.slow
def test_two_processes_share_the_work_and_an_error_in_one_ends_both(
    series: dict[str, bytes], tmp_path: Path
) -> None:
    worker = start(tmp_path, "fails")
    printed = end(worker)
    assert worker.returncode == 11, printed  # 10 and 1: both ended, one of them by the other's end
    assert files(tmp_path / "whole") == series
    assert "images/s" not in printed  # nobody watches
    reports = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert reports == 2 * [{"made": NUM, "images_of": [NUM // 2, NUM // 2]}]
    assert "this process fails" in printed
    assert not (tmp_path / "broken" / f"samples_{NUM}x6x6x3.npz").exists()
