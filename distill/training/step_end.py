"""A callback that is called once per optimizer step.

The order of the callbacks is written at the top of :mod:`distill.training.module`.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from distill.training.module import DistillationModule


class StepEnd(pl.Callback):
    """Calls :meth:`step_end` once per optimizer step, not once per micro-batch."""

    def __init__(self) -> None:
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store the step at which training begins."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        """Call :meth:`step_end` if this micro-batch has completed a step."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.step_end(trainer, module, trainer.global_step)

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Called after optimizer step ``step``, counted from 1."""
