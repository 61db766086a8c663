"""The shards of a text on disk: sections of its source that are tokenized one by one, each by the process that claims
it, and concatenated when all are finished.

    <name>-<hash>.shards/
        00000.bin .bounds ...   a token file per shard; its ``.json``, written last, says that it is finished
        00000.lock              locked by the process that tokenizes the shard
        count.json              number of shards, written by the first process that has read the source to its end

A claim is a lock of the file system, which is released when its process ends for any reason. Therefore a shard whose
process was killed is free for another process, or for the next run, and a finished one is never tokenized again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from distill.core.errors import InputError, unwritable
from distill.core.stored import read_checked, write_checked
from distill.data.packing import TokenFile, read_tokens

CHARACTERS = 1 << 25
"""Minimum number of characters of text per shard; about 8 million tokens of English."""
_COUNT: TypeAdapter[dict[str, int]] = TypeAdapter(dict[str, int])


class TokenShards:
    """The shards of one token file that is being made.

    Args:
        path: the ``.bin`` file into which they are joined.
    """

    def __init__(self, path: Path):
        self.whole, self.folder = path, path.with_suffix(".shards")
        self._held: dict[int, IO[str]] = {}

    def path(self, number: int) -> Path:
        """The ``.bin`` file of a shard."""
        return self.folder / f"{number:05}.bin"

    def claim(self, number: int) -> bool:
        """Claim a shard. Returns False if it is finished, held by another process, or already joined and deleted.

        Raises:
            MachineError: the folder cannot be locked.
        """
        if not (lock := self._locked(number)):
            return False
        # another process may have joined the shards and removed the folder
        if self.is_finished(number) or self.whole.with_suffix(".json").is_file():
            lock.close()
            return False
        self._held[number] = lock
        return True

    def release(self, number: int) -> None:
        """Release a claimed shard, finished or not."""
        lock: Any = self._held.pop(number)
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough, as forked processes have the file open too
        lock.close()

    def release_all(self) -> None:
        """Release all claimed shards."""
        for number in [*self._held]:
            self.release(number)

    def is_finished(self, number: int) -> bool:
        """Whether a shard is complete and undamaged."""
        return self.path(number).with_suffix(".json").is_file() and self._read(number) is not None

    def is_free(self, number: int) -> bool:
        """Whether no other process holds the lock of a shard."""
        if not (lock := self._locked(number)):
            return False
        lock.close()
        return True

    def count(self) -> int | None:
        """Number of shards; None while no process has read the text to its end."""
        file = self.folder / "count.json"
        try:
            return read_checked(file, _COUNT, "")["num_shards"] if file.is_file() else None
        except (InputError, KeyError):  # it is written again
            return None

    def tell_count(self, number: int) -> None:
        """Store the number of shards.

        Raises:
            MachineError: the disk is full.
        """
        try:
            lock: Any = (self.folder / "count.lock").open("w")
        except FileNotFoundError:  # all shards are joined and deleted
            return
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.count() is None and not self.whole.with_suffix(".json").is_file():
                write_checked(self.folder / "count.json", {"num_shards": number})

    def files(self) -> list[TokenFile] | None:
        """Token files of all shards in their order; None while one is missing."""
        count = self.count()
        if count is None or not all(self.path(number).with_suffix(".json").is_file() for number in range(count)):
            return None
        found = [self._read(number) for number in range(count)]
        return [file for file in found if file is not None] if None not in found else None

    def remove(self) -> None:
        """Delete the folder, after all shards have been joined."""
        aside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        with suppress(OSError):  # another process removes it
            self.folder.rename(aside)  # atomic, so that no process finds some of them missing
        shutil.rmtree(aside, ignore_errors=True)

    def _read(self, number: int) -> TokenFile | None:
        return read_tokens(self.path(number), quietly=True)

    def _locked(self, number: int) -> Any:
        """The open lock file of a shard; None if another process holds it, or all shards are joined and deleted."""
        try:
            lock = self.path(number).with_suffix(".lock").open("w")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unwritable(self.folder, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError as error:
            lock.close()
            raise unwritable(self.folder, error) from error
        return lock
