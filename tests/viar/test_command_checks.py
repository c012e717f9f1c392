"""What commands compare before work begins, runs that go on, and training from a checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import make_world, write_pictures
from hypothesis import given
from hypothesis import strategies as st
from test_cli import call
from test_train import Disk
from tiny_models import tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor

import viar.commands.evaluate
import viar.commands.train
import viar.training.loop
from viar import NextScaleTransformer, Tokenizer
from viar.commands.cli import one_line
from viar.commands.demo import check_demo
from viar.data import ImageFolder, TensorImages, load_data, write_shards
from viar.files import check_writable
from viar.training import TrainConfig, train_transformer

SIDES = (1, 2, 4)
SHORT = ("--train.seconds", "None", "--train.batch-size", 4, "--train.steps")
SIZES = ("--model.width", 16, "--model.num-heads", 2, "--model.depth", 3, "--model.codebook-size", 16)
SIZES += ("--model.code-channels", 4, "--model.sides", *SIDES)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def train(
    world: Path, out: Path, *flags: object, data: str = "data3", steps: int = 2
) -> tuple[int, str, str]:
    paths = ("--data", world / data, "--tokenizer", world / "tokenizer", "--out", out)
    return call("train", "digits-viar", *paths, *SHORT, steps, *flags)


def logits(model: NextScaleTransformer, labels: list[int]) -> Tensor:
    tokens = model.pos_embed.shape[1] - model.pos_start.shape[1]
    with torch.no_grad():
        result: Tensor = model.eval()(torch.tensor(labels), uniform(len(labels), tokens, 4))
    return result


# Classes


@pytest.mark.parametrize("classes", [2, 4])
def test_a_model_gets_as_many_classes_as_the_folder_has_and_says_so(
    classes: int, world: Path, tmp_path: Path
) -> None:
    code, output, errors = train(world, tmp_path / "run", *SIZES, data=f"data{classes}")
    assert (code, errors) == (0, "")
    assert f"num_classes is {classes} as in the data, instead of the recipe's 10" in output
    assert NextScaleTransformer.from_pretrained(tmp_path / "run").config.num_classes == classes


def test_tokens_on_disk_say_as_well_how_many_classes_there_are(world: Path, tmp_path: Path) -> None:
    code, output, errors = train(world, tmp_path / "run", *SIZES, data="tokens")
    assert (code, errors) == (0, "")
    assert "num_classes is 3 as in the data, instead of the recipe's 10" in output
    assert NextScaleTransformer.from_pretrained(tmp_path / "run").config.num_classes == 3
    code, _, errors = train(world, tmp_path / "given", *SIZES, "--model.num-classes", 10, data="tokens")
    assert code == 2
    assert "tokens has 3 classes, got 10" in errors


@pytest.mark.parametrize("given", ["--model.num-classes", "--model.num_classes", "--model.num-classes=10"])
def test_classes_that_were_given_and_are_not_those_of_the_folder_are_refused(
    given: str, world: Path, tmp_path: Path
) -> None:
    flag = (given,) if "=" in given else (given, 10)  # the recipe's own number, but given
    code, _, errors = train(world, tmp_path / "run", *SIZES, *flag)
    assert code == 2
    assert "--model.num-classes:" in errors
    assert "has 3 classes, got 10" in errors
    assert not (tmp_path / "run").exists()


def test_a_model_gets_the_scales_and_codes_of_its_tokenizer_and_says_so(world: Path, tmp_path: Path) -> None:
    small = ("--model.width", 16, "--model.num-heads", 2, "--model.depth", 3)
    code, output, errors = train(world, tmp_path / "run", *small)
    assert (code, errors) == (0, "")
    assert "codebook_size is 16 as in the tokenizer, instead of the recipe's 64" in output
    assert "code_channels is 4 as in the tokenizer, instead of the recipe's 8" in output
    assert "sides is" not in output  # the same in both
    assert NextScaleTransformer.from_pretrained(tmp_path / "run").config.codebook_size == 16
    code, _, errors = train(world, tmp_path / "given", *small, "--model.codebook-size", 64)
    assert code == 2
    assert "its codebook_size is 16, the model's is 64" in errors


@pytest.mark.parametrize("kind", ["memory", "folder", "served"])
def test_a_label_that_is_the_null_class_is_no_class_to_train_on(kind: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 4, side=6)
    images = TensorImages(uniform(8, 3, 6, 6), torch.arange(8) % 4)
    files = [(path, int(path.parent.name[-1])) for path in sorted((tmp_path / "pictures").glob("*/*.png"))]
    data: Any = {
        "memory": images,
        "served": Disk(images),
        "folder": ImageFolder(files, 6, train=False),
    }[kind]
    config = TrainConfig(steps=4, batch_size=8)
    with pytest.raises(
        ValueError, match="labels: expected the model's classes, 0 to 2, got values from 0 to 3"
    ):
        train_transformer(tiny_transformer(), tiny_tokenizer(), data, tmp_path / "run", config)


def test_evaluate_compares_classes_before_it_trains_a_classifier(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viar.commands.evaluate, "judge_of", None)  # would fail if it was called
    models = ("--model", world / "viar", "--tokenizer", world / "tokenizer")
    for flags, message in (
        (("--data", world / "data4"), "data4 has 4 classes, the model has 3"),
        (
            ("--data", world / "data3", "--iterations", 1, 2, 3, 4),
            "--iterations: expected one count a scale (3), one for all",
        ),
        (
            ("--data", world / "data3", "--tokenizer", world / "coarser"),
            "codebook_size is 8, the model's is 16",
        ),
    ):
        code, _, errors = call("evaluate", *models, *flags)
        assert code == 2
        assert message in errors


# Runs that go on


def interrupted(world: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    """A run that was stopped by Ctrl-C after its first state."""
    set_progress, calls = viar.training.loop.set_progress, []

    def stopping(*arguments: Any, **settings: Any) -> None:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        set_progress(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(viar.training.loop, "set_progress", stopping)
        code, _, errors = train(world, out, *SIZES, "--train.save-every", 1e-9, *flags, steps=4)
    assert (code, errors) == (130, "viar: interrupted")
    assert (out / "state").is_dir()


@pytest.fixture(scope="module")
def stopped(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupted(world, out, patch)
    return out


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (("--model.width", 32), ["model.width: 16 there, 32 now"]),
        (("--model.trunk.grad", 1, 3), ["model.trunk.grad: [1, 2] there, [1, 3] now"]),
        (
            ("--train.lr", 0.5, "--train.seed", 3),
            ["train.lr: 0.004 there, 0.5 now", "train.seed: 0 there, 3 now"],
        ),
        (("--train.batch-size", 8), ["train.batch_size: 4 there, 8 now"]),
        (("--train.mixed-precision", "bf16"), ['train.mixed_precision: "no" there, "bf16" now']),
        (("--data", "data4"), ["data.images: ", "data.fingerprint: ", "model.num_classes: 3 there, 4 now"]),
        (("--data", "same_count"), ["data.fingerprint: "]),
        (("--data", "tokens"), ["data.fingerprint: "]),
        (("--tokenizer", "other_tokenizer"), ["tokenizer: "]),
        (("--from", "viar"), ["origin.fingerprint: "]),
    ],
)
def test_a_run_does_not_go_on_with_other_settings_and_names_them_with_both_values(
    flags: tuple[object, ...], messages: list[str], world: Path, stopped: Path
) -> None:
    if not (world / "same_count").exists():
        shutil.copytree(world / "data3", world / "same_count")
        (world / "same_count" / "class1" / "0.png").rename(world / "same_count" / "class1" / "renamed.png")
        tiny_tokenizer(7, sides=SIDES).save_pretrained(world / "other_tokenizer")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    placed = [
        world / value if isinstance(value, str) and (world / value).exists() else value for value in flags
    ]
    code, _, errors = train(world, stopped, *SIZES, *placed, steps=4)
    assert code == 2
    assert "holds an interrupted run that was started with other settings" in errors
    for message in messages:
        assert message in errors
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_run_of_the_other_kind_is_named_as_such(world: Path, stopped: Path) -> None:
    flags = ("--data", world / "data3", "--augment", 0, *SHORT, 4, "--out", stopped)
    code, _, errors = call("train-tokenizer", "digits", *flags)
    assert code == 2
    assert 'kind: "transformer" there, "tokenizer" now' in errors
    assert "model.sides" not in errors


def test_a_run_goes_on_to_another_end_and_says_so(world: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    flags = ("--train.accumulate", 2, "--train.sample-every", 5)
    code, output, errors = train(world, tmp_path / "run", *SIZES, *flags, steps=5)
    assert (code, errors) == (0, "")
    assert "the run goes on with another train.steps: 4 there, 5 now" in output
    assert "the run goes on with another train.accumulate: 1 there, 2 now" in output
    assert "the run goes on with another train.sample_every: 1000 there, 5 now" in output
    assert (tmp_path / "run" / "samples" / "step-000005.png").exists()
    assert json.loads(output[output.index("{") :])["steps"] == 5
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["steps"] == 5


def test_a_run_on_tokens_does_not_go_on_with_others(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, codec = load_data(str(world / "data3"), SIDES[-1] * 2), tiny_tokenizer(sides=SIDES)
    write_shards(codec, images, tmp_path / "other_crops", origin={}, seed=1)
    interrupted(world, tmp_path / "run", monkeypatch, "--data", world / "tokens")
    code, _, errors = train(
        world, tmp_path / "run", *SIZES, "--data", tmp_path / "other_crops", "--train.save-every", 1, steps=4
    )
    assert code == 2
    assert "data.fingerprint: " in errors
    assert "data.images" not in errors
    code, _, errors = train(world, tmp_path / "run", *SIZES, data="tokens", steps=4)
    assert (code, errors) == (0, "")


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_state_ends_with_a_message(size: int, world: Path, stopped: Path, tmp_path: Path) -> None:
    names = [path.name for path in (stopped / "state").iterdir() if path.stat().st_size > size]
    assert "state.pt" in names
    for name in names:
        out = tmp_path / name
        shutil.copytree(stopped, out)
        damaged = out / "state" / name
        damaged.write_bytes(damaged.read_bytes()[:size])
        code, _, errors = train(world, out, *SIZES, steps=4)
        assert (code, "Traceback" in errors) == (2, False), name
        assert "found one of another model or damaged files" in errors
        assert "remove that folder to start over" in errors


@pytest.mark.parametrize("text", ["", '{"kind": "trans', "[]", "7"])
def test_damaged_settings_of_a_run_end_with_a_message(
    text: str, world: Path, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(text)
    code, _, errors = train(world, tmp_path / "run", *SIZES, steps=4)
    assert code == 2
    assert "run.json: expected the settings of a run" in errors or "other settings" in errors


def test_a_state_without_settings_goes_on_with_a_word(world: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    code, output, _ = train(world, tmp_path / "run", *SIZES, steps=4)
    assert code == 0
    assert "what its run was started with is not known, and not compared" in output


@pytest.mark.parametrize("name", ["series", "classifier", "tokens", "viar", "note.txt", "note.txt/inside"])
def test_a_run_does_not_go_where_other_work_is(name: str, world: Path) -> None:
    code, _, errors = train(world, world / name, *SIZES)
    assert code == 2
    assert "viar: --out: " in errors
    assert not (world / name / "metrics.jsonl").exists()


# From a checkpoint


@pytest.mark.parametrize("source", ["viar", "viar.pth"])
def test_training_from_a_checkpoint_starts_at_its_logits(
    source: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(model: NextScaleTransformer, *arguments: Any, **settings: Any) -> dict[str, float]:
        seen.append(logits(model, [0, 1, 2, model.null_class]))
        return train_transformer(model, *arguments, **settings)

    monkeypatch.setattr(viar.commands.train, "train_transformer", noted)
    trained = tiny_transformer(sides=SIDES)
    wanted = trained if source == "viar" else viar.load_official(world / source)
    assert isinstance(wanted, NextScaleTransformer)
    code, output, errors = train(world, tmp_path / "same", "--from", world / source)
    assert (code, errors) == (0, "")
    assert seen[0].equal(logits(wanted, [0, 1, 2, 3]))
    assert "kept" not in output
    record = json.loads((tmp_path / "same" / "run.json").read_text())
    assert record["origin"]["source"] == str(world / source)

    code, output, errors = train(world, tmp_path / "more", "--from", world / source, data="data4")
    assert (code, errors) == (0, "")
    assert "num_classes is 4 as in the data, instead of the checkpoint's 3" in output
    assert "class_embed.weight: 3 of 3 classes kept, 0 dropped, 1 new" in output
    assert seen[1].equal(logits(wanted, [0, 1, 2, 3]))
    assert NextScaleTransformer.from_pretrained(tmp_path / "more").config.num_classes == 4


def test_training_from_a_checkpoint_takes_the_sides_of_its_tokenizer(world: Path, tmp_path: Path) -> None:
    flags = ("--data", world / "data3", "--tokenizer", world / "smaller", "--out", tmp_path / "run")
    code, output, errors = call("train", "digits-viar", *flags, *SHORT, 2, "--from", world / "viar")
    assert (code, errors) == (0, "")
    assert "pos_embed: 2 of 3 scales kept, 1 dropped, 1 new" in output
    assert NextScaleTransformer.from_pretrained(tmp_path / "run").config.sides == (1, 2, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model.width", 32), "width: 16 there, 32 asked for"),
        (("--model.depth", 4), "depth: 3 there, 4 asked for"),
        (("--model.no-qk-norm",), "qk_norm: True there, False asked for"),
        (("--model.trunk.num-pre", 0), "trunk.num_pre: 1 there, 0 asked for"),
        (("--from", "var"), "its weights have an explicit trunk, the recipe's is implicit"),
        (("--from", "tokenizer"), "expected a transformer (VAR or VIAR), found a tokenizer"),
        (("--from", "unfinished"), "an unfinished training run"),
    ],
)
def test_what_a_checkpoint_cannot_start_is_refused(
    flags: tuple[object, ...], message: str, world: Path, tmp_path: Path
) -> None:
    given = flags if flags[0] != "--from" else ("--from", world / str(flags[1]))
    start = () if flags[0] == "--from" else ("--from", world / "viar")
    code, _, errors = train(world, tmp_path / "run", *start, *given)
    assert code == 2
    assert "--from: " in errors
    assert message in errors
    assert not (tmp_path / "run").exists()


def test_flags_change_what_may_differ_from_the_checkpoint(world: Path, tmp_path: Path) -> None:
    flags = ("--model.label-dropout", 0.3, "--model.trunk.iterations", 7)
    assert train(world, tmp_path / "run", "--from", world / "viar", *flags)[0] == 0
    config = NextScaleTransformer.from_pretrained(tmp_path / "run").config
    assert (config.label_dropout, config.trunk.iterations, config.width) == (0.3, 7, 16)


def test_a_tokenizer_trains_from_a_checkpoint_and_keeps_its_codebook(world: Path, tmp_path: Path) -> None:
    start = Tokenizer.from_pretrained(world / "tokenizer")
    flags = ("--data", world / "data3", "--augment", 0, *SHORT, 1, "--train.lr", 1e-12)
    out = ("--out", tmp_path / "run", "--from", world / "tokenizer")
    code, _, errors = call("train-tokenizer", "digits", *flags, *out)
    assert (code, errors) == (0, "")
    tuned = Tokenizer.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(tuned.quantizer.codebook.weight, start.quantizer.codebook.weight)
    assert tuned.config == start.config
    code, _, errors = call("train-tokenizer", "digits", *flags, *out[:1], tmp_path / "b", *out[2:],
                           "--model.codebook-size", 8)  # fmt: skip
    assert code == 2
    assert "codebook_size: 16 there, 8 asked for" in errors


# Folders and files that are no model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unfinished", "an unfinished training run; run its command again with the same --out"),
        ("empty", "an empty folder"),
        ("series", "a series of images"),
        ("classifier", "a classifier"),
        ("data3", "a folder with class0, class1, class2"),
        (".", "a folder with models in it; give one of "),
        ("cut", "config.json: expected settings as JSON, found a damaged file"),
        ("list", "expected settings by name, found list"),
        ("foreign", "without 'trunk'"),
        ("short", "model.safetensors is damaged"),
        ("bare", "model.safetensors is damaged"),
        ("others", "50 missing: "),
        ("wider", " of another shape: "),
        ("tokenizer", "expected a transformer (VAR or VIAR), found a tokenizer"),
        ("tokens", "tokens of a data set, which viar train reads as --data"),
        ("note.txt", "a file, expected a folder"),
        ("nowhere", "no such folder, and no name that can be read from the Hugging Face hub"),
    ],
)
def test_a_folder_that_holds_no_model_says_what_it_holds(name: str, message: str, world: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is looked at below
        NextScaleTransformer.from_pretrained(world / name)
    assert str(world / name) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


JUNK = st.sampled_from(
    [None, -1, 0, 3, 1.5, float("nan"), float("inf"), 1e308, "x", "", [], [3, 1], {}, True]
)


@given(kind=st.sampled_from(["viar", "var", "tokenizer"]), data=st.data(), value=JUNK)
def test_settings_of_any_wrong_kind_are_refused_with_the_name_of_the_folder(
    kind: str, data: st.DataObject, value: Any, world: Path
) -> None:
    config = json.loads((world / kind / "config.json").read_text())
    inner = config["trunk"] if kind == "viar" and data.draw(st.booleans()) else config
    inner[data.draw(st.sampled_from(sorted(inner)))] = value
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(world / kind, folder, dirs_exist_ok=True)
        Path(folder, "config.json").write_text(json.dumps(config))
        refused_or_loaded(Path(folder))


@given(kind=st.sampled_from(["viar", "tokenizer"]), place=st.floats(0, 1), data=st.binary(max_size=8))
def test_weights_damaged_anywhere_are_refused_or_are_only_other_numbers(
    kind: str, place: float, data: bytes, world: Path
) -> None:
    weights = (world / kind / "model.safetensors").read_bytes()
    at = int(place**4 * len(weights))  # often in the header
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(world / kind, folder, dirs_exist_ok=True)
        for damaged in (weights[:at], weights[:at] + data + weights[at + len(data) :], weights + data):
            Path(folder, "model.safetensors").write_bytes(damaged)
            refused_or_loaded(Path(folder))


def refused_or_loaded(folder: Path) -> None:
    """Loading either works or raises a `ValueError` of one line that names the folder."""
    for read in (NextScaleTransformer.from_pretrained, Tokenizer.from_pretrained):
        try:
            read(folder)
        except ValueError as error:
            said = str(error)
        else:
            continue
        assert str(folder) in said
        assert "\n" not in said


def test_a_name_on_a_hub_that_cannot_be_reached_ends_with_one_line() -> None:
    with pytest.raises(
        ValueError, match="nobody/nothing: no such folder, and no name that can be read"
    ) as caught:
        Tokenizer.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_may_be_asked_for(world: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        NextScaleTransformer.from_pretrained(world / "others")
    NextScaleTransformer.from_pretrained(world / "others", strict=False)


# Devices, places to write, messages


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda:7", "meta", "cpu:3", "hpu", "", "gpu", "xla"])
def test_a_device_that_is_not_there_ends_with_a_message(name: str, world: Path) -> None:
    models = ("--model", world / "viar", "--tokenizer", world / "tokenizer")
    code, _, errors = call("generate", *models, "--device", name)
    assert code == 2
    assert errors.startswith("viar: --device: ")


def test_half_precision_on_a_cpu_is_refused_before_anything_is_read(world: Path, tmp_path: Path) -> None:
    code, _, errors = train(world, tmp_path / "run", "--train.mixed-precision", "fp16", data="nowhere")
    assert code == 2
    assert "mixed_precision='fp16' needs a GPU" in errors
    assert "use mixed_precision='no' or 'bf16'" in errors


def test_where_something_can_be_written_is_found_out_without_leaving_anything(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b.png", "--out", folder=False)
    check_writable(tmp_path / "a" / "b", "--out", folder=True)
    check_writable(tmp_path, "--out", folder=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for path, folder in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file" / "x", False)):
        with pytest.raises(ValueError, match=r"^--out: "):
            check_writable(path, "--out", folder=folder)


@pytest.mark.parametrize("name", ["note.txt/inside.png", "viar", "picture.jpg"])
@pytest.mark.parametrize("command", ["generate", "edit"])
def test_where_nothing_can_be_written_is_found_before_models_are_read(
    command: str, name: str, world: Path, tmp_path: Path
) -> None:
    flags: tuple[object, ...] = ("--model", tmp_path / "none", "--tokenizer", tmp_path / "none")
    if command == "edit":
        flags += ("--image", world / "picture.png", "--label", 1, "--box", 0, 0, 1, 1)
    code, _, errors = call(command, *flags, "--out", world / name)
    assert code == 2
    assert errors.startswith("viar: --out: ")


def test_the_demo_does_not_empty_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    check_demo(tmp_path / "new")
    (tmp_path / "tokenizer").mkdir()
    check_demo(tmp_path)
    (tmp_path / "tokenizer" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="tokenizer is not of the demo, which would empty it"):
        check_demo(tmp_path)


def test_a_broken_picture_that_another_process_reads_ends_with_one_line(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data3", tmp_path / "data")
    for path in (tmp_path / "data").glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    flags = (*SIZES, "--train.workers", 1)
    code, _, errors = train(world, tmp_path / "run", *flags, data=str(tmp_path / "data"))
    assert code == 2
    assert "Traceback" not in errors


def test_an_error_is_one_line_and_names_what_a_reading_process_met() -> None:
    assert one_line(ValueError("a:\n  1 missing: b\n  2 more")) == "a: 1 missing: b 2 more"
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    assert one_line(ValueError(f"{text}  File x\nValueError: p.png: broken: why\n")) == "p.png: broken: why"
    assert "memory" in (one_line(torch.OutOfMemoryError("CUDA out of memory.\nmore")) or "")
    assert one_line(RuntimeError("mat1 and mat2 must have the same dtype")) is None
