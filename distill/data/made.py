"""Rows that were made by a stage of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from distill.core.errors import InputError
from distill.data import files
from distill.data.base import Conversation, Document, Item, Rejected, SourceSpec, normalised
from distill.data.conversation import Columns, conversation_of
from distill.data.files import File
from distill.data.jsonl import json_rows
from distill.data.message import Unusable


class Made(SourceSpec):
    """The rows of a synthesize stage: conversations, or texts. A stage that trains on them names it by `data`."""

    kind: Literal["made"] = "made"
    stage: str
    """Name of the stage that makes them."""
    holds: Literal["conversations", "text"] = "conversations"
    """Type of the rows; filled in by the recipe."""
    path: str | None = None
    """Folder of the rows; filled in by the run."""

    def documents(self) -> Iterator[Item]:
        """Yield one conversation or document per row, in the order of the files."""
        for file in self._files():
            for id, row in json_rows(file):
                yield self._read(id, row)

    def fingerprint(self) -> str:
        """A hash of the bytes of the files."""
        return files.fingerprint(self._files())

    def num_bytes(self) -> int | None:
        """Size of the files; None before they exist."""
        return files.num_bytes(self._files()) if self.is_there() else None

    def is_there(self) -> bool:
        """Whether the stage has made them."""
        if self.path is None:
            return False
        try:
            return bool(self._files())
        except InputError:
            return False

    def is_at_hand(self) -> bool:
        """Whether they can be read now."""
        return self.is_there()

    def paths(self) -> list[str]:
        """Empty: the recipe names no files."""
        return []

    def holds_conversations(self) -> bool:
        """Whether the stage makes conversations."""
        return self.holds == "conversations"

    def split_key(self, document: Document | Conversation) -> str:
        """The text before the assistant's first message, so that several answers to one prompt are on the same side."""
        return normalised(document.opening if isinstance(document, Conversation) else document.text)

    def drops_rows(self) -> bool:
        """True: a row may be damaged."""
        return True

    def _read(self, id: str, row: Any) -> Item:
        try:
            if isinstance(row, Unusable):
                raise row
            if self.holds == "conversations":
                return conversation_of(row, id, Columns())
            if isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"].strip():
                return Document(id, row["text"])
            raise Unusable("no such column", "no column text")
        except Unusable as why:
            return Rejected(id, why.reason, why.detail)

    def _files(self) -> list[File]:
        if self.path is None:
            raise InputError(f"the rows of stage {self.stage} are made by the run; run it first")
        return files.find(self.path, [".jsonl"])
