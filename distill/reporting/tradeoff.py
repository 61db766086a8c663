"""One row of measurements per model, the Pareto set of the rows, and the fraction of a loss gap that was closed.

A figure that was not measured is None.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter

from distill.core.stored import parse_stored, read_stored

Role = Literal["teacher", "student", "control"]
SPEED = (
    "prefill_ms",
    "decode_tokens_per_s",
    "decode_tokens_per_s_p90",
    "peak_memory_bytes",
    "memory_above_start_bytes",
    "prefill_joules",
    "decode_joules",
    "cpu_load",
    "gpu_load",
)
"""Fields that are None for a simulated kernel."""
ENERGY = ("prefill_joules", "decode_joules")
OF_TASKS = (
    "accuracy",
    "macro_f1",
    "matthews",
    "span_f1",
    "pearson",
    "spearman",
    "embedding_cosine",
    "neighbours_shared",
    "pair_spearman",
    "knn_accuracy",
)
"""Metrics of tasks other than the next token."""
HIGHER_IS_BETTER = frozenset({"top1_agreement", "decode_tokens_per_s", "decode_tokens_per_s_p90", *OF_TASKS})
EQUAL_SPEED = 0.05
"""Speeds whose ratio differs from 1 by at most this are equal, because repeated measurements differ as much."""

FILE = "export"
"""The ``kind`` of rows of exports in their engine."""
ROUNDING = 1e-5
"""How far a mean of non-negative terms may be below zero, in nats, because of rounding."""
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Measured = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Correlation = Annotated[float, Field(ge=-1 - ROUNDING, le=1 + ROUNDING, allow_inf_nan=False)]
Nats = Annotated[float, Field(ge=-ROUNDING, allow_inf_nan=False)]


@dataclass(frozen=True)
class Domain:
    """Quality on one source of a mixture; figures as in :class:`Row`.

    Attributes:
        name: of the source.
        tokens: predictions that counted.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Text
    tokens: Count
    perplexity: Annotated[float, Field(ge=1 - ROUNDING, allow_inf_nan=False)] | None = None
    loss_nats: Nats | None = None
    bits_per_byte: Nats | None = None
    kl_to_teacher: Nats | None = None
    top1_agreement: Share | None = None


@dataclass(frozen=True)
class SpeedPoint:
    """Speed at one batch size and length of the prompt, in the engine of the row.

    Attributes:
        batch: sequences answered at once.
        prompt_tokens: of each.
        prefill_tokens_per_s: of the whole batch.
        decode_tokens_per_s: of the whole batch, behind the prompt; None where the engine keeps no keys and values.
        peak_memory_bytes: up to this point; None where nothing reads that of the device.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    batch: Count
    prompt_tokens: Count
    prefill_tokens_per_s: Measured
    decode_tokens_per_s: Measured | None
    peak_memory_bytes: Count | None


@dataclass(frozen=True)
class Row:
    """One model of a run in one engine, with its measurements; None: not measured.

    Attributes:
        name: the stage's name, or "teacher".
        role: teacher, student, or control (trained only for comparison).
        kind: kind of the stage that made it.
        parent: name of the row from which it was made; None for an external or new model.
        scheme: how the weights are quantized, such as "int4, group 32"; None: they are not.
        notes: short text for the table.
        parameters: logical parameters; non_embedding_parameters: without embedding and head.
        weight_bytes: size of the weight files; bits_per_parameter: mean bits on disk per parameter.
        nonzero_share: fraction of nonzero parameters of a sparse model; None for a dense model.
        perplexity, loss_nats, bits_per_byte, kl_to_teacher, top1_agreement: as in ``evaluation.quality``.
        accuracy, ..., knn_accuracy: metrics of the recipe's task, as in ``evaluation.task_quality``.
        errors: name of a metric of the task -> its standard error.
        prefill_ms, decode_tokens_per_s: medians of the fastest round; decode_tokens_per_s_p90: its slowest 10 %.
        peak_memory_bytes: of the process or device; memory_above_start_bytes: the part due to the model.
        prefill_joules, decode_joules: energy per 1,000 tokens, by counters.
        cpu_load, gpu_load: percent of all processors that the process used, and of the GPUs, while it decoded.
        speeds: the speed at each batch size and length of the prompt, first at that of the fields above.
        kernel: "simulated" if the engine dequantizes the weights before it multiplies.
        install: the command that installs the engine, if it is missing.
        baseline: name of the row of the teacher's own file in the same engine and precision, rounded after training.
        engine, device, dtype: used for the measurement of speed; None: speed was not requested.
        training_tokens: tokens on which this stage trained, 0 for none; training_seconds: the time for it.
        domains: the quality on each source, if the text is a mixture.
        run: name of the run, in a report over several; "" in the file of a run.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Text
    role: Role = "student"
    kind: str = ""
    parent: str | None = None
    scheme: str | None = None
    notes: str = ""
    parameters: Count | None = None
    non_embedding_parameters: Count | None = None
    weight_bytes: Count | None = None
    bits_per_parameter: Measured | None = None
    nonzero_share: Share | None = None
    perplexity: Annotated[float, Field(ge=1 - ROUNDING, allow_inf_nan=False)] | None = None
    loss_nats: Nats | None = None
    bits_per_byte: Nats | None = None
    kl_to_teacher: Nats | None = None
    top1_agreement: Share | None = None
    accuracy: Share | None = None
    macro_f1: Share | None = None
    matthews: Correlation | None = None
    span_f1: Share | None = None
    pearson: Correlation | None = None
    spearman: Correlation | None = None
    embedding_cosine: Correlation | None = None
    neighbours_shared: Share | None = None
    pair_spearman: Correlation | None = None
    knn_accuracy: Share | None = None
    errors: Mapping[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = field(default_factory=dict)
    prefill_ms: Measured | None = None
    decode_tokens_per_s: Measured | None = None
    decode_tokens_per_s_p90: Measured | None = None
    peak_memory_bytes: Count | None = None
    memory_above_start_bytes: Count | None = None
    prefill_joules: Measured | None = None
    decode_joules: Measured | None = None
    cpu_load: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    gpu_load: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    speeds: tuple[SpeedPoint, ...] = ()
    kernel: Literal["real", "simulated"] = "real"
    install: Text | None = None
    baseline: Text | None = None
    engine: str | None = None
    device: str | None = None
    dtype: str | None = None
    training_tokens: Count | None = None
    training_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    domains: tuple[Domain, ...] = ()
    run: str = ""

    def __post_init__(self) -> None:
        filled = [name for name in SPEED if getattr(self, name) is not None]
        if self.kernel == "simulated" and filled:
            raise ValueError(f"{self.name}: a simulated kernel has no {', '.join(filled)}")
        if len({domain.name for domain in self.domains}) < len(self.domains):
            raise ValueError(f"{self.name}: a source is there more than once")

    @property
    def is_file(self) -> bool:
        """Whether it is an export in its engine, and no model of the run in transformers."""
        return self.kind == FILE

    @property
    def lacks_speed(self) -> bool:
        """Whether speed was requested (``engine`` is set) but not measured because the kernel is simulated."""
        return self.kernel == "simulated" and self.engine is not None


def _apart(rows: list[Row]) -> list[Row]:
    """The rows, if their names are distinct and at most one is the teacher."""
    if twice := [name for name, count in Counter(row.name for row in rows).items() if count > 1]:
        raise ValueError(f"{len(rows)} rows, of which {twice[0]!r} is there more than once")
    if len(teachers := [row.name for row in rows if row.role == "teacher"]) > 1:
        raise ValueError(f"{len(teachers)} teachers ({', '.join(teachers)}), expected one at most")
    return rows


_ROWS: TypeAdapter[list[Row]] = TypeAdapter(Annotated[list[Row], Field(min_length=1), AfterValidator(_apart)])


def to_json(rows: Iterable[Row]) -> str:
    """Rows as JSON text."""
    return json.dumps([{k: v for k, v in asdict(row).items() if k != "run" or v} for row in rows], indent=2) + "\n"


def from_json(text: str, name: str = "rows") -> list[Row]:
    """Rows from the text of :func:`to_json`.

    Args:
        text: the JSON text.
        name: its name in messages.

    Raises:
        InputError: a type or key is wrong, a value is impossible, a name is repeated, or there are two teachers.
    """
    return parse_stored(text, _ROWS, name, "measure again")


def read_rows(file: Path) -> list[Row]:
    """The rows in a stage's file with the text of :func:`to_json`.

    Raises:
        InputError: see :func:`from_json`.
    """
    return read_stored(file, _ROWS, f"measure again by --from {file.parent.name}")


def figure(row: Row, name: str) -> float | None:
    """The value of a field; None if it was not measured or is NaN."""
    value = getattr(row, name)
    return None if value is None or math.isnan(value) else float(value)


def pareto(rows: Sequence[Row], quality: str = "perplexity", cost: str = "weight_bytes") -> set[str]:
    """Names of the Pareto-optimal rows: no other row is at least as good in both fields and better in one.

    Two speeds within ``EQUAL_SPEED`` count as equal, so that noise does not add models to the front.

    Args:
        rows: rows without one of the two values are ignored.
        quality: a field of :class:`Row`.
        cost: another field. Lower is better, except for the fields in ``HIGHER_IS_BETTER``.
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
    """Fraction of the loss gap to ``target`` that was closed: 1 for all of it, 0 for none, negative if it grew.

    None if a loss is missing or there was no gap (``before`` is not above ``target``).
    """
    if before is None or after is None or target is None or not before > target:
        return None
    share = (before - after) / (before - target)
    return share if math.isfinite(share) else None
