"""Progress of a training: a progress bar on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.training.module import DistillationModule
from distill.training.record import Record
from distill.training.step_end import StepEnd


class ShowProgress(StepEnd):
    """A progress bar with the remaining time on a terminal; in a log file, one line every few seconds."""

    def __init__(self, record: Record, name: str, *, seconds_between_lines: float = 15.0):
        super().__init__()
        self.record, self.name, self.seconds = record, name, seconds_between_lines
        self._bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Create the bar, or start the clock of the lines."""
        super().on_train_start(trainer, module)
        self._started, self._first, self._line = time.perf_counter(), trainer.global_step, time.perf_counter()
        if sys.stderr.isatty():
            left = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
            right = (TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(), TextColumn("left"))
            self._bar = Progress(*left, *right, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.name, total=trainer.max_steps, completed=self._first, numbers="")
            self._bar.start()

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Update the bar, or print a line if one is due."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=self._numbers())
        elif time.perf_counter() - self._line >= self.seconds and step < trainer.max_steps:
            self._line = time.perf_counter()
            left = (self._line - self._started) / max(1, step - self._first) * (trainer.max_steps - step)
            print(f"  {self.name} step {step}/{trainer.max_steps}  {self._numbers()}  {_clock(left)} left", flush=True)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Print a line with the last metrics."""
        self.teardown(trainer, module, "fit")
        took = _clock(time.perf_counter() - self._started)
        print(f"  {self.name} step {trainer.global_step}/{trainer.max_steps}  {self._numbers()}  in {took}", flush=True)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Remove the bar, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning does not call ``teardown`` when the training ends with an error."""
        self.teardown(trainer, module, "fit")

    def _numbers(self) -> str:
        latest = dict(self.record.latest)
        if latest.get("train/kl") == latest.get("train/forward_kl"):
            latest.pop("train/kl", None)  # it is equal to the loss
        shown = [f"{key.split('/')[1]} {value:.3f}" for key, value in latest.items() if key.startswith("train/")]
        if "val/cross_entropy" in latest:
            shown.append(f"val {latest['val/cross_entropy']:.3f}")
        if "perf/tokens_per_s" in latest:
            shown.append(f"{latest['perf/tokens_per_s']:,.0f} tokens/s")
        return "  ".join(shown)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
