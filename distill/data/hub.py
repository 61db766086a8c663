"""A data set of the Hugging Face Hub, or a local folder in the same layout: one document per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.core.outside import is_folder
from distill.data import files
from distill.data.base import Item
from distill.data.columns import ColumnsSpec, Numbered
from distill.data.text_template import TextOf

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
        """Yield every row, in the data set's order."""
        return numbered(self._where(), self.path, self._loaded(columns))

    def open_at(self, state: dict[str, Any] | None) -> tuple[Iterator[Item], Callable[[], dict[str, Any]]]:
        """See :meth:`~distill.data.base.SourceSpec.open_at`; the state that ``datasets`` returns contains the file and
        the row."""
        if not self.streaming:
            raise ValueError("only a stream has positions")
        text_of = TextOf(self.text)
        found = self._loaded(text_of.columns)
        num_rows = 0 if state is None else int(state["num_rows"])
        if state is not None:
            found.load_state_dict(state["of_library"])

        def counted() -> Iterator[Numbered]:
            nonlocal num_rows
            for row in numbered(self._where(), self.path, found, num_rows):
                num_rows += 1
                yield row

        return self.documents_of(counted(), text_of), lambda: {"num_rows": num_rows, "of_library": found.state_dict()}

    def _loaded(self, columns: frozenset[str] | None) -> Any:
        self.check_place()
        found, names = load_rows(
            self._where(), self.path, self.name, self.split, revision=self.revision, streaming=self.streaming
        )
        if (why := self.missing(names)) is not None:
            raise InputError(f"{self._where()}: {why}")
        return found if columns is None else found.select_columns([name for name in names if name in columns])

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Class names from a ``ClassLabel`` feature or a list of them."""
        self.check_place()
        found, _ = load_rows(
            self._where(), self.path, self.name, self.split, revision=self.revision, streaming=self.streaming
        )
        feature = (found.features or {}).get(column)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return tuple(names) if names else None

    def fingerprint(self) -> str:
        """A hash of Hub id, name, split, text and revision; for a local folder, its file names and bytes replace the
        id."""
        place = self.path
        if is_folder(self.path):
            root = Path(self.path).expanduser()
            place = files.fingerprint(files.find(self.path, _DATA_SUFFIXES), root)
        return hash_of(place, self.name, self.split, self.text, self.revision)

    def is_at_hand(self) -> bool:
        """False: it may need a download."""
        return False

    def is_stream(self) -> bool:
        """Whether the recipe sets ``streaming``."""
        return self.streaming

    def _where(self) -> str:
        return f"{self.path} ({', '.join(filter(None, (self.name, self.split)))})"

    def check_place(self) -> None:
        """Check that the path is not a file or a folder of another kind of source.

        Raises:
            InputError: it is one.
        """
        kind = OF_FILES.get(files.unpacked(self.path).rpartition(".")[2])
        if kind and Path(self.path).is_file():
            raise InputError(f"{self.path}: is a file and no data set; use kind: {kind}")
        if kind:  # data set names do not have these suffixes
            raise InputError(f"{self.path}: no such file; correct the path, and use kind: {kind} for a file")
        if any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise InputError(f"{self.path}: was written by save_to_disk; use kind: saved")


OF_FILES = {"parquet": "parquet", "csv": "csv", "tsv": "csv", "jsonl": "jsonl", "txt": "text_files", "md": "text_files"}
"""File name suffix -> the kind of source that reads it."""


def numbered(where: str, name: str, rows: Iterable[Any], first: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a data set, each with its name in messages to the user.

    Args:
        where: name of the data set in messages to the user.
        name: its Hub id or folder.
        rows: its rows.
        first: number of the first row.

    Raises:
        InputError: a row cannot be read, because the connection is broken or a file is damaged.
    """
    number = first - 1
    try:
        for number, row in enumerate(rows, first):
            yield f"{name}:{number}", row
    except Exception as error:  # the library raises its own, the network's and the file system's
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: row {number + 1} cannot be read ({why}); fetch the data set again") from None


def load_rows(where: str, path: str, name: str | None, split: str, **how: Any) -> tuple[Any, list[str]]:
    """A data set and the names of its columns.

    Args:
        where: name of the data set in messages to the user.
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
