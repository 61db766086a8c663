"""The content of the page as plain data for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.reporting import tables, tradeoff, verdict
from distill.reporting.tradeoff import Row

TIMES = "\N{MULTIPLICATION SIGN}"
SMALL_PRINT = {
    "parameters": "non_embedding_parameters",
    "weight_bytes": "bits_per_parameter",
    "perplexity": "loss_nats",
    "kl_to_teacher": "top1_agreement",
    "decode_tokens_per_s": "decode_tokens_per_s_p90",
    "peak_memory_bytes": "memory_above_start_bytes",
    "training_tokens": "training_seconds",
}
"""Column -> column whose value is shown below it in the same cell of the page."""


def sentences(text: str) -> list[tuple[str, str]]:
    """Split the verdict into (name, rest) sentences, so that the page can emphasise the names."""
    parts = [sentence.partition(": ") for sentence in text.removesuffix(".").split(". ")]
    return [(name, rest + ".") if rest else ("", name + ".") for name, _, rest in parts]


def tiles(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(large figure, label, small text) that compare the main student with the teacher, if both were measured."""
    student, teacher = verdict.main_student(rows), next((row for row in rows if row.role == "teacher"), None)
    if student is None or teacher is None:
        return []
    wanted = (
        ("non_embedding_parameters", "of the teacher's non-embedding parameters", "share"),
        ("decode_tokens_per_s", "decode speed", "times"),
        ("peak_memory_bytes", "of the teacher's peak memory", "share"),
    )
    found = []
    for key, words, form in wanted:
        own, whole, column = tradeoff.figure(student, key), tradeoff.figure(teacher, key), tables.BY_KEY[key]
        if own is not None and whole:
            big = tables.percent(own / whole) if form == "share" else f"{own / whole:.2f}{TIMES}"
            small = f"{tables.cell(student, column)} against {tables.cell(teacher, column)} {column.unit}"
            found.append((big, words, small))
    gap = next((g for g in reversed(verdict.gaps(rows)) if g.after is student and g.share is not None), None)
    if student.perplexity is not None and teacher.perplexity is not None:
        against = f"against {tables.significant(teacher.perplexity)} of the teacher"
        found.insert(0, (tables.significant(student.perplexity), "validation perplexity", against))
    if gap is not None and gap.share is not None:
        found.insert(1, (tables.percent(gap.share), "of the loss gap closed", f"from {gap.before.name} to the teacher"))
    return found[:4]


def table(rows: Sequence[Row]) -> dict[str, Any]:
    """The page's table: headers, and per model the value, small text and whether it is the best of each column."""
    rows = tables.teacher_first(rows)
    named = {row.name: row for row in rows}
    teacher = next((row for row in rows if row.role == "teacher"), None)
    columns = [column for column in tables.shown(rows) if column.key not in SMALL_PRINT.values()]
    winners = {column.key: tables.best(rows, column) for column in columns}
    lines = []
    for row in rows:
        cells = [
            {
                "text": tables.cell(row, column),
                "ratio": _ratio(row, named.get(row.baseline or "") if row.is_file else teacher, column),
                "under": _under(row, column),
                "best": row.name in winners[column.key],
                "empty": tables.cell(row, column) in {tables.MISSING, tables.NOT_MEASURED, "simulated", row.install},
            }
            for column in columns
        ]
        notes = [part for part in (row.scheme, row.engine if row.is_file else row.dtype, row.notes) if part]
        lines.append({"row": row, "notes": ", ".join(notes), "cells": cells})
    return {"columns": columns, "lines": lines}


def _ratio(row: Row, teacher: Row | None, column: tables.Column) -> str:
    """The ratio to the teacher, such as "0.54x"; empty for the teacher and for columns without a meaningful ratio. Of
    an export to the teacher's own file in the same engine."""
    if teacher is None or row is teacher or not column.compare or column.key in {"kl_to_teacher", "top1_agreement"}:
        return ""
    own, whole = tradeoff.figure(row, column.key), tradeoff.figure(teacher, column.key)
    if own is None or not whole:
        return ""
    ratio = own / whole
    return f"{ratio:.2f}{TIMES}" if ratio < 100 else f"{ratio:.3g}{TIMES}"


def _under(row: Row, column: tables.Column) -> str:
    """The second figure of a cell, with its unit."""
    key = SMALL_PRINT.get(column.key)
    value = None if key is None else tradeoff.figure(row, key)
    if value is None:
        return ""
    return {
        "non_embedding_parameters": f"{tables.significant(value / 1e6)} non-emb.",
        "bits_per_parameter": f"{tables.significant(value)} bit/param.",
        "loss_nats": f"{value:.3f} nats",
        "top1_agreement": f"top-1 {100 * value:.1f} %",
        "training_seconds": f"{tables.significant(value)} s",
        "decode_tokens_per_s_p90": f"p90 {tables.significant(value)}",
        "memory_above_start_bytes": f"{tables.significant(value / 1e6)} model",
    }[str(key)]


def bars(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Bars of the loss above the teacher's, one per model; empty if there is no control."""
    teacher = next((row for row in rows if row.role == "teacher" and row.loss_nats is not None), None)
    others = [row for row in rows if row.role != "teacher" and row.loss_nats is not None and not row.is_file]
    if teacher is None or not any(row.role == "control" for row in others):
        return []
    extra = [(row, (row.loss_nats or 0.0) - (teacher.loss_nats or 0.0)) for row in others]
    longest = max((value for _, value in extra), default=0.0)
    return [
        {"row": row, "text": f"{value:+.3f}", "width": max(0.0, 100 * value / longest) if longest > 0 else 0.0}
        for row, value in extra
    ]


def marked(item: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with its answers, each split into the text before, at and after the first differing token."""
    answers = []
    for name, given in item["answers"].items():
        start, end = given.get("mark") or (len(given["text"]),) * 2
        text = given["text"]
        stopped = given.get("mark") is not None and start == end
        answers.append(
            {
                "name": name,
                "before": text[:start],
                "differs": text[start:end],
                "after": text[end:],
                "stopped": stopped,
                "small": counted(given),
                "same": given.get("mark") is None,
            }
        )
    return {"prompt": item["prompt"], "answers": answers}


def counted(given: Mapping[str, Any]) -> str:
    """Tokens, words and seconds of an answer."""
    seconds = given.get("seconds")
    parts = [f"{given['tokens']} tokens", *([f"{given['words']} words"] if "words" in given else [])]
    return ", ".join([*parts, *([] if seconds is None else [f"{seconds:.2f} s"])])
