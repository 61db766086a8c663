"""Exports in the engines that run them, each beside the teacher's own file in the same precision.

A user who needs a small file can round the teacher after training and be done. A cut or trained file is worth its
training only where it is smaller, faster or better than that one.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.reporting.tables import MISSING, NOT_MEASURED, percent, significant
from distill.reporting.tradeoff import EQUAL_SPEED, Row
from distill.tracking.spec import Price

EQUAL_NATS = 0.01
"""Losses closer than this (1 % of perplexity) are called equal, because another seed changes a run by as much."""


def findings(rows: Sequence[Row]) -> list[str]:
    """One sentence per export that has a baseline. If the teacher was exported several times, each later file is
    compared with the first."""
    named = {row.name: row for row in rows}
    found = [
        _finding(row, named[row.baseline], "which was rounded without training")
        for row in rows
        if row.baseline is not None and row.baseline in named
    ]
    teachers = {row.name for row in rows if row.role == "teacher"} | {"teacher"}
    of_teacher = [row for row in rows if row.is_file and row.role == "student" and row.parent in teachers]
    return found + [_finding(row, of_teacher[0]) for row in of_teacher[1:] if row.parent == of_teacher[0].parent]


def compared(own: Row, other: Row) -> dict[str, int | None]:
    """Size, decode speed and loss of two files: 1 better, -1 worse, 0 equal, None not measured."""
    return {
        "smaller": _sign(other.weight_bytes, own.weight_bytes, 0.0),
        "faster": _sign(own.decode_tokens_per_s, other.decode_tokens_per_s, EQUAL_SPEED),
        "better": _sign(other.loss_nats, _loss_in_tokens_of(own, other), 0.0, EQUAL_NATS),
    }


def _loss_in_tokens_of(own: Row, other: Row) -> float | None:
    """The loss of ``own`` in nats per token of ``other``, as their vocabularies may differ."""
    if own.bits_per_byte is None or not other.bits_per_byte or other.loss_nats is None:
        return own.loss_nats
    return other.loss_nats * own.bits_per_byte / other.bits_per_byte


def _sign(one: float | None, other: float | None, relative: float, absolute: float = 0.0) -> int | None:
    if one is None or other is None:
        return None
    difference = one - other
    return 0 if abs(difference) <= max(relative * abs(other), absolute) else 1 if difference > 0 else -1


WORDS = {
    "smaller": {1: "smaller", 0: "no smaller", -1: "larger"},
    "faster": {1: "faster", 0: "no faster", -1: "slower"},
    "better": {1: "better", 0: "no better", -1: "worse"},
}


def _finding(own: Row, other: Row, about: str = "") -> str:
    found = {name: sign for name, sign in compared(own, other).items() if sign is not None}
    parts = []
    if own.weight_bytes is not None and other.weight_bytes:
        share = percent(own.weight_bytes / other.weight_bytes)
        sizes = f"{own.weight_bytes / 1e6:,.1f} MB against {other.weight_bytes / 1e6:,.1f} MB"
        parts.append(f"{share} of the bytes of {other.name}{about and f', {about}'} ({sizes})")
    if own.decode_tokens_per_s and other.decode_tokens_per_s:
        parts.append(f"{own.decode_tokens_per_s / other.decode_tokens_per_s:.2f}x its decode speed")
    if own.perplexity is not None and other.perplexity is not None:
        parts.append(f"perplexity {significant(own.perplexity)} against {significant(other.perplexity)}")
    words = [WORDS[name][sign] for name, sign in found.items()]
    if own.install is not None:
        words.append(f"speed and quality not measured: {own.install}")
    elif about and found and max(found.values()) <= 0:
        words.append("so it is no improvement on that file")
    return f"{own.name}: {', '.join(parts)}: {', '.join(words)}."


def speed_table(rows: Sequence[Row], price: Price | None) -> list[list[str]]:
    """Headings, then a row per model, engine, batch size and length of the prompt; empty if no speed was measured.

    Args:
        rows: of the run.
        price: of the recipe; None: no column of costs.
    """
    measured = [row for row in rows if row.speeds]
    if not measured:
        return []
    has_gpu = any(row.gpu_load is not None for row in measured)
    cost = [f"Decode [{price.currency} per million tokens]"] if price is not None else []
    loads = ["CPU load [%]", *(["GPU load [%]"] if has_gpu else [])]
    head = ["Model", "Engine", "Batch", "Prompt [tokens]", "Prefill [tokens/s]", "Decode [tokens/s]",
            "Peak memory [MB]", *loads, "Energy, prefill [J per 1,000 tokens]",
            "Energy, decode [J per 1,000 tokens]", *cost]  # fmt: skip
    return [head, *(line for row in measured for line in _lines(row, price, has_gpu))]


def _lines(row: Row, price: Price | None, has_gpu: bool) -> list[list[str]]:
    main = row.speeds[0]
    lines = []
    for point in row.speeds:
        speed = point.decode_tokens_per_s
        # energy and load are measured at the main point alone
        taken = [_number(row.cpu_load), *([_number(row.gpu_load)] if has_gpu else [])]
        taken += [_number(row.prefill_joules, NOT_MEASURED), _number(row.decode_joules, NOT_MEASURED)]
        line = [row.name, row.engine or "", f"{point.batch}", f"{point.prompt_tokens:,}"]
        peak = None if point.peak_memory_bytes is None else point.peak_memory_bytes / 1e6
        line += [significant(point.prefill_tokens_per_s), _number(speed), _number(peak, NOT_MEASURED)]
        line += taken if point is main else [MISSING] * len(taken)
        if price is not None:
            line.append(MISSING if speed is None else significant(price.per_hour / 3600 / speed * 1e6))
        lines.append(line)
    return lines


def _number(value: float | None, missing: str = MISSING) -> str:
    return missing if value is None else significant(value)
