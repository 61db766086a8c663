"""Files of lines that grow while a stage runs; a kill loses at most the line that was being written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from distill.core.artifact import sync
from distill.core.errors import InputError, MachineError
from distill.core.outside import check_appendable, opened
from distill.core.stored import parse_stored

Line = TypeVar("Line")


def append_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add JSON lines to a file and sync it.

    Raises:
        MachineError: the disk is full or not writable.
        InputError: it is no regular file.
    """
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        is_new = not file.exists()
        check_appendable(file)
        with file.open("ab") as stream:
            stream.write(lines.encode())
            stream.flush()
            os.fsync(stream.fileno())
        if is_new:
            sync(file.parent)
    except OSError as error:
        raise MachineError(f"{file}: cannot be written ({error.strerror or error})") from error


def appended_lines(file: Path, kind: type[Line], fix: str, *, is_last: bool = True) -> Iterator[Line]:
    """The lines of a file, as dataclasses.

    Args:
        file: to read.
        kind: dataclass of a line.
        fix: what to do about a damaged file, for messages.
        is_last: whether a kill may have left half a line at its end, which is removed.

    Raises:
        InputError: it is no regular file, or a line is damaged.
    """
    with opened(file) as stream:
        content = stream.read()
    end = content.rfind(b"\n") + 1
    if end < len(content) and not is_last:
        raise InputError(f"{file}: ends in the middle of a line; put it back, or {fix}")
    if end < len(content):
        with file.open("rb+") as stream:
            stream.truncate(end)
    for number, line in enumerate(content[:end].splitlines(), 1):
        yield parse_stored(line.decode("utf-8", "replace"), kind, f"{file}:{number}", f"put it back, or {fix}")
