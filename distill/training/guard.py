"""Steps whose loss or gradient is not finite: their batches are saved, and too many in a row end the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from safetensors.torch import save_file

from distill.core.errors import DistillError
from distill.training.module import DistillationModule
from distill.training.step_end import StepEnd

BAD_BATCHES = "bad-batches"
KEPT = 3
"""Largest number of steps whose batches are saved, each time the guard checks."""


class Guard(StepEnd):
    """Whenever a row of metrics is due, checks which steps were skipped (step 5 in the list at the top of
    :mod:`distill.training.module`).

    A late check is harmless, because skipped steps change no weight. A check after each step would synchronise with the
    device.

    Args:
        folder: folder to which batches are saved, as safetensors.
        batches: function that returns this rank's micro-batches of a step, counted from 0. It reads them again.
        every: number of steps between two checks.
        limit: number of consecutive skipped steps that ends the run.
        rank: rank of this process, for the names of the files.
        say: function that prints a line.
    """

    def __init__(
        self,
        folder: Path,
        batches: Callable[[int], Iterable[Any]],
        *,
        every: int,
        limit: int,
        rank: int,
        say: Callable[[str], None],
    ):
        super().__init__()
        self.folder, self.batches, self.rank, self.say = folder, batches, rank, say
        self.every, self.limit = every, limit
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """The count of consecutive skipped steps, so that a run that is resumed repeatedly still ends."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count."""
        self._in_a_row = state_dict["in_a_row"]

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Check, if it is due.

        Raises:
            DistillError: ``limit`` consecutive steps were skipped.
        """
        if step % self.every and step != trainer.max_steps:
            return
        skipped = module.drain_skipped()
        first = step - len(skipped)
        bad = [first + i for i, is_bad in enumerate(skipped) if is_bad]
        for number in bad[:KEPT]:
            self._keep(number)
        if bad:
            steps = ", ".join(str(number + 1) for number in bad[:10]) + (", ..." if len(bad) > 10 else "")
            self.say(f"  warning: loss or gradient not finite, skipped: step {steps} (see {self.folder})")
        for number, is_bad in enumerate(skipped, first + 1):
            self._in_a_row = self._in_a_row + 1 if is_bad else 0
            if self._in_a_row >= self.limit:
                raise DistillError(
                    f"loss or gradient not finite in {self.limit} steps in a row, the last at step {number}; no weight "
                    "was changed: lower optimizer.lr or raise its warmup_steps, and look at the text in "
                    f"{self.folder}"
                )

    def _keep(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{number}.{name}": value.contiguous()
            for number, batch in enumerate(self.batches(step))
            for name, value in batch.items()
        }
        save_file(tensors, self.folder / f"step={step + 1:08d}.rank={self.rank}.safetensors")
