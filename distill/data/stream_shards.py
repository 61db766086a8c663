"""The rows of a stream on disk: a writer process stores them ahead, and the training processes map them into memory.

    stream-<hash>/
        000000000000-000000016384.json   the position after these rows and their SHA-256; never deleted, 100 kB at most
        000000000000-000000016384.bin    the rows themselves, :data:`~distill.data.stream.TOKEN` [rows, tokens]
        writer.lock                      locked by the writer process
        <process>.reader                 the row that a process reads; locked while it does

The positions are an index of the stream. Therefore a training that resumes at its billionth token starts with the shard
that contains it, which is still there or is rebuilt from the position before it, and reads nothing that comes earlier.

Rows are kept while a process is about to read them: for each reader, those of its current shard, of
:data:`~distill.data.stream_bounds.BEHIND` shards before it and of :data:`~distill.data.stream_bounds.AHEAD` shards
after it. Shards grow in size, so that the first rows are available soon. Where a shard ends depends on the stream
alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import TypeAdapter

from distill.core.artifact import sync
from distill.core.errors import InputError, unwritable
from distill.core.stored import read_checked, write_checked
from distill.data.stream import TOKEN, Position, Stream
from distill.data.stream_bounds import AHEAD, BEHIND, LARGEST, SMALLEST

RULE = f"2: shards of {SMALLEST} to {LARGEST} tokens"
"""Version of the sharding rule; part of what the folder's name hashes."""
_DIGEST = "sha256"
_POSITION: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_numbers = itertools.count()


class StreamShards:
    """The folder of a stream.

    Args:
        stream: the stream whose rows it holds.
    """

    def __init__(self, stream: Stream):
        self.stream, self.folder = stream, stream.folder
        self._reading: tuple[int, Iterator[tuple[np.ndarray, Position]]] | None = None

    def bounds(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of all contiguous shards from the first row of the stream on."""
        found = sorted(tuple(map(int, file.stem.split("-"))) for file in self.folder.glob("*-*.json"))
        chain: list[tuple[int, int]] = []
        for first, stop in found:
            if first == (chain[-1][1] if chain else 0):
                chain.append((first, stop))
        return chain

    def rows_of(self, first: int, stop: int) -> np.ndarray | None:
        """The rows of a shard, mapped into memory; None if they are missing. Damaged ones are deleted."""
        file, shape = self._file(first, stop, "bin"), (stop - first, self.stream.room)
        try:
            if file.stat().st_size == shape[0] * shape[1] * TOKEN.itemsize:
                rows = np.memmap(file, TOKEN, mode="r", shape=shape)
                if self._written(first, stop).get(_DIGEST) == _digest(rows):
                    return rows
        except FileNotFoundError:
            return None
        except InputError:  # damaged; the process that writes makes both files again
            pass
        file.unlink(missing_ok=True)
        return None

    def sweep(self) -> None:
        """Delete incomplete files of a killed process. Only the holder of the writer lock may call it."""
        for file in self.folder.glob(".*.bin.*"):
            file.unlink(missing_ok=True)

    def wanted(self, rows: list[int]) -> int | None:
        """Number of the shard to write next; None if all shards exist that readers at these rows need soon.

        Rows that are not near to any reader are deleted.
        """
        chain = self.bounds()
        read = [next((at for at, (_, behind) in enumerate(chain) if row < behind), len(chain)) for row in sorted(rows)]
        kept = {number for at in read for number in range(at - BEHIND, at + AHEAD + 1)}
        for number, (first, behind) in enumerate(chain):
            if number not in kept:
                self._file(first, behind, "bin").unlink(missing_ok=True)
        for at in read:
            for number in range(at, at + AHEAD + 1):
                if number >= len(chain):
                    return len(chain)
                if not self._file(*chain[number], "bin").is_file():
                    return number
        return None

    def make(self, number: int) -> None:
        """Write a shard, starting at the position after the previous one.

        Raises:
            InputError: the text cannot be read or used.
            MachineError: the disk is full.
        """
        chain = self.bounds()
        try:
            begin = Position() if number == 0 else self._position(*chain[number - 1])
        except InputError:  # damaged: the shard before it is made first, with its position
            self._file(*chain[number - 1], "json").unlink(missing_ok=True)
            return
        if self._reading is None or self._reading[0] != begin.row:
            self._reading = begin.row, self.stream.read(begin)
        room, found, at = self.stream.room, list[np.ndarray](), begin
        least = min(max(begin.row * room, SMALLEST), LARGEST)
        for rows, at in self._reading[1]:
            found.append(rows)
            if (at.row - begin.row) * room >= least:
                break
        self._reading = at.row, self._reading[1]
        self._write(np.concatenate(found), begin.row, at)

    def _write(self, rows: np.ndarray, first: int, behind: Position) -> None:
        file = self._file(first, behind.row, "bin")
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            rows.tofile(temporary)
            sync(temporary)
            # rows without a digest, or with that of others, would be taken for damaged
            write_checked(self._file(first, behind.row, "json"), {_DIGEST: _digest(rows), **behind.to_json()})
            temporary.replace(file)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _position(self, first: int, stop: int) -> Position:
        try:
            written = self._written(first, stop)
            return Position.from_json({key: value for key, value in written.items() if key != _DIGEST})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder}: a damaged position ({error})") from None

    def _written(self, first: int, stop: int) -> dict[str, Any]:
        return read_checked(self._file(first, stop, "json"), _POSITION, "")

    def _file(self, first: int, stop: int, kind: str) -> Path:
        return self.folder / f"{first:012}-{stop:012}.{kind}"


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()


class Mark:
    """Tells the writer process which row a process reads.

    Args:
        folder: folder of the stream.
    """

    def __init__(self, folder: Path):
        self.file = folder / f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}.reader"
        while True:
            self._open: IO[bytes] = self.file.open("wb", buffering=0)
            fcntl.flock(self._open, fcntl.LOCK_EX)
            if self.file.exists():
                break
            self._open.close()  # another process deleted the file as stale before it was locked

    def move(self, row: int) -> None:
        """Record that the process reads this row now."""
        os.pwrite(self._open.fileno(), f"{row:020}".encode(), 0)

    def close(self) -> None:
        """Record that the process has stopped reading."""
        self.file.unlink(missing_ok=True)
        fcntl.flock(self._open, fcntl.LOCK_UN)  # forked processes have it open too
        self._open.close()


def rows_read(folder: Path) -> list[int]:
    """The rows that running processes read; marks of ended processes are deleted."""
    rows = []
    for file in folder.glob("*.reader"):
        with suppress(FileNotFoundError), file.open("rb") as mark:
            try:
                fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if (text := mark.read()).isdigit():
                    rows.append(int(text))
            else:
                file.unlink(missing_ok=True)
    return rows
