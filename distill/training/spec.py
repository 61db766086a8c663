"""What a training stage is told (``TrainSpec``) and on what machine it runs (``ComputeSpec``)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.errors import InputError
from distill.core.spec import DEVICE, Spec
from distill.losses import LOSSES, AnyLossSpec, ForwardKL, LossSpec, StateLossSpec
from distill.losses.schedule import Schedule, Share


class OptimizerSpec(Spec):
    """AdamW with a warmed-up schedule (arXiv 1711.05101)."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean and square of the gradient."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices (norms and biases have none); 0 is off."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0 is off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up; unset: 5 % of all steps."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Last learning rate as a share of the peak (cosine and linear)."""

    def factor(self, step: int, num_steps: int) -> float:
        """Learning rate at ``step`` (from 0) of ``num_steps``, as a share of the peak."""
        warmup = round(0.05 * num_steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape


class BudgetSpec(Spec):
    """How long and with what batch a stage trains; the budget is in tokens or in steps."""

    num_tokens: int | None = Field(None, ge=0)
    """Tokens to train on, rounded up to whole steps; 0 trains nothing. Exclusive with num_steps."""
    num_steps: int | None = Field(None, ge=0)
    """Optimizer steps. Exclusive with num_tokens."""
    batch_size: int = Field(16, ge=1)
    """Sequences an optimizer step, over all devices and micro-batches."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """AdamW and its schedule."""
    validate_every_steps: int | None = Field(None, ge=1)
    """Steps between two looks at the validation split; unset: four times a run."""
    max_skipped_steps: int = Field(5, ge=1)
    """Steps in a row whose loss or gradient is not finite until the run stops; each of them is passed over."""

    @model_validator(mode="after")
    def _one_budget(self) -> BudgetSpec:
        if (self.num_tokens is None) == (self.num_steps is None):
            raise ValueError("give the budget once: num_tokens or num_steps")
        return self

    def steps(self, tokens_per_sequence: float) -> int:
        """Optimizer steps of the budget, by the tokens of text in a sequence, on average."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_tokens is not None
        return math.ceil(self.num_tokens / (self.batch_size * tokens_per_sequence))


def split_batch(budget: BudgetSpec, compute: ComputeSpec, num_processes: int = 1) -> tuple[int, int]:
    """Micro-batch size of a process, and how many micro-batches it takes to a step.

    Raises:
        InputError: the batch is not a whole number of micro-batches on each process.
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
    """What is held to be wrong with the student's own sequences: measured over each row of the metrics, and where the
    text can be measured too, against the passages that stand in its place."""

    at_limit: float | None = Field(0.5, gt=0, le=1)
    """So much larger a share of own sequences than of the text's passages reaches max_new_tokens without an end (0.5:
    80 % of them where 30 % of the text's do). Null is off."""
    repetition: float | None = Field(0.3, gt=0, le=1)
    """So much larger a share of 4-grams stood in the same sequence before than in the text's passages. Null is off."""
    min_entropy: float | None = Field(0.1, gt=0)
    """The student's distribution has less entropy than this on average, in nats a token. Null is off."""


class OnPolicySpec(Spec):
    """Steps that learn from sequences which the student writes itself, at prompts from the text (GKD)."""

    share: Share = 0.5
    """Probability that an optimizer step learns from own sequences in place of the text: 0 is never, 1 always. May
    follow a schedule. Every step counts as whole blocks in the budget; the metrics count the tokens really read."""
    prompt_tokens: int = Field(32, ge=1)
    """Tokens at the start of a training block that the student goes on from."""
    max_new_tokens: int = Field(128, ge=1)
    """Most tokens that it writes; with the prompt they must fit a block of data.sequence_length."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling (not of a loss); 1 is the student's own distribution, which is what the method asks for."""
    alarms: AlarmSpec = AlarmSpec()
    """When own sequences are degenerate: {at_limit: 0.5, repetition: 0.3, min_entropy: 0.1}, each null for off."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """stop: end the run with an error when num_alarms rows of metrics in a row gave an alarm."""
    num_alarms: int = Field(3, ge=1)
    """Rows of metrics in a row that must give an alarm before on_alarm: stop stops."""

    def share_at(self, step: int, num_steps: int) -> float:
        """The share with which optimizer step ``step`` (from 0) of ``num_steps`` is drawn."""
        return self.share.at(step, num_steps) if isinstance(self.share, Schedule) else self.share

    def num_tokens(self) -> int:
        """Tokens of the longest sequence, prompt and all."""
        return self.prompt_tokens + self.max_new_tokens


class DistillSpec(BudgetSpec):
    """A budget and the losses against a teacher."""

    may_be_untaught: ClassVar[bool] = False
    """Whether the stage has another purpose than to learn from a teacher."""

    losses: list[Annotated[AnyLossSpec, LOSSES]] = Field([ForwardKL()], min_length=1)
    """Losses, each with its weight; a loss is on when it is named."""
    on_policy: OnPolicySpec | None = None
    """Learn from the student's own sequences too, {share: 0.5, prompt_tokens: 32, max_new_tokens: 128}; unset is off.
    Needs a teacher that runs, which ends a text as the student does."""

    @model_validator(mode="after")
    def _each_loss_once(self) -> DistillSpec:
        kinds = [loss.kind for loss in self.losses]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"each kind of loss stands once (got {', '.join(kinds)}); add up their weights instead")
        if all(isinstance(loss, StateLossSpec) for loss in self.losses):
            raise ValueError(f"{kinds[0]} teaches no prediction; add a loss on the logits, such as forward_kl")
        return self

    @model_validator(mode="after")
    def _looks_at_the_teacher(self) -> DistillSpec:
        if not self.is_taught() and not self.may_be_untaught:
            raise ValueError("no loss looks at the teacher; use kind: finetune to train without one")
        return self

    def is_taught(self) -> bool:
        """Whether any loss looks at the teacher."""
        return any(loss.needs_teacher for loss in self.losses)

    @model_validator(mode="after")
    def _own_sequences_have_a_loss(self) -> DistillSpec:
        bound = [loss.kind for loss in self.losses if loss.needs_text]
        if self.on_policy is None or not bound:
            return self
        why = f"{', '.join(bound)} needs the text's next token, and the student's own sequences have none"
        if all(loss.needs_text for loss in self.losses if isinstance(loss, LossSpec)):
            raise ValueError(f"{why}; add a loss such as reverse_kl, or remove on_policy")
        if self.on_policy.share == 1.0:
            raise ValueError(f"{why}; with on_policy.share: 1 it has no effect, so remove it")
        return self


class ComputeSpec(Spec):
    """The machine: nothing here changes what a run means, only where and how fast it runs."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device to use; auto takes a GPU where there is one."""
    devices: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Processes on each machine that train together, one a GPU; auto is every GPU, and 1 on a CPU."""
    num_nodes: int = Field(1, ge=1)
    """Machines; more than 1 are started by torchrun or srun, with the same command on each."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: each process holds the whole student and teacher. fsdp: each holds a share of both, for what does not fit.
    auto is ddp where there are several."""
    silence_s: float = Field(60.0, ge=1)
    """Seconds without a sign of life from one of several processes until the others stop."""
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    """Arithmetic of training; auto is bf16-mixed on a GPU and 32-true on a CPU."""
    teacher_device: str = Field("auto", pattern=DEVICE)
    """Where a teacher that is in memory runs, such as cpu or cuda:1; auto is beside the student."""
    teacher_precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and arithmetic of that teacher; auto is its file's precision on a GPU and float32 on a CPU."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences in a process's memory at once (gradients accumulate to batch_size); unset: its share of the batch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile student and teacher: minutes at the start, faster steps on a GPU; a CPU gains nothing."""
    num_workers: int = Field(0, ge=0)
    """Processes that prepare batches; 0 does it in the training process."""
    checkpoint_every_steps: int = Field(200, ge=1)
    """Optimizer steps between two checkpoints of a training stage."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept while a stage trains; they go when it has finished."""
    write_checkpoints: Literal["at_once", "behind"] = "at_once"
    """behind: training goes on while a checkpoint is written, from one more copy of it in the machine's memory."""
    log_every_steps: int = Field(10, ge=1)
    """Optimizer steps between two rows of the metrics."""

    @model_validator(mode="after")
    def _several_teachers_are_not_on_one_gpu(self) -> ComputeSpec:
        self.check_teacher(1 if self.devices == "auto" else self.devices)
        return self

    def check_teacher(self, num_here: int) -> None:
        """Whether so many processes of a machine can have their teachers where they are to be.

        Raises:
            ValueError: all of them on one GPU.
        """
        if num_here > 1 and self.names_gpu_of_teacher:
            raise ValueError(
                f"teacher_device: {self.teacher_device} would hold the teachers of all {num_here} processes; use "
                "auto (each beside its student) or cpu, or devices: 1"
            )

    @property
    def names_gpu_of_teacher(self) -> bool:
        """Whether the teacher has a GPU of its own."""
        return self.teacher_device.startswith("cuda:")

    def known_processes(self) -> int:
        """Processes that train together, as far as this says it: ``devices: auto`` is counted as one a machine."""
        return self.num_nodes * (1 if self.devices == "auto" else self.devices)
