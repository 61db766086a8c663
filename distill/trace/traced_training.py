"""The training of a job for two optimizer steps, by ``fit`` itself."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, PreTrainedModel

from distill.core.batch import causal_batch
from distill.data.teacher_cache.base import HIDDEN, IDS, PROBS, TAIL
from distill.data.teacher_cache.fidelity import signal_of
from distill.forecast.memory import Config
from distill.losses.head_losses import Head, Signal
from distill.losses.sparse import SparseSignal
from distill.models.head import output_head
from distill.models.load import empty_model
from distill.trace.counter import OperationCounter
from distill.trace.fake_cuda import fake_cuda
from distill.trace.fake_world import fake_world
from distill.trace.figures import Figures
from distill.trace.jobs import Job
from distill.training import live_teacher
from distill.training import module as training_module
from distill.training.assemble import assemble
from distill.training.flops import flops_per_token
from distill.training.live_teacher import LiveTeacher
from distill.training.module import DistillationModule
from distill.training.own_weights import OwnWeights
from distill.training.spec import BudgetSpec, ComputeSpec
from distill.training.teacher import Teacher
from distill.training.trainer import fit

NUM_STEPS = 2
"""The second one has the optimizer's moments from its beginning on."""
MOST_MICRO_BATCHES = 2
"""Number of micro-batches traced per step; all micro-batches after the first do the same work."""
KEPT_TOKENS = 64
"""Tokens of a sparse signal that are kept; the default of ``top_k``."""
DOCUMENTS = 4
"""In a row that holds several."""


class Traced(Exception):
    """Ends the training after its second step."""


class TracedModule(DistillationModule):
    """The training module, which tells the counter what it is doing.

    Attributes:
        counter: of the operations.
        still: bytes before the first step.
    """

    counter: OperationCounter
    still = 0
    _num_steps_done = _micro_batch = 0

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Forward, and what only a step does; recorded from the second step on."""
        if not self.still:
            self.still = self.counter.now
            self.counter.forget_peak()
            self.counter.phase = "step"
        self.counter.is_recording = self._num_steps_done > 0
        self.counter.micro_batch, self._micro_batch = self._micro_batch, self._micro_batch + 1
        with self.counter.during("step"):
            return super().training_step(batch, batch_index)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward."""
        with self.counter.during("backward"):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the gradients."""
        with self.counter.during("scale and clip"):
            super().on_before_optimizer_step(optimizer)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip."""
        with self.counter.during("scale and clip"):
            super().configure_gradient_clipping(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """AdamW, with the last micro-batch within it, as Lightning has it."""
        with self.counter.during("optimizer"):
            super().optimizer_step(*args, **kwargs)
        self._num_steps_done, self._micro_batch = self._num_steps_done + 1, 0
        if self._num_steps_done == NUM_STEPS:
            self.counter.is_recording, self.counter.phase = False, "teardown"
            self.counter.host_peak = self.counter.host
            raise Traced


class CachedSignal(Teacher):
    """A teacher whose output is in the batches; see :class:`distill.training.cached_teacher.CachedTeacher`.

    Args:
        vocabulary: rows of its head.
        head: for hidden states.
    """

    def __init__(self, vocabulary: int, head: Head | None):
        self.vocabulary, self.head = vocabulary, head

    def move(self, device: torch.device) -> None:
        """Nothing to do."""

    def signal(self, batch: dict[str, Tensor]) -> Signal | SparseSignal:
        """What the batch holds."""
        if HIDDEN in batch and self.head is not None:
            batch = batch | {HIDDEN: batch[HIDDEN].to(self.head.parameters[0].dtype)}
        return signal_of(batch, self.vocabulary, self.head)


def trace(job: Job) -> Figures:
    """The figures of a job, in a process that has the guard (:mod:`distill.trace.device_guard`)."""
    began = time.perf_counter()
    torch.set_num_threads(1)  # nothing is computed
    with fake_cuda(has_documents=job.has_documents) as counter, fake_world(job.world, counter):
        with mock.patch.object(training_module, "check_head"), mock.patch.object(live_teacher, "check_head"):
            module = _module(job)  # not checked, as the check compares numbers
        module.counter = counter
        flops = flops_per_token(module)
        with _phases(module, counter), tempfile.TemporaryDirectory() as folder:
            _fit(job, module, Path(folder))
        tokens = job.memory.micro_batch_size * job.memory.sequence_length
        return Figures(
            peak_bytes=counter.peak,
            peak_phase=counter.peak_phase,
            peaks=dict(counter.peaks),
            still_bytes=module.still,
            host_bytes=counter.host_peak,
            num_micro_batches=_micro_batches(job),
            tokens=tokens,
            works=counter.works(),
            waits=counter.waits(),
            model_flops=flops,
            seconds=time.perf_counter() - began,
        )


def _micro_batches(job: Job) -> int:
    return min(job.num_micro_batches, MOST_MICRO_BATCHES)


def _fit(job: Job, module: TracedModule, folder: Path) -> None:
    batch, num_micro, rows = _batch(job), _micro_batches(job), job.memory.micro_batch_size
    try:
        fit(
            module,
            BudgetSpec(
                num_steps=NUM_STEPS + 1,
                batch_size=num_micro * rows * job.world.size,
                optimizer=job.training.budget.optimizer,
                validate_every_steps=NUM_STEPS + 1,  # before a validation Lightning frees the gradients
            ),
            ComputeSpec(
                accelerator="gpu",
                devices=job.world.local_size,
                num_nodes=job.world.num_nodes,
                strategy="fsdp" if job.memory.sharded else "ddp",
                precision=job.memory.precision,
                micro_batch_size=rows,
                gradient_checkpointing=job.memory.checkpointing,
                checkpoint_every_steps=10**9,
                log_every_steps=10**9,
            ),
            name=job.name,
            folder=folder,
            tokens_per_sequence=job.memory.sequence_length,
            train_loader=lambda micro, consumed: [batch] * (NUM_STEPS + 1) * num_micro,
            validation_loader=[],
            say=lambda line: None,
            world=job.world,
        )
    except Traced:
        return
    raise AssertionError("the training ended before its second step was traced")


def _module(job: Job) -> TracedModule:
    """The job's module: models of the right shapes without numbers, wrapped as the stage wraps them."""
    student, training, memory = _model(job.memory.student, torch.float32), job.training, job.memory
    teacher: Teacher | PreTrainedModel | None = None
    if memory.teacher is not None:
        theirs = _model(memory.teacher, torch.float32 if memory.teacher_bytes == 4 else torch.bfloat16)
        head = output_head(theirs.requires_grad_(False)) if job.source == "hidden states" else None
        teacher = LiveTeacher(theirs) if head is None else CachedSignal(theirs.config.vocab_size, head)
    elif job.source == "some tokens":
        teacher = CachedSignal(student.config.vocab_size, None)
    quant = training.fake_quant
    width: int = cast(nn.Embedding, student.get_input_embeddings()).weight.shape[-1]
    wrapped = assemble(
        student,
        quantizer=quant.quantizer if quant else None,
        layers=quant.layers if quant else (),
        activations=quant.activations if quant else None,
        kv_cache=quant.kv_cache if quant else None,
        embeddings=quant.embeddings_grid(width) if quant else None,
        lora=training.lora,
        gradient_checkpointing=memory.checkpointing,
    )
    if job.source == "own weights":
        teacher = OwnWeights(wrapped.model)
    return TracedModule(
        wrapped.model, training.losses, teacher, optimizer=training.budget.optimizer, num_steps=NUM_STEPS + 1
    )


def _model(config: Config, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the GPU; its buffers keep their own dtype, as in a model that is read from its file."""
    keys = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "dtype")}
    with unset_fake_temporarily():
        model = empty_model(AutoConfig.for_model(config["model_type"], **keys))
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="cuda:0"))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda:0")
    model.config.dtype = dtype
    return model


def _batch(job: Job) -> dict[str, Tensor]:
    """A micro-batch on the CPU, as the loader makes it."""
    rows, length = job.memory.micro_batch_size, job.memory.sequence_length
    with unset_fake_temporarily():
        ids = torch.ones(rows, length, dtype=torch.int64)
        mask = torch.ones(rows, length, dtype=torch.bool)
        mask[:, -1] = False
        more: dict[str, Tensor] = {}
        if job.has_documents:
            more["position_ids"] = torch.arange(length).remainder(-(-length // DOCUMENTS)).repeat(rows, 1)
        if job.source == "hidden states":
            assert job.memory.teacher is not None
            more[HIDDEN] = torch.zeros(rows, length, job.memory.teacher["hidden_size"], dtype=torch.bfloat16)
        if job.source == "some tokens":
            kept = min(KEPT_TOKENS, int(job.memory.student["vocab_size"]))
            more[IDS] = torch.arange(kept).repeat(rows, length, 1)
            more[PROBS], more[TAIL] = torch.full((rows, length, kept), 0.5 / kept), torch.full((rows, length), 0.5)
        return causal_batch(ids, mask, **more)


@contextmanager
def _phases(module: TracedModule, counter: OperationCounter) -> Iterator[None]:
    """Name the parts of a forward pass, which the module calls as functions."""

    def named(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with counter.during(phase):
                return function(*args, **kwargs)

        return call

    if module.teacher is not None:
        module.teacher.signal = named("teacher forward", module.teacher.signal)  # type: ignore[method-assign]
    student, head = training_module.hidden_states, training_module.head_losses
    with (
        mock.patch.object(training_module, "hidden_states", named("student forward", student)),
        mock.patch.object(training_module, "head_losses", named("head and losses", head)),
    ):
        yield
