"""Whoever reads what is printed may leave; whoever logs may find the disk full."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any

import pytest

from distill.core import output


def leave() -> Any:
    """Make standard output a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    sys.stdout = io.TextIOWrapper(io.FileIO(write, "w"))
    return sys.stdout


def test_a_run_goes_on_unread(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back at the end
    broken = leave()
    with output.guarded(), output.unread():
        print("one")
        print("two")
    assert capsys.readouterr().err == "nobody reads standard output any more; the run goes on without it\n"
    assert sys.stdout is broken


def test_another_command_does_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    leave()
    with pytest.raises(SystemExit) as ended, output.guarded():
        print("one")
    assert ended.value.code == output.UNREAD
    assert capsys.readouterr().err == ""


def test_what_is_read_arrives_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with output.guarded():
        print("one")
        assert capfd.readouterr().out == "one\n"


def test_a_log_that_cannot_be_written_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """wandb's log is on the disk that is full."""
    full = logging.StreamHandler(open("/dev/full", "w"))  # noqa: SIM115
    logger = logging.Logger("library")
    logger.addHandler(full)
    with output.guarded():
        logger.error("a line")
    assert capsys.readouterr().err == ""
