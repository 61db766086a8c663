"""A Lightning Trainer from our specs, and one call that trains a module from where it was left."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from distill.core.errors import MachineError
from distill.core.run import CHECKPOINTS
from distill.training.alarms import Alarms
from distill.training.callbacks import Checkpoints, Record, ShowProgress, Waited
from distill.training.checkpoint import AtomicCheckpointIO, checkpoint_step, newest_valid
from distill.training.compile import compiled_bodies
from distill.training.metrics import MetricsLog
from distill.training.module import DistillationModule
from distill.training.spec import BudgetSpec, ComputeSpec, split_batch

Loader = Iterable[Any]


def resolve_precision(compute: ComputeSpec) -> Any:
    """The arithmetic of training: as asked, or by the device."""
    if compute.precision != "auto":
        return compute.precision
    return "bf16-mixed" if resolve_device(compute) == "cuda" else "32-true"


def resolve_device(compute: ComputeSpec) -> str:
    """``"cuda"`` or ``"cpu"``.

    Raises:
        MachineError: a GPU is asked for and there is none.
    """
    if compute.accelerator == "gpu" and not torch.cuda.is_available():
        raise MachineError("compute.accelerator: gpu: this machine shows no GPU to PyTorch; use auto or cpu")
    return "cuda" if compute.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def resolve_teacher(compute: ComputeSpec) -> tuple[torch.device, str]:
    """Where a teacher runs, and the precision to load it in (fp32 on a CPU, which is slow in bf16).

    Raises:
        MachineError: a GPU is asked for that is not there.
    """
    wanted = compute.teacher_device
    device = torch.device(resolve_device(compute) if wanted == "auto" else wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"compute.teacher_device: {wanted}: PyTorch sees {torch.cuda.device_count()} GPUs here; use auto or cpu"
        )
    auto = "auto" if device.type == "cuda" else "float32"
    return device, auto if compute.teacher_precision == "auto" else compute.teacher_precision


def fit(
    module: DistillationModule,
    budget: BudgetSpec,
    compute: ComputeSpec,
    *,
    name: str,
    folder: Path,
    tokens_per_sequence: float,
    train_loader: Callable[[int, int], Loader],
    validation_loader: Loader,
    logger: Logger | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Train for the budget, from the newest valid checkpoint in ``folder`` if there is one.

    Args:
        module: what to train.
        budget: how long, with what batch.
        compute: on what.
        name: shown to people.
        folder: of the stage; checkpoints go to ``checkpoints/``, metrics beside them.
        tokens_per_sequence: of text, on average.
        train_loader: (micro-batch size, sequences consumed already) -> batches without end.
        validation_loader: the validation split in a fixed order.
        logger: Lightning's logger, for W&B.
        say: prints a line.

    Returns:
        Optimizer steps of the budget.
    """
    _quiet_lightning()
    num_steps = budget.steps(tokens_per_sequence)
    micro, accumulate = split_batch(budget, compute)
    checkpoint, complaints = newest_valid(folder / CHECKPOINTS)
    for line in complaints:
        say(f"  warning: {line}")
    step = checkpoint_step(checkpoint) if checkpoint else 0
    if checkpoint:
        say(f"  going on from step {step} of {num_steps} ({checkpoint.name})")
    log = MetricsLog(folder, step)
    data = Waited(train_loader(micro, step * budget.batch_size))
    alarms = Alarms(module.on_policy.spec, name, say) if module.on_policy is not None else None
    tokens_per_step = budget.batch_size * tokens_per_sequence
    record = Record(log, name, data, every=compute.log_every_steps, tokens_per_step=tokens_per_step, alarms=alarms)
    saver = Checkpoints(folder / CHECKPOINTS, every=compute.checkpoint_every_steps, keep=compute.keep_checkpoints)
    validate_every = min(budget.validate_every_steps or max(1, num_steps // 4), num_steps)
    trainer = pl.Trainer(
        accelerator="gpu" if resolve_device(compute) == "cuda" else "cpu",
        devices=1,
        precision=resolve_precision(compute),
        max_steps=num_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=budget.optimizer.clip_norm or None,
        check_val_every_n_epoch=None,
        val_check_interval=validate_every * accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=compute.log_every_steps,
        logger=logger or False,
        callbacks=[record, ShowProgress(record, name), saver],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module.student.train()
    teacher = module.teacher.model if module.teacher is not None else None
    models = {id(model): model for model in (module.student, teacher) if model is not None}
    try:
        with compiled_bodies(*models.values()) if compute.compile else nullcontext():
            trainer.fit(
                module,
                train_dataloaders=data,
                val_dataloaders=validation_loader,
                ckpt_path=checkpoint,
                weights_only=True,
            )
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{name}: out of GPU memory; lower compute.micro_batch_size ({micro}) "
            "or set compute.gradient_checkpointing: true"
        ) from error
    except BaseException:
        log.stop()
        raise
    log.close()
    return num_steps


def _quiet_lightning() -> None:
    """Keep Lightning's adverts and its advice about things we do on purpose out of people's way."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for advice in (
        "does not have many workers",
        "IterableDataset",
        "isn't supported.*mid-epoch",
        "litlogger",
        "LeafSpec",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}")
