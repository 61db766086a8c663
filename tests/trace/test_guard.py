"""The guard is compiled once, and a machine that cannot says so in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distill.core.errors import MachineError
from distill.trace import device_guard


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match=r"^--trace compiles guard.cpp once, and this machine has no C\+\+ compiler"):
        device_guard.built()


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'guard.cpp:2: fatal error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    with pytest.raises(MachineError, match=r"cannot compile .*fatal error: no such header"):
        device_guard.built()
    assert not [*device_guard.cache_folder().glob("*.so")]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "distill").write_text("a file")
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true")
    with pytest.raises(MachineError, match="set XDG_CACHE_HOME"):
        device_guard.built()


def test_what_is_in_the_cache_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(torch: Path, library: Path) -> None:
        library.parent.mkdir(parents=True)
        library.write_bytes(b"")

    monkeypatch.setattr(device_guard, "_compile", make)
    first = device_guard.built()
    monkeypatch.delattr(device_guard, "_compile")
    assert device_guard.built() == first is not None
