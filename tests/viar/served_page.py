"""`viar app` in a process of its own, with tiny models."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_models import tiny_transformer

from viar.app.drawing import Pair


@contextmanager
def served(pair: Pair, folder: Path, *, ended_by: signal.Signals = signal.SIGINT) -> Iterator[str]:
    """The address of a page of `pair`, with a VAR of the same tokenizer beside it.

    In the end the process gets the signal, and must end as it promises, with no file of a browser left. What
    was asked of it may have printed nothing to a terminal but lines of text, and no traceback.

    Args:
        pair: a VIAR.
        folder: where models and the files that browsers send are written.
        ended_by: SIGINT, as Ctrl-C, or SIGTERM.
    """
    models = {"model": pair.model, "tokenizer": pair.tokenizer, "var": tiny_transformer("explicit")}
    models["var-tokenizer"] = pair.tokenizer
    arguments = [sys.executable, "-m", "viar", "app", "--device", "cpu"]
    for name, model in models.items():
        model.save_pretrained(folder / name)
        arguments += [f"--{name}", str(folder / name)]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "sent")}
    told = folder / "told.txt"
    with (
        told.open("w") as errors,
        subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as server,
    ):
        assert server.stdout is not None
        (found,) = re.findall(r"http://127\.0\.0\.1:\d+", server.stdout.readline()) or [""]
        try:
            assert found
            yield found
        finally:
            server.send_signal(ended_by)
            code = server.wait(60)
    lines = told.read_text().splitlines()
    assert code == 128 + ended_by, lines
    assert all(line.isprintable() and line.startswith("viar: ") for line in lines), lines
    assert not [path for path in (folder / "sent").rglob("*") if path.is_file()]
