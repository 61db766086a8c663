"""CSV and TSV files: one document per row. All values are text; JSON Lines preserves numbers and lists."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO, Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.data import files
from distill.data.columns import ColumnsSpec, Numbered
from distill.data.file_source import FileSource
from distill.data.files import File
from distill.data.message import Unusable

LARGEST_FIELD = 1 << 26
"""Largest number of characters in a field. The reader uses four bytes per character, and an unclosed quote makes one
field of everything that follows it."""


class Csv(FileSource, ColumnsSpec):
    """CSV or TSV files (`.csv`, `.tsv`); a row is a document. Values are text; a quoted field may have line breaks."""

    kind: Literal["csv"] = "csv"
    path: str | list[str]
    """A file, a folder or a glob, or a list of these; `.gz` and `.zst`, `s3://`, `gs://` and `https://` too."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """The character between two fields; null: a tab in `.tsv` files, otherwise a comma."""
    columns: list[str] | None = Field(None, min_length=1)
    """Names of the columns, for files without a header; null: the first row of each file contains them."""

    def rows(self, columns: frozenset[str] | None) -> Iterator[Numbered]:
        """Yield every row, in the order of the files; lines without any field are skipped."""
        for file in self._files():
            with files.opened(file) as stream:
                yield from self._rows_of(file, stream)

    def _files(self) -> list[File]:
        return files.find(self.path, [".csv", ".tsv"])

    def _rows_of(self, file: File, stream: IO[bytes]) -> Iterator[Numbered]:
        csv.field_size_limit(LARGEST_FIELD)
        delimiter = self.delimiter or ("\t" if files.form(file) == "tsv" else ",")
        reader = csv.reader(_decoded(stream, file), delimiter=delimiter, strict=True)
        header, line = self.columns, 1
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                self._check(error, file, line, header)
                fields = []
                yield f"{file.as_posix()}:{line}", Unusable("not CSV", f"not a row of CSV ({error})")
            if fields is None:
                break
            if fields and header is None:
                header = fields
                self._check_header(header, file, line)
            elif fields and header is not None:
                yield f"{file.as_posix()}:{line}", _row(fields, header)
            line = reader.line_num + 1
        if header is None:
            raise InputError(f"{file}: has no header; the first row of a CSV file names its columns")

    def _check(self, error: csv.Error, file: File, line: int, header: list[str] | None) -> None:
        """Raise an InputError if a CSV error affects more than one row."""
        if header is None:
            raise InputError(f"{file}:{line}: the header is no row of CSV ({error})")
        if "unexpected end" in str(error) or "field limit" in str(error):
            raise InputError(
                f"{file}:{line}: a quote in this row is not closed (within {LARGEST_FIELD:,} characters, or before "
                "the end of the file), so that what follows is taken for one field; close it, or double it"
            )

    def _check_header(self, header: list[str], file: File, line: int) -> None:
        if twice := [name for name in header if header.count(name) > 1]:
            raise InputError(f"{file}:{line}: two columns are called {twice[0]!r}; rename one of them")
        if (why := self.missing(header)) is not None:
            raise InputError(f"{file}:{line}: {why}; columns: [...] names them where the file has no header")


def _decoded(stream: IO[bytes], file: File) -> Iterator[str]:
    """Yield the lines as text. A byte that is not UTF-8 becomes a lone surrogate, because of which its row is
    rejected."""
    for number, line in enumerate(files.lines(stream, file)):
        yield line.decode("utf-8-sig" if number == 0 else "utf-8", "surrogateescape")


def _row(fields: list[str], header: list[str]) -> dict[str, str] | Unusable:
    if len(fields) == len(header):
        return dict(zip(header, fields, strict=True))
    expected = f"{len(header)} columns"
    return Unusable(
        "ragged row", f"{len(fields)} fields in place of {expected}; a field with the delimiter needs quotes"
    )
