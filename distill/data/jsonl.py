"""Rows of JSON, one per line: one document per row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from distill.data import files
from distill.data.columns import ColumnsSpec, Numbered
from distill.data.file_source import FileSource
from distill.data.files import File
from distill.data.message import Unusable


class Jsonl(FileSource, ColumnsSpec):
    """JSON Lines files (`.jsonl`); a row is a document."""

    kind: Literal["jsonl"] = "jsonl"
    path: str | list[str]
    """A file, a folder or a glob, or a list of these; `.gz` and `.zst`, `s3://`, `gs://` and `https://` too."""

    def rows(self, columns: frozenset[str] | None) -> Iterator[Numbered]:
        """Yield every row, in the order of the files and lines; empty lines are skipped."""
        for file in self._files():
            yield from json_rows(file)

    def _files(self) -> list[File]:
        return files.find(self.path, [".jsonl"])


def json_rows(file: File) -> Iterator[Numbered]:
    """Yield the rows of a JSON Lines file, numbered by their lines.

    Raises:
        InputError: it cannot be read.
    """
    with files.opened(file) as stream:
        # A binary file ends its lines at "\n" alone; text mode would also cut strings at "\r" and U+2028.
        for number, line in enumerate(files.lines(stream, file), start=1):
            if line.strip():
                yield f"{file.as_posix()}:{number}", json_of(line)


def json_of(text: bytes) -> Any:
    """The value of a line or a file of JSON, or an :class:`Unusable` if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a line that is not UTF-8
        return Unusable("not JSON", f"not a row of JSON ({' '.join(str(error).split())})")
