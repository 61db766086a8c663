"""The record of a training stage: one JSON line a row, flushed at once, and a CSV made from it."""

from __future__ import annotations

import csv
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.core.artifact import write_text

ROWS = "metrics.jsonl"
TABLE = "metrics.csv"


class MetricsLog:
    """Appends rows to ``metrics.jsonl``; on resume the rows after the checkpoint's step are dropped.

    Args:
        folder: where the files lie.
        step: the step that training goes on from; 0 starts afresh.
    """

    def __init__(self, folder: Path, step: int = 0):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(folder) if row["step"] <= step] if step else []
        write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream = (folder / ROWS).open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it is on its way to the disk when this returns."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def stop(self) -> None:
        """Let go of the file; the rows stay, and an error that is on its way is not replaced by another."""
        with suppress(OSError):
            self._stream.close()

    def close(self) -> None:
        """Write the CSV table and let go of the file."""
        self._stream.close()
        write_text(self.folder / TABLE, as_csv(read_rows(self.folder)))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All complete rows of a folder's ``metrics.jsonl``; a line that is cut short or damaged is left out."""
    file = folder / ROWS
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def is_validated(folder: Path, step: int) -> bool:
    """Whether there is a row of a whole look at the validation split after this step."""
    return any(row["step"] == step and any(key.startswith("val/") for key in row) for row in read_rows(folder))


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows with differing keys as one table; a column a key, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
