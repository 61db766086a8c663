"""llama.cpp is tried in a child process first, so that a build for another processor is one line and not a dead run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distill.core.errors import DistillError
from distill.exporters.llama_cpp import LlamaCpp, check_engine


@pytest.mark.parametrize(
    ("dies", "message"),
    [
        ("SIGILL", r"llama.cpp crashed when it loaded the file \(SIGILL\): .*CMAKE_ARGS=-DGGML_NATIVE=OFF pip install"),
        ("SIGSEGV", r"\(SIGSEGV\): .*CMAKE_ARGS=-DGGML_NATIVE=OFF pip install"),
        ("SIGKILL", r"\(SIGKILL\): this machine has probably too little memory"),
    ],
)
def test_an_engine_that_kills_its_process_is_one_line(
    dies: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = f"import os, signal\nos.kill(os.getpid(), signal.{dies})\n"
    (tmp_path / "llama_cpp.py").write_text(fake)
    monkeypatch.syspath_prepend(tmp_path)
    check_engine.cache_clear()
    with pytest.raises(DistillError, match=message) as raised:
        LlamaCpp(tmp_path / "model.gguf", context_tokens=8)
    assert "\n" not in str(raised.value)


def test_an_error_that_the_engine_reports_is_left_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("def Llama(*_, **__):\n    raise ValueError('no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, module)  # another test may have loaded the real one
    check_engine.cache_clear()
    check_engine(tmp_path / "model.gguf")
    with pytest.raises(DistillError, match=r"model.gguf: llama.cpp cannot load the file \(no such file\)") as raised:
        LlamaCpp(tmp_path / "model.gguf", context_tokens=8)
    assert raised.value.exit_code == 1
