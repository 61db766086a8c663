"""A data set of the Hugging Face Hub, or a local folder in the same layout: one document per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.core.outside import is_folder
from distill.data import files
from distill.data.columns import ColumnsSpec, Numbered

_DATA_SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".txt")


class Hub(ColumnsSpec):
    """A data set of the Hugging Face Hub or a local folder of parquet files; code in the data set is never run."""

    kind: Literal["hub"] = "hub"
    path: str
    """Hub id such as `org/name`, or a local folder."""
    name: str | None = None
    """The configuration, such as `20231101.en`; null for the default one."""
    split: str = "train"
    """The split; slices such as `train[:1%]` work when not streaming."""
    revision: str | None = None
    """Commit, tag or branch on the Hub; null for the newest. A commit makes the run repeatable."""
    streaming: bool = False
    """Read the rows as they are needed and store nothing; false downloads and tokenizes all of it first."""

    def rows(self, columns: frozenset[str] | None) -> Iterator[Numbered]:
        """Every row, in the data set's order."""
        self.check_place()
        found, names = load_rows(
            self._where(), self.path, self.name, self.split, revision=self.revision, streaming=self.streaming
        )
        if (why := self.missing(names)) is not None:
            raise InputError(f"{self._where()}: {why}")
        if columns is not None:
            found = found.select_columns([name for name in names if name in columns])
        return numbered(self._where(), self.path, found)

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Those of a ``ClassLabel``, or of a list of them."""
        self.check_place()
        found, _ = load_rows(
            self._where(), self.path, self.name, self.split, revision=self.revision, streaming=self.streaming
        )
        feature = (found.features or {}).get(column)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return tuple(names) if names else None

    def fingerprint(self) -> str:
        """A hash of Hub id, name, split and revision; of a local folder in place of the id the names in it and all
        bytes."""
        place = self.path
        if is_folder(self.path):
            root = Path(self.path).expanduser()
            place = files.fingerprint(files.find(self.path, _DATA_SUFFIXES), root)
        return hash_of(place, self.name, self.split, self.text, self.revision)

    def is_at_hand(self) -> bool:
        """Never, as the Hub may be asked for it."""
        return False

    def is_stream(self) -> bool:
        """As the recipe says."""
        return self.streaming

    def _where(self) -> str:
        return f"{self.path} ({', '.join(filter(None, (self.name, self.split)))})"

    def check_place(self) -> None:
        """Refuse files and folders that other sources read.

        Raises:
            InputError: it is one of them.
        """
        if (kind := OF_FILES.get(files.unpacked(self.path).rpartition(".")[2])) and Path(self.path).is_file():
            raise InputError(f"{self.path}: is a file and no data set; use kind: {kind}")
        if any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise InputError(f"{self.path}: was written by save_to_disk; use kind: saved")


OF_FILES = {"parquet": "parquet", "csv": "csv", "tsv": "csv", "jsonl": "jsonl", "txt": "text_files", "md": "text_files"}
"""End of a file's name -> the kind of source that reads it."""


def numbered(where: str, name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The rows of a data set, each with what a message calls it.

    Args:
        where: what a message calls the data set.
        name: its Hub id or folder.
        rows: of it.

    Raises:
        InputError: one cannot be read, as the connection is broken or a file damaged.
    """
    number = -1
    try:
        for number, row in enumerate(rows):
            yield f"{name}:{number}", row
    except Exception as error:  # the library raises its own, the network's and the file system's
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: row {number + 1} cannot be read ({why}); fetch the data set again") from None


def load_rows(where: str, path: str, name: str | None, split: str, **how: Any) -> tuple[Any, list[str]]:
    """A data set and the names of its columns.

    Args:
        where: what a message calls it.
        path: Hub id or local folder.
        name: the configuration, or None.
        split: the split.
        how: further arguments of ``datasets.load_dataset``.

    Raises:
        InputError: it cannot be loaded.
    """
    import datasets

    try:
        rows = datasets.load_dataset(path, name=name, split=split, **how)
        return rows, rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # the library raises its own, the network's and the file system's
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{where}: this data set cannot be loaded ({why})") from None
