"""`viar app`: the web page."""

from __future__ import annotations

import errno
import socket
import threading
from typing import Literal

from rich.console import Console

from ..app.drawing import Pair
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .flags import ExecutionFlags
from .loading import load_model, load_pair, make_ready
from .output import report

LOOPBACK = "127.0.0.1"
MOST_PORT = 65535


def app_command(
    model: str | None = None,
    tokenizer: str | None = None,
    var: str | None = None,
    var_tokenizer: str | None = None,
    host: str = LOOPBACK,
    port: int | None = None,
    open: bool = False,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Serve a web page that generates and in-paints, until Ctrl-C; needs pip install 'deqlib[app]'.

    It asks for nothing from the network. Programs can call it too, with gradio_client.

    Args:
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VIAR or VAR; without it and
            --tokenizer the VIAR of handwritten digits that comes with the package.
        tokenizer: The same, of its tokenizer.
        var: The same, of a model of the same classes to show beside it, such as a VAR.
        var_tokenizer: The same, of the tokenizer of that one.
        host: Address to listen at; the default is reached from this machine alone, 0.0.0.0 by whoever
            reaches this machine, with no password.
        port: To listen at; default the first free one from 7860 on.
        open: Open the page in a browser.
        device: cpu, cuda, or cuda:1; auto is cuda where there is one.
        dtype: Of the blocks' weights; default as saved.
    """
    _check_both(var, var_tokenizer)
    _check_gradio()
    _check_address(host, port)
    flags = ExecutionFlags(device=device, dtype=dtype)
    pair = Pair(*load_pair(model, tokenizer, flags))
    beside = None if var is None or var_tokenizer is None else _load_beside(pair, var, var_tokenizer, flags)
    _serve(pair, beside, host, port, open)


def _serve(pair: Pair, beside: Pair | None, host: str, port: int | None, open_browser: bool) -> None:
    """Make the page, say where it is, and end with Ctrl-C or SIGTERM."""
    from ..app.page import build_page, serve

    page = build_page(pair, beside)
    address = serve(page, host, port, open_browser=open_browser)
    console = Console()
    console.print(f"the page is at {address}; Ctrl-C ends it", markup=False, soft_wrap=True)
    report({"address": address})
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _check_both(model: str | None, tokenizer: str | None) -> None:
    """Raise unless `--var` and `--var-tokenizer` are both given, or none of them."""
    if (model is None) != (tokenizer is None):
        given, missing = ("--var", "--var-tokenizer") if tokenizer is None else ("--var-tokenizer", "--var")
        raise ValueError(f"{given}: given without {missing}; give both, or neither for one model alone")


def _check_address(host: str, port: int | None) -> None:
    """Raise unless the page can be served there, before time is spent on models."""
    if port is not None and not 1 <= port <= MOST_PORT:
        raise ValueError(f"--port: expected a number from 1 to {MOST_PORT}, got {port}")
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"--port: {port} is taken at {host}; give another, or none for the first free one"
            ) from error
        if error.errno == errno.EACCES:
            raise ValueError(f"--port: {port} is for the administrator alone; give one above 1023") from error
        raise ValueError(
            f"--host: expected an address of this machine, got {host!r}; give {LOOPBACK}, or 0.0.0.0 for all "
            "that it has"
        ) from error


def _check_gradio() -> None:
    """Raise unless the page can be made, before time is spent on models."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(f"viar app needs the package gradio ({error}); pip install 'deqlib[app]'") from error


def _load_beside(pair: Pair, model: str, tokenizer: str, flags: ExecutionFlags) -> Pair:
    """The model of `--var`, ready to generate what the first one does."""
    beside = Pair(
        load_model(NextScaleTransformer, model, "--var"), load_model(Tokenizer, tokenizer, "--var-tokenizer")
    )
    ours, theirs = pair.model.config.num_classes, beside.model.config.num_classes
    if ours != theirs:
        raise ValueError(
            f"--var: has {theirs} classes, the model that it is shown beside {ours}; give one of the same "
            "classes"
        )
    make_ready(beside.model, beside.tokenizer, flags)
    return beside
