"""The rows as text: for a terminal or a README (Markdown) and for a spreadsheet (CSV)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.tracking.tradeoff import EQUAL_SPEED, HIGHER_IS_BETTER, SPEED, Row, figure

MISSING = "—"


def percent(share: float) -> str:
    """0.543 -> "54 %"; small shares keep a digit, and one short of all is never rounded up to it."""
    value = 100 * share
    if abs(value) < 10 and value:
        return f"{value:.1f} %"
    return f"{math.floor(value) if 99 <= value < 100 else value:.0f} %"


def significant(value: float, digits: int = 3) -> str:
    """A number with three significant digits and no exponent below a million: 58.0, 4.21, 1,240."""
    if not math.isfinite(value) or abs(value) >= 1e6:
        return f"{value:.{digits}g}"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


@dataclass(frozen=True)
class Column:
    """One figure of the table.

    Attributes:
        key: field of :class:`distill.tracking.tradeoff.Row`.
        title: header without unit.
        unit: of the printed number, empty for none.
        scale: field value times this is the printed number.
        compare: whether the best cell is marked and the ratio to the teacher is worth printing.
    """

    key: str
    title: str
    unit: str
    scale: float = 1.0
    compare: bool = True
    style: Callable[[float], str] = significant

    @property
    def header(self) -> str:
        """Title with unit."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title

    @property
    def higher_is_better(self) -> bool:
        """Which way is better."""
        return self.key in HIGHER_IS_BETTER


COLUMNS = (
    Column("parameters", "Parameters", "M", 1e-6),
    Column("non_embedding_parameters", "Non-embedding", "M", 1e-6),
    Column("weight_bytes", "On disk", "MB", 1e-6),
    Column("bits_per_parameter", "Bits per parameter", "bit"),
    Column("nonzero_share", "Not zero", "%", 100, compare=False, style=lambda value: f"{value:.1f}"),
    Column("perplexity", "Perplexity", ""),
    Column("loss_nats", "Loss", "nats/token", style=lambda value: f"{value:.3f}"),
    Column("bits_per_byte", "Bits per byte", "bit"),
    Column("kl_to_teacher", "KL to teacher", "nats/token", style=lambda value: f"{value:.3f}"),
    Column("top1_agreement", "Top-1 agreement", "%", 100, style=lambda value: f"{value:.1f}"),
    Column("prefill_ms", "Prefill", "ms"),
    Column("decode_tokens_per_s", "Decode", "tokens/s"),
    Column("peak_memory_bytes", "Peak memory", "MB", 1e-6),
    Column("memory_above_start_bytes", "Memory of the model", "MB", 1e-6),
    Column("training_tokens", "Trained on", "M tokens", 1e-6, compare=False),
    Column("training_seconds", "Training", "s", compare=False),
)
BY_KEY = {column.key: column for column in COLUMNS}


def cell(row: Row, column: Column) -> str:
    """A printed figure; "simulated" for the speed of a simulated kernel and a dash for what was not measured."""
    if row.lacks_speed and column.key in SPEED:
        return "simulated"
    value = figure(row, column.key)
    return MISSING if value is None else column.style(value * column.scale)


def kernel(row: Row) -> str:
    """What the speed of a row was measured on; a dash where none was asked for."""
    return row.kernel if row.engine is not None else MISSING


def best(rows: Sequence[Row], column: Column) -> set[str]:
    """Names of the rows, the teacher's aside, that hold a column's best figure.

    Speeds and memory within ``EQUAL_SPEED`` of the best share the mark. Empty where all rows would be marked.
    """
    values = {row.name: figure(row, column.key) for row in rows if row.role != "teacher"}
    measured = {name: value for name, value in values.items() if value is not None}
    if not column.compare or not measured:
        return set()
    top = max(measured.values()) if column.higher_is_better else min(measured.values())
    room = EQUAL_SPEED * abs(top) if column.key in SPEED else 0.0
    winners = {name for name, value in measured.items() if abs(value - top) <= room}
    return winners if len(winners) < len(measured) else set()


def shown(rows: Sequence[Row]) -> list[Column]:
    """Columns in which at least one row has something to say."""
    return [column for column in COLUMNS if any(cell(row, column) != MISSING for row in rows)]


def teacher_first(rows: Sequence[Row]) -> list[Row]:
    """The rows in the run's order with the teacher on top."""
    return sorted(rows, key=lambda row: row.role != "teacher")


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table, the best student's cells in bold."""
    rows, columns = teacher_first(rows), shown(rows)
    winners = {column.key: best(rows, column) for column in columns}
    lines = ["| Model | " + " | ".join(column.header for column in columns) + " | Kernel | Notes |"]
    lines.append("|---" + "|---:" * len(columns) + "|---|---|")
    for row in rows:
        cells = [f"**{cell(row, c)}**" if row.name in winners[c.key] else cell(row, c) for c in columns]
        notes = "; ".join(part for part in (row.role if row.role != "student" else "", row.scheme, row.notes) if part)
        lines.append("| " + " | ".join(_escape(text) for text in [row.name, *cells, kernel(row), notes]) + " |")
    return "\n".join(lines) + "\n"


def csv_table(rows: Sequence[Row]) -> str:
    """Comma-separated values at full precision: empty where nothing was measured, "simulated" where that is why."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    texts = ("role", "kind", "parent", "scheme", "kernel", "engine", "device", "dtype", "notes")
    writer.writerow(["model", *(column.header for column in COLUMNS), *texts])
    for row in teacher_first(rows):
        figures = []
        for column in COLUMNS:
            value = figure(row, column.key)
            empty = "simulated" if row.lacks_speed and column.key in SPEED else ""
            figures.append(empty if value is None else f"{value * column.scale:.10g}")
        writer.writerow([row.name, *figures, *(getattr(row, name) or "" for name in texts)])
    return stream.getvalue()


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
