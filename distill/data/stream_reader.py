"""Reads rows of a stream from disk at any position; a reader that needs a missing row starts the writer process."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter
from torch.utils.data import IterableDataset

from distill.core import stop
from distill.core.artifact import make_folder
from distill.core.errors import DistillError, InputError, MachineError, unwritable
from distill.core.forked import can_fork
from distill.core.stored import read_checked, write_checked
from distill.data.micro_batches import MicroBatches
from distill.data.stream import Stream
from distill.data.stream_shards import Mark, StreamShards, rows_read
from distill.data.token_processes import one_thread_each

if TYPE_CHECKING:
    from torch import Tensor

LOOK_S = 0.05
"""Seconds between two checks of what is on disk."""
_ERROR: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


class StreamReader:
    """Reads a stream's rows. At most one of the readers of a folder runs a writer process at a time.

    Args:
        stream: the stream to read.

    Raises:
        MachineError: the folder cannot be written.
    """

    def __init__(self, stream: Stream):
        self.shards = StreamShards(stream)
        make_folder(stream.folder)
        self._error = stream.folder / "error.json"
        self._error.unlink(missing_ok=True)  # left by an earlier run
        self._mark = Mark(stream.folder)
        self._writer: Any = None
        self._shard: tuple[int, np.ndarray] = 0, np.zeros((0, 0))

    def rows(self, positions: range) -> np.ndarray:
        """Rows of the list. :data:`~distill.data.stream.TOKEN` [positions, tokens]

        Raises:
            InputError: the text cannot be read or used.
            MachineError: the disk is full, or the writer process was killed.
        """
        return np.stack([self._row(position) for position in positions])

    def close(self) -> None:
        """End the writer process, if this reader has started it."""
        self._mark.close()
        if self._writer is not None:
            self._writer.kill()  # an unfinished shard is written again
            self._writer.join()
            self._writer = None

    def _row(self, position: int) -> np.ndarray:
        first, rows = self._shard
        if not first <= position < first + len(rows):
            self._mark.move(position)
            self._shard = first, rows = self._wait_for(position)
        row: np.ndarray = rows[position - first]
        return row

    def _wait_for(self, position: int) -> tuple[int, np.ndarray]:
        """Return (first row of the shard that contains a position, its rows)."""
        while True:
            for first, behind in self.shards.bounds():
                if first <= position < behind and (rows := self.shards.rows_of(first, behind)) is not None:
                    self._start()  # the writer stores the next shards
                    return first, rows
            if not self._start() and self._error.is_file():
                raise self._what_was_wrong()
            stop.check()
            time.sleep(LOOK_S)

    def _start(self) -> bool:
        """Start the writer unless one is running. Returns whether it was started."""
        try:
            lock = (self.shards.folder / "writer.lock").open("w")
        except OSError as error:
            raise unwritable(self.shards.folder, error) from error
        with lock:  # the started writer inherits the lock and holds it until it ends
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                raise unwritable(self.shards.folder, error) from error
            if self._error.is_file():
                raise self._what_was_wrong()
            self.shards.sweep()
            if not can_fork():
                if (number := self.shards.wanted(rows_read(self.shards.folder))) is not None:
                    self.shards.make(number)
                return True
            if self._writer is not None:
                self._writer.join()
                if code := self._writer.exitcode:
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    raise MachineError(f"the process that tokenizes the stream {how}")
            with one_thread_each():
                context = multiprocessing.get_context("fork")
                self._writer = context.Process(target=self._write_ahead, args=(os.getpid(),), daemon=True)
                self._writer.start()
        return True

    def _write_ahead(self, parent: int) -> None:
        """Main loop of the writer; ends when no reader is left."""
        stop.in_worker()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
        try:
            while os.getppid() == parent and (rows := rows_read(self.shards.folder)):
                if (number := self.shards.wanted(rows)) is None:
                    time.sleep(LOOK_S)
                else:
                    self.shards.make(number)
        except DistillError as error:
            self._write_error(type(error).__name__, str(error))
        except Exception:
            self._write_error("", traceback.format_exc())

    def _write_error(self, kind: str, text: str) -> None:
        write_checked(self._error, {"kind": kind, "text": text})

    def _what_was_wrong(self) -> Exception:
        try:
            error = read_checked(self._error, _ERROR, "")
        except InputError:
            return MachineError(f"{self.shards.folder}: the process that tokenizes the stream has ended; try again")
        kinds = {"InputError": InputError, "MachineError": MachineError}
        return kinds.get(error["kind"], RuntimeError)(error["text"])


class StreamBatches(IterableDataset[dict[str, "Tensor"]]):
    """Micro-batches of one rank from a stream, endlessly.

    Args:
        stream: the stream.
        taken: the positions that the rank takes.
    """

    def __init__(self, stream: Stream, taken: MicroBatches):
        self.stream, self.taken = stream, taken

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        reader = StreamReader(self.stream)
        try:
            for positions in self.taken:
                yield self.stream.batch(reader.rows(positions))
        finally:
            reader.close()
