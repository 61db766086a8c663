"""Replies on disk, row by row, so that a kill loses the batch that was being written and nothing else.

replies/replies-00000.jsonl    one reply per line, synced after each batch; a new file every 5,000 rows
replies/writer.json            what stands for the writer
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict

from distill.core.artifact import sync
from distill.core.errors import InputError, MachineError
from distill.core.stored import parse_stored, read_checked, write_checked
from distill.stages.synthesize.requests import Reply

PER_FILE = 5000
FOLDER = "replies"


@dataclass(frozen=True)
class Stored:
    """A line of a file: a reply with the id of its request."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    text: str
    finish: str
    prompt_tokens: int | None = None
    new_tokens: int | None = None


@dataclass(frozen=True)
class _About:
    __pydantic_config__ = ConfigDict(extra="forbid")

    writer: str


class Replies:
    """All replies that a stage has. They are read when it is opened.

    Args:
        place: folder of the stage.
        writer: identity of the writer.

    Raises:
        InputError: the replies there are of another writer, or damaged.
    """

    def __init__(self, place: Path, writer: str):
        self.folder = place / FOLDER
        about, fix = self.folder / "writer.json", f"run the stage again by --from {place.name}"
        if about.is_file() and (other := read_checked(about, _About, fix).writer) != writer:
            raise InputError(f"{self.folder}: holds replies of {other}, and the writer is now {writer}; {fix}")
        write_checked(about, {"writer": writer})
        self._known: dict[str, Reply] = {}
        self._files = sorted(self.folder.glob("replies-*.jsonl"))
        for number, file in enumerate(self._files):
            self._read(file, fix, is_last=number == len(self._files) - 1)

    def __contains__(self, id: str) -> bool:
        return id in self._known

    def __getitem__(self, id: str) -> Reply:
        return self._known[id]

    def __len__(self) -> int:
        return len(self._known)

    def add(self, replies: Sequence[tuple[str, Reply]]) -> None:
        """Store replies; those that are there already stay as they are.

        Raises:
            MachineError: the disk is full or not writable.
        """
        fresh = {id: reply for id, reply in replies if id not in self._known}
        if not fresh:
            return
        file = self.folder / f"replies-{len(self._known) // PER_FILE:05}.jsonl"
        lines = "".join(json.dumps({"id": id, **asdict(reply)}) + "\n" for id, reply in fresh.items())
        try:
            is_new = not file.exists()
            with file.open("ab") as stream:
                stream.write(lines.encode())
                stream.flush()
                os.fsync(stream.fileno())
            if is_new:
                sync(self.folder)
        except OSError as error:
            raise MachineError(f"{file}: cannot be written ({error.strerror or error})") from error
        self._known |= fresh

    def _read(self, file: Path, fix: str, *, is_last: bool) -> None:
        content = file.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content) and is_last:  # a kill while a line was written
            with file.open("rb+") as stream:
                stream.truncate(end)
        elif end < len(content):
            raise InputError(f"{file}: ends in the middle of a line; put it back, or {fix}")
        for number, line in enumerate(content[:end].splitlines(), 1):
            row = parse_stored(line.decode("utf-8", "replace"), Stored, f"{file}:{number}", f"put it back, or {fix}")
            self._known[row.id] = Reply(row.text, row.finish, row.prompt_tokens, row.new_tokens)
