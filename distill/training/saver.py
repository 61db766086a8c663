"""When checkpoints are saved, and how a signal stops the training."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from distill.core import stop
from distill.core.errors import DistillError, MachineError
from distill.training.checkpoint import AtomicCheckpointIO, checkpoint_path
from distill.training.module import DistillationModule
from distill.training.ranks import largest
from distill.training.sharded import Sharded, local
from distill.training.step_end import StepEnd

STEP_S = 600.0
"""After a stop signal, time limit in seconds for the current step, and again for its checkpoint. If it is exceeded, the
process exits."""


class Checkpoints(StepEnd):
    """Saves a checkpoint every ``every`` steps, after the last step, and when a signal asks to stop.

    See :mod:`distill.core.stop` for signals. A checkpoint is only made between two optimizer steps, at the same step on
    all ranks, and never if a weight is not finite.

    The checkpoint of the last step is on disk before the last validation begins. So if anything fails afterwards (the
    validation, merging, rounding or writing the model), no step is repeated when the same command runs again.

    Args:
        folder: folder of the checkpoints.
        files: writes checkpoints, in a thread or not. A stop and the end of the training wait for the last write.
        every: number of steps between two checkpoints.
        pending_validation: whether a validation is due at the step from which training resumes.
        provenance: hashes of what the training reads; see :func:`distill.training.checkpoint.check_provenance`.
    """

    def __init__(
        self,
        folder: Path,
        files: AtomicCheckpointIO,
        *,
        every: int,
        pending_validation: bool = False,
        provenance: dict[str, str] | None = None,
    ):
        super().__init__()
        self.folder, self.files, self.every = folder, files, every
        self.pending_validation, self.provenance = pending_validation, provenance or {}
        self._saved = 0
        self._began_s, self._before_s = time.perf_counter(), 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop before the first step if any rank was asked to stop; there is nothing to save yet."""
        super().on_train_start(trainer, module)
        if asked := largest(stop.asked()):
            raise stop.stopped(asked, " before a step was made")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Finish the current write. Lightning does not call ``teardown`` when the training ends with an error."""
        with suppress(MachineError):  # only the first error is reported
            self.files.settle()
        self._drop(trainer, module)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the provenance and the seconds of training."""
        checkpoint["provenance"], checkpoint["seconds"] = self.provenance, self.seconds()

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Recompute Lightning's counts of micro-batches for the current micro-batch size."""
        if not checkpoint["optimizer_states"]:  # Lightning would ignore this and start with new moments
            raise ValueError("it holds no state of the optimizer")
        self._before_s = checkpoint.get("seconds", 0.0)
        # Private API of Lightning: it counts micro-batches, and derives the ends of steps and the validations from the
        # count. Otherwise a training that resumes with another micro_batch_size or number of devices would update the
        # weights and validate in the middle of a step, and one that was stopped during a validation would skip it.
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for progress in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
            if isinstance(progress, dict):
                # one micro-batch is not completed, because checkpoints are made in its last hook, on_train_batch_end
                progress.update(ready=done, started=done, processed=done, completed=done - 1)
        for progress in checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"].values():
            if isinstance(progress, dict):  # Lightning repeats a validation that was started and not completed
                begun = int(self.pending_validation)
                progress.update(ready=begun, started=begun, processed=0, completed=0)

    def seconds(self) -> float:
        """Seconds of training so far, including earlier processes up to their last checkpoint."""
        return self._before_s + time.perf_counter() - self._began_s

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Save if a checkpoint is due, and stop if any rank was asked to stop."""
        self.files.settle(wait=False)
        if step % self.every == 0 or step == trainer.max_steps:
            self._save(trainer, module)
        if step == trainer.max_steps:
            self.files.settle()
        self._look(trainer, module)

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, *batch: Any) -> None:
        """Stop if any rank was asked to stop. A validation may take longer than a scheduler waits before it kills."""
        self._look(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Wait for the last checkpoint, and stop if any rank was asked to stop after the last step."""
        self.files.settle()
        self._look(trainer, module)
        self._drop(trainer, module)

    def _drop(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Free optimizer states and unused weights. Otherwise Lightning copies them to CPU memory in every process: 8 x
        12 bytes per parameter on a node of 8 GPUs."""
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        if trainer.global_rank and not self.pending_validation and not isinstance(trainer.strategy, Sharded):
            for parameter in module.parameters():  # only the first process uses the model after this
                parameter.grad, parameter.data = None, parameter.data.new_empty(0)

    def _look(self, trainer: pl.Trainer, module: DistillationModule) -> None:
        """Save and stop, on all ranks, if any of them was asked to stop."""
        if asked := largest(stop.asked()):
            with stop.patient(STEP_S, held=True):  # a new time limit, for the checkpoint
                if self._saved != trainer.global_step:
                    self._save(trainer, module)
                self.files.settle()
                # without it, a rank that writes nothing would exit first, and its launcher would kill the other ranks
                trainer.strategy.barrier()
            raise stop.stopped(asked, f" at step {trainer.global_step} of {trainer.max_steps}, which is saved")

    def _save(self, trainer: pl.Trainer, module: DistillationModule) -> None:
        step = trainer.global_step
        trained = local(p.detach() for p in module.parameters() if p.requires_grad)
        if largest(not all(p.isfinite().all() for p in trained)):
            raise DistillError(
                f"a trained weight is not finite at step {step}: lower optimizer.lr or raise its warmup_steps, "
                "and run again"
            )
        self.files.settle()  # before the state is copied a second time
        stop.confirm()
        trainer.save_checkpoint(checkpoint_path(self.folder, step))
        self._saved = step
