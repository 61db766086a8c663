"""Reads parquet files and Arrow batches as plain rows; a row that cannot be read is yielded with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from distill.core.errors import InputError
from distill.data import files
from distill.data.columns import ColumnsSpec, Numbered
from distill.data.files import File
from distill.data.message import Unusable

BUFFER = 1 << 20
"""Number of bytes of a column that are read at once."""
BATCH = 256
"""Number of rows in memory at once."""


def rows_of(batch: pyarrow.RecordBatch, *, from_disk: bool = False) -> Iterator[Any]:
    """Yield the rows of a batch, each as a dict (column -> Python value), or the reason why it cannot be read.

    Args:
        batch: the rows.
        from_disk: whether the buffers are mapped from a file, which may be damaged; if so, all of them are checked
            first.

    Raises:
        pyarrow.ArrowInvalid: an offset points outside its buffer.
    """
    batch.validate(full=from_disk)
    names, columns = batch.schema.names, batch.columns
    for place in range(batch.num_rows):
        try:
            yield {name: column[place].as_py() for name, column in zip(names, columns, strict=True)}
        except UnicodeDecodeError as error:
            yield Unusable("not text", f"a column is not UTF-8 ({error.reason} at byte {error.start})")
        except (ValueError, OverflowError) as error:
            yield Unusable("wrong type", f"a value is out of range ({' '.join(str(error).split())[:100]})")


def parquet_rows(file: File, columns: frozenset[str] | None, source: ColumnsSpec | None) -> Iterator[Numbered]:
    """Yield the rows of a parquet file, numbered from 1.

    Args:
        file: the parquet file.
        columns: names of the columns to read; None: all.
        source: source that must be able to build its text from these columns; None: no check.

    Raises:
        InputError: the file is not a complete parquet file, or lacks a column from which the text is built.
    """
    if file.suffix in files.PACKED:
        raise InputError(f"{file}: parquet is compressed inside, and is not read in another compressed file; unpack it")
    number = 0
    with files.raw(file, seekable=True) as stream:
        try:
            # BUFFER bytes of a column are read at a time, not the whole column
            how: dict[str, Any] = {"buffer_size": BUFFER, "pre_buffer": False}
            opened = pyarrow.parquet.ParquetFile(stream, **how)
            schema = opened.schema_arrow
            if source is not None and (why := source.missing(schema.names)) is not None:
                raise InputError(f"{file}: {why}")
            # keep the dictionary encoding, because expanding repeated strings may exhaust the memory
            texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
            opened = pyarrow.parquet.ParquetFile(stream, metadata=opened.metadata, read_dictionary=texts, **how)
            wanted = None if columns is None else [name for name in schema.names if name in columns]
            for batch in opened.iter_batches(batch_size=BATCH, columns=wanted, use_threads=False):
                for row in rows_of(batch):
                    number += 1
                    yield f"{file.as_posix()}:row {number}", row
        except (OSError, pyarrow.ArrowException, MemoryError, OverflowError, ValueError) as error:
            where = f" behind row {number:,}" if number else ""
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{file}: not a whole parquet file{where} ({why}); fetch or write it again") from None
