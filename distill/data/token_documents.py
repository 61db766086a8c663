"""Reads documents of token ids: rows of tables, and arrays that are mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.core import outside
from distill.core.errors import InputError
from distill.core.spec import LARGEST
from distill.data import files
from distill.data.base import Rejected, Tokenized
from distill.data.files import File
from distill.data.jsonl import json_rows
from distill.data.message import Unusable
from distill.data.parquet import parquet_rows

ARRAYS = ("bin", "npy")
LONGEST = 1 << 24
"""Largest number of tokens in a document; a longer one means a wrong `document_end` or a wrong `dtype`."""
LOOKED_AT = 1 << 20
"""Number of tokens of a flat file that are searched for ends of documents at once."""


def read(
    found: Sequence[File], column: str, dtype: str, document_end: int | None, *, add_end: bool
) -> Iterator[Tokenized | Rejected]:
    """Yield the documents of files; see :class:`~distill.data.tokens.Tokens` for the arguments.

    Raises:
        InputError: a file holds no ids, or cannot be read.
    """
    for file in found:
        if files.form(file) not in ARRAYS:
            yield from _of_table(file, column, add_end)
        elif isinstance(file, Path) and file.suffix not in files.PACKED:
            yield from _of_array(file, _mapped(file, dtype), document_end, add_end)
        else:
            raise InputError(
                f"{file}: is mapped into memory, so it must be on this machine and not compressed; fetch and unpack it"
            )


def _of_table(file: File, column: str, add_end: bool) -> Iterator[Tokenized | Rejected]:
    is_parquet = files.form(file) == "parquet"
    for id, row in parquet_rows(file, frozenset({column})) if is_parquet else json_rows(file):
        try:
            ids = _ids_of(row, column)
        except Unusable as why:
            yield Rejected(id, why.reason, why.detail.encode("utf-8", "backslashreplace").decode())
        else:
            if ids:
                yield Tokenized.of(id, np.array(ids, np.int64), add_end)


def _of_array(file: Path, ids: Any, document_end: int | None, add_end: bool) -> Iterator[Tokenized | Rejected]:
    if ids.ndim == 2:
        rows = ((f"row {number}", row) for number, row in enumerate(ids, start=1))
    elif document_end is None:
        raise InputError(
            f"{file}: is one list of ids; set document_end to the id with which a document ends, such as the "
            "tokenizer's eos_token_id"
        )
    else:
        rows = ((f"token {start:,}", ids[start:stop]) for start, stop in _spans(file, ids, document_end))
    for place, row in rows:
        id = f"{file.as_posix()}:{place}"
        if int(row.min()) < 0 or int(row.max()) > LARGEST:
            yield Rejected(id, "wrong type", f"it holds {int(row.min())}, and ids are whole numbers from 0")
        elif len(row) > 1 or row[0] != document_end:
            yield Tokenized.of(id, row.astype(np.int64), add_end)


def _ids_of(row: Any, column: str) -> list[int]:
    if isinstance(row, Unusable):
        raise row
    if not isinstance(row, dict):
        raise Unusable("not an object", f"a row must be a JSON object (got {type(row).__name__})")
    if column not in row:
        raise Unusable(
            "no such column", f"no column {column!r} (it has {', '.join(map(repr, row)) or 'none'}); set column"
        )
    ids = row[column]
    if not isinstance(ids, list):
        raise Unusable("wrong type", f"column {column!r} must hold a list of ids (got {type(ids).__name__})")
    for token in ids:
        if type(token) is not int or not 0 <= token <= LARGEST:
            raise Unusable("wrong type", f"column {column!r} must hold whole numbers from 0 (it has {token!r:.40})")
    return ids


def _mapped(file: Path, dtype: str) -> Any:
    """The ids of a file, memory-mapped. [tokens], or [documents, tokens]"""
    size = outside.status_of(file).st_size
    if file.suffix == ".npy":
        try:
            found = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # the header is parsed as Python, which may raise what its tokenizer does
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{file}: not a whole .npy file of whole numbers ({why}); write it again") from None
        if found.ndim not in (1, 2) or found.dtype.kind not in "iu" or 0 in found.shape:
            raise InputError(
                f"{file}: must hold whole numbers, [tokens] or [documents, tokens] (got {found.dtype}, {found.shape})"
            )
        return found
    width = np.dtype(dtype).itemsize
    if size == 0 or size % width:
        raise InputError(f"{file}: {size:,} bytes are no whole number of ids of {width} ({dtype}); is dtype right?")
    found = np.memmap(file, np.dtype(dtype).newbyteorder("<"), mode="r")
    head = found[:4096]
    if len(head) >= 16 and not head[1::2].any() and head[::2].any():
        raise InputError(f"{file}: every other id is 0, as where ids have more than {width} bytes; set a wider dtype")
    return found


def _spans(file: Path, ids: Any, end: int) -> Iterator[tuple[int, int]]:
    """Yield the first token of each document, and the one after its last."""
    start = 0
    for begin in range(0, len(ids), LOOKED_AT):
        part = ids[begin : begin + LOOKED_AT]
        for place in np.flatnonzero(part == end).tolist():
            yield start, begin + place + 1
            start = begin + place + 1
        if begin + len(part) - start > LONGEST:
            raise InputError(
                f"{file}: {LONGEST:,} ids from token {start:,} on without document_end ({end}); are document_end and "
                "dtype right?"
            )
    if start < len(ids):
        yield start, len(ids)
