"""The web page served on loopback: what programs get from it, and that it asks for nothing else."""

from __future__ import annotations

import gc
import json
import re
import socket
import urllib.error
import urllib.request
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image
from served_page import served
from tiny_models import tiny_tokenizer, tiny_transformer

import viar
from viar.app.drawing import Pair
from viar.app.markup import picture_url

pytest.importorskip("gradio_client", reason="the web page needs gradio")
# Of what the client is made of, while it is imported.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(tiny_transformer(), tiny_tokenizer())


@pytest.fixture(scope="module")
def address(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(pair, tmp_path_factory.mktemp("models")) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Callable[..., Any]]:
    """Asks as a program does: the name of a call, and what it takes."""
    from gradio_client import Client

    held = [Client(address, verbose=False)]
    yield lambda name, *values, **settings: held[0].predict(*values, api_name=f"/{name}", **settings)
    held.pop().close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # it leaves an event loop open, which is no fault of a later test


def generated(pair: Pair, label: int, seed: int, **settings: Any) -> str:
    return picture_url(viar.generate(pair.model, pair.tokenizer, [label], seed=seed, **settings)[0])


def test_programs_get_the_picture_and_report_of_generate(pair: Pair, client: Any) -> None:
    answer = client("generate", 1, 5, 2.0, [2, 1, 1])
    assert answer["picture"] == generated(pair, 1, 5, cfg=2.0, iterations=[2, 1, 1])
    assert [scale["evaluations"] for scale in answer["report"]["scales"]] == [2, 1, 1]
    assert answer["report"]["decode_seconds"] > 0
    assert client("generate", label=1)["picture"] == generated(pair, 1, 0)


def test_programs_get_a_picture_in_painted_and_are_told_what_is_wrong(pair: Pair, client: Any) -> None:
    from gradio_client.exceptions import AppError

    whole = picture_url(torch.zeros(3, 6, 6))
    half = picture_url(viar.box_mask((0, 0, 1, 0.5), 6).expand(3, 6, 6))
    picture = generated(pair, 0, 1)
    anew = client("in_paint", picture, whole, 2, 9)["picture"]
    assert anew == generated(pair, 2, 9)  # with nothing kept
    assert client("in_paint", picture, half, 2, 9)["picture"] not in (anew, picture)
    with pytest.raises(AppError, match="label: expected an integer from 0 to 3, got 7"):
        client("generate", 7)
    with pytest.raises(AppError, match="picture: expected a PNG or JPEG file in base64"):
        client("in_paint", "?", whole, 0)


def test_two_who_ask_at_once_get_what_each_asked_for(pair: Pair, client: Any) -> None:
    with ThreadPoolExecutor(2) as threads:
        asked = [(label, seed) for seed in range(4) for label in (0, 2)]
        answers = list(threads.map(lambda pick: client("generate", *pick)["picture"], asked))
    assert answers == [generated(pair, label, seed) for label, seed in asked]


def asked(address: str, path: str, sent: object = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer, as a program gets it that knows nothing of the page."""
    content = None if sent is None else json.dumps(sent).encode()
    headers = {"content-type": "application/json", **headers}
    request = urllib.request.Request(address + path, content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def told_by(address: str, call: str, values: list[object]) -> str:
    """The events that answer a call."""
    path = f"/gradio_api/call/{call}"
    status, answer = asked(address, path, {"data": values})
    assert status == 200, answer
    status, events = asked(address, f"{path}/{json.loads(answer)['event_id']}")
    assert status == 200
    return events


@pytest.mark.promise("The page is for this machine")
@pytest.mark.parametrize(
    ("call", "values", "told"),
    [
        ("generate", ["three", 0, 1.5, None], "label: expected an integer from 0 to 3, got 'three'"),
        ("generate", [None, 0, 1.5, None], "label: expected an integer from 0 to 3, got None"),
        ("generate", [1, 2.5, 1.5, None], "seed: expected an integer"),
        ("generate", [1, 0, {"a": 1}, None], "guidance: expected a number from 0 to 10, got {'a': 1}"),
        ("generate", [1, 0, 1.5, 7], "iterations: expected a list of one count a scale, got 7"),
        ("generate", [1, 0, 1.5, [1] * 9999], "one count a scale, 3 in all, got 9999; leave them out"),
        ("generate", [1, 0, 1.5, [8, 2]], "iterations: expected one count a scale, 3 in all, got 2; leave"),
        ("in_paint", [5, "", 1, 0, 1.5, None], "picture: expected a PNG or JPEG file in base64, got 5"),
        ("in_paint", ["A" * 11_000_000, "", 1, 0, 1.5, None], "picture: expected at most 8,000,000 bytes"),
        ("generate", [], "generate: expected 4 values, got 0"),
        ("generate", [1] * 5, "generate: expected 4 values, got 5"),
    ],
    ids=[
        "text",
        "nothing",
        "half",
        "object",
        "number",
        "many",
        "two",
        "no text",
        "huge",
        "without arguments",
        "too many",
    ],
)
def test_a_malformed_call_is_told_what_is_wrong_and_the_server_goes_on(
    address: str, pair: Pair, call: str, values: list[object], told: str
) -> None:
    events = told_by(address, call, values)
    assert told in json.loads(events.partition("data: ")[2])["error"]
    assert generated(pair, 1, 0) in told_by(address, "generate", [1, 0, 1.5, None])


@pytest.mark.promise("The page is for this machine")
def test_a_picture_that_would_fill_the_memory_is_refused(client: Any) -> None:
    from gradio_client.exceptions import AppError

    file = BytesIO()
    Image.new("1", (16_000, 16_000)).save(file, "png")
    bomb = b64encode(file.getvalue()).decode()
    with pytest.raises(AppError, match=r"picture: (expected at most|more than)"):
        client("in_paint", bomb, bomb, 1)
    with pytest.raises(TypeError, match="label"):
        client("generate")


@pytest.mark.promise("The page is for this machine")
def test_nothing_is_served_but_the_page_and_nothing_is_written(address: str) -> None:
    for path in ("/etc/passwd", "models/viar/app/page.py", "../../../../etc/passwd", "file:///etc/passwd"):
        assert asked(address, f"/gradio_api/file={path}")[0] == 404, path
    assert asked(address, "/gradio_api/upload", {})[0] == 404
    picture = {"data": [1, 0, 1.5, None], "fn_index": 0, "session_hash": "s"}
    for path in ("run/generate", "run/predict", "api/generate", "api/predict", "call/v2/generate"):
        assert asked(address, f"/gradio_api/{path}", picture)[0] == 404, path
    assert asked(address, "/gradio_api/queue/join", {**picture, "fn_index": 0})[0] == 200
    assert asked(address, "/gradio_api/deep_link?session_hash=s")[0] == 404
    status, text = asked(address, "/gradio_api/call/generate", {"data": ["A" * 25_000_000]})
    assert (status, "request: expected at most 24,000,000 bytes" in text) == (413, True)


@pytest.mark.promise("The page is for this machine")
def test_no_request_makes_the_page_fetch_something(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        link = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.png"
        file = {"path": link, "url": link, "meta": {"_type": "gradio.FileData"}}
        for data in ([file, 0, 1.5, None], [[{"a": file}], 0, 1.5, None]):
            body = {"data": data, "fn_index": 0, "session_hash": "s"}
            for path in ("call/generate", "queue/join"):
                status, answer = asked(address, f"/gradio_api/{path}", body)
                assert (status, "send pictures in base64" in answer) == (400, True)
        for path in (f"file={link}", f"proxy={link}", f"file/{link}"):
            assert asked(address, f"/gradio_api/{path}")[0] == 404
        with pytest.raises(BlockingIOError):  # nobody called
            elsewhere.accept()


@pytest.mark.promise("The page is for this machine")
def test_pages_and_names_of_elsewhere_are_not_served(address: str) -> None:
    sent = {"data": [1, 0, 1.5, None]}
    assert asked(address, "/", host="example.org")[0] == 403
    assert asked(address, "/gradio_api/call/generate", sent, origin="http://example.org")[0] == 403
    assert asked(address, "/gradio_api/call/generate", sent, origin="http://localhost:1")[0] == 200


@pytest.mark.promise("The page is for this machine")
def test_what_a_caller_sends_does_not_get_to_the_terminal_as_it_is(address: str) -> None:
    text = "\x1b[31m\x07\n"
    told_by(address, "generate", [text])
    told_by(address, "generate", [text, text, text, [text]])
    assert asked(address, "/gradio_api/call/nothing", {"data": [text]})[0] == 400
    assert asked(address, "/gradio_api/call/generate", {"data": text})[0] == 422
    headers = {"x-forwarded-host": "[\t", "x-gradio-server": "[\t"}
    for index in range(-1, 20):  # every event of the page, and some that are none
        body = {"data": [text, {"a": text}], "fn_index": index, "session_hash": f"s{index}", "trigger_id": 1}
        for data in ([text, {"a": text}], [text] * 6, [{"file": text}], [text]):
            answer = asked(address, "/gradio_api/queue/join?%1b=%ff", {**body, "data": data}, **headers)
            if answer[0] == 200:
                asked(address, f"/gradio_api/queue/data?session_hash=s{index}")
    asked(address, "/gradio_api/queue/data?session_hash=nobody%1b")
    # What they made is looked at when the page has ended, see `served`.


def test_the_page_is_whole_without_another_network_and_has_a_slider_for_each_scale(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        html = answer.read().decode()
    fetched = re.findall(r'<(?:script|link)[^>]+(?:src|href)="(.*?)"', html)
    assert fetched
    assert not [link for link in fetched if re.match("(https?:)?//", link) and not link.startswith(address)]
    sliders = re.findall(r'"label":"(iterations at .*?)"', html)
    assert sliders == [f"iterations at {side} x {side}" for side in (1, 2, 3)]
