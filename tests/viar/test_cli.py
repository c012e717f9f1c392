"""The command line: help, the whole pipeline on digits, and messages."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_broken_pictures import call as command
from test_broken_pictures import judge_of_two_steps

import viar
import viar.commands.cli
import viar.commands.evaluate
import viar.commands.generate
import viar.commands.loading
from viar import ImplicitTrunkConfig, NextScaleTransformer, Sampling, Tokenizer
from viar.data import save_grid, save_picture
from viar.generation.series.series import SeriesReport
from viar.training import TOKENIZERS, TRANSFORMERS

TINY_MODEL = ("--model.width", "16", "--model.num-heads", "2")


def call(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, output, and errors on one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        code, output, errors = command(*arguments)
    return code, output, " ".join(errors.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a `tokenizer` and a `viar`, hardly trained."""
    folder = tmp_path_factory.mktemp("runs")
    short = ("--train.steps", 3, "--train.batch-size", 16, "--augment", 0)
    out = folder / "tokenizer"
    results = [
        call("train-tokenizer", "digits", "--out", out, *short),
        call("train", "digits-viar", "--tokenizer", out, "--out", folder / "viar", *short, *TINY_MODEL),
    ]
    for code, output, errors in results:
        assert code == 0, errors
        assert json.loads(output[output.index("{") :])["steps"] == 3
    return folder


def test_the_command_is_installed_under_its_name() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="viar")
    assert script.load() is viar.commands.cli.main


def test_the_parser_of_the_command_line_is_needed_by_the_commands_alone() -> None:
    root = Path(viar.__file__).parent
    users = {p.relative_to(root).parts[0] for p in root.rglob("*.py") if "tyro" in p.read_text()}
    assert users == {"commands"}


# Help


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ((), list(viar.commands.cli.COMMANDS)),
        (("train-tokenizer",), ["--out", "digits", "mnist", "imagenet256", "imagenet512"]),
        (("reproduce",), ["--model", "--reference", "--sha256", "--dry-run", "--shape", "--cfg"]),
        (("train-tokenizer", "digits"), ["--model.codebook-size", "--train.steps", "--loss", "--data"]),
        (("train",), ["--tokenizer", "--out", "digits-viar", "digits-var", "imagenet256-viar"]),
        (("train", "digits-viar"), ["--model.trunk.num-pre", "--train.mixed-precision", "--model.depth"]),
        (
            ("generate",),
            [
                "--labels",
                "--per-class",
                "--iterations",
                "--adaptive",
                "--cfg",
                "--top-p",
                "--num",
                "--device",
            ],
        ),
        (("evaluate",), ["--model", "--tokenizer", "--data", "--per-class", "--seed"]),
        (("demo",), ["--out", "--steps", "--per-class", "--iterations", "--cfg"]),
    ],
)
def test_help_lists_the_flags(command: tuple[str, ...], flags: list[str]) -> None:
    code, output, _ = call(*command, "--help")
    assert code == 0
    for flag in flags:
        assert flag in output, flag


def test_help_tells_what_each_recipe_makes() -> None:
    _, output, _ = call("train", "--help")
    assert "emoji-viar" in output
    assert "5 + implicit + 5 blocks of width 1920; 1,376,253 steps of 512 images" in output
    _, output, _ = call("train-tokenizer", "--help")
    assert "8 pixels in 21 tokens of 64 codes; 600 steps of 64 images" in output


def test_help_breaks_no_sentence_where_its_source_does() -> None:
    _, output, _ = call("train", "--help")
    assert "of the tokenizer, unless --model.num-classes" in output
    assert "published checkpoint. Its settings are kept" in output


def test_help_explains_sampling_by_what_its_settings_say_of_themselves() -> None:
    _, output, _ = call("generate", "--help")
    text = " ".join(output.replace("│", " ").split())
    explained = [
        "--iterations [INT [INT ...]] one for all scales, two for first and last, or one a scale "
        "(default: as the model says)",
        "--adaptive {None}|FLOAT instead: iterate until the relative residual is below this",
        "--budget {None}|INT instead: evaluations in all, falling from the first scale to the last",
        "--no-warm-start start each scale where the fixed point of the one before suggests (default: False)",
        "--guidance-reuse INT last scales that reuse the guidance of the scale before them; an approximation",
        "--cfg FLOAT guidance; 0 switches it off (default: 1.5)",
        "--top-k {None}|INT most likely tokens kept (default: 900)",
        "--top-p {None}|FLOAT probability kept (default: 0.96)",
        "--no-more-smooth mixtures of codes instead of single ones; smoother pictures, not for metrics",
        "--seed INT of all that is drawn at random (default: 0)",
        "--cache {equilibrium,iterate} of keys and values: at the fixed point, or one set an iteration, as",
        "--batch-size INT images generated at a time",
        "--device STR cpu, cuda, or cuda:1",
        "--dtype {None,float32,bfloat16,float16} of the blocks' weights (default: as saved)",
        "--no-compile compile the blocks",
        "--no-graphs replay CUDA graphs: the first batch takes three times as long",
    ]
    places = [text.find(line) for line in explained]
    assert -1 not in places, explained[places.index(-1)]
    assert places == sorted(places)


# The pipeline


def test_training_leaves_models_of_the_recipe_and_its_changes(trained: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(trained / "tokenizer")
    assert tokenizer.config == TOKENIZERS["digits"].model
    model = NextScaleTransformer.from_pretrained(trained / "viar")
    recipe = TRANSFORMERS["digits-viar"].model
    assert model.config == dataclasses.replace(recipe, width=16, num_heads=2)
    assert isinstance(model.config.trunk, ImplicitTrunkConfig)


def test_generate_writes_a_row_a_class(trained: Path, tmp_path: Path) -> None:
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer", "--per-class", 3)
    picture = tmp_path / "new" / "a.png"
    code, output, errors = call("generate", *models, "--out", picture)
    assert (code, errors) == (0, "")
    assert f"30 images in {picture}" in output
    with Image.open(picture) as image:
        assert image.size == (3 * 50, 10 * 50)  # 8 pixels six times as large, and an edge
        first = image.tobytes()
    again = tmp_path / "b.png"
    assert call("generate", *models, "--out", again, "--batch-size", 7)[0] == 0
    with Image.open(again) as image:
        assert image.tobytes() == first  # how many are made at a time makes no difference
    some = tmp_path / "c.png"
    assert call("generate", *models, "--out", some, "--labels", 7, 1, "--seed", 3)[0] == 0
    with Image.open(some) as image:
        assert image.size == (150, 100)


def test_generate_makes_a_series_and_goes_on_with_it(trained: Path, tmp_path: Path) -> None:
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer", "--labels", 7, 1)
    flags = ("--out", tmp_path / "s", "--batch-size", 2, "--seed", 3)
    code, output, errors = call("generate", *models, *flags, "--num", 3, "--format", "png")
    assert (code, errors) == (0, "")
    assert f"3 images in {tmp_path / 's'}; 3 made now" in " ".join(output.split())
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "series.json",
    ]
    code, output, _ = call("generate", *models, *flags, "--num-images", 5)
    assert code == 0
    assert "samples_5x8x8x3.npz; 2 made now" in " ".join(output.split())
    code, _, errors = call("generate", *models, *flags, "--num", 5, "--cfg", 2)
    assert code == 2
    assert "cfg: 1.5 there, 2.0 now" in errors


def test_every_sampling_flag_reaches_a_series(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noted(*arguments: Any, **settings: Any) -> SeriesReport:
        calls.append((arguments[2:], settings))
        return SeriesReport(tmp_path, 4, 4, 0, None, 1.0)

    monkeypatch.setattr(viar.commands.generate, "generate_series", noted)
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer")
    flags = ("--top-k", 5, "--top-p", 0.5, "--cache", "iterate", "--iterations", 3, 2, "--format", "npz")
    assert call("generate", *models, "--num", 4, *flags, "--labels", 1, "--cfg", 2)[0] == 0
    ((arguments, settings),) = calls
    assert arguments == (Path("samples"), 4)
    del settings["console"]
    assert settings == {
        "labels": (1,),
        "formats": ("npz",),
        "batch_size": 100,
        "sampling": Sampling(iterations=(3, 2), cfg=2.0, top_k=5, top_p=0.5, cache="iterate"),
    }


def test_edit_takes_mixtures_and_measures_refuse_them(trained: Path, tmp_path: Path) -> None:
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer", "--more-smooth")
    assert call("generate", *models, "--per-class", 1, "--out", tmp_path / "a.png")[0] == 0
    box = ("--box", 0, 0, 1, 1)
    edited = []
    for more in (models, models[:-1]):
        flags = ("--image", tmp_path / "a.png", "--label", 3, "--out", tmp_path / "b.png")
        assert call("edit", *more, *box, *flags)[0] == 0
        edited.append((tmp_path / "b.png").read_bytes())
    assert edited[0] != edited[1]
    code, _, errors = call("evaluate", *models)
    assert code == 2
    assert "Unrecognized options: --more-smooth" in errors


def test_published_checkpoints_are_read_from_files(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"model": tmp_path / "viar.pth", "tokenizer": tmp_path / "vae.pth"}
    loaded = {
        str(files["model"]): NextScaleTransformer.from_pretrained(trained / "viar"),
        str(files["tokenizer"]): Tokenizer.from_pretrained(trained / "tokenizer"),
    }
    for file in files.values():
        file.touch()
    monkeypatch.setattr(viar.commands.loading, "load_official", loaded.__getitem__)
    flags = ("--out", tmp_path / "a.png", "--per-class", 1)
    code, _, errors = call("generate", "--model", files["model"], "--tokenizer", files["tokenizer"], *flags)
    assert (code, errors) == (0, "")
    code, _, errors = call("generate", "--model", files["tokenizer"], "--tokenizer", files["model"], *flags)
    assert code == 2
    assert "--model: expected a NextScaleTransformer, found a Tokenizer" in errors


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            (),
            {"iterations": None, "cfg": 1.5, "top_k": 900, "top_p": 0.96, "cache": "equilibrium", "seed": 0},
        ),
        (("--iterations", 4), {"iterations": 4}),
        (("--iterations", 4, 2, "--cache", "iterate"), {"iterations": (4, 2), "cache": "iterate"}),
        (("--iterations", 4, 3, 2), {"iterations": [4, 3, 2]}),
        (("--adaptive", 0.1), {"iterations": viar.Adaptive(rtol=0.1)}),
        (("--budget", 9), {"iterations": viar.Budget(evaluations=9)}),
        (("--warm-start", "--guidance-reuse", 2), {"warm_start": True, "guidance_reuse": 2}),
        (("--more-smooth",), {"more_smooth": True}),
        (("--top-k", "None", "--top-p", 0.5, "--cfg", 0), {"top_k": None, "top_p": 0.5, "cfg": 0.0}),
    ],
)
def test_sampling_flags_reach_the_sampler(
    flags: tuple[object, ...],
    expected: dict[str, Any],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def noted(model: Any, tokenizer: Any, labels: torch.Tensor, **settings: Any) -> torch.Tensor:
        calls.append((labels.tolist(), settings))
        return torch.zeros(len(labels), 3, 8, 8)

    monkeypatch.setattr(viar.commands.generate, "generate", noted)
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer", "--per-class", 1)
    code, _, errors = call("generate", *models, "--out", tmp_path / "a.png", "--batch-size", 6, *flags)
    assert code == 0, errors
    assert [labels for labels, _ in calls] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert [settings["first_index"] for _, settings in calls] == [0, 6]
    assert all(settings[name] == value for _, settings in calls for name, value in expected.items())


def test_generate_reports_every_scale_of_every_batch(trained: Path, tmp_path: Path) -> None:
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer", "--per-class", 1)
    flags = ("--out", tmp_path / "a.png", "--batch-size", 6, "--iterations", 3, 1, "--report")
    code, output, _ = call("generate", *models, *flags)
    assert code == 0
    rows = [line.split() for line in output.splitlines() if " x " in line]
    assert [(row[0], row[3]) for row in rows] == 2 * [("1", "3.0"), ("2", "2.0"), ("4", "1.0")]
    code, _, errors = call("generate", *models[:4], "--num", 4, "--report")
    assert code == 2
    assert "--report: not with --num" in errors


def test_models_are_prepared_as_asked(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    monkeypatch.setattr(
        viar.commands.loading, "prepare_inference", lambda *a, **settings: prepared.append(settings)
    )
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer", "--per-class", 1)
    for flags in ((), ("--dtype", "bfloat16", "--compile", "--graphs")):
        call("generate", *models, "--out", tmp_path / "a.png", *flags)
    assert prepared == [
        {"dtype": None, "compile": False, "graphs": False},
        {"dtype": torch.bfloat16, "compile": True, "graphs": True},
    ]


def test_editing_has_no_graphs_to_be_asked_for(trained: Path, tmp_path: Path) -> None:
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer")
    code, output, errors = call("edit", *models, "--image", tmp_path / "a.png", "--label", 1, "--graphs")
    assert code == 2
    assert "--graphs" in output + errors


def test_evaluate_prints_measures_as_json(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_of_two_steps(monkeypatch)
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer")
    code, output, errors = call("evaluate", *models, "--per-class", 2, "--iterations", 1)
    assert (code, errors) == (0, "")
    measures = json.loads(output[output.index("{") :])
    assert {"validation_loss", "class_consistency", "classifier_held_out_accuracy"} <= set(measures)
    assert 3 < measures["validation_loss"] < 5  # hardly trained: about log 64
    assert 0 <= measures["class_consistency"] <= 1
    assert measures["generated"] == measures["matched"]
    assert measures["generated"]["num_images"] == measures["real"]["num_images"] == 20
    assert measures["ratios"]["fid"] == measures["matched"]["fid"] / measures["real"]["fid"] > 1
    assert measures["reference"]["num_images"] == 1612
    assert "--data is not given: images are compared with digits" in output
    assert (measures["data"], measures["per_class"], measures["dtype"]) == ("digits", 2, "float32")
    assert measures["sampling"]["seed"] == 0
    assert set(measures["sampling"]["iterations"]) == {1}
    assert "FID" in output[: output.index("{")]


def test_evaluate_takes_images_that_were_made_before(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of a model a series, and statistics that were written in place of data."""
    judge_of_two_steps(monkeypatch)
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer")
    made = ("--images", tmp_path / "series", "--data", "digits", "--judge", tmp_path / "judges")
    call("generate", *models, "--num", 20, "--out", tmp_path / "series", "--iterations", 1)
    code, output, errors = call("evaluate", *made, "--save-statistics", tmp_path / "digits.npz")
    assert (code, errors) == (0, "")
    first = json.loads(output[output.index("{") :])
    assert first["generated"]["num_images"] == 20
    assert first["class_consistency"] is not None  # the series tells its classes
    assert "validation_loss" not in first
    statistics = ("--reference", tmp_path / "digits.npz", "--out", tmp_path / "figures.json")
    code, output, errors = call("evaluate", *made, *statistics)
    assert (code, errors) == (0, "")
    again = json.loads((tmp_path / "figures.json").read_text())
    assert again["generated"] == pytest.approx(first["generated"])
    assert len(again["reference"]["sha256"]) == 64
    for arguments, message in (
        ((*made, "--reference", tmp_path / "digits.npz", "--sha256", "00"), "is another file: expected 00"),
        ((*made, *models), "--images: they are made already"),
        ((*made[:2],), "--data: a judge learns from real images; give them, or --features inception"),
        ((*made[:2], "--features", "inception"), "--reference: without --data there is nothing to compare"),
        ((*made, "--features", "vgg"), "--features: expected judge, inception or inception:FILE, got 'vgg'"),
        ((*made, "--sha256", "00"), "--sha256: this is the digest of the file --reference"),
        ((*models[:2],), "--model: given without --tokenizer"),
        (("--images", tmp_path / "nothing", "--data", "digits"), "--images: "),
        ((*made, "--reference", tmp_path / "none.npz"), "--reference: "),
    ):
        code, _, errors = call("evaluate", *arguments)
        assert code == 2
        assert message in errors


@pytest.mark.parametrize(
    ("flags", "iterations"),
    [((), "default"), (("--iterations", 1), 1), (("--iterations", 3, 1), None), (("--adaptive", 0.1), None)],
)
def test_validation_loss_is_by_the_iterations_that_images_are_made_with(
    flags: tuple[object, ...], iterations: Any, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_of_two_steps(monkeypatch)
    asked = []
    monkeypatch.setattr(
        viar.commands.evaluate, "validation_loss", lambda *_, iterations: asked.append(iterations) or math.nan
    )
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer")
    code, output, errors = call("evaluate", *models, "--per-class", 1, *flags)
    assert (code, errors) == (0, "")
    assert json.loads(output[output.index("{") :])["validation_loss"] is None  # nor is NaN any JSON
    config = NextScaleTransformer.from_pretrained(trained / "viar").config.trunk
    assert isinstance(config, ImplicitTrunkConfig)
    expected = config.iterations if iterations == "default" else iterations
    assert asked == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cfg", 2, "--top-k=5"), "--cfg, --top-k: of no use with --images, which are made already"),
        (("--iterations", 2), "--iterations: of no use with --images"),
        (("--per-class", 2), "--per-class: of no use with --images"),
        (("--no-warm-start",), "--no-warm-start: of no use with --images"),
        (("--batch-size", 2), "--batch-size: of no use with --images"),
        (("--judge", "note.txt"), "--judge: expected the name of a folder, note.txt is a file"),
        (("--save-statistics", "stats"), "--save-statistics: expected a name that ends in .npz, got stats"),
        (("--save-statistics", "a.npz", "--out", "./a.npz"), "--save-statistics: a.npz is --out too"),
        (("--reference", "nowhere"), "viar: --reference: expected one of"),
        (("--features", "inception"), "viar: --features: "),
        (("--reference", "nowhere", "--sha256", "00"), "viar: --sha256: expected a file to have a digest"),
        ((), "viar: --images: "),
    ],
)
def test_what_evaluate_cannot_take_with_images_is_named_by_its_flag(
    flags: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_of_two_steps(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")
    Path("note.txt").touch()
    Path("made").mkdir()
    save_picture(torch.rand(3, 8, 8), Path("made", "0.png"))
    Path("made", "1.png").write_bytes(Path("made", "0.png").read_bytes()[:60])
    code, _, errors = call("evaluate", "--images", "made", "--data", "digits", *flags)
    assert code == 2
    assert message in errors
    assert not any(f"{flag}: {flag[2:]}" in errors for flag in ("--features", "--sha256"))
    assert "source:" not in errors


def test_a_judge_is_of_data(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    flags = ("--features", "inception", "--reference", tmp_path / "made", "--judge", tmp_path / "judges")
    code, _, errors = call("evaluate", "--images", tmp_path / "made", *flags)
    assert code == 2
    assert "--judge: it is of real images; give them with --data, or leave the flag" in errors


# Messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--models", "x"), "--models"),
        (("generate", "--model", "m", "--tokenizer", "t", "--per-class", "many"), "many"),
        (("paint",), "paint"),
        ((), "expected a command, one of train-tokenizer"),
        (("generate", "--model", "m"), "--model: given without --tokenizer"),
        (("train", "digits-viar", "--model.trunk.num-before", "2"), "--model.trunk.num-before"),
        (("train-tokenizer", "digits", "--train.mixed-precision", "fp8", "--out", "x"), "mixed_precision"),
        (("train-tokenizer", "digits", "--train.steps", "0", "--out", "x"), "steps must be positive, got 0"),
        (
            ("train-tokenizer", "digits", "--model.sides", "2", "1", "--out", "x"),
            "strictly rising, got (2, 1)",
        ),
        (
            ("train-tokenizer", "digits", "--data", "no[/b]where", "--augment", "0", "--out", "x"),
            "got 'no[/b]where'",
        ),
        (("train-tokenizer", "digits", "--loss", "lpips", "--out", "x", "--train.steps", "1"), "'lpips'"),
    ],
)
def test_what_is_wrong_ends_with_code_2_and_a_message_that_names_it(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, errors = call(*arguments)
    assert code == 2
    assert message in errors + output
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cfg", -1), "--cfg: expected a number from 0 to 1,000,000, got -1.0"),
        (("--top-p", 2), "--top-p: expected a number in (0, 1]"),
        (("--labels", 10, 11), "--labels: expected classes 0 to 9"),
        (("--iterations", 1, 2, 3, 4), "--iterations: expected one count a scale (3), one for all"),
        (("--iterations", 1, 2, "--cache", "iterate"), "use cache='equilibrium'"),
        (("--iterations", 2, "--adaptive", 0.1), "--iterations, --adaptive and --budget exclude each other"),
        (("--budget", 30, "--adaptive", 0.1), "--adaptive and --budget exclude each other"),
        (("--budget", 2), "Budget: 3 scales need at least one evaluation each, got 2"),
        (("--adaptive", -1), "rtol"),
        (("--per-class", 0), "per_class must be at least 1, got 0"),
        (("--per-class", -3), "per_class must be at least 1, got -3"),
    ],
)
def test_sampling_settings_out_of_range_end_with_a_message(
    flags: tuple[object, ...], message: str, trained: Path, tmp_path: Path
) -> None:
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer")
    code, _, errors = call("generate", *models, "--out", tmp_path / "a.png", *flags)
    assert code == 2
    assert errors.startswith("viar: ")
    assert message in errors
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num", 3, "--per-class", 2), "--num and --per-class exclude each other"),
        (("--format", "png"), "--format: only with --num"),
        (("--num", 0), "num must be at least 1, got 0"),
        (("--num", 2, "--device", "gpu"), "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_what_a_series_cannot_be_ends_with_a_message(
    flags: tuple[object, ...], message: str, trained: Path, tmp_path: Path
) -> None:
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer")
    code, _, errors = call("generate", *models, "--out", tmp_path / "a", *flags)
    assert (code, message in errors) == (2, True), errors
    assert not (tmp_path / "a").exists()


def test_a_gpu_that_is_not_there_ends_with_a_message(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ("--model", trained / "viar", "--tokenizer", trained / "tokenizer", "--out", tmp_path / "a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = call("generate", *models, "--device", "cuda")
    assert (code, "PyTorch finds no GPU; use cpu" in errors) == (2, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, _, errors = call("generate", *models)
    assert (code, "no GPU 1, PyTorch finds 1" in errors) == (2, True)


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_a_folder_that_is_not_there_ends_with_a_message(name: str, trained: Path) -> None:
    models = {"model": trained / "viar", "tokenizer": trained / "tokenizer", name: "no/such/folder"}
    flags = [part for key, value in models.items() for part in (f"--{key}", value)]
    code, _, errors = call("generate", *flags)
    assert code == 2
    assert "no/such/folder" in errors


def test_a_model_for_another_tokenizer_ends_with_a_message(trained: Path, tmp_path: Path) -> None:
    codec = dataclasses.replace(Tokenizer.from_pretrained(trained / "tokenizer").config, codebook_size=32)
    Tokenizer(codec).save_pretrained(tmp_path)
    code, _, errors = call("generate", "--model", trained / "viar", "--tokenizer", tmp_path)
    assert code == 2
    assert "codebook_size is 32, the model's is 64" in errors


# Pictures


def test_a_grid_is_filled_row_by_row(tmp_path: Path) -> None:
    shades = torch.tensor([0.0, 0.2, 0.4, 0.6, 1.0])
    save_grid(shades.view(5, 1, 1, 1).expand(5, 3, 8, 8), tmp_path / "a.png", columns=2, least_side=20)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * 26, 3 * 26)  # three times as large, and an edge
        places = [(13 + 26 * column, 13 + 26 * row) for row in range(3) for column in range(2)]
        values = [image.getpixel(place)[0] for place in places]
        assert image.getpixel((0, 0)) == (255, 255, 255)
    assert values == [0, 51, 102, 153, 255, 255]


def test_names_stand_beside_the_rows_of_a_grid(tmp_path: Path) -> None:
    save_grid(torch.zeros(4, 3, 48, 48), tmp_path / "plain.png", columns=2)
    save_grid(torch.zeros(4, 3, 48, 48), tmp_path / "named.png", columns=2, row_names=["first", ""])
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "named.png") as named:
        margin = named.width - plain.width
        assert named.crop((margin, 0, *named.size)).tobytes() == plain.tobytes()
        upper, lower = (named.crop((0, 50 * row, margin, 50 * row + 50)) for row in range(2))
    assert upper.getextrema()[0] == (0, 255)  # something is written
    assert lower.getextrema()[0] == (255, 255)


def test_a_finished_run_is_not_overwritten(trained: Path) -> None:
    before = (trained / "tokenizer" / "model.safetensors").stat().st_mtime_ns
    code, _, errors = call("train-tokenizer", "digits", "--out", trained / "tokenizer", "--train.steps", 1)
    assert code == 2
    assert "--out" in errors
    assert "finished run" in errors
    assert (trained / "tokenizer" / "model.safetensors").stat().st_mtime_ns == before
