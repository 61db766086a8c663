"""Settings of training stages (``BudgetSpec``, ``DistillSpec``) and of the machine (``ComputeSpec``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distill.core.errors import InputError
from distill.core.spec import DEVICE, Spec
from distill.data.chat_spec import ChatSpec
from distill.data.mixture import Mixture
from distill.data.spec import FULL, DataSpec, Packing
from distill.losses import LOSSES, AnyLossSpec, ForwardKL, LossSpec, StateLossSpec
from distill.losses.schedule import Schedule, Share
from distill.training.task_losses import unfit

LARGEST_BATCH = 2**31 - 1
"""Largest number of sequences per step. There must be a limit, because all divisors of a batch are listed."""


class OptimizerSpec(Spec):
    """AdamW (arXiv 1711.05101) and its learning rate schedule with linear warm-up."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices (norms and biases are not decayed); 0 is off."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest norm of the gradient of all parameters; larger gradients are scaled down. 0 is off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_steps: int | None = Field(None, ge=0)
    """Number of steps of linear warm-up; unset: 5 % of all steps."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak (cosine and linear)."""

    def factor(self, step: int, num_steps: int) -> float:
        """Learning rate at ``step`` (from 0) of ``num_steps``, as a fraction of the peak."""
        warmup = round(0.05 * num_steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape


class BudgetSpec(Spec):
    """How long a stage trains, in tokens, steps or epochs, and its batch size."""

    num_tokens: int | None = Field(None, ge=0)
    """Number of tokens to train on, rounded up to whole steps; 0 trains nothing. Give this, num_steps or num_epochs."""
    num_steps: int | None = Field(None, ge=0)
    """Number of optimizer steps."""
    num_epochs: float | None = Field(None, gt=0)
    """Number of passes over the training rows, rounded up to whole steps."""
    batch_size: int = Field(16, ge=1, le=LARGEST_BATCH)
    """Number of sequences per optimizer step, over all devices and micro-batches."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """Settings of AdamW and of its schedule."""
    validate_every_steps: int | None = Field(None, ge=1)
    """Number of steps between two validations; unset: a quarter of all steps."""
    max_skipped_steps: int = Field(5, ge=1)
    """Number of consecutive steps with a loss or gradient that is not finite after which the run stops. Each such step
    is skipped."""

    @model_validator(mode="after")
    def _one_budget(self) -> BudgetSpec:
        if sum(budget is not None for budget in (self.num_tokens, self.num_steps, self.num_epochs)) != 1:
            raise ValueError("give the budget once: num_tokens, num_steps or num_epochs")
        return self

    def is_trained(self) -> bool:
        """Whether the budget is not 0."""
        return bool(self.num_tokens or self.num_steps or self.num_epochs)

    def steps(self, tokens_per_sequence: float) -> int:
        """Number of optimizer steps of the budget.

        With ``num_epochs``, call :meth:`for_rows` first; otherwise one row is assumed.

        Args:
            tokens_per_sequence: mean number of tokens of text per sequence.
        """
        if self.num_steps is not None:
            return self.num_steps
        if self.num_epochs is not None:
            return math.ceil(self.num_epochs / self.batch_size)
        assert self.num_tokens is not None
        return math.ceil(self.num_tokens / (self.batch_size * tokens_per_sequence))

    def for_rows(self, num_rows: int | None) -> Self:
        """The same budget, converted to steps if it was in epochs.

        Args:
            num_rows: number of training rows; None for a stream, which has no known number.

        Raises:
            InputError: it is in epochs, and the rows cannot be counted.
        """
        if self.num_epochs is None:
            return self
        if num_rows is None:
            raise InputError("num_epochs: a stream has no end to count passes by; give num_tokens or num_steps")
        steps = math.ceil(self.num_epochs * num_rows / self.batch_size)
        return self.model_copy(update={"num_epochs": None, "num_steps": steps})

    def in_words(self, sequence_length: int, packing: Packing) -> list[str]:
        """The training of the stage, as phrases for the plan."""
        return [self.budget_in_words(sequence_length, packing)]

    def budget_in_words(self, sequence_length: int, packing: Packing) -> str:
        """The budget as a phrase for the plan. With some packings, the tokens per row are known only after reading."""
        steps = self.steps(sequence_length)
        if steps == 0:
            return "no training"
        if self.num_epochs is not None:
            return f"{self.num_epochs:g} epochs in batches of {self.batch_size}"
        tokens = steps * self.batch_size * sequence_length
        of = f"{steps:,} steps of {self.batch_size} x {sequence_length}"
        if packing in FULL:
            return f"{tokens:,} tokens = {of}"
        if self.num_tokens is None:
            return f"at most {tokens:,} tokens = {of}"
        return f"{self.num_tokens:,} tokens = at least {of}"


def split_batch(budget: BudgetSpec, compute: ComputeSpec, num_processes: int = 1) -> tuple[int, int]:
    """Micro-batch size of a process, and number of micro-batches per step on each process.

    Raises:
        InputError: the batch cannot be divided into equal micro-batches on all processes.
    """
    if budget.batch_size % num_processes:
        raise InputError(
            f"batch_size ({budget.batch_size}) must be a multiple of the {num_processes} processes that share it; "
            "change it or compute.devices"
        )
    share = budget.batch_size // num_processes
    micro = min(compute.micro_batch_size or share, share)
    if share % micro:
        among = f" / {num_processes} processes" if num_processes > 1 else ""
        raise InputError(
            f"batch_size ({budget.batch_size}{among}) must be a multiple of compute.micro_batch_size ({micro})"
        )
    return micro, share // micro


class AlarmSpec(Spec):
    """Limits for degenerate on-policy samples, which are checked for each row of the metrics.

    Length and repetition are compared with the text's own continuations of the same prompts.
    """

    at_limit: float | None = Field(0.5, gt=0, le=1)
    """Largest difference between the fraction of samples that reach max_new_tokens without an end-of-text token and the
    same fraction of the text's continuations. With 0.5, the limit is reached if, for example, 80 % of the samples but
    only 30 % of the continuations have no end-of-text token. Null is off."""
    repetition: float | None = Field(0.3, gt=0, le=1)
    """Largest difference between the fraction of 4-grams that already occurred in the same sample and the same fraction
    of the text's continuations. Null is off."""
    min_entropy: float | None = Field(0.1, gt=0)
    """Smallest mean entropy of the student's distribution, in nats per token. Null is off."""


class OnPolicySpec(Spec):
    """On-policy distillation (GKD): some steps learn from the student's own continuations of prompts from the text."""

    share: Share = 0.5
    """Probability that an optimizer step learns from samples instead of text: 0 is never, 1 always. May follow a
    schedule. In the budget, every step counts as full rows; the metrics count the tokens that were read."""
    prompt_tokens: int | None = Field(None, ge=1)
    """Number of tokens at the start of a row that the student continues; unset: 32. Not for conversations, where the
    prompt is everything before a turn of the assistant."""
    max_new_tokens: int = Field(128, ge=1)
    """Largest number of sampled tokens. Together with the prompt they must fit in data.sequence_length. In
    conversations, turns with a prompt that is too long for this are not chosen."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the sampling (not of a loss); 1 samples from the student's own distribution, as in GKD."""
    alarms: AlarmSpec = AlarmSpec()
    """Limits for degenerate samples: {at_limit: 0.5, repetition: 0.3, min_entropy: 0.1}; null switches one off."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """What to do with degenerate samples. warn: print a line; stop: end the run with an error after num_alarms rows."""
    num_alarms: int = Field(3, ge=1)
    """Number of consecutive rows of metrics that must exceed a limit before on_alarm: stop ends the run."""

    def share_at(self, step: int, num_steps: int) -> float:
        """The share at optimizer step ``step`` (from 0) of ``num_steps``."""
        return self.share.at(step, num_steps) if isinstance(self.share, Schedule) else self.share

    @property
    def of_text(self) -> int:
        """Number of tokens of a prompt from text."""
        return 32 if self.prompt_tokens is None else self.prompt_tokens

    def num_tokens(self) -> int:
        """Number of tokens of the longest sequence from text, including its prompt."""
        return self.of_text + self.max_new_tokens


class DistillSpec(BudgetSpec):
    """A budget, and the losses with which the student learns from the teacher."""

    may_be_untaught: ClassVar[bool] = False
    """Whether the stage can also train without a teacher."""

    losses: list[Annotated[AnyLossSpec, LOSSES]] = Field([ForwardKL()], min_length=1)
    """Losses, each with its weight. Only the losses that are listed are used."""
    on_policy: OnPolicySpec | None = None
    """Train on samples of the student too: {share: 0.5, prompt_tokens: 32, max_new_tokens: 128}; unset is off. It needs
    a live teacher (not a cache) with the same end-of-text tokens as the student."""
    teacher_reads: Literal["text", "document"] = "text"
    """What the teacher reads. text: the same as the student; document: the teacher also reads the row's `document`
    column before the conversation, so that the student learns to answer as if it had read the document (prompt
    distillation)."""

    @model_validator(mode="after")
    def _each_loss_once(self) -> DistillSpec:
        kinds = [loss.kind for loss in self.losses]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"each kind of loss is given once (got {', '.join(kinds)}); add up their weights instead")
        if all(isinstance(loss, StateLossSpec) for loss in self.losses):
            raise ValueError(f"{kinds[0]} does not train the output head; add a loss on logits, such as forward_kl")
        return self

    @model_validator(mode="after")
    def _documents_are_for_logits(self) -> DistillSpec:
        if self.teacher_reads == "text":
            return self
        if inner := [loss.kind for loss in self.losses if isinstance(loss, StateLossSpec)]:
            raise ValueError(
                f"teacher_reads: document: {inner[0]} compares hidden states position by position, and the teacher has "
                "more positions; use losses on logits"
            )
        if not self.is_taught():
            raise ValueError("teacher_reads has no effect without a loss that reads the teacher; remove it")
        return self

    @model_validator(mode="after")
    def _reads_the_teacher(self) -> DistillSpec:
        if not self.is_taught() and not self.may_be_untaught:
            raise ValueError("no loss reads the teacher; use kind: finetune to train without one")
        return self

    def is_taught(self) -> bool:
        """Whether any loss reads the teacher."""
        return any(loss.needs_teacher for loss in self.losses)

    def mistakes(self, data: DataSpec) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Losses that do not fit the task, and settings of on_policy that do not fit the data: sequences longer than a
        row, or prompts that do not exist."""
        yield from ((("losses",), line) for line in unfit(self.losses, data.task))
        policy, length = self.on_policy, data.sequence_length
        if self.teacher_reads == "document" and not data.holds_conversations:
            yield (
                ("teacher_reads",),
                "document needs conversations with a column document; set data to a synthesize stage that makes qna",
            )
        if self.teacher_reads == "document" and data.chat is not None and data.chat.learn_from == "all":
            yield (
                ("teacher_reads",),
                "document cannot be used with data.chat.learn_from: all, since the teacher's prompts have other "
                "tokens; use assistant or last",
            )
        if policy is None:
            return
        if not data.task.is_causal:
            yield ("on_policy",), f"needs a model that generates text, not task: {data.task.kind}; remove it"
            return
        if not data.holds_conversations:
            if (wanted := policy.num_tokens()) > length:
                yield (
                    ("on_policy",),
                    f"prompt_tokens ({policy.of_text}) + max_new_tokens ({policy.max_new_tokens}) = {wanted} must fit "
                    f"a row of data.sequence_length ({length}); lower one of them or raise it",
                )
            return
        if policy.prompt_tokens is not None:
            yield (
                ("on_policy", "prompt_tokens"),
                "has no effect on conversations, whose prompts are everything before a turn of the assistant; "
                "remove it",
            )
        if policy.max_new_tokens >= length:
            yield (
                ("on_policy",),
                f"max_new_tokens ({policy.max_new_tokens}) leaves no room for a prompt in a row of "
                f"data.sequence_length ({length}); lower it",
            )
        if isinstance(data.train, Mixture) and (texts := data.train.texts()):
            yield (
                ("on_policy",),
                f"continues prompts before a turn of the assistant, and the mixture's {', '.join(texts)} has no turns; "
                "give this stage its own data section with conversations only",
            )
        if (data.chat or ChatSpec()).learn_from == "all":
            yield (
                ("on_policy",),
                "continues prompts before a turn of the assistant, which data.chat.learn_from: all does not mark; set "
                "it to assistant",
            )

    def in_words(self, sequence_length: int, packing: Packing) -> list[str]:
        """Phrases for the plan: the budget and, unless it is 0, the losses and the fraction of on-policy steps."""
        said = super().in_words(sequence_length, packing)
        if not self.steps(sequence_length):
            return said
        losses = " + ".join(loss.kind for loss in self.losses)
        if self.on_policy is None:
            return [*said, losses]
        share = self.on_policy.share
        return [*said, f"{losses}, {f'{share:.0%}' if isinstance(share, float) else 'a share'} of steps on-policy"]

    @model_validator(mode="after")
    def _samples_have_a_loss(self) -> DistillSpec:
        bound = [loss.kind for loss in self.losses if loss.needs_text]
        if self.on_policy is None or not bound:
            return self
        why = f"{', '.join(bound)} needs the text's next token, which samples of the student do not have"
        if all(loss.needs_text for loss in self.losses if isinstance(loss, LossSpec)):
            raise ValueError(f"{why}; add a loss such as reverse_kl, or remove on_policy")
        if self.on_policy.share == 1.0:
            raise ValueError(f"{why}; with on_policy.share: 1 it has no effect, so remove it")
        return self


class ComputeSpec(Spec):
    """Settings of the machine. They change where and how fast a run computes, but not what it computes."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device to train on; auto is a GPU if there is one."""
    devices: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Number of processes per machine, one per GPU; auto is the number of GPUs, or 1 on a CPU."""
    num_nodes: int = Field(1, ge=1)
    """Number of machines. For more than 1, start the same command on each with torchrun or srun."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: each process holds the whole student and teacher. fsdp: each process holds a shard of both, for models that
    do not fit on one GPU. auto is ddp if there are several processes."""
    silence_s: float = Field(60.0, ge=1)
    """Number of seconds without a heartbeat from a process after which the other processes stop."""
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    """Precision of training; auto is bf16-mixed on a GPU and 32-true on a CPU."""
    teacher_device: str = Field("auto", pattern=DEVICE)
    """Device of a live teacher, such as cpu or cuda:1; auto is the student's device."""
    teacher_precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of a live teacher; auto is the dtype of its file on a GPU and float32 on a CPU."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Number of sequences per forward pass of a process (gradients are accumulated to batch_size); unset: the whole
    batch of the process."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Whether to compile student and teacher with torch.compile: takes minutes at the start, and makes steps faster on
    a GPU, but not on a CPU."""
    num_workers: int = Field(0, ge=0)
    """Number of processes that prepare batches; 0 prepares them in the training process."""
    checkpoint_every_steps: int = Field(200, ge=1)
    """Number of optimizer steps between two checkpoints of a training stage."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep while a stage trains; all are deleted when it has finished."""
    write_checkpoints: Literal["at_once", "behind"] = "at_once"
    """at_once: training waits until a checkpoint is written. behind: it continues while a copy in CPU memory is
    written."""
    log_every_steps: int = Field(10, ge=1)
    """Number of optimizer steps between two rows of the metrics."""

    @model_validator(mode="after")
    def _several_teachers_are_not_on_one_gpu(self) -> ComputeSpec:
        self.check_teacher(1 if self.devices == "auto" else self.devices)
        return self

    def check_teacher(self, num_here: int) -> None:
        """Check that the processes of one machine do not put all their teachers on one GPU.

        Args:
            num_here: number of processes on the machine.

        Raises:
            ValueError: they do.
        """
        if num_here > 1 and self.names_gpu_of_teacher:
            raise ValueError(
                f"teacher_device: {self.teacher_device} would hold the teachers of all {num_here} processes; use "
                "auto (each on its student's GPU) or cpu, or devices: 1"
            )

    @property
    def names_gpu_of_teacher(self) -> bool:
        """Whether the teacher has a GPU of its own."""
        return self.teacher_device.startswith("cuda:")

    def known_processes(self) -> int:
        """Number of processes that train together, according to the recipe; ``auto`` counts as one per machine."""
        return self.num_nodes * (1 if self.devices == "auto" else self.devices)
