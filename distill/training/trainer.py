"""A Lightning Trainer from our specs, and one call that trains a module from where it was left."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy

from distill.core.errors import InputError, MachineError
from distill.core.run import CHECKPOINTS
from distill.core.world import ALONE, World
from distill.training.alarms import Alarms
from distill.training.callbacks import Checkpoints, Record, ShowProgress, Waited
from distill.training.checkpoint import AtomicCheckpointIO, check_made_of, checkpoint_step, newest_valid
from distill.training.compile import compiled_bodies
from distill.training.guard import BAD_BATCHES, Guard
from distill.training.joined import Joined
from distill.training.metrics import MetricsLog, is_validated
from distill.training.module import DistillationModule
from distill.training.ranks import from_first, summed
from distill.training.sharded import Sharded, unshard
from distill.training.share import Share
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
    world: World = ALONE,
    made_of: dict[str, str] | None = None,
) -> int:
    """Train for the budget, from the newest valid checkpoint in ``folder`` if there is one.

    Args:
        module: what to train.
        budget: how long, with what batch.
        compute: on what.
        name: shown to people.
        folder: of the stage; checkpoints go to ``checkpoints/``, metrics beside them.
        tokens_per_sequence: of text, on average.
        train_loader: (micro-batch size, sequences consumed already) -> this rank's batches without end.
        validation_loader: the validation split in a fixed order, the same on every rank.
        logger: Lightning's logger, for W&B.
        say: prints a line.
        world: the processes that train together; see :func:`distill.training.ranks.together`.
        made_of: what the training reads -> its hash; a checkpoint of anything else is refused.

    Returns:
        Optimizer steps of the budget.

    Raises:
        InputError: the batch cannot be split, the checkpoint is of another training, or none of several is whole.
        MachineError: no memory or no disk is left.
        Interrupted: by Ctrl-C; what was done is saved.
        Preempted: likewise, by SIGTERM or SIGUSR1.
    """
    _quiet_lightning()
    num_steps = budget.steps(tokens_per_sequence)
    micro, accumulate = split_batch(budget, compute, world.size)
    validate_every = min(budget.validate_every_steps or max(1, num_steps // 4), num_steps)
    # one looks for all: ranks that went on from different steps would be lost
    found = newest_valid(folder / CHECKPOINTS) if world.rank == 0 else (None, [])
    checkpoint, complaints = from_first(found)
    if complaints and checkpoint is None:
        raise InputError(
            f"{complaints[0]}, and there is no other that is whole; put one back, or give up what is saved by "
            f"--from {name.partition('/')[0]}"
        )
    for line in complaints:
        say(f"  warning: {line}")
    if checkpoint:
        check_made_of(checkpoint, made_of or {})
    step = checkpoint_step(checkpoint) if checkpoint else 0
    owed = bool(step) and step % validate_every == 0 and from_first(not is_validated(folder, step))
    if checkpoint:
        say(f"  going on from step {step} of {num_steps} ({checkpoint.name})")
    log = MetricsLog(folder, step) if world.rank == 0 else None
    data = Waited(train_loader(micro, step * budget.batch_size))
    alarms = Alarms(module.on_policy.spec, name, say) if module.on_policy is not None else None
    tokens_per_step = budget.batch_size * tokens_per_sequence
    record = Record(log, name, data, every=compute.log_every_steps, tokens_per_step=tokens_per_step, alarms=alarms)
    guard = Guard(
        folder / BAD_BATCHES,
        lambda bad: islice(train_loader(micro, bad * budget.batch_size), accumulate),
        every=compute.log_every_steps,
        limit=budget.max_skipped_steps,
        rank=world.rank,
        say=say,
    )
    files = AtomicCheckpointIO(compute.keep_checkpoints, behind=compute.write_checkpoints == "behind")
    saver = Checkpoints(
        folder / CHECKPOINTS,
        files,
        every=compute.checkpoint_every_steps,
        owed=owed,
        made_of=made_of,
    )
    trainer = pl.Trainer(
        accelerator="gpu" if resolve_device(compute) == "cuda" else "cpu",
        devices=world.local_size,
        num_nodes=world.num_nodes,
        strategy=_strategy(compute, world),
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
        # the guard before the saver: what it stops at is not saved
        callbacks=[record, guard, *([ShowProgress(record, name)] if world.rank == 0 else []), saver],
        plugins=[files, *([Joined(world)] if world.size > 1 else [])],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    # Lightning's own handlers exchange numbers within a signal, and its look for one waits for the device each time
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    module.student.train()
    teacher = module.teacher.model if module.teacher is not None else None
    models = {id(model): model for model in (module.student, teacher) if model is not None}
    try:
        with compiled_bodies(*models.values()) if compute.compile else nullcontext():
            trainer.fit(
                module,
                train_dataloaders=data,
                val_dataloaders=Share(validation_loader, world),
                ckpt_path=checkpoint,
                weights_only=True,
            )
            if owed and step == num_steps:  # with no step left to make, Lightning does not even begin
                trainer.validate(module, Share(validation_loader, world), verbose=False)
            if isinstance(trainer.strategy, Sharded):
                unshard(module.student, keep=world.rank == 0)
            module.tokens_read = summed(module.tokens_read)
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{name}: out of GPU memory; lower compute.micro_batch_size ({micro}) "
            "or set compute.gradient_checkpointing: true"
        ) from error
    except BaseException:
        if log is not None:
            log.stop()
        raise
    if log is not None:
        log.close()
    return num_steps


def _strategy(compute: ComputeSpec, world: World) -> Any:
    """How the ranks share the work."""
    if world.size == 1:
        return "auto"
    if compute.strategy == "fsdp":
        return Sharded(world.size)
    return DDPStrategy(gradient_as_bucket_view=True)


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
