"""What longer trainings would bring, by the validations of those that were run; a table of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.numerics.loss_forecast import forecast
from distill.reporting.tables import MISSING
from distill.reporting.task_tables import PLUS_MINUS, points
from distill.reporting.tradeoff import Row, gap_closed
from distill.stages.base import StageSpec
from distill.stages.report.left import Left
from distill.training.metrics import ROWS, read_rows
from distill.training.outlook import LONGER, validations
from distill.training.spec import BudgetSpec

LOSS = "val/cross_entropy"
HEADINGS = [
    "Stage",
    "Training tokens",
    "Validation loss [nats/token]",
    "90 % interval",
    "Gap to the teacher closed [%]",
]


def outlook(left: Left, stages: Mapping[str, StageSpec], rows: Sequence[Row]) -> list[list[str]]:
    """Headings, then for each training what was measured at its end and is expected of longer ones; empty for none.

    Args:
        left: what the finished stages left.
        stages: those that validated on the text that the rows were measured on; losses on others cannot be compared.
        rows: the measured models.
    """
    named = {row.name: row for row in rows}
    teacher = next((row.loss_nats for row in rows if row.role == "teacher"), None)
    found: list[list[str]] = []
    for name, stage in stages.items():
        if not isinstance(stage, BudgetSpec) or not left.files(name, ROWS):
            continue
        metrics = read_rows(left.run.stage(name))
        _, steps, losses = validations(metrics, [LOSS])
        if not steps or name not in named or named[name].scheme is not None:  # rounding has a gap of its own
            continue
        tokens = next(row["tokens"] for row in reversed(metrics) if row["step"] == steps[-1] and "tokens" in row)
        done = left.run.done(name)
        assert done is not None  # else none of its files was there
        length = int(done.figures["training_steps"])
        expected = forecast(steps, losses, length, stage.optimizer.factor, lengths=[length * t for t in LONGER])
        if not expected:
            continue
        start = named.get(named[name].parent or "")
        before = start.loss_nats if start is not None else None
        found.append([name, f"{tokens:,}", f"{losses[-1]:.3f}", "measured", _closed(before, losses[-1], teacher)])
        for times, one in zip(LONGER, expected, strict=True):
            share = _closed(before, one.loss, teacher)
            ends = [gap_closed(before, loss, teacher) for loss in (one.low, one.high)]
            if ends[0] is not None and ends[1] is not None:
                share += f" {PLUS_MINUS} {points((ends[0] - ends[1]) / 2)}"
            between = f"{one.low:.3f} to {one.high:.3f}"
            found.append([name, f"{times} times as many", f"{one.loss:.3f}", between, share])
    return [HEADINGS, *found] if found else []


def _closed(before: float | None, after: float, teacher: float | None) -> str:
    share = gap_closed(before, after, teacher)
    return MISSING if share is None else points(share)
