"""Parquet files: one document per row. The fastest table format; only the needed columns are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from distill.data import files
from distill.data.columns import ColumnsSpec, Numbered
from distill.data.file_source import FileSource
from distill.data.files import File


class Parquet(FileSource, ColumnsSpec):
    """Parquet files, read a few rows at a time; a row is a document."""

    kind: Literal["parquet"] = "parquet"
    path: str | list[str]
    """A file, a folder or a glob, or a list of these; `s3://`, `gs://` and `https://` too."""

    def rows(self, columns: frozenset[str] | None) -> Iterator[Numbered]:
        """Yield every row, in the order of the files."""
        for file in self._files():
            yield from parquet_rows(file, columns, self)

    def _files(self) -> list[File]:
        return files.find(self.path, [".parquet"])


def parquet_rows(
    file: File, columns: frozenset[str] | None = None, source: ColumnsSpec | None = None
) -> Iterator[Numbered]:
    """See :func:`distill.data.arrow.parquet_rows`, which needs pyarrow."""
    from distill.data import arrow

    return arrow.parquet_rows(file, columns, source)
