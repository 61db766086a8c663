"""Files are what they were, or it is said what has become of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.core import digest, seal
from distill.core.seal import changes, files_of, is_sealed, marks_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "stage"
    (place / "model").mkdir(parents=True)
    (place / "model" / "weights").write_bytes(bytes(range(256)) * 5000)
    (place / "model" / "config.json").write_text('{"rope_theta": 10000}')
    (place / "rows.json").write_text("[]")
    return place


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def nowhere(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def within(file: Path) -> None:
    file.unlink()
    file.mkdir()


def bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[12] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "kind"),
    [
        ("model/weights", bit, "damaged"),
        ("model/weights", lambda file: file.write_bytes(os.urandom(256 * 5000)), "damaged"),
        ("model/weights", lambda file: file.write_bytes(file.read_bytes()[:-1]), "damaged"),
        ("model/weights", lambda file: file.write_bytes(b""), "damaged"),
        ("model/weights", lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"), "edited"),
        ("model/weights", Path.unlink, "gone"),
        ("model/weights", pipe, "damaged"),
        ("model/weights", within, "damaged"),
        ("model/weights", nowhere, "gone"),
        ("model/weights", lambda file: shutil.copy2(file.with_name("config.json"), file), "edited"),
        ("model/config.json", lambda file: file.write_text('{"rope_theta": 90000}'), "edited"),
        ("model/config.json", lambda file: file.write_text('{"rope_theta": 9'), "damaged"),
        ("model/added.json", lambda file: file.write_text("{}"), "added"),
        ("model/added.json", os.mkfifo, "added"),
    ],
)
def test_what_has_become_of_a_file(folder: Path, name: str, spoil: Callable[[Path], object], kind: str) -> None:
    marks = marks_of(folder, files_of(folder))
    assert [*marks] == ["model/config.json", "model/weights", "rows.json"]
    assert changes(folder, marks, "model", read=True) == []
    spoil(folder / name)
    for read in (True, False):  # it was written to, so it is read either way
        (change,) = changes(folder, marks, "model", read=read)
        assert (change.name, change.kind) == (name, kind)
    assert changes(folder, marks, "rows.json", read=True) == []
    assert len(changes(folder, marks, read=True)) == (kind != "added")


def test_what_keeps_its_size_and_time_is_only_seen_by_reading(folder: Path) -> None:
    file = folder / "model" / "weights"
    marks, status = marks_of(folder, files_of(folder)), file.stat()
    bit(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert changes(folder, marks, "model", read=False) == []
    (change,) = changes(folder, marks, "model", read=True)
    assert change.detail.startswith(f"SHA-256 {marks['model/weights'].sha256[:12]} expected, ")


def test_a_copy_is_the_same_though_it_is_written_later(folder: Path, tmp_path: Path) -> None:
    marks = marks_of(folder, files_of(folder))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert changes(copy, marks, read=False) == changes(copy, marks, "model", read=True) == []


def test_a_file_is_read_once_as_long_as_it_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in files_of(folder):
        os.utime(folder / name, (1e9, 1e9))
    time.sleep(0.1)  # what was written to a moment ago may be written to again within one tick of its clock
    marks = marks_of(folder, files_of(folder))
    monkeypatch.setattr(digest.hashlib, "sha256", lambda: pytest.fail("it is read again"))
    assert changes(folder, marks, read=True) == []


def test_a_folder_is_sealed_until_a_file_of_it_changes(folder: Path) -> None:
    assert not is_sealed(folder)
    seal.seal(folder)
    assert is_sealed(folder)
    (folder / "rows.json").write_text("[1]")
    assert not is_sealed(folder)
    seal.seal(folder)
    sealed = (folder / seal.SEAL).read_text()
    (folder / seal.SEAL).write_text(sealed.replace('"bytes": 3', '"bytes": 4'))
    assert not is_sealed(folder)


def test_a_mark_is_of_every_byte(folder: Path) -> None:
    (mark,) = marks_of(folder, ["rows.json"]).values()
    assert (mark.bytes, mark.sha256) == (2, hashlib.sha256(b"[]").hexdigest())
