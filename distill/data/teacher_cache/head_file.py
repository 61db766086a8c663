"""The teacher's head, stored beside its caches with a checksum, by which damage to it is found."""

from __future__ import annotations

import zlib
from pathlib import Path

from distill.core.artifact import write_text

_PIECE = 1 << 24


def head_file(folder: Path) -> Path:
    """Path of the head in the folder that holds the caches of the training and the validation text."""
    return folder / "head" / "head.safetensors"


def seal(file: Path) -> None:
    """Write the checksum of a head that has just been written."""
    write_text(_seal_of(file), _checksum(file))


def is_whole(file: Path) -> bool:
    """Whether the head exists and is undamaged."""
    return file.is_file() and _seal_of(file).is_file() and _seal_of(file).read_bytes() == _checksum(file).encode()


def _seal_of(file: Path) -> Path:
    return file.with_suffix(".crc32")


def _checksum(file: Path) -> str:
    """CRC-32 of a file, read piece by piece, as a line."""
    value = 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            value = zlib.crc32(piece, value)
    return f"{value:08x}\n"
