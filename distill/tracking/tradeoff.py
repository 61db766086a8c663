"""What was won and what it cost: a row of measured figures a model, the Pareto set, and how much of a gap was closed.

A figure that was not measured is None, and nothing is claimed from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from distill.core.errors import InputError

Role = Literal["teacher", "student", "control"]
SPEED = (
    "prefill_ms",
    "decode_tokens_per_s",
    "decode_tokens_per_s_p90",
    "peak_memory_bytes",
    "memory_above_start_bytes",
)
"""Figures that a simulated kernel must leave empty."""
HIGHER_IS_BETTER = frozenset({"top1_agreement", "decode_tokens_per_s", "decode_tokens_per_s_p90"})
EQUAL_SPEED = 0.05
"""Speeds whose ratio is this close to 1 are called equal: repeated measurements differ by as much."""


@dataclass(frozen=True)
class Row:
    """One model of a run and all that was measured of it; None: not measured.

    Attributes:
        name: the stage's name, or "teacher".
        role: teacher, student, or control (trained only to be compared with).
        kind: kind of the stage that made it.
        parent: name of the row that it was made from; None for a model from outside or from scratch.
        scheme: how the weights are rounded, such as "int4, group 32"; None: they are not.
        notes: a few words for the table.
        parameters: logical parameters; non_embedding_parameters: without embedding and head.
        weight_bytes: weight files on disk; bits_per_parameter: their mean width.
        nonzero_share: of the parameters of a masked model, those that are not zero; None without a mask.
        perplexity, loss_nats, bits_per_byte, kl_to_teacher, top1_agreement: as in ``evaluation.quality``.
        prefill_ms, decode_tokens_per_s: medians of the least disturbed round; decode_tokens_per_s_p90: its slow tenth.
        peak_memory_bytes: of the whole process or device; memory_above_start_bytes: what the model added to it.
        kernel: "simulated" when the engine at hand undoes the rounding before it multiplies.
        engine, device, dtype: what its speed was measured with; None: it was not asked for.
        training_tokens: tokens that this stage trained on, 0 for none; training_seconds: how long that took.
    """

    name: str
    role: Role = "student"
    kind: str = ""
    parent: str | None = None
    scheme: str | None = None
    notes: str = ""
    parameters: int | None = None
    non_embedding_parameters: int | None = None
    weight_bytes: int | None = None
    bits_per_parameter: float | None = None
    nonzero_share: float | None = None
    perplexity: float | None = None
    loss_nats: float | None = None
    bits_per_byte: float | None = None
    kl_to_teacher: float | None = None
    top1_agreement: float | None = None
    prefill_ms: float | None = None
    decode_tokens_per_s: float | None = None
    decode_tokens_per_s_p90: float | None = None
    peak_memory_bytes: int | None = None
    memory_above_start_bytes: int | None = None
    kernel: Literal["real", "simulated"] = "real"
    engine: str | None = None
    device: str | None = None
    dtype: str | None = None
    training_tokens: int | None = None
    training_seconds: float | None = None

    def __post_init__(self) -> None:
        filled = [name for name in SPEED if getattr(self, name) is not None]
        if self.kernel == "simulated" and filled:
            raise ValueError(f"{self.name}: a simulated kernel has no {', '.join(filled)}")

    @property
    def lacks_speed(self) -> bool:
        """Whether a speed was wanted, for which an engine is named, and cannot be had of a simulated kernel."""
        return self.kernel == "simulated" and self.engine is not None


def to_json(rows: Iterable[Row]) -> str:
    """Rows as JSON text."""
    return json.dumps([asdict(row) for row in rows], indent=2) + "\n"


def from_json(text: str) -> list[Row]:
    """Rows from :func:`to_json`.

    Raises:
        InputError: not a list of rows, or a row with a field that this version does not know.
    """
    known = {field.name for field in fields(Row)}
    try:
        items = json.loads(text)
        unknown = sorted({key for item in items for key in item} - known)
        if unknown:
            raise InputError(f"rows: unknown field {unknown[0]!r}; they were written by another version of distill")
        return [Row(**item) for item in items]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"rows: not a list of measured rows ({error}); measure again") from None


def figure(row: Row, name: str) -> float | None:
    """A measured, comparable number of a row, or None."""
    value = getattr(row, name)
    return None if value is None or math.isnan(value) else float(value)


def pareto(rows: Sequence[Row], quality: str = "perplexity", cost: str = "weight_bytes") -> set[str]:
    """Names of the rows that no other row beats: none is at least as good in both and better in one.

    Two speeds within ``EQUAL_SPEED`` count as equal, so that noise puts no bad model on the front.

    Args:
        rows: those without one of the two figures are left out.
        quality: a field of :class:`Row`.
        cost: another; for both the better direction is known (``HIGHER_IS_BETTER``, else lower).
    """
    signs = [-1 if name in HIGHER_IS_BETTER else 1 for name in (quality, cost)]
    points: list[tuple[str, float, float]] = []
    for row in rows:
        q, c = figure(row, quality), figure(row, cost)
        if q is not None and c is not None:
            points.append((row.name, signs[0] * q, signs[1] * c))
    noise = EQUAL_SPEED if cost in SPEED else 0.0

    def beats(other_q: float, other_c: float, q: float, c: float) -> bool:
        slack = noise * abs(c)
        return other_q <= q and other_c <= c + slack and (other_q < q or other_c < c - slack)

    return {name for name, q, c in points if not any(beats(oq, oc, q, c) for _, oq, oc in points)}


def gap_closed(before: float | None, after: float | None, target: float | None) -> float | None:
    """Share of the loss gap to ``target`` that was closed: 1 all of it, 0 none, negative when it grew.

    None when a loss is missing or there was no gap (``before`` no worse than ``target``).
    """
    if before is None or after is None or target is None or not before > target:
        return None
    share = (before - after) / (before - target)
    return share if math.isfinite(share) else None
