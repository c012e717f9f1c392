"""What is behind the web page: pictures scale by scale, in-painting, what is shown, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from base64 import b64decode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import call
from tiny_models import SIDES, tiny_tokenizer, tiny_transformer

import viar
from viar import GenerationReport, Sampling, ScaleReport
from viar.app import drawing, markup
from viar.app.calls import calls_of
from viar.app.drawing import MOST_GUIDANCE, MOST_ITERATIONS, MOST_SEED, Pair, draw, in_paint, sampling_of
from viar.app.limits import LimitedRequests, Message, Receive, Send, Server
from viar.app.refusals import NAMES_OF_FILES, RefusedError, check_content
from viar.data.decoding import decode_bytes
from viar.data.pictures import as_picture
from viar.generation.sampling import grow_images

ROOT = Path(__file__).resolve().parents[2]
SIDE = 6  # pixels of the tiny tokenizer's images
OWN = [3, 3, 3]  # iterations of the tiny model


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(tiny_transformer(), tiny_tokenizer())


@pytest.fixture(scope="module")
def var() -> Pair:
    return Pair(tiny_transformer("explicit"), tiny_tokenizer())


def picture(side: int = SIDE) -> Image.Image:
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_kept(side: int = SIDE) -> Image.Image:
    """The upper half is kept."""
    mask = Image.new("L", (side, side), 255)
    mask.paste(0, (0, side // 2, side, side))
    return mask


def of_url(url: str) -> Image.Image:
    head, _, text = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(BytesIO(b64decode(text)))


# Pictures scale by scale


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (7, 3), (MOST_SEED, 2)])
def test_a_picture_that_grows_ends_as_the_one_that_is_generated_at_once(
    seed: int, count: int, pair: Pair
) -> None:
    model, tokenizer = pair.model, pair.tokenizer
    labels, sampling = [0, 2], Sampling(seed=seed, iterations=count)
    grown = list(grow_images(model, tokenizer, labels, sampling))
    images, report = viar.generate(model, tokenizer, labels, seed=seed, iterations=count, return_report=True)
    assert torch.equal(grown[-1][0], images)
    told = grown[-1][1]
    for scales in (told.scales, report.scales):
        assert [scale.side for scale in scales] == list(SIDES)
    same = [(s.evaluations, s.residual, s.cache_bytes) for s in report.scales]
    assert [(s.evaluations, s.residual, s.cache_bytes) for s in told.scales] == same
    assert [len(part.scales) for _, part in grown] == [1, 2, 3]


def test_after_each_scale_a_picture_is_what_its_tokens_so_far_decode_to(pair: Pair) -> None:
    sampling = Sampling(seed=5)
    tokens = viar.sample_tokens(pair.model, pair.tokenizer, [1], sampling).tokens
    with torch.no_grad():
        for (image, _), k in zip(draw(pair, 1, sampling), range(1, 4), strict=True):
            expected = pair.tokenizer.decode(tokens[:k])[0].add(1).div(2)
            torch.testing.assert_close(image, expected)


def test_a_model_without_iterations_is_drawn_by_class_seed_and_guidance_alone(var: Pair) -> None:
    assert (var.name, var.configured, drawing.presets(var)) == ("VAR", [], {})
    *_, (image, report) = draw(var, 0, sampling_of(var, 3, 1.5))
    assert torch.equal(image, viar.generate(var.model, var.tokenizer, [0], seed=3)[0])
    assert report.evaluations is None
    with pytest.raises(ValueError, match="iterations: an explicit trunk has none to choose"):
        sampling_of(var, 0, 1.5, [1, 1, 1])


def test_every_preset_is_a_schedule_that_the_page_allows(pair: Pair) -> None:
    schedules = drawing.presets(pair)
    assert schedules["the model's own"] == OWN
    assert schedules["3 falling to 1"] == [3, 2, 1]
    for counts in schedules.values():
        assert sampling_of(pair, 0, 1.5, counts).schedule(pair.model.trunk) == counts


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 4}, "label: expected an integer from 0 to 3, got 4"),
        ({"label": "1"}, "label: expected an integer from 0 to 3, got '1'"),
        ({"label": True}, "label: expected an integer"),
        ({"seed": -1}, f"seed: expected an integer from 0 to {MOST_SEED}, got -1"),
        ({"seed": MOST_SEED + 1}, "seed: expected an integer"),
        ({"seed": None}, "seed: expected an integer .* got None"),
        ({"guidance": MOST_GUIDANCE + 1}, "guidance: expected a number from 0 to 10, got 11"),
        ({"guidance": float("nan")}, "guidance: expected a number"),
        ({"guidance": "much"}, "guidance: expected a number .* got 'much'"),
        ({"iterations": [1, 0, 1]}, "iterations: expected an integer from 1 to 20, got 0"),
        ({"iterations": [MOST_ITERATIONS + 1] * 3}, "iterations: expected an integer from 1 to 20, got 21"),
        ({"iterations": [1.5, 1, 1]}, "iterations: expected an integer from 1 to 20, got 1.5"),
        ({"iterations": [1, 1]}, "iterations: expected one count a scale"),
        ({"iterations": 5}, "iterations: expected a list of one count a scale, got 5"),
        ({"seed": "9" * 1000}, "seed: expected an integer .* got '9{59}[.]{3}$"),
    ],
    ids=str,
)
def test_what_costs_too_much_or_means_nothing_is_refused_by_name(
    changes: dict[str, object], message: str, pair: Pair
) -> None:
    generate = calls_of(pair)["generate"]
    with pytest.raises(ValueError, match=message):
        generate(**{"label": 1, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no base64!", "picture: expected a PNG or JPEG file in base64, got 'no base64!'"),
        (None, "picture: expected a PNG or JPEG file in base64, got None"),
        ("aGVsbG8=", "picture: is no picture"),
    ],
)
def test_a_text_that_is_no_picture_is_refused(text: str, message: str, pair: Pair) -> None:
    with pytest.raises(ValueError, match=message):
        calls_of(pair)["in_paint"](text, markup.picture_url(torch.zeros(3, 6, 6)), 1)


def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = BytesIO()
    picture(12).save(file, "png")
    monkeypatch.setattr(drawing, "MOST_PIXELS", 100)
    with pytest.raises(ValueError, match="picture: expected at most 100 pixels, got 12 x 12"):
        drawing.read_sent(file.getvalue(), "picture")
    monkeypatch.setattr(drawing, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="picture: expected at most 10 bytes"):
        drawing.read_sent(file.getvalue(), "picture")
    assert decode_bytes(file.getvalue(), "picture", most_pixels=144).size == (12, 12)


# In-painting


def test_in_painting_is_edit_with_what_was_painted(pair: Pair) -> None:
    sampling = sampling_of(pair, 2, 1.5)
    made, _ = in_paint(pair, picture(), half_kept(), 1, sampling)
    before = drawing.fitted(picture(), SIDE)
    kept = torch.ones(SIDE, SIDE)
    kept[SIDE // 2 :] = 0
    expected = viar.edit(pair.model, pair.tokenizer, before[None], kept, [1], sampling=sampling)
    assert torch.equal(made, expected[0])
    assert torch.equal(made[:, 0], before[:, 0])
    assert not torch.equal(made[:, -1], before[:, -1])


@pytest.mark.parametrize("factor", [1, 2, 7])
def test_a_picture_enlarged_for_painting_is_the_same_again(factor: int) -> None:
    large = picture().resize((SIDE * factor, SIDE * factor), Image.Resampling.NEAREST)
    assert torch.equal(drawing.fitted(large, SIDE), drawing.fitted(picture(), SIDE))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (SIDE, SIDE), 255), "mask: leaves nothing to make anew"),
        (Image.new("L", (5, 4)), "mask: has 5 x 4 pixels, the picture 6 x 6"),
    ],
    ids=["all kept", "another size"],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Image.Image, message: str, pair: Pair) -> None:
    with pytest.raises(ValueError, match=message):
        in_paint(pair, picture(), mask, 1, Sampling())


# What is shown


def test_a_picture_in_an_address_is_the_picture(pair: Pair) -> None:
    image = torch.rand(3, 5, 5)
    assert np.array_equal(of_url(markup.picture_url(image)), as_picture(image))
    answer = calls_of(pair)["generate"](2, seed=4)
    made = viar.generate(pair.model, pair.tokenizer, [2], seed=4)[0]
    assert np.array_equal(of_url(answer["picture"]), as_picture(made))
    assert [scale["evaluations"] for scale in answer["report"]["scales"]] == OWN


def cells(html: str) -> list[list[str]]:
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    return [row[1:] for row in rows]


def test_the_numbers_shown_are_those_of_the_report() -> None:
    scales = (ScaleReport(1, 8.0, 1.5e-3, 0.0125, 2000), ScaleReport(2, 6.5, None, 0.02, 12345))
    html = markup.report_panel(
        "VIAR", "data:b", ["data:a", "data:c"], GenerationReport(scales, 0.0011), (1, 2, 3)
    )
    assert cells(html) == [
        list(markup.HEADINGS[1:]),
        ["1 x 1", "8.0", "1.5e-03", "12.5", "2.0"],
        ["2 x 2", "6.5", "-", "20.0", "12.3"],
        ["3 x 3", "", "", "", ""],
        ["decoding", "", "", "1.1", ""],
        ["all", "14.5", "", "33.6", "12.3"],
    ]
    assert re.findall(r'<img class="whole" src="(.*?)"', html) == ["data:b"]
    assert re.findall(r'<img class="part" src="(.*?)"', html) == ["data:a", "data:c"]
    assert "&lt;b&gt;" in markup.picture_panel("<b>", "data:c", 0.5)


@pytest.mark.parametrize("name", ["frontier", "convergence"])
def test_the_figures_of_the_page_are_those_of_the_documentation(name: str) -> None:
    shown = ROOT / "models/viar/app/figures" / f"{name}.png"
    assert shown.read_bytes() == (ROOT / "docs/assets/benchmarks" / f"viar_{name}.png").read_bytes()


# What is taken


HERE = (b"host", b"127.0.0.1:7860")


def answers_to(
    *requests: list[bytes | None],
    server: Server | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (HERE,),
    asked: str = "GET /",
    **limits: Any,
) -> list[list[Message]]:
    """What each of some requests at a time gets of a server that takes 10 bytes; None is an endless pause."""

    async def read_all(scope: Message, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b""})

    wanted = {"most_bytes": 10, "most_held": 30, "most_seconds": 0.2, "most_open": 9, **limits}
    limited = LimitedRequests(server or read_all, **wanted)
    method, _, path = asked.partition(" ")
    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}

    async def ask(chunks: list[bytes | None]) -> list[Message]:
        sent: list[Message] = []
        parts = iter(chunks)

        async def receive() -> Message:
            await asyncio.sleep(0)
            part = next(parts, b"")
            if part is None:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": part, "more_body": part != b""}

        async def send(message: Message) -> None:
            sent.append(message)

        await limited(scope, receive, send)
        return sent

    async def ask_all() -> list[list[Message]]:
        return await asyncio.gather(*(ask(chunks) for chunks in requests))

    return asyncio.run(ask_all())


def statuses(*requests: list[bytes | None], **limits: Any) -> list[int]:
    return [sent[0]["status"] for sent in answers_to(*requests, **limits)]


@pytest.mark.parametrize(
    ("chunks", "status"), [([], 200), ([b"12345"] * 2, 200), ([b"12345"] * 3, 413), ([b"1" * 11], 413)]
)
@pytest.mark.parametrize("told", [True, False])
def test_a_request_of_too_many_bytes_is_refused_whether_it_tells_or_not(
    chunks: list[bytes | None], status: int, told: bool
) -> None:
    length = str(sum(len(chunk or b"") for chunk in chunks)).encode()
    assert statuses(chunks, headers=[HERE, (b"content-length", length)] if told else [HERE]) == [status]


@pytest.mark.promise("The page is for this machine")
def test_requests_that_stall_are_given_up_and_do_not_hold_more_than_is_allowed() -> None:
    stalled: list[bytes | None] = [b"123456", None]
    assert statuses(stalled) == [408]
    assert statuses(stalled, stalled, [b"123456"], most_held=12) == [408, 408, 503]
    assert statuses(stalled, stalled, stalled, most_open=2) == [408, 408, 503]
    assert statuses(*[[b"123456"]] * 3, most_held=18) == [200] * 3


@pytest.mark.promise("The page is for this machine")
@pytest.mark.parametrize(
    "name", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST", "127.0.0.1:1", "[::1]:7860"]
)
def test_names_of_this_machine_are_served(name: str) -> None:
    host = name.encode()
    assert statuses([], headers=[(b"host", host)]) == [200]
    assert statuses([], headers=[(b"host", host), (b"origin", b"http://" + host)]) == [200]


@pytest.mark.promise("The page is for this machine")
@pytest.mark.parametrize(
    "name",
    [
        "",
        "example.org",
        "localhost.example.org",
        "192.0.2.1:80",
        "127.0.0.1@example.org",
        "127.0.0.1:99999",
        "a@127.0.0.1",
        "127.0.0.1.",
        "[::2]",
        "127.0.0.1/x",
        "\x1b[31m",
        "\xff",
        "[",
        "0.0.0.0",
    ],
)
def test_names_of_elsewhere_are_refused_unless_the_page_is_served_to_others(name: str) -> None:
    host = name.encode("latin-1")
    assert statuses([], headers=[(b"host", host)]) == [403]
    assert statuses([], headers=[HERE, (b"host", host)]) == [403]
    assert statuses([], headers=[HERE, (b"origin", b"http://" + host)]) == [403]
    assert statuses([], headers=[(b"host", host)], here_only=False) == [200]
    (sent,) = answers_to([], headers=[(b"host", host)])
    assert sent[-1]["body"].decode().isprintable()


@pytest.mark.promise("The page is for this machine")
def test_who_tells_no_host_or_a_page_without_an_origin_is_refused() -> None:
    assert statuses([], headers=[]) == [403]
    assert statuses([], headers=[HERE, (b"origin", b"null")]) == [403]


@pytest.mark.promise("The page is for this machine")
@pytest.mark.parametrize(
    "asked",
    [
        "POST /gradio_api/run/generate",
        "POST /gradio_api/api/generate/",
        "POST /gradio_api/upload",
        "GET /gradio_api/deep_link",
        "GET /gradio_api/file=x",
        "GET /gradio_api/proxy=x",
        "PUT /",
        "POST /",
        "POST /gradio_api/call/v2/generate",
        "GET /monitoring/summary",
        "GET /config/\x1b",
        "get /config",
    ],
)
def test_what_the_page_does_not_need_is_not_there(asked: str) -> None:
    assert statuses([b"{}"], asked=asked) == [404]


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@pytest.mark.promise("The page is for this machine")
@settings(max_examples=30)
@given(JSON, st.lists(st.sampled_from(["list", "object"]), max_size=20), st.sampled_from(NAMES_OF_FILES))
def test_a_file_is_refused_however_deep_it_stands_in_what_is_sent(
    beside: object, around: list[str], name: str
) -> None:
    sent, file = {"data": [beside]}, {name: "http://192.0.2.1/x.png"}
    check_content(json.dumps(sent).encode())
    value: object = file
    for kind in around:
        value = [beside, value] if kind == "list" else {"a": value, "b": beside}
    with pytest.raises(RefusedError, match="as of a file"):
        check_content(json.dumps({**sent, "event_data": value}).encode())


@pytest.mark.promise("The page is for this machine")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_json_object_is_refused(content: bytes) -> None:
    limits = {"most_bytes": 200_000, "most_held": 200_000}
    assert statuses([content] if content else [], asked="POST /gradio_api/queue/join", **limits) == [400]


@pytest.mark.promise("The page is for this machine")
@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_nobody_foresaw_is_answered_to_its_end_and_prints_no_control_characters(
    begun: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fails(scope: Message, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200})
        raise RuntimeError("\x1b[31m\n")

    (sent,) = answers_to([], server=fails)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == (200 if begun else 400)
    printed = capsys.readouterr().err
    assert printed == ("" if begun else "viar: GET /: \\x1b[31m\\n\n")


# The command


def test_the_command_says_what_to_install_where_gradio_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, errors = call("app")
    assert code == 2
    assert errors.startswith("viar: viar app needs the package gradio (")
    assert errors.endswith("pip install 'deqlib[app]'")


@pytest.mark.parametrize("given", ["--var", "--var-tokenizer"])
def test_a_model_beside_without_its_tokenizer_or_the_reverse_is_refused(given: str) -> None:
    code, _, errors = call("app", given, "somewhere")
    assert code == 2
    assert errors.startswith(f"viar: {given}: given without --var")


def test_a_port_or_address_that_cannot_be_had_is_told_before_models_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = call("app", "--port", str(port), "--model", "nowhere")
    assert (code, errors) == (
        2,
        f"viar: --port: {port} is taken at 127.0.0.1; give another, or none for the first free one",
    )
    for port in ("0", "65536", "-1"):
        code, _, errors = call("app", "--port", port)
        assert (code, errors) == (2, f"viar: --port: expected a number from 1 to 65535, got {port}")
    code, _, errors = call("app", "--host", "192.0.2.1")  # of no machine, by RFC 5737
    assert code == 2
    assert errors.startswith("viar: --host: expected an address of this machine, got '192.0.2.1'; give")


def test_nothing_but_the_page_and_its_command_needs_gradio() -> None:
    sources = (ROOT / "models/viar").rglob("*.py")
    assert {path.name for path in sources if "import gradio" in path.read_text()} == {"page.py", "app.py"}
