"""Files that somebody else has put there: only regular ones are read, and text only up to a stated size."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from distill.core.errors import InputError

LARGEST_TEXT = 64 << 20
"""Bytes of a JSON or text file that are read at once; the largest tokenizers in use have half of it."""


@contextmanager
def opened(file: Path) -> Iterator[BufferedReader]:
    """The bytes of a regular file.

    Raises:
        InputError: it is not there, cannot be read, or is a folder, a pipe, a socket or a device.
    """
    try:
        stream = open(file, "rb", opener=_open)  # noqa: SIM115 - closed below
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from None
    with stream:
        _refuse(file, os.fstat(stream.fileno()).st_mode)
        try:
            yield stream
        except OSError as error:
            raise unreadable(file, error) from None


def _open(file: str, flags: int) -> int:
    """Opening a pipe would wait for somebody who writes into it. For a regular file the flag changes nothing."""
    return os.open(file, flags | os.O_NONBLOCK)


def read(file: Path, most: int = LARGEST_TEXT) -> bytes:
    """All bytes of a regular file.

    Args:
        file: what to read.
        most: bytes that it may have.

    Raises:
        InputError: see :func:`opened`; or it is larger.
    """
    with opened(file) as stream:
        found = stream.read(most + 1)
    if len(found) > most:
        raise InputError(f"{file}: has more than {most:,} bytes, as no file of this kind has; fetch or make it anew")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file that something else may have written, or damaged.

    Raises:
        InputError: it holds none, cannot be read, or is larger than any such file.
    """
    found = _parsed(file)
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds {type(found).__name__}, expected a JSON object; fetch or make it anew")
    return found


def read_json_list(file: Path) -> list[Any]:
    """As :func:`read_json`, for a file that holds a list."""
    found = _parsed(file)
    if not isinstance(found, list):
        raise InputError(f"{file}: holds {type(found).__name__}, expected a JSON list; fetch or make it anew")
    return found


def _parsed(file: Path) -> Any:
    try:
        found = json.loads(read(file).decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # an escape may stand for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{file}: cannot be read as JSON ({why}); it is damaged, fetch or make it anew") from None
    return found


def is_text(text: str) -> bool:
    """Whether UTF-8 can write it; names of files, and escapes, may hold what it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_folder(path: str | Path) -> bool:
    """Whether a path that somebody wrote leads to a folder. ``Path.is_dir`` raises for one that is too long."""
    return os.path.isdir(path)


def is_file(path: str | Path) -> bool:
    """Whether a path that somebody wrote leads to a regular file. ``Path.is_file`` raises for one that is too long."""
    return os.path.isfile(path)


def is_there(path: str | Path) -> bool:
    """Whether a path that somebody wrote is taken, if only by a link that leads nowhere."""
    return os.path.lexists(path)


def status_of(file: Path) -> os.stat_result:
    """What the system says of a regular file, which is not opened.

    Raises:
        InputError: it is not there, is no regular file, or a link that leads nowhere.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from None
    _refuse(file, status.st_mode)
    return status


def check_appendable(file: Path) -> None:
    """Refuse to append to anything but a regular file: a pipe would wait for a reader, and a device takes everything.

    Raises:
        InputError: it is no regular file. A missing file is accepted.
    """
    if is_there(file):
        status_of(file)


def _refuse(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
        what = next((name for is_kind, name in kinds if is_kind(mode)), "a device")
        raise InputError(f"{file}: is {what}, expected a regular file; remove it, or put the file in its place")


def unreadable(file: Path, error: OSError | ValueError) -> InputError:
    """What to raise for a file that the system does not open."""
    whys = {
        errno.ENOENT: "no such file, or a link that leads nowhere; remove the link, or put the file in its place",
        errno.ELOOP: "is a link that leads in a circle; remove it, or put the file in its place",
        errno.EISDIR: "is a folder, expected a regular file; remove it, or put the file in its place",
        errno.ENXIO: "is a socket, expected a regular file; remove it, or put the file in its place",
    }
    other = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return InputError(f"{file}: {whys.get(getattr(error, 'errno', None) or 0, other)}")
