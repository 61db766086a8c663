"""Folders that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill.core import artifact
from distill.core.artifact import Artifact, Lineage, fingerprint, hash_of, replacing, write_lineage, write_text
from distill.core.errors import InputError, MachineError

FULL = OSError(errno.ENOSPC, "No space left on device")


def fill(folder: Path, text: str) -> None:
    (folder / "a").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that holds the old state."""
    with replacing(tmp_path / "model") as folder:
        fill(folder, "old")
    return tmp_path / "model"


OLD, NEW = ({"a": text, "sub/b": text} for text in ("old", "new"))


def test_the_new_folder_takes_the_old_ones_place_whole(place: Path) -> None:
    with replacing(place) as folder:
        (folder / "only").write_text("new")
        assert content(place) == OLD
    assert content(place) == {"only": "new"}
    assert [path.name for path in place.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), InputError("mistake")])
def test_an_error_leaves_the_old_folder(place: Path, error: BaseException) -> None:
    def write() -> None:
        with replacing(place) as folder:
            fill(folder, "new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert content(place) == OLD
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_a_full_disk_while_writing(place: Path) -> None:
    with pytest.raises(MachineError, match=r"model: cannot be written \(No space left on device\)"), replacing(place):
        raise FULL
    assert content(place) == OLD


def test_a_full_disk_as_safetensors_says_it(place: Path) -> None:
    """Its error is no OSError."""
    error = type("SafetensorError", (Exception,), {})("I/O error: No space left on device (os error 28)")
    with pytest.raises(MachineError, match=r"cannot be written \(I/O error: No space left"), replacing(place):
        raise error
    assert content(place) == OLD


@pytest.mark.parametrize("call", range(1, 4))
def test_a_full_disk_at_any_sync(place: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Two files, then the folder itself: before the renames."""
    calls = 0

    def sync(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise FULL

    monkeypatch.setattr(artifact, "sync", sync)
    with pytest.raises(MachineError), replacing(place) as folder:
        fill(folder, "new")
    assert content(place) == OLD


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_gives_the_old_folder_back(place: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    real, calls = os.replace, 0

    def replace(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise FULL
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(MachineError), replacing(place) as folder:
        fill(folder, "new")
    assert content(place) == OLD


def test_a_kill_between_the_renames_loses_nothing(place: Path) -> None:
    """What such a kill leaves: the old folder aside, the new one under its temporary name."""
    place.rename(place.with_name(".model.old"))
    place.with_name(".model.writing").mkdir()
    with replacing(place) as folder:
        assert content(place) == OLD
        fill(folder, "new")
    assert content(place) == NEW
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_kills_at_any_moment_leave_old_or_new(tmp_path: Path) -> None:
    """Processes that replace a folder again and again are killed; every time the folder is of one piece."""
    place = tmp_path / "model"
    code = (
        "import sys, itertools, pathlib\n"
        "from distill.core.artifact import replacing\n"
        "for i in itertools.count():\n"
        "    with replacing(pathlib.Path(sys.argv[1])) as folder:\n"
        "        for name in 'abcdefgh': (folder / name).write_text(f'{i}')\n"
        "    print(i, flush=True)\n"
    )
    for delay in (0.0, 0.003, 0.007, 0.011):
        process = subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole = place if place.exists() else place.with_name(".model.old")
        assert len(content(whole)) == 8
        assert len(set(content(whole).values())) == 1


def test_write_text_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sub" / "note"
    write_text(file, "old ä")
    assert file.read_text(encoding="utf-8") == "old ä"

    def sync(path: Path) -> None:
        raise FULL

    monkeypatch.setattr(artifact, "sync", sync)
    with pytest.raises(MachineError, match="No space left"):
        write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old ä"


def test_write_text_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        write_text(tmp_path / "file" / "note", "text")


def test_lineage_round_trip(tmp_path: Path) -> None:
    lineage = Lineage("distill", "distill", "prune", "teacher", "org/base", None, "00ff", {"tokens": 3})
    write_lineage(tmp_path, lineage)
    assert Artifact("distill", str(tmp_path)).lineage() == lineage
    assert Artifact("hub", "org/base").lineage() is None
    assert Artifact("hub", "org/base").folder is None


def test_hash_of_is_stable_and_tells_apart() -> None:
    assert hash_of({"a": 1, "b": [2]}) == hash_of({"b": [2], "a": 1}) != hash_of({"a": 1, "b": [3]})
    assert hash_of("a", "b") != hash_of("ab")


def one_tensor(data: bytes) -> bytes:
    """A safetensors file."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_fingerprint_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(one_tensor(b"weights"))
    before = fingerprint(str(tmp_path))
    (tmp_path / "distill.json").write_text("{}")
    (tmp_path / "notes.md").write_text("x")
    os.utime(tmp_path / "config.json", (0, 0))
    assert fingerprint(str(tmp_path)) == before
    weights.write_bytes(one_tensor(b"WEIGHTS"))
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("org/model") == "org/model"


def test_a_folder_that_is_no_model_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a model folder \(no config.json in it\)"):
        fingerprint(str(tmp_path))
