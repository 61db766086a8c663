"""What a training stage is told (``TrainSpec``) and on what machine it runs (``ComputeSpec``)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.losses import LOSSES, ForwardKL, LossSpec


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


def split_batch(budget: BudgetSpec, compute: ComputeSpec) -> tuple[int, int]:
    """Micro-batch size and how many of them make a step.

    Raises:
        InputError: the batch is not a whole number of micro-batches.
    """
    micro = min(compute.micro_batch_size or budget.batch_size, budget.batch_size)
    if budget.batch_size % micro:
        raise InputError(f"batch_size ({budget.batch_size}) must be a multiple of compute.micro_batch_size ({micro})")
    return micro, budget.batch_size // micro


class DistillSpec(BudgetSpec):
    """A budget and the losses against a teacher."""

    losses: list[Annotated[LossSpec, LOSSES]] = Field([ForwardKL()], min_length=1)
    """Losses, each with its weight; a loss is on when it is named."""

    @model_validator(mode="after")
    def _each_loss_once(self) -> DistillSpec:
        kinds = [loss.kind for loss in self.losses]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"each kind of loss stands once (got {', '.join(kinds)}); add up their weights instead")
        if not any(loss.needs_teacher for loss in self.losses):
            raise ValueError("no loss looks at the teacher; use kind: finetune to train without one")
        return self


class ComputeSpec(Spec):
    """The machine: nothing here changes what a run means, only where and how fast it runs."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device to use; auto takes a GPU where there is one."""
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    """Arithmetic of training; auto is bf16-mixed on a GPU and 32-true on a CPU."""
    teacher_device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where a teacher that is in memory runs, such as cpu or cuda:1; auto is beside the student."""
    teacher_precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and arithmetic of that teacher; auto is its file's precision on a GPU and float32 on a CPU."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences in memory at once (gradients accumulate to batch_size); unset: the whole batch."""
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
    log_every_steps: int = Field(10, ge=1)
    """Optimizer steps between two rows of the metrics."""
