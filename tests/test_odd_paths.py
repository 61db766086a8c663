"""Paths that somebody typed and that lead nowhere end every verb with one line, and what is no file is not replaced."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from distill.cli import app, main
from distill.core.errors import InputError
from tests.verbs import VERBS, WITHOUT_A_PATH


def outcome(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["distill", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_these_are_all_verbs() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    names |= {group.name for group in app.registered_groups}
    assert names - WITHOUT_A_PATH == {verb[0] for verb in VERBS}


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 2500, "x\0y"], ids=["long name", "long path", "zero byte"])
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_path_that_cannot_be_is_one_line(
    verb: list[str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = outcome([path if word == "PATH" else word for word in verb], monkeypatch)
    said = capfd.readouterr().err
    assert code in (1, 2), said
    assert "Traceback" not in said
    assert said.strip()
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_of_prompts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "prompts")
    assert outcome(["compare", str(tmp_path), "--prompts", str(tmp_path / "prompts")], monkeypatch) == 2
    assert "is a named pipe, expected a regular file" in capfd.readouterr().err


def test_what_is_no_file_is_not_replaced_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "schema.json"
    os.mkfifo(pipe)
    assert outcome(["schema", str(pipe)], monkeypatch) == 2
    assert "is a named pipe" in capfd.readouterr().err
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.api.open_run import load_run
    from distill.data.teacher_cache.verify import caches

    def refuse(path: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    for look in (load_run, caches):
        with pytest.raises(InputError, match="no "):
            look(tmp_path)
