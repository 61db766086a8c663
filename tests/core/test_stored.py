"""JSON from disk: what the schema says, or one line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill.core.errors import InputError
from distill.core.stored import read_checked, read_stored, write_checked


@dataclass(frozen=True)
class Notes:
    steps: int
    losses: tuple[float, ...]


def test_a_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    write_checked(file, {"steps": 3, "losses": (0.1, 2)}, about="one")
    assert read_checked(file, Notes, "", about="one") == Notes(3, (0.1, 2.0))
    with pytest.raises(InputError, match="its own checksum is wrong"):
        read_checked(file, Notes, "", about="another")
    file.write_text(file.read_text().replace("3", "4"))
    with pytest.raises(InputError, match=f"^{file}: damaged or edited .*; make it anew$"):
        read_checked(file, Notes, "make it anew", about="one")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
        (b"\xff", "no text"),
        (b"[]", "Input should be an object"),
        (b'{"losses": []}', "steps: Field required; make it anew"),
        (b'{"steps": true, "losses": []}', r"steps: Input should be a valid integer \(got True\)"),
        (b'{"steps": 1, "losses": [1, "2"]}', r"losses\.1: Input should be a valid number \(got '2'\)"),
        (b"[" * 100_000, "Invalid JSON: recursion limit exceeded"),
    ],
)
def test_anything_else_is_one_line(tmp_path: Path, text: bytes, said: str) -> None:
    file = tmp_path / "notes.json"
    file.write_bytes(text)
    with pytest.raises(InputError, match=f"^{file}: {said}") as refusal:
        read_stored(file, Notes, "make it anew")
    assert "\n" not in str(refusal.value)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing"):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: "):
            read_stored(tmp_path / name, Notes, "")
