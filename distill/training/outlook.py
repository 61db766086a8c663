"""Prints a forecast after each validation: the final loss, or, after the last one, the loss of longer trainings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from distill.numerics.loss_forecast import Forecast, Schedule, forecast
from distill.training.metrics import read_rows
from distill.training.record import Record

WATCHED = {"val/kl": "KL divergence", "val/cross_entropy": "loss"}
"""Columns of the metrics -> name in messages. The first column that exists is forecast."""
LONGER = (2, 4)
"""Longer trainings that are forecast after the last validation, as multiples of the number of steps."""


class Outlook(pl.Callback):
    """Prints a forecast after a validation, on rank 0, if there are enough validations for one.

    Args:
        folder: folder of the metrics.
        name: name of the stage.
        num_steps: number of optimizer steps of the training.
        schedule: schedule of the learning rate.
        say: function that prints a line.
        record: callback whose training clock excludes the time that fitting the curve takes.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        num_steps: int,
        schedule: Schedule,
        say: Callable[[str], None],
        record: Record | None = None,
    ):
        self.folder, self.name, self.num_steps, self.schedule, self.say = folder, name, num_steps, schedule, say
        self.record = record

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Print the forecast."""
        if trainer.global_rank:
            return
        started = time.perf_counter()
        with suppress(np.linalg.LinAlgError, FloatingPointError):  # no curve fits these losses
            self._print()
        if self.record is not None:
            self.record.leave_out(time.perf_counter() - started)

    def _print(self) -> None:
        column, steps, losses = validations(read_rows(self.folder))
        if not steps:
            return
        at_end = steps[-1] >= self.num_steps
        lengths = [self.num_steps * times for times in LONGER] if at_end else [self.num_steps]
        found = forecast(steps, losses, self.num_steps, self.schedule, lengths=lengths)
        if not found:
            return
        now = f"  {self.name}: {WATCHED[column]} {losses[-1]:.3f} at step {steps[-1]}"
        if at_end:
            more = ", ".join(
                f"{times} times the steps: {_words(one)}" for times, one in zip(LONGER, found, strict=True)
            )
            self.say(f"{now}; forecast of longer trainings, {more}")
        else:
            self.say(f"{now}; forecast of the end, step {self.num_steps}: {_words(found[0])}")


def validations(
    rows: Sequence[dict[str, Any]], columns: Sequence[str] = tuple(WATCHED)
) -> tuple[str, list[int], list[float]]:
    """(column, steps, losses) of the validations, from the first column that exists; one entry per step."""
    for column in columns:
        if found := {int(row["step"]): float(row[column]) for row in rows if column in row and row[column] > 0}:
            return column, sorted(found), [found[step] for step in sorted(found)]
    return columns[0], [], []


def _words(one: Forecast) -> str:
    return f"{one.loss:.3f} ({one.low:.3f} to {one.high:.3f})"
