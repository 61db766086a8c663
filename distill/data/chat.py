"""Conversations: rows of messages, or of a prompt and its response, from files or the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import model_validator

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.data import files
from distill.data.base import Conversation, Document, Rejected, SourceSpec, normalised
from distill.data.columns import Numbered
from distill.data.conversation import Columns, conversation_of
from distill.data.files import File
from distill.data.hub import load_rows, numbered
from distill.data.jsonl import json_of, json_rows
from distill.data.message import Unusable, without_nulls
from distill.data.parquet import parquet_rows


class Chat(SourceSpec):
    """Conversations from JSON Lines, JSON, parquet or the Hub; a model learns from the assistant's turns."""

    kind: Literal["chat"] = "chat"
    path: str | list[str] | None = None
    """Files, folders or globs: `.jsonl` and `.parquet` files, and `.json` files that hold a list of rows and that
    `path` names directly or by a glob, not through a folder; `.gz`, `.zst` and `s3://`, `gs://` and `https://` too."""
    hub: str | None = None
    """Instead of path: a Hub id such as `org/name`."""
    name: str | None = None
    """The data set's configuration; null for the default one. Hub only."""
    split: str = "train"
    """The data set's split. Hub only."""
    revision: str | None = None
    """Commit, tag or branch on the Hub; null for the newest. Hub only."""
    messages: str | None = None
    """The column of the messages; null: `messages` or `conversations`, whichever a row has."""
    prompt: str | None = None
    """The column of the user's text; null: `prompt`, `instruction` (with `input`) or `question`. Set it together with
    response."""
    response: str | None = None
    """The column of the assistant's answer; null: `response`, `completion`, `output` or `answer`. Set it together with
    prompt."""

    @model_validator(mode="after")
    def _one_place_and_one_form(self) -> Chat:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name one place: path (files) or hub (a data set of the Hub)")
        if self.hub is None and (self.name, self.split, self.revision) != (None, "train", None):
            raise ValueError("name, split and revision belong to hub; with path they have no effect, so remove them")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response are named together; add the other one")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("a row has messages, or prompt and response; name one of the two forms")
        return self

    def documents(self) -> Iterator[Conversation | Rejected]:
        """Yield one conversation per row, in the order of the files and rows; unusable rows as :class:`Rejected`."""
        return (self.read(id, row) for id, row in self.rows())

    def read(self, id: str, row: Any) -> Conversation | Rejected:
        """Convert one row of :meth:`rows` to a conversation, or say why it is rejected."""
        try:
            if isinstance(row, Unusable):
                raise row
            return conversation_of(row, id, self.columns())
        except Unusable as why:
            # the detail may quote a lone surrogate, which cannot be printed
            return Rejected(id, why.reason, why.detail.encode("utf-8", "backslashreplace").decode())
        except RecursionError:
            return Rejected(id, "wrong type", "its values are nested too deep")

    def rows(self) -> Iterator[Numbered]:
        """Yield every row as it is stored, with its name in messages to the user.

        Raises:
            InputError: a file cannot be read, or the data set cannot be loaded.
        """
        if self.hub is not None:
            where = f"{self.hub} ({', '.join(filter(None, (self.name, self.split)))})"
            found, _ = load_rows(where, self.hub, self.name, self.split, revision=self.revision)
            yield from ((id, without_nulls(row)) for id, row in numbered(where, self.hub, found))
            return
        for file in self._files():
            yield from {"parquet": _parquet, "json": _json}.get(files.form(file), json_rows)(file)

    def columns(self) -> Columns:
        """The columns that are read."""
        return Columns(self.messages, self.prompt, self.response)

    def fingerprint(self) -> str:
        """A hash of the bytes of the files, or of the data set's name, and of the columns."""
        place = files.fingerprint(self._files()) if self.hub is None else [self.name, self.split, self.revision]
        return hash_of(self.hub, place, self.messages, self.prompt, self.response)

    def num_bytes(self) -> int | None:
        """Size of the files, which is larger than that of the text."""
        return files.num_bytes(self._files()) if self.hub is None else None

    def is_at_hand(self) -> bool:
        """Whether it reads local files."""
        return self.hub is None and super().is_at_hand()

    def holds_conversations(self) -> bool:
        """True: it yields conversations."""
        return True

    def split_key(self, document: Document | Conversation) -> str:
        """The text before the assistant's first message, so that several answers to one prompt are on the same side."""
        return normalised(document.opening if isinstance(document, Conversation) else document.text)

    def _files(self) -> list[File]:
        return files.find(self.path or [], [".jsonl", ".parquet"])


def _json(file: File) -> Iterator[Numbered]:
    with files.opened(file) as stream:
        rows = json_of(files.whole(stream, file))
    if isinstance(rows, Unusable) or not isinstance(rows, list):
        why = rows.detail if isinstance(rows, Unusable) else f"it holds a {type(rows).__name__}"
        raise InputError(
            f"{file}: a .json file must hold a list of rows ({why}); name it .jsonl if it has a row per line"
        )
    yield from ((f"{file.as_posix()}:row {number}", row) for number, row in enumerate(rows, start=1))


def _parquet(file: File) -> Iterator[Numbered]:
    return ((id, row if isinstance(row, Unusable) else without_nulls(row)) for id, row in parquet_rows(file))
