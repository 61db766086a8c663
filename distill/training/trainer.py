"""A Lightning Trainer from our specs, and one call that trains a module from its newest checkpoint."""

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

from distill.core import stop
from distill.core.errors import InputError, MachineError
from distill.core.run_folder import CHECKPOINTS
from distill.core.world import SINGLE_PROCESS, World
from distill.training.alarms import Alarms
from distill.training.ask import Asked, AskQuestions
from distill.training.checkpoint import AtomicCheckpointIO, check_provenance, checkpoint_step, newest_valid, restoring
from distill.training.compile import compiled_bodies
from distill.training.external_cluster import ExternalCluster
from distill.training.guard import BAD_BATCHES, Guard
from distill.training.half_weights import HalfWeights
from distill.training.metrics import MetricsLog, is_validated
from distill.training.module import DistillationModule
from distill.training.outlook import Outlook
from distill.training.rank_batches import RankBatches
from distill.training.ranks import from_first, summed
from distill.training.record import Record, TimedLoader
from distill.training.saver import STEP_S, Checkpoints
from distill.training.sharded import Sharded, unshard
from distill.training.show_progress import ShowProgress
from distill.training.spec import BudgetSpec, ComputeSpec, split_batch
from distill.training.threads import Threads

Loader = Iterable[Any]


def resolve_precision(compute: ComputeSpec) -> Any:
    """Lightning precision: as configured, or the default of the device."""
    if compute.precision != "auto":
        return compute.precision
    return "bf16-mixed" if resolve_device(compute) == "cuda" else "32-true"


def resolve_device(compute: ComputeSpec) -> str:
    """``"cuda"`` or ``"cpu"``.

    Raises:
        MachineError: a GPU is requested and there is none.
    """
    if compute.accelerator == "gpu" and not torch.cuda.is_available():
        raise MachineError("compute.accelerator: gpu: this machine shows no GPU to PyTorch; use auto or cpu")
    return "cuda" if compute.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def dtype_on(device: str) -> str:
    """Dtype for loading a frozen model: ``auto`` (that of its file) on a GPU, float32 on a CPU, which is slow in
    bf16."""
    return "auto" if device == "cuda" else "float32"


def resolve_teacher(compute: ComputeSpec) -> tuple[torch.device, str]:
    """Device of a teacher, and the dtype to load it in (see :func:`dtype_on`).

    Raises:
        MachineError: the requested GPU does not exist.
    """
    wanted = compute.teacher_device
    device = torch.device(resolve_device(compute) if wanted == "auto" else wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"compute.teacher_device: {wanted}: PyTorch sees {torch.cuda.device_count()} GPUs here; use auto or cpu"
        )
    auto = dtype_on(device.type)
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
    world: World = SINGLE_PROCESS,
    provenance: dict[str, str] | None = None,
    ask: Asked | None = None,
) -> float:
    """Train for the budget, from the newest valid checkpoint in ``folder`` if there is one.

    Args:
        module: the module to train.
        budget: how long to train, and the batch size.
        compute: settings of the machine.
        name: name of the stage, for messages.
        folder: folder of the stage; checkpoints are written to ``checkpoints/``, metrics beside them.
        tokens_per_sequence: mean number of tokens of text per sequence.
        train_loader: (micro-batch size, number of sequences already consumed) -> this rank's endless batches.
        validation_loader: the validation split in a fixed order, the same on every rank.
        logger: Lightning's logger, for W&B.
        say: prints a line.
        world: the processes that train together; see :func:`distill.training.ranks.together`.
        provenance: name of each input of the training -> its hash; a checkpoint with other hashes is rejected.
        ask: tasks to evaluate between two steps; None: none.

    Returns:
        Seconds of training, with those of earlier processes up to their last checkpoint.

    Raises:
        InputError: the batch cannot be split, the checkpoint is of another training, or every checkpoint is damaged.
        MachineError: no memory or no disk is left.
        Interrupted: Ctrl-C; the steps so far are saved.
        Preempted: the same by SIGTERM, SIGUSR1 or SIGHUP.
    """
    _quiet_lightning()
    num_steps = budget.steps(tokens_per_sequence)
    micro, accumulate = split_batch(budget, compute, world.size)
    validate_every = min(budget.validate_every_steps or max(1, num_steps // 4), num_steps)
    # only rank 0 searches for a checkpoint and broadcasts the result, because all ranks must resume from the same step
    found = newest_valid(folder / CHECKPOINTS) if world.rank == 0 else (None, [])
    checkpoint, complaints = from_first(found)
    if complaints and checkpoint is None:
        raise InputError(
            f"{complaints[0]}, and there is no other valid checkpoint; restore one, or discard the saved progress with "
            f"--from {name.partition('/')[0]}"
        )
    for line in complaints:
        say(f"  warning: {line}")
    if checkpoint:
        check_provenance(checkpoint, provenance or {})
    step = checkpoint_step(checkpoint) if checkpoint else 0
    pending_validation = bool(step) and step % validate_every == 0 and from_first(not is_validated(folder, step))
    if checkpoint:
        say(f"  resuming from step {step} of {num_steps} ({checkpoint.name})")
    log = MetricsLog(folder, step) if world.rank == 0 else None
    data = TimedLoader(train_loader(micro, step * budget.batch_size))
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
    threads = Threads(micro * tokens_per_sequence * module.student.config.get_text_config().hidden_size, say)
    files = AtomicCheckpointIO(compute.keep_checkpoints, behind=compute.write_checkpoints == "behind")
    saver = Checkpoints(
        folder / CHECKPOINTS,
        files,
        every=compute.checkpoint_every_steps,
        pending_validation=pending_validation,
        provenance=provenance,
    )
    precision = resolve_precision(compute)
    halved = precision == "bf16-true"  # HalfWeights sets it; Lightning accepts either a plugin or the argument
    trainer = pl.Trainer(
        accelerator="gpu" if resolve_device(compute) == "cuda" else "cpu",
        devices=world.local_size,
        num_nodes=world.num_nodes,
        strategy=_strategy(compute, world),
        precision=None if halved else precision,
        max_steps=num_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=budget.optimizer.clip_norm or None,
        check_val_every_n_epoch=None,
        val_check_interval=validate_every * accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=compute.log_every_steps,
        logger=logger or False,
        # called in this order after each step: the guard before the saver, so that a step that ends the run is not
        # saved
        callbacks=[
            threads,
            record,
            guard,
            *([ShowProgress(record, name)] if world.rank == 0 else []),
            *([AskQuestions(record, ask)] if ask is not None else []),
            Outlook(folder, name, num_steps, budget.optimizer.factor, say, record),
            saver,
        ],
        plugins=[files, *([ExternalCluster(world)] if world.size > 1 else []), *([HalfWeights()] if halved else [])],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    # Private API of Lightning: disable its SIGTERM handler. It broadcasts inside the signal handler, where other ranks
    # may be in another collective (deadlock), and saves nothing.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # Private API of Lightning: disable its broadcast of signals before each batch, which synchronises CPU and device;
    # Checkpoints checks once per step.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    module.student.train()
    teacher = module.teacher.model if module.teacher is not None else None
    models = {id(model): model for model in (module.student, teacher) if model is not None}
    try:
        with (
            stop.listening(),
            stop.patient(STEP_S, held=True),
            restoring(checkpoint, name),
            compiled_bodies(*models.values()) if compute.compile else nullcontext(),
        ):
            trainer.fit(
                module,
                train_dataloaders=data,
                val_dataloaders=RankBatches(validation_loader, world),
                ckpt_path=checkpoint,
                weights_only=True,
            )
            if pending_validation and step == num_steps:  # if no step is left, Lightning does not enter its loop
                trainer.validate(module, RankBatches(validation_loader, world), verbose=False)
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
    return saver.seconds()


def _strategy(compute: ComputeSpec, world: World) -> Any:
    """Lightning's strategy: that of one process, DDP or FSDP."""
    if world.size == 1:
        return "auto"
    if compute.strategy == "fsdp":
        return Sharded(world.size)
    return DDPStrategy(gradient_as_bucket_view=True)


def _quiet_lightning() -> None:
    """Silence Lightning's adverts, and its advice about things that are intended here."""
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
