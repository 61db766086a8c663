"""Scores a model on tasks between two optimizer steps; the scores are rows of the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl

from distill.core.errors import GivenUp
from distill.training.module import DistillationModule
from distill.training.record import Record
from distill.training.step_end import StepEnd


@dataclass(frozen=True)
class Asked:
    """Tasks that the student is scored on during training.

    Attributes:
        num_steps: number of optimizer steps between two evaluations.
        ask: function that evaluates the tasks and returns name of the metric -> score. It changes neither the model nor
            any random state.
    """

    num_steps: int
    ask: Callable[[], dict[str, float]]


class AskQuestions(StepEnd):
    """Evaluates tasks on rank 0, every ``num_steps`` steps and after the last step.

    The other ranks wait for rank 0 in the next step. This callback is called before the one that saves checkpoints. So
    the metrics of a step are written before its checkpoint, unless a signal interrupts the evaluation.

    Args:
        record: callback that writes the rows.
        asked: tasks, and how often they are evaluated.
    """

    def __init__(self, record: Record, asked: Asked):
        super().__init__()
        self.record, self.asked = record, asked

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Evaluate the tasks if they are due."""
        if step % self.asked.num_steps and step != trainer.max_steps:
            return
        tokens = self.record.tokens(module, step)  # a collective call, so it is made on all ranks
        if trainer.global_rank:
            return
        started = time.perf_counter()
        try:
            figures = self.asked.ask()
        except GivenUp:  # a signal asks to stop: there is no row for this step
            return
        self.record.add(trainer, step, tokens, figures, time.perf_counter() - started)
