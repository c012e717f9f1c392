"""Commands that are ended from outside, and those that lose a process that they work with."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

import viar.commands.cli
from viar.commands.ended import Ended, lost_another, told_of_sigterm
from viar.files import replacing

GLOO = (
    "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1246. "
    "This is typically caused by a remote worker crashing.\nmore"
)


def half_a_file(path: Path) -> None:
    with told_of_sigterm(), replacing(path) as file:
        file.write(b"half")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:  # a second one is not waited with
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_leaves_no_half_a_file(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Ended):
        half_a_file(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_among_several_processes_sigterm_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with told_of_sigterm():
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_gets_sigterm_tells_so_and_ends_with_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(arguments: list[str]) -> None:
        raise Ended

    monkeypatch.setattr(viar.commands.cli, "_run", end)
    with pytest.raises(SystemExit) as ended:
        viar.commands.cli.main()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "viar: ended by SIGTERM\n"


def test_a_process_that_is_lost_is_told_with_the_way_out() -> None:
    said = lost_another(RuntimeError(GLOO))
    assert said is not None
    assert said.startswith(
        "another process of this work has ended or does not answer (Connection closed by peer"
    )
    assert "typically" not in said
    assert viar.commands.cli.one_line(RuntimeError(GLOO)) == said
    assert lost_another(dist.DistStoreError("wait timeout")) is not None
    assert lost_another(RuntimeError("shapes do not fit")) is None
    assert lost_another(ValueError(GLOO)) is None
