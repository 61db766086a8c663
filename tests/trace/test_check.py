"""``distill check --trace`` as people use it, on a machine without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distill.cli import app, exit_with
from distill.trace.device_guard import COMPILERS

RECIPE = """\
name: small
teacher: {teacher}
data: {{train: {{kind: jsonl, path: {text}}}, sequence_length: 16, tokenizer: teacher}}
stages:
  learn: {{kind: distill, student: {student}, num_steps: 4, batch_size: 8}}
  int8: {{kind: quantize, student: learn, num_steps: 4, batch_size: 8, quantizer: int8_channel}}
compute: {{micro_batch_size: 1, precision: bf16-mixed}}
"""


OFFLINE = """\
import pathlib, socket
pathlib.Path({folder!r}, "loaded").touch()
def refuse(*given):
    pathlib.Path({folder!r}, "connected").touch()
    raise OSError("a connection was opened")
socket.getaddrinfo = refuse
"""
"""For the process that traces: no name of a host is looked up."""


def check(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        exit_with(lambda: app(["check", *arguments], standalone_mode=False))
    return int(left.value.code or 0)


@pytest.fixture
def recipe(tiny_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.core.stop.leave", lambda code: exit(code))
    teacher, student = tiny_folders
    (tmp_path / "text.jsonl").write_text('{"text": "one text that is read"}\n' * 40)
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE.format(teacher=teacher, student=student, text=tmp_path / "text.jsonl"))
    return str(file)


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="tracing needs a C++ compiler")
def test_each_training_stage_is_traced(
    recipe: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(OFFLINE.format(folder=str(site)))
    monkeypatch.syspath_prepend(site)  # the process that traces has the same path
    monkeypatch.setattr("socket.getaddrinfo", lambda *given: pytest.fail("a connection was opened"))
    there = {*tmp_path.rglob("*")}
    assert check(recipe, "--trace", "--gpu", "h100", "--devices", "2", "--nodes", "2") == 0
    said = capfd.readouterr().out
    for stage in ("learn", "int8"):
        assert f"{stage}: 4 GPUs (ddp), 2 micro-batches of 1 x 16 tokens per step and GPU, bf16-mixed" in said
    assert said.count("peak by phase: teacher forward ") == 2
    assert said.count("collectives of a step: ") == 2
    assert said.count("H100: at least ") == 2
    assert said.count("MFU at most 0.") == 2
    assert {*tmp_path.rglob("*")} == there
    assert (site / "loaded").exists()
    assert not (site / "connected").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--trace", "--gpu", "H1000"],
            "--gpu H1000: not known, expected one of H100, H200, B200, L4, RTX 4090; did you",
        ),
        (["--trace", "--devices", "3"], "batch_size (8) must be a multiple of the 3"),
        (["--devices", "3"], "--devices: only with --trace; add it"),
        (["--trace", "--nodes", "0"], "nodes"),
    ],
)
def test_a_mistake_is_one_line(recipe: str, arguments: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert check(recipe, *arguments) == 2
    said = capfd.readouterr().err.strip()
    assert line in said
    assert "\n" not in said
