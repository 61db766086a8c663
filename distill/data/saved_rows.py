"""Reads the rows of a folder that ``save_to_disk`` has written, with the library that wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow

from distill.core.errors import InputError
from distill.data.arrow import BATCH, rows_of
from distill.data.columns import ColumnsSpec, Numbered


def read(folder: Path, columns: frozenset[str] | None, source: ColumnsSpec) -> Iterator[Numbered]:
    """Yield the rows of a data set, numbered from 1; its files are mapped into memory.

    Args:
        folder: folder of the data set, or of one of its splits.
        columns: names of the columns to read; None: all.
        source: source that must be able to build its text from these columns.

    Raises:
        InputError: the folder is damaged, or lacks a column from which the text is built.
    """
    try:
        found = datasets.load_from_disk(str(folder), keep_in_memory=False)
        names: list[str] = list(found.column_names)
    except Exception as error:  # the library raises its own, Arrow's and Python's
        raise _damaged(folder, error) from None
    if (why := source.missing(names)) is not None:
        raise InputError(f"{folder}: {why}")
    if columns is not None:
        found = found.select_columns([name for name in names if name in columns])
    number = 0
    try:
        for table in found.with_format("arrow").iter(BATCH):
            for batch in table.to_batches():
                for row in rows_of(batch, from_disk=True):
                    number += 1
                    yield f"{folder.as_posix()}:row {number}", row
    except (OSError, pyarrow.ArrowException, MemoryError, OverflowError, ValueError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: BaseException) -> InputError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{folder}: this data set cannot be read ({why}); fetch or save it again")
