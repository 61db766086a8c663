"""Replies on disk, row by row, so that a kill loses the batch that was being written and nothing else.

replies/replies-00000.jsonl    one reply per line, synced after each batch; a new file every 5,000 rows
replies/likelihoods.jsonl      log-likelihoods of texts that the writer was given, in the same way
replies/writer.json            what stands for the writer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict

from distill.core.errors import InputError
from distill.core.stored import read_checked, write_checked
from distill.stages.synthesize.appended import append_lines, appended_lines
from distill.stages.synthesize.requests import Likelihood, Reply

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
class _StoredLikelihood:
    """The likelihood of a text, with the id of what was asked."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    mean: float
    is_cut: bool


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
            for row in appended_lines(file, Stored, fix, is_last=number == len(self._files) - 1):
                self._known[row.id] = Reply(row.text, row.finish, row.prompt_tokens, row.new_tokens)
        self._likelihoods: dict[str, Likelihood] = {}
        self._file_of_likelihoods = self.folder / "likelihoods.jsonl"
        if self._file_of_likelihoods.is_file():
            for one in appended_lines(self._file_of_likelihoods, _StoredLikelihood, fix):
                self._likelihoods[one.id] = Likelihood(one.mean, one.is_cut)

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
        append_lines(file, [{"id": id, **asdict(reply)} for id, reply in fresh.items()])
        self._known |= fresh

    def num_tokens(self) -> dict[str, int]:
        """Tokens of all prompts and replies, where the writer has counted them."""
        return {
            "prompts": sum(reply.prompt_tokens or 0 for reply in self._known.values()),
            "replies": sum(reply.new_tokens or 0 for reply in self._known.values()),
        }

    def likelihood(self, id: str) -> Likelihood | None:
        """The likelihood of a text that was computed before; None if it was not."""
        return self._likelihoods.get(id)

    def add_likelihoods(self, found: Mapping[str, Likelihood]) -> None:
        """Store likelihoods; those that are there already stay as they are.

        Raises:
            MachineError: the disk is full or not writable.
        """
        fresh = {id: one for id, one in found.items() if id not in self._likelihoods}
        if fresh:
            append_lines(self._file_of_likelihoods, [{"id": id, **asdict(one)} for id, one in fresh.items()])
            self._likelihoods |= fresh
