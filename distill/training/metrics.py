"""The metrics of a training stage: one JSON line per row, flushed immediately, and a CSV table with the same rows."""

from __future__ import annotations

import csv
import io
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distill.core.artifact import write_text

ROWS = "metrics.jsonl"
TABLE = "metrics.csv"
_ROW: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, int | float])


class MetricsLog:
    """Appends rows to ``metrics.jsonl``. On resume, the rows after the checkpoint's step are removed.

    Args:
        folder: folder of the files.
        step: step from which training resumes; 0 starts new files.
    """

    def __init__(self, folder: Path, step: int = 0):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(folder) if row["step"] <= step] if step else []
        write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream = (folder / ROWS).open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and flush it to the operating system."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def stop(self) -> None:
        """Close the file without an error, so that this can be called while another error is raised."""
        with suppress(OSError):
            self._stream.close()

    def close(self) -> None:
        """Close the file and write the CSV table."""
        self._stream.close()
        write_text(self.folder / TABLE, as_csv(read_rows(self.folder)))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All complete rows of a folder's ``metrics.jsonl``; truncated or damaged lines are skipped."""
    file = folder / ROWS
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
    return [row for line in lines if (row := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    """A row of numbers by name, if ``step`` and ``tokens`` are valid; None for anything else."""
    try:
        row = _ROW.validate_json(line, strict=True)
    except ValidationError:
        return None
    step, tokens = row.get("step"), row.get("tokens", 0)
    is_small = all(isinstance(value, float) or abs(value) < 1 << 63 for value in row.values())
    return row if is_small and isinstance(step, int) and step >= 0 and 0 <= tokens < math.inf else None


def is_validated(folder: Path, step: int) -> bool:
    """Whether there is a row of a completed validation after this step."""
    return any(row["step"] == step and any(key.startswith("val/") for key in row) for row in read_rows(folder))


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as one table, with one column per key, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
