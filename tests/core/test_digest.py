"""Every byte of a file counts, and a file that is left alone is read once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from distill.core import digest
from distill.core.artifact import fingerprint
from distill.core.digest import digests, sha256_of
from distill.core.errors import InputError, MachineError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are remembered; of files of a kilobyte too, unless a test says otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "LASTING_BYTES", 1000)
    monkeypatch.setattr(digest, "TICK_NS", 0)
    monkeypatch.setattr(digest, "SETTLED_NS", 0)
    monkeypatch.setattr(digest, "_KNOWN", {})
    return tmp_path / "cache" / "distill" / "digests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each piece of a file that is hashed."""
    pieces: list[int] = []
    real = hashlib.sha256

    class Counted:
        def __init__(self) -> None:
            self.real = real()

        def update(self, piece: bytes) -> None:
            pieces.append(len(piece))
            self.real.update(piece)

        def hexdigest(self) -> str:
            return self.real.hexdigest()

    monkeypatch.setattr(digest.hashlib, "sha256", Counted)
    return pieces


def test_a_change_of_any_page_of_a_large_file_is_seen(tmp_path: Path) -> None:
    size = 100 << 20  # more than anybody would read on a whim; as zeros it takes no room
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(weights, 8 + len(header) + size)
    seen, dice = {fingerprint(str(tmp_path / "model"))}, random.Random(0)
    for number in range(8):
        with weights.open("r+b") as file:
            file.seek(8 + len(header) + dice.randrange(size - 4096))
            file.write(b"x" * 4096)
        seen.add(fingerprint(str(tmp_path / "model")))
        assert len(seen) == number + 2


def test_what_is_remembered_is_not_read_again(tmp_path: Path, cache: Path, reads: list[int]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 3000)
    expected = hashlib.new("sha256", b"a" * 3000).hexdigest()
    assert digests([file]) == [expected]
    assert digests([file, file]) == [expected, expected]
    assert len(list(cache.iterdir())) == 1
    digest._KNOWN.clear()  # another process
    assert digests([file]) == [expected]
    assert reads == [3000]
    assert sha256_of(file) == expected  # of what a stage made, each process makes sure by itself
    assert reads == [3000, 3000]


@pytest.mark.parametrize("how", ["write", "write and turn the clock back", "replace", "replace and turn back"])
def test_a_file_that_was_changed_is_read(how: str, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 3000)
    before, status = digests([file])[0], file.stat()
    if "write" in how:
        with file.open("r+b") as stream:
            stream.write(b"b")
    else:
        (tmp_path / "other").write_bytes(b"b" + b"a" * 2999)
        os.replace(tmp_path / "other", file)
    if "back" in how:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests([file])[0] != before


def test_what_has_just_been_written_is_not_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write within one tick of the clock would leave all times as they are."""
    monkeypatch.setattr(digest, "SETTLED_NS", 60_000_000_000)
    monkeypatch.setattr(digest, "TICK_NS", 60_000_000_000)
    (tmp_path / "weights").write_bytes(b"a" * 3000)
    digests([tmp_path / "weights"])
    assert not cache.exists()
    assert digest._KNOWN == {}


@pytest.mark.parametrize("note", [b"", b"x", b"1 2 3 " + b"0" * 64 + b"\n", b"\xff" * 80])
def test_a_damaged_note_is_not_believed(note: bytes, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "weights").write_bytes(b"a" * 3000)
    expected = digests([tmp_path / "weights"])
    (remembered,) = cache.iterdir()
    remembered.write_bytes(note)
    digest._KNOWN.clear()
    assert digests([tmp_path / "weights"]) == expected


def test_without_a_place_to_remember_nothing_is_lost(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "weights").write_bytes(b"a" * 3000)
    assert digests([tmp_path / "weights"]) == [hashlib.sha256(b"a" * 3000).hexdigest()]


def test_a_file_that_grows_while_it_is_read_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 3000)

    class Growing:
        def update(self, piece: bytes) -> None:
            with file.open("ab") as stream:
                stream.write(b"b") if stream.tell() < 4000 else None

    monkeypatch.setattr(digest.hashlib, "sha256", Growing)
    with pytest.raises(MachineError, match="weights: was written to while it was read"):
        digests([file])


def test_a_file_that_is_removed_while_it_is_read_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 3000)

    class Removing:
        def update(self, piece: bytes) -> None:
            file.unlink()

    monkeypatch.setattr(digest.hashlib, "sha256", Removing)
    with pytest.raises(InputError, match="weights: was removed or replaced while it was read"):
        digests([file])


def test_an_error_does_not_wait_for_the_rest(tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One file cannot be read: of a large one beside it no more is read than is in hand."""
    monkeypatch.setattr(digest, "_PIECE", 10)
    (tmp_path / "large").write_bytes(bytes(40_000))

    class Slow(digest.hashlib.sha256):  # type: ignore[misc, name-defined]
        def update(self, piece: bytes) -> None:
            time.sleep(
                0.001
            )  # the 4,000 pieces take seconds, so that the error comes first however busy the machine is
            super().update(piece)

    with monkeypatch.context() as slowly:
        slowly.setattr(digest.hashlib, "sha256", Slow)
        with pytest.raises(InputError, match="gone: no such file"):
            digests([tmp_path / "gone", tmp_path / "large"])
    assert len(reads) < 4000
    arguments: Any = [tmp_path / "large"]
    assert len(digests(arguments)[0]) == 64
