"""Rows of JSON, one a line, with the text in one column: one document a row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from distill.core.errors import InputError
from distill.data import files
from distill.data.base import Document, SourceSpec


class Jsonl(SourceSpec):
    """JSON Lines files (`.jsonl`, `.jsonl.gz`); a row is a document."""

    kind: Literal["jsonl"] = "jsonl"
    path: str | list[str]
    """A file, a folder or a glob, or a list of these; relative to the current directory."""
    text: str = "text"
    """The column that holds the text."""

    def documents(self) -> Iterator[Document]:
        """One document a row, in the order of the files and lines; rows with an empty text are passed over."""
        for file in self._files():
            with files.opened(file) as stream:
                # A binary file ends its lines at "\n" alone; text mode would also cut strings at "\r" and U+2028.
                for number, line in enumerate(stream, start=1):
                    text = self._text(line, f"{file}:{number}") if line.strip() else ""
                    if text.strip():
                        yield Document(f"{file.as_posix()}:{number}", text)

    def fingerprint(self) -> str:
        """A hash of the names and bytes of the files."""
        return files.fingerprint(self._files())

    def num_bytes(self) -> int | None:
        """The size of the files: a little more than that of the text."""
        return files.num_bytes(self._files())

    def _files(self) -> list[Path]:
        return files.find(self.path, [".jsonl"])

    def _text(self, line: bytes, place: str) -> str:
        try:
            row: Any = json.loads(line)
        except ValueError as error:  # also a line that is not UTF-8
            raise InputError(f"{place}: not a row of JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: a row must be a JSON object (got {type(row).__name__})")
        if self.text not in row:
            raise InputError(f"{place}: no column {self.text!r} (it has {', '.join(map(repr, row))}); set text: COLUMN")
        text = row[self.text]
        if not isinstance(text, str):
            raise InputError(f"{place}: column {self.text!r} must hold a string (got {type(text).__name__})")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{place}: column {self.text!r} holds half of a surrogate pair, which is no text"
            ) from None
        return text
