"""A data set of the Hugging Face Hub, or a local folder in the same layout: one document a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.data import files
from distill.data.base import Document, SourceSpec

_DATA_SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".txt")


class Hub(SourceSpec):
    """A data set of the Hugging Face Hub or a local folder of parquet files; code in the data set is never run."""

    kind: Literal["hub"] = "hub"
    path: str
    """Hub id such as `org/name`, or a local folder."""
    name: str | None = None
    """The configuration, such as `20231101.en`; null for the default one."""
    split: str = "train"
    """The split; slices such as `train[:1%]` work when not streaming."""
    text: str = "text"
    """The column that holds the text."""
    revision: str | None = None
    """Commit, tag or branch on the Hub; null for the newest. A commit makes the run repeatable."""
    streaming: bool = False
    """Read the rows as they are needed and store nothing; false downloads and tokenises all of it first."""

    def documents(self) -> Iterator[Document]:
        """One document a row, in the data set's order; rows with an empty text are passed over."""
        for number, row in enumerate(self._rows()):
            text = row[self.text]
            if not isinstance(text, str):
                raise InputError(
                    f"{self._where()}: column {self.text!r} must hold strings (row {number}: {type(text).__name__})"
                )
            if text.strip():
                yield Document(f"{self.path}:{number}", text)

    def fingerprint(self) -> str:
        """A hash of path, name, split and revision; for a local folder also of its files' bytes."""
        local = files.fingerprint(files.find(self.path, _DATA_SUFFIXES)) if Path(self.path).is_dir() else None
        return hash_of(self.path, self.name, self.split, self.text, self.revision, local)

    def is_stream(self) -> bool:
        """As the recipe says."""
        return self.streaming

    def _where(self) -> str:
        return f"{self.path} ({', '.join(filter(None, (self.name, self.split)))})"

    def _rows(self) -> Any:
        """The data set, with the text column alone.

        Raises:
            InputError: it cannot be had, or lacks the column.
        """
        import datasets

        try:
            rows = datasets.load_dataset(
                self.path, name=self.name, split=self.split, revision=self.revision, streaming=self.streaming
            )
            columns = rows.column_names or list(next(iter(rows), {}))
        except Exception as error:  # the library raises its own, the network's and the file system's
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"{self._where()}: this data set cannot be loaded ({why})") from None
        if self.text not in columns:
            raise InputError(
                f"{self._where()}: no column {self.text!r} (it has {', '.join(columns)}); set text: COLUMN"
            )
        return rows.select_columns([self.text])
