"""SHA-256 of every byte of large files, read once: a file that is left alone is known from then on.

A process remembers all digests, and the user's cache (``~/.cache/distill/digests``) those of large files from outside,
so that a teacher is not read for each command. They are kept under the file's device, inode, size, and times of its
last write and last change of any kind. No ordinary program can write to a file, or put another in its place, and keep
all of these. Only damage of the disk itself would go unseen, until the folder of digests is removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import TypeVar

from distill.core.errors import InputError, MachineError
from distill.core.outside import opened, read

S = TypeVar("S")
T = TypeVar("T")
READERS = 4
"""Files that are read at once: one thread does not keep a fast disk busy."""
LASTING_BYTES = 32 << 20
"""Files of this size and more are remembered longer than a process lives."""
TICK_NS, SETTLED_NS = 50_000_000, 2_000_000_000
"""A file that was changed less than this before it was read could change again within one tick of the clock, of this
machine's or of a file server's, and is not remembered: by this process, and longer."""
_PIECE = 1 << 20
_NOTE = re.compile(r"(\d+ \d+ \d+) ([0-9a-f]{64})\n")
_KNOWN: dict[tuple[int, int, str], str] = {}
"""Digests of this process, by device, inode and stamp."""


def digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of files from outside, several at once; see :func:`sha256_of`."""
    return several(lambda file, stop: sha256_of(file, stop, lasting=True), files)


def sha256_of(file: Path, stop: Event | None = None, *, lasting: bool = False) -> str:
    """SHA-256 of a regular file, read once as long as it is left alone.

    Args:
        file: what to read.
        stop: ends the reading when it is set; what is returned then is of no use.
        lasting: whether a large file that another process has read need not be read again.

    Returns:
        64 hex digits.

    Raises:
        InputError: it cannot be read, is no regular file, or was removed meanwhile.
        MachineError: it was written to meanwhile.
    """
    with opened(file) as stream:
        before = os.fstat(stream.fileno())
        key, place = (before.st_dev, before.st_ino, _stamp(before)), _place(before) if lasting else None
        if known := _KNOWN.get(key) or (place is not None and _recall(place, before)):
            return known
        digest, started = hashlib.sha256(), time.time_ns()
        while piece := stream.read(_PIECE):
            if stop is not None and stop.is_set():
                return ""
            digest.update(piece)
        after = os.fstat(stream.fileno())
        if before.st_nlink and not after.st_nlink:
            raise InputError(f"{file}: was removed or replaced while it was read")
        if _stamp(after) != _stamp(before):
            raise MachineError(f"{file}: was written to while it was read; wait until it is whole, then run again")
    age_ns = started - max(before.st_mtime_ns, before.st_ctime_ns)
    if age_ns > TICK_NS:
        _KNOWN[key] = digest.hexdigest()
    if place is not None and age_ns > SETTLED_NS:
        _remember(place, before, digest.hexdigest())
    return digest.hexdigest()


def several(work: Callable[[S, Event], T], items: Iterable[S]) -> list[T]:
    """``work`` on several items at once; an error or a signal does not wait for the rest of a large file."""
    stop = Event()
    with ThreadPoolExecutor(READERS, thread_name_prefix="sha256") as pool:
        try:
            return list(pool.map(lambda item: work(item, stop), items))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _place(status: os.stat_result) -> Path | None:
    """Where a file's digest is kept; None for a small file, and where there is no home."""
    if status.st_size < LASTING_BYTES:
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with suppress(RuntimeError):
        return Path(cache).expanduser() / "distill" / "digests" / f"{status.st_dev:x}-{status.st_ino:x}"
    return None


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _recall(place: Path, status: os.stat_result) -> str | None:
    with suppress(InputError):  # there is none
        note = _NOTE.fullmatch(read(place).decode("ascii", "replace"))
        return note[2] if note is not None and note[1] == _stamp(status) else None
    return None


def _remember(place: Path, status: os.stat_result, digest: str) -> None:
    with suppress(OSError):  # it would only have saved time
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        temporary.write_text(f"{_stamp(status)} {digest}\n", encoding="ascii")
        os.replace(temporary, place)
