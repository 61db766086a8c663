"""The result of a benchmark: a JSON file in ``results/``, in one format, from which ``tables`` generates the docs."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def write(
    benchmark: str,
    *,
    command: str,
    hardware: Mapping[str, Any],
    versions: Mapping[str, str],
    rows: Iterable[Mapping[str, Any]],
    notes: Iterable[str] = (),
    folder: Path = FOLDER,
) -> Path:
    """Write ``<folder>/<benchmark>.json`` atomically, with today's date.

    Args:
        benchmark: name of the script, without ``.py``.
        command: command that repeats the benchmark; folders are in capital letters (``--corpus BOOKS``), never paths.
        hardware: result of :func:`benchmarks.hardware.describe`.
        versions: result of :func:`benchmarks.hardware.versions`.
        rows: the figures: text, numbers, None, or results of :func:`spread`. Rows with different values of ``"table"``
            become different tables.
        notes: sentences below the tables: how it was measured, what failed and with which error.
        folder: folder of the file.
    """
    result = {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "hardware": dict(hardware),
        "versions": dict(versions),
        "command": command,
        "rows": [dict(row) for row in rows],
        "notes": list(notes),
    }
    file = folder / f"{benchmark}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)
    return file


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single value) and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}
