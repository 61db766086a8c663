"""What happens around the training steps: rows of metrics, progress for people, checkpoints and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

import psutil
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.throughput import get_available_flops
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.core.errors import DistillError, Interrupted, MachineError, Preempted
from distill.training.alarms import Alarms
from distill.training.checkpoint import AtomicCheckpointIO, checkpoint_path
from distill.training.metrics import MetricsLog
from distill.training.module import DistillationModule
from distill.training.ranks import largest
from distill.training.sharded import local

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a training to stop."""


class StepEnd(pl.Callback):
    """Calls :meth:`step_end` once an optimizer step, not once a micro-batch."""

    def __init__(self) -> None:
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note where training begins."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        """Find out whether a step has just been made."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.step_end(trainer, module, trainer.global_step)

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """An optimizer step has been made; ``step`` counts from 1."""


class Waited:
    """Batches, and the seconds that the loop has waited for them.

    Attributes:
        waited_s: since it was last set to 0.
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
    """Rows of metrics to disk and, through Lightning's logger, to W&B; of several processes the first one writes them.

    The losses are read from the device only every ``every`` steps; nothing else synchronises. Speed is in tokens that a
    loss was taken from: filling and prompts that do not count are no work done.
    """

    def __init__(
        self,
        metrics: MetricsLog | None,
        name: str,
        data: Waited,
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
        self._since = time.perf_counter()
        self._counted = cast(DistillationModule, module).counted_tokens()  # of steps before a kill
        self.data.waited_s = 0.0
        self._flops_per_token = flops_per_token(cast(DistillationModule, module))
        self._peak_flops = get_available_flops(module.device, _arithmetic(trainer))

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Write a row when it is due."""
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
            "perf/data_wait_share": self.data.waited_s / seconds,
            "perf/model_tflops_per_s": speed * self._flops_per_token / 1e12,
            "memory/peak_bytes": _memory_bytes(),
        }
        if self._peak_flops:
            row["perf/mfu"] = speed * self._flops_per_token / (self._peak_flops * trainer.world_size)
        self._since, self.data.waited_s = now, 0.0
        self._write(trainer, step, row)
        if self.alarms is not None:
            self.alarms.look(row, step)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """A row of validation losses."""
        started = time.perf_counter()
        self._write(trainer, trainer.global_step, {f"val/{k}": v for k, v in module.validation_means().items()})
        self._since = getattr(self, "_since", started)

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Stop the training clock while validating."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Let the training clock go on."""
        if hasattr(self, "_since"):
            self._since += time.perf_counter() - self._paused

    def _tokens(self, module: Any, step: int) -> int:
        """Tokens trained on after ``step`` steps; own sequences are counted, as their length is not known before."""
        return round(step * self.tokens_per_step) if module.on_policy is None else module.tokens_of_all_ranks()

    def _write(self, trainer: pl.Trainer, step: int, row: dict[str, float]) -> None:
        self.latest |= row
        row = {"step": step, "tokens": self._tokens(trainer.lightning_module, step), **row}
        if self.metrics is not None:
            self.metrics.write(row)
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"{self.name}/{key}": value for key, value in row.items()}, step=step)


class Checkpoints(StepEnd):
    """A checkpoint every so many steps, and one when a signal asks to stop; both between two steps, never within one,
    on all ranks alike, and never of weights that have diverged.

    Ctrl-C ends with one exit code, SIGTERM and SIGUSR1, by which a scheduler takes the machine back, with another.

    Args:
        folder: where they go.
        files: writes them, maybe behind the training; a stop and the end wait for the last.
        every: steps between two.
        owed: whether the checkpoint that is gone on from was left before the validation after its step was done.
        made_of: goes into each; see :func:`distill.training.checkpoint.check_made_of`.
    """

    def __init__(
        self,
        folder: Path,
        files: AtomicCheckpointIO,
        *,
        every: int,
        owed: bool = False,
        made_of: dict[str, str] | None = None,
    ):
        super().__init__()
        self.folder, self.files, self.every, self.owed, self.made_of = folder, files, every, owed, made_of or {}
        self._asked = self._saved = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take over the signals: the first asks to stop after the step, a second Ctrl-C stops at once."""
        super().on_train_start(trainer, module)
        if threading.current_thread() is threading.main_thread():  # signals are no other's
            self._before = {number: signal.signal(number, self._ask) for number in STOPS}

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Give the signals back, and stop if one has come after the last look, when nothing can be saved any more."""
        self._give_back()
        if self._asked:
            raise _stopped(self._asked, "; the same command goes on from the last checkpoint")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back; Lightning calls no teardown when training ends by an error."""
        with suppress(MachineError):  # one error is told, the one that came first
            self.files.settle()
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what it was made of."""
        checkpoint["made_of"] = self.made_of

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count micro-batches anew: Lightning finds the ends of steps by them, and their size may have changed."""
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for progress in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
            if isinstance(progress, dict):
                # one micro-batch is not completed yet, as when we save in its last hook
                progress.update(ready=done, started=done, processed=done, completed=done - 1)
        for progress in checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"].values():
            if isinstance(progress, dict):  # to Lightning a validation that is begun is one to do again
                progress.update(ready=int(self.owed), started=int(self.owed), processed=0, completed=0)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # not KeyboardInterrupt: Lightning turns that into exit code 1
        if number == signal.SIGINT and self._asked:
            raise Interrupted("stopped at once; the same command goes on from the last checkpoint")
        self._asked = self._asked or number

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Save when it is due, and stop when any rank is asked to."""
        self.files.settle(wait=False)
        if step % self.every == 0:
            self._save(trainer, module)
        self._look(trainer, module)

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, *batch: Any) -> None:
        """Stop when any rank is asked to: a look at the validation split may take longer than a machine is left us."""
        self._look(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Wait for the last checkpoint, and stop when any rank was asked to in what followed the last step."""
        self.files.settle()
        self._look(trainer, module)

    def _look(self, trainer: pl.Trainer, module: DistillationModule) -> None:
        if asked := largest(self._asked):
            if self._saved != trainer.global_step:
                self._save(trainer, module)
            self.files.settle()
            trainer.strategy.barrier()  # whoever has nothing to write would end, and be taken for a reason to end all
            raise _stopped(
                asked,
                f" at step {trainer.global_step} of {trainer.max_steps}, which is saved; the same command goes on",
            )

    def _save(self, trainer: pl.Trainer, module: DistillationModule) -> None:
        step = trainer.global_step
        trained = local(p.detach() for p in module.parameters() if p.requires_grad)
        if largest(not all(p.isfinite().all() for p in trained)):
            raise diverged("a trained weight is not finite", step)
        self.files.settle()  # before a second copy is made
        trainer.save_checkpoint(checkpoint_path(self.folder, step))
        self._saved = step


def _stopped(asked: int, where: str) -> DistillError:
    if asked == signal.SIGINT:
        return Interrupted(f"stopped{where}")
    return Preempted(f"stopped by {signal.Signals(asked).name}{where}")


class ShowProgress(StepEnd):
    """A bar with the time left on a terminal; a plain line now and then in a log file."""

    def __init__(self, record: Record, name: str, *, seconds_between_lines: float = 15.0):
        super().__init__()
        self.record, self.name, self.seconds = record, name, seconds_between_lines
        self._bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the bar, or start the clock of the lines."""
        super().on_train_start(trainer, module)
        self._started, self._first, self._line = time.perf_counter(), trainer.global_step, time.perf_counter()
        if sys.stderr.isatty():
            left = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
            right = (TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(), TextColumn("left"))
            self._bar = Progress(*left, *right, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.name, total=trainer.max_steps, completed=self._first, numbers="")
            self._bar.start()

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Move on."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=self._numbers())
        elif time.perf_counter() - self._line >= self.seconds and step < trainer.max_steps:
            self._line = time.perf_counter()
            left = (self._line - self._started) / max(1, step - self._first) * (trainer.max_steps - step)
            print(f"  {self.name} step {step}/{trainer.max_steps}  {self._numbers()}  {_clock(left)} left", flush=True)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave one line of what came out."""
        self.teardown(trainer, module, "fit")
        took = _clock(time.perf_counter() - self._started)
        print(f"  {self.name} step {trainer.global_step}/{trainer.max_steps}  {self._numbers()}  in {took}", flush=True)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Take the bar away, however training ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning calls no teardown when training ends by an error."""
        self.teardown(trainer, module, "fit")

    def _numbers(self) -> str:
        latest = dict(self.record.latest)
        if latest.get("train/kl") == latest.get("train/forward_kl"):
            latest.pop("train/kl", None)  # the loss alone is it
        shown = [f"{key.split('/')[1]} {value:.3f}" for key, value in latest.items() if key.startswith("train/")]
        if "val/cross_entropy" in latest:
            shown.append(f"val {latest['val/cross_entropy']:.3f}")
        if "perf/tokens_per_s" in latest:
            shown.append(f"{latest['perf/tokens_per_s']:,.0f} tokens/s")
        return "  ".join(shown)


def diverged(what: str, step: int) -> DistillError:
    """The one line for a training that has left the finite numbers."""
    return DistillError(f"{what} at step {step}: lower optimizer.lr or raise its warmup_steps, and run again")


def flops_per_token(module: DistillationModule) -> float:
    """Model FLOPs of a training token: 2 a weight of the teacher, 6 a weight of the student, 4 where it is frozen.

    An embedding that is only looked up multiplies nothing. Attention's own products are left out, as they are small
    beside the weights' at usual lengths. Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1.
    """
    asked = module.teacher.model if module.teacher is not None else None
    teacher = _multiplied(asked) if asked is not None else 0
    trained = sum(p.numel() for p in module.student.parameters() if p.requires_grad)
    student = _multiplied(module.student)
    return 2.0 * teacher + 4.0 * student + 2.0 * min(trained, student)


def _multiplied(model: Any) -> int:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = 0 if head is not None and head.weight is embedding.weight else embedding.weight.numel()
    return sum(p.numel() for p in model.parameters()) - looked_up


def _arithmetic(trainer: pl.Trainer) -> torch.dtype:
    return torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32


def _memory_bytes() -> int:
    """Peak of the GPU's allocated memory, or this process's resident memory now on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
