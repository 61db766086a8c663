"""Tables of the rows: Markdown for terminals and READMEs, and CSV for spreadsheets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.core.markdown import escaped
from distill.reporting.spreadsheet import csv_of_texts, text_cell
from distill.reporting.tradeoff import ENERGY, EQUAL_SPEED, HIGHER_IS_BETTER, SPEED, Row, figure

MISSING = "—"
NOT_MEASURED = "not measured"
"""In cells of energy where there is no counter."""


def percent(share: float) -> str:
    """0.543 -> "54 %"; values below 10 % have one decimal, and values below 1 are never rounded to 100 %."""
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
    """One column of the table.

    Attributes:
        key: field of :class:`distill.reporting.tradeoff.Row`.
        title: header without unit.
        unit: of the printed number; may be empty.
        scale: factor from the field's value to the printed number.
        compare: whether the best cell is marked and the ratio to the teacher is shown.
        style: formats the printed number.
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
    Column("accuracy", "Accuracy", "%", 100, style=lambda value: f"{value:.1f}"),
    Column("macro_f1", "Macro F1", "%", 100, style=lambda value: f"{value:.1f}"),
    Column("matthews", "Matthews correlation", "", style=lambda value: f"{value:.3f}"),
    Column("span_f1", "F1 of spans", "%", 100, style=lambda value: f"{value:.1f}"),
    Column("pearson", "Pearson correlation", "", style=lambda value: f"{value:.3f}"),
    Column("spearman", "Spearman correlation", "", style=lambda value: f"{value:.3f}"),
    Column("embedding_cosine", "Cosine to teacher", "", style=lambda value: f"{value:.3f}"),
    Column("neighbours_shared", "Neighbours shared with teacher", "%", 100, style=lambda value: f"{value:.1f}"),
    Column("pair_spearman", "Spearman of cosines", "", style=lambda value: f"{value:.3f}"),
    Column("knn_accuracy", "Accuracy of 15 neighbours", "%", 100, style=lambda value: f"{value:.1f}"),
    Column("prefill_ms", "Prefill", "ms"),
    Column("decode_tokens_per_s", "Decode", "tokens/s"),
    Column("peak_memory_bytes", "Peak memory", "MB", 1e-6),
    Column("memory_above_start_bytes", "Memory of the model", "MB", 1e-6),
    Column("prefill_joules", "Energy, prefill", "J per 1,000 tokens"),
    Column("decode_joules", "Energy, decode", "J per 1,000 tokens"),
    Column("training_tokens", "Trained on", "M tokens", 1e-6, compare=False),
    Column("training_seconds", "Training", "s", compare=False),
)
BY_KEY = {column.key: column for column in COLUMNS}


def cell(row: Row, column: Column) -> str:
    """The text of a cell: "simulated" for the speed of a simulated kernel, the command that installs a missing engine
    in place of its decode speed, and a dash if it was not measured."""
    if row.lacks_speed and column.key in SPEED:
        return "simulated"
    if row.install is not None and column.key == "decode_tokens_per_s":
        return row.install
    value = figure(row, column.key)
    if value is None:
        is_without_counter = column.key in ENERGY and row.decode_tokens_per_s is not None
        return NOT_MEASURED if is_without_counter else MISSING
    text = column.style(value * column.scale)
    error = row.errors.get(column.key)
    return text if error is None else f"{text} \N{PLUS-MINUS SIGN} {column.style(error * column.scale)}"


def kernel(row: Row) -> str:
    """The kernel with which a row's speed was measured; a dash if it was not."""
    return row.kernel if row.engine is not None else MISSING


def best(rows: Sequence[Row], column: Column) -> set[str]:
    """Names of the rows with the best value of a column, without the teacher.

    Speeds and memory within ``EQUAL_SPEED`` of the best are included. Empty if all rows would be marked.
    """
    values = {row.name: figure(row, column.key) for row in rows if row.role != "teacher"}
    measured = {name: value for name, value in values.items() if value is not None}
    if not column.compare or not measured:
        return set()
    top = max(measured.values()) if column.higher_is_better else min(measured.values())
    tolerance = EQUAL_SPEED * abs(top) if column.key in SPEED else 0.0
    winners = {name for name, value in measured.items() if abs(value - top) <= tolerance}
    return winners if len(winners) < len(measured) else set()


def shown(rows: Sequence[Row]) -> list[Column]:
    """Columns in which at least one row has a value."""
    return [column for column in COLUMNS if any(cell(row, column) not in (MISSING, NOT_MEASURED) for row in rows)]


def teacher_first(rows: Sequence[Row]) -> list[Row]:
    """The rows in the run's order, but the teacher first."""
    return sorted(rows, key=lambda row: row.role != "teacher")


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table; the best values are bold."""
    rows, columns = teacher_first(rows), shown(rows)
    winners = {column.key: best(rows, column) for column in columns}
    lines = ["| Model | " + " | ".join(column.header for column in columns) + " | Kernel | Notes |"]
    lines.append("|---" + "|---:" * len(columns) + "|---|---|")
    for row in rows:
        cells = [f"**{cell(row, c)}**" if row.name in winners[c.key] else cell(row, c) for c in columns]
        engine = f"in {row.engine}" if row.is_file and row.engine else ""
        role = row.role if row.role != "student" else ""
        notes = "; ".join(part for part in (role, row.scheme, engine, row.notes) if part)
        lines.append("| " + " | ".join([escaped(row.name), *cells, kernel(row), escaped(notes)]) + " |")
    return "\n".join(lines) + "\n"


def whole_table(rows: Sequence[Row]) -> list[list[str]]:
    """Headings, then one row per model with all columns, for interactive tables."""
    headings = ["model", "role", "kernel", *(column.header for column in COLUMNS)]
    cells = [[row.name, row.role, kernel(row), *(cell(row, c) for c in COLUMNS)] for row in teacher_first(rows)]
    return [headings, *cells]


def measured_figures(rows: Sequence[Row]) -> dict[str, float]:
    """``model/column`` -> value of every measured figure, at full precision."""
    found = {f"{row.name}/{column.key}": getattr(row, column.key) for row in teacher_first(rows) for column in COLUMNS}
    return {key: value for key, value in found.items() if value is not None}


def csv_table(rows: Sequence[Row]) -> str:
    """Comma-separated values at full precision; empty, or "simulated", where nothing was measured."""
    texts = ("role", "kind", "parent", "scheme", "kernel", "engine", "device", "dtype", "notes")
    lines: list[list[str]] = [["model", *(column.header for column in COLUMNS), *texts]]
    for row in teacher_first(rows):
        figures = []
        for column in COLUMNS:
            value = figure(row, column.key)
            empty = cell(row, column) if column.key in SPEED and (row.lacks_speed or row.install) else ""
            figures.append(empty.replace(MISSING, "") if value is None else f"{value * column.scale:.10g}")
        shown = [text_cell(getattr(row, name) or "") for name in texts]
        lines.append([text_cell(row.name), *figures, *shown])
    return csv_of_texts(lines)
