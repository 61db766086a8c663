"""Files of a data set that a stage has made.

data/rows-00000.jsonl      a row per line: {id, messages, document, source, ...}, or {id, text, source, ...}
dropped.jsonl              the rows that are left out: {id, filter, why, messages, ...}
exam.jsonl                 questions that are kept out of the training
data.json                  lineage: the writer, the settings, counts of kept and dropped rows and of tokens, seconds
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from distill.core.artifact import replacing, write_text
from distill.core.errors import InputError
from distill.core.outside import read
from distill.core.stored import parse_stored

FOLDER, DROPPED, EXAM, ABOUT = "data", "dropped.jsonl", "exam.jsonl", "data.json"
_ROW: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def write_rows(place: Path, rows: Sequence[dict[str, Any]], per_file: int) -> None:
    """Write the files of kept rows; all or none.

    Args:
        place: folder of the stage.
        rows: to write.
        per_file: rows of each file.
    """
    with replacing(place / FOLDER) as folder:
        for start in range(0, max(1, len(rows)), per_file):
            some = rows[start : start + per_file]
            (folder / f"rows-{start // per_file:05}.jsonl").write_text(as_lines(some), encoding="utf-8")


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of rows, whole or not at all."""
    write_text(file, as_lines(rows))


def as_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as JSON Lines. Half surrogate pairs, which no file can hold, are replaced."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return "".join(lines).encode("utf-8", "replace").decode("utf-8")


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file.

    Raises:
        InputError: it cannot be read, or a line is no object.
    """
    for number, line in enumerate(read(file).splitlines(), 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}:{number}: not UTF-8 ({error}); make the data set again") from None
        yield parse_stored(text, _ROW, f"{file}:{number}", "make the data set again")
