"""Rows of metrics (losses, speed, memory), written every ``log_every_steps`` steps and after each validation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

import psutil
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.throughput import get_available_flops

from distill.training.alarms import Alarms
from distill.training.flops import flops_per_token
from distill.training.gpu_peaks import peak_of
from distill.training.metrics import MetricsLog
from distill.training.module import DistillationModule
from distill.training.step_end import StepEnd


class TimedLoader:
    """A loader that measures how long the training loop waits for batches.

    Args:
        batches: loader of batches.

    Attributes:
        waited_s: number of seconds that the loop has waited since this was last set to 0.
    """

    def __init__(self, batches: Iterable[Any]):
        self.batches, self.waited_s = batches, 0.0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch


class Record(StepEnd):
    """Writes rows of metrics to disk, on rank 0, and through Lightning's logger to W&B.

    The losses are read from the device only every ``every`` steps; nothing else synchronises with it. The speed is in
    counted tokens, without padding and prompts.

    Args:
        metrics: file of the metrics; None on all ranks except 0.
        name: name of the stage, for the logger.
        data: loader of the training batches.
        every: number of steps between two rows.
        tokens_per_step: mean number of tokens of text per step.
        alarms: checks of on-policy samples; None without ``on_policy``.
    """

    def __init__(
        self,
        metrics: MetricsLog | None,
        name: str,
        data: TimedLoader,
        *,
        every: int,
        tokens_per_step: float,
        alarms: Alarms | None = None,
    ):
        super().__init__()
        self.data = data
        self.name = name
        self.metrics, self.every, self.tokens_per_step = metrics, every, tokens_per_step
        self.alarms = alarms
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, module)
        self._since, self._latest_step = time.perf_counter(), trainer.global_step
        self._counted = cast(DistillationModule, module).counted_tokens()  # of steps before the resume
        self.data.waited_s = 0.0
        if module.device.type == "cuda":  # else it would be that of an earlier stage
            torch.cuda.reset_peak_memory_stats(module.device)
        self._flops_per_token = flops_per_token(cast(DistillationModule, module))
        self._peak_flops = _peak_flops(module.device, trainer)

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Write a row if it is due."""
        if step % self.every and step != trainer.max_steps:
            return
        tokens, self._counted = module.counted_tokens() - self._counted, 0
        terms = module.drain_terms()
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        speed = tokens / seconds
        row = {name if "/" in name else f"train/{name}": value for name, value in terms.items()} | {
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "perf/tokens_per_s": speed,
            "perf/steps_per_s": (step - self._latest_step) / seconds,
            "perf/data_wait_share": self.data.waited_s / seconds,
            "perf/model_tflops_per_s": speed * self._flops_per_token / 1e12,
            "memory/peak_bytes": _memory_bytes(),
        }
        if self._peak_flops:
            row["perf/mfu"] = speed * self._flops_per_token / (self._peak_flops * trainer.world_size)
        self._since, self.data.waited_s, self._latest_step = now, 0.0, step
        self._write(trainer, step, self.tokens(module, step), row)
        if self.alarms is not None:
            self.alarms.look(row, step)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Write a row of validation losses."""
        started = time.perf_counter()
        step, means = trainer.global_step, module.validation_means()
        self._write(trainer, step, self.tokens(module, step), {f"val/{k}": v for k, v in means.items()})
        self._since = getattr(self, "_since", started)

    def add(self, trainer: pl.Trainer, step: int, tokens: int, row: dict[str, float], seconds: float) -> None:
        """Write a row of other metrics; called on one rank only.

        Args:
            trainer: trainer that runs the training.
            step: step of the row.
            tokens: result of :meth:`tokens`, which must be called on all ranks.
            row: metrics by name.
            seconds: time that the metrics took, which is not counted as training.
        """
        self._write(trainer, step, tokens, row)
        self.leave_out(seconds)

    def leave_out(self, seconds: float) -> None:
        """Subtract seconds from the training time, on which the speed is based."""
        if hasattr(self, "_since"):
            self._since += seconds

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Stop the training clock while validating."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Restart the training clock."""
        self.leave_out(time.perf_counter() - self._paused)

    def tokens(self, module: Any, step: int) -> int:
        """Number of tokens trained on in ``step`` steps; with ``on_policy`` it is counted and not computed."""
        return round(step * self.tokens_per_step) if module.on_policy is None else module.tokens_of_all_ranks()

    def _write(self, trainer: pl.Trainer, step: int, tokens: int, row: dict[str, float]) -> None:
        self.latest |= row
        row = {"step": step, "tokens": tokens, **row}
        if self.metrics is not None:
            self.metrics.write(row)
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"{self.name}/{key}": value for key, value in row.items()}, step=step)


def _peak_flops(device: torch.device, trainer: pl.Trainer) -> float | None:
    """Peak FLOP/s of a GPU in the precision of the training; None if unknown."""
    if device.type != "cuda":
        return None
    if "bf16" in str(trainer.precision):
        return peak_of(torch.cuda.get_device_name(device))
    return get_available_flops(device, torch.float32)


def _memory_bytes() -> int:
    """Peak memory allocated on the GPU; on a CPU the current resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
