"""The one training module: a student, maybe a teacher, and losses. Every training stage uses it.

Normalisation is exact per token: a step returns the *sum* of its losses, and the gradients are divided once, before
they are clipped, by the number of tokens of the whole step - over all micro-batches and ranks. Lightning's own mean
over micro-batches would weight short ones more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from distill.core.batch import model_inputs
from distill.core.errors import InputError
from distill.losses import AnyLossSpec, CrossEntropy, LossSpec, LossTerm, StateLossSpec
from distill.losses.head import KL, head_losses
from distill.losses.states import refusal
from distill.models.head import check_head, hidden_states, output_head
from distill.quantization.fake_quant import switch
from distill.quantization.scales import expect_held, hold_scales, renew_scales
from distill.training import rank_state
from distill.training.live_teacher import LiveTeacher
from distill.training.on_policy import OnPolicy
from distill.training.ranks import from_each, several, summed
from distill.training.sharded import local, shard_module
from distill.training.spec import OptimizerSpec
from distill.training.state_losses import StateLosses
from distill.training.step import Step, gradients_of, means_of, norm_of
from distill.training.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.pruning.origin import Origin

Batch = dict[str, Tensor]
Losses = Sequence[tuple[str, AnyLossSpec]]


class DistillationModule(pl.LightningModule):
    """Trains ``student`` on ``losses``; works with any Lightning Trainer.

    Args:
        student: causal language model; its parameters that require gradients are trained.
        losses: at least one on the predictions; those that need a teacher need ``teacher``.
        teacher: a model over the same tokens, which is frozen here, or another source of signal. It stays outside the
            module tree: never in a checkpoint, an optimizer or ``train()``.
        on_policy: writes the student's own sequences, which some steps learn from in place of the text; unset is off.
        optimizer: AdamW and its schedule.
        num_steps: length of the schedules (learning rate, and any setting of a loss) in optimizer steps; unset: as
            many as the Trainer will make.
        origin: where a student that was cut out of the teacher has its layers and channels from, for losses on inner
            states; None when it was not, or when there are none.
        quantized_from_step: optimizer steps that a fake-quantized student makes in full precision first.
        held_from_step: optimizer steps after which the scales of its weights stand still; None: they never do.

    Attributes:
        tokens_read: int64 scalar, with ``on_policy`` the tokens that this rank has trained on so far, without filling.

    Batches are dicts with ``input_ids`` int64 [batch, sequence] and ``mask`` bool [batch, sequence], True where the
    prediction made at a position (of the next token) counts; the last position never does. With ``position_ids`` int64
    [batch, sequence] that start anew with each document of a row, the documents do not see each other.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        losses: Sequence[AnyLossSpec],
        teacher: PreTrainedModel | Teacher | None = None,
        *,
        on_policy: OnPolicy | None = None,
        optimizer: OptimizerSpec | None = None,
        num_steps: int | None = None,
        origin: Origin | None = None,
        quantized_from_step: int = 0,
        held_from_step: int | None = None,
    ):
        super().__init__()
        if not any(isinstance(loss, LossSpec) for loss in losses):
            raise ValueError("no loss on the predictions to train on; give at least one")
        if teacher is None and any(loss.needs_teacher for loss in losses):
            raise ValueError(f"{[loss.kind for loss in losses if loss.needs_teacher]} need a teacher")
        self.student = student
        self.losses = [(loss.kind, loss) for loss in losses]
        self.optimizer_spec = optimizer or OptimizerSpec()
        self.num_steps = num_steps
        self.quantized_from_step, self.held_from_step = quantized_from_step, held_from_step
        self._renewed = self._held = False
        self.teacher = LiveTeacher(teacher) if isinstance(teacher, torch.nn.Module) else teacher
        self.on_policy = on_policy
        self.tokens_read = torch.zeros((), dtype=torch.int64)
        self._step = Step.begin()
        self._terms: dict[str, LossTerm] = {}
        self._skipped: deque[Tensor] = deque(maxlen=1000)  # of a Trainer that never looks
        self._settings: dict[str, float] = {}
        self._random: dict[str, Tensor] | None = None
        check_head(student)
        if self.teacher is not None:
            self.teacher.check([loss for loss in losses if isinstance(loss, LossSpec)])
        inner = [loss for loss in losses if isinstance(loss, StateLossSpec)]
        self.states: StateLosses | None = None
        if inner and self.teacher is not None:
            if self.teacher.model is None:
                raise InputError(f"losses: {refusal(inner)}")
            self.states = StateLosses(inner, student, self.teacher.model, origin)
        if on_policy is not None and (self.teacher is None or self.teacher.model is None):
            raise InputError(
                "on_policy needs a teacher that runs, as nobody has written down what one says of sequences that do "
                "not exist yet; name the model itself as teacher, or remove on_policy"
            )
        if on_policy is not None and all(loss.needs_text for loss in losses if isinstance(loss, LossSpec)):
            raise InputError("on_policy needs a loss that does without the text's next token, such as reverse_kl")

    def configure_model(self) -> None:
        """Share student and teacher out among the ranks, where the strategy does that."""
        shard_module(self)

    def on_fit_start(self) -> None:
        """Make the teacher ready for the student's device, and forget a step that was broken off."""
        self.on_validation_start()
        self._step = Step.begin(self.device)
        self.tokens_read = self.tokens_read.to(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Switch fake-quantization on, and hold its scales, when their steps have come."""
        step = self.trainer.global_step
        if self.quantized_from_step:
            if step == self.quantized_from_step and not self._renewed:  # also in a run that goes on from this step
                renew_scales(self.student)
                self._renewed = True
            switch(self.student, enabled=step >= self.quantized_from_step)
        if self.held_from_step is not None and step >= self.held_from_step and not self._held:
            hold_scales(self.student)
            self._held = True

    def on_validation_start(self) -> None:
        """Make the teacher ready for the student's device."""
        if self.teacher is not None:
            self.teacher.move(self.device)

    def batch_losses(self, batch: Batch, losses: Losses) -> tuple[Tensor, dict[str, LossTerm]]:
        """Weighted sum of the losses over a batch, and each term; see :func:`distill.losses.head.head_losses`."""
        input_ids, mask = batch["input_ids"], batch["mask"]
        inner = [(name, loss) for name, loss in losses if isinstance(loss, StateLossSpec)]
        states = self.states if inner else None
        with states.teacher.recording() if states else nullcontext():
            signal = self.teacher.signal(batch) if self.teacher is not None else None
        with states.student.recording() if states else nullcontext():
            hidden = hidden_states(self.student, **model_inputs(batch))
        outer = [(name, loss) for name, loss in losses if isinstance(loss, LossSpec)]
        total, terms = head_losses(hidden, output_head(self.student), signal, input_ids.roll(-1, dims=1), mask, outer)
        if states:
            more, inner_terms = states(batch, inner)
            total, terms = total + more, terms | inner_terms
        return total, terms

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One micro-batch: the sum of its losses over its tokens (not their mean)."""
        losses = self._losses_now()
        if self.on_policy is None:
            total, terms = self.batch_losses(batch, losses)
        else:
            batch, total, terms = self._turn(self.on_policy, batch, losses)
        self._step.add(total.detach(), batch["mask"].sum(), terms)
        return total

    def _turn(self, policy: OnPolicy, batch: Batch, losses: Losses) -> tuple[Batch, Tensor, dict[str, LossTerm]]:
        """A micro-batch as text or as the student's own sequences: what was learned from, its losses and figures."""
        place = self._step.sequences * self.trainer.world_size + self.trainer.global_rank * len(batch["input_ids"])
        self._step.sequences += len(batch["input_ids"])
        turn = policy.turn(self.student, batch, losses, self.trainer.global_step, self._schedule_steps(), place)
        self.tokens_read += turn.tokens
        total, terms = self.batch_losses(turn.batch, turn.losses)
        if turn.batch is not batch:
            terms["on_policy/kl"] = terms[KL]
        return turn.batch, total, terms | turn.figures

    def _losses_now(self) -> list[tuple[str, AnyLossSpec]]:
        """The losses with the settings of the step that is being made; all its micro-batches share them."""
        if not any(loss.schedules() for _, loss in self.losses):
            return self.losses
        step, num_steps = self.trainer.global_step, self._schedule_steps()
        now = [(name, loss.at(step, num_steps)) for name, loss in self.losses]
        self._settings = {
            f"{name}.{setting}": getattr(at_step, setting)
            for (name, loss), (_, at_step) in zip(self.losses, now, strict=True)
            for setting in loss.schedules()
        }
        return now

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the step's tokens, undoing Lightning's and DDP's means; clipping comes after."""
        step = self._step
        if several():
            total, tokens = summed(torch.stack([step.total.double(), step.tokens.double()]))
            step.total, step.tokens = total, tokens.long()
        means = torch.full_like(step.tokens, self.trainer.accumulate_grad_batches * self.trainer.world_size)
        torch._foreach_mul_(local(gradients_of(optimizer)), LossTerm(means, step.tokens).per_token())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and let the optimizer pass over a step whose loss or gradient is not finite, on all ranks alike.

        The decision stays on the device: nobody waits for it, and the optimizer takes it as it would a loss scaler's.
        """
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            norm = norm_of(optimizer)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            norm = norm_of(optimizer, clip=gradient_clip_val)
        skipped = ~(norm.isfinite() & self._step.total.isfinite())
        optimizer.found_inf = skipped.to(torch.float32)  # type: ignore[attr-defined]
        self._skipped.append(skipped)
        for name, term in self._step.terms.items():
            made = LossTerm(torch.where(skipped, 0.0, term.sum), torch.where(skipped, 0, term.count))
            self._terms[name] = self._terms[name] + made if name in self._terms else made
        self._step = Step.begin(self.device)

    def counted_tokens(self) -> int:
        """Tokens of all ranks that a loss was taken from since the last drain (this synchronises with the device)."""
        counts = [term.count for term in self._terms.values()]
        return int(summed(torch.stack(counts)).max()) if counts else 0

    def tokens_of_all_ranks(self) -> int:
        """:attr:`tokens_read`, summed over all ranks."""
        return int(summed(self.tokens_read.clone()))

    def drain_terms(self) -> dict[str, float]:
        """Mean of each loss per token of all ranks since the last call (this synchronises with the device).

        Beside them stand figures of own sequences, under ``on_policy/``, and settings that follow a schedule, as the
        last step had them (``forward_kl.temperature``). Steps that were passed over count for nothing.
        """
        means = means_of(self._terms)
        self._terms = {}
        return means | self._settings

    def drain_skipped(self) -> list[bool]:
        """Of each optimizer step since the last call: was it passed over? (This synchronises with the device.)"""
        skipped = torch.stack(list(self._skipped)).tolist() if self._skipped else []
        self._skipped.clear()
        return skipped

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch to the validation's terms: always cross-entropy, and KL where there is a teacher."""
        _, terms = self.batch_losses(batch, [("cross_entropy", CrossEntropy())])
        for name, term in terms.items():
            self._validation[name] = self._validation[name] + term if name in self._validation else term

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._validation: dict[str, LossTerm] = {}

    def validation_means(self) -> dict[str, float]:
        """Nats per token over the validation split that has just been read, by all ranks together."""
        return means_of(self._validation)

    def configure_optimizers(self) -> Any:
        """AdamW, without decay on vectors, and the schedule per step."""
        spec, num_steps = self.optimizer_spec, self._schedule_steps()
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=spec.lr, betas=spec.betas, fused=True)
        # True makes Lightning refuse to clip under mixed precision; without it Lightning undoes fp16's loss scale
        # itself, and bf16 has none
        optimizer._step_supports_amp_scaling = False
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: spec.factor(step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule_steps(self) -> int:
        """Optimizer steps over which all schedules run."""
        num_steps = self.num_steps or self.trainer.estimated_stepping_batches
        if math.isinf(num_steps):
            raise ValueError(
                "the schedule needs an end: give num_steps here, or max_steps or max_epochs to the Trainer"
            )
        return int(num_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen (it is in its artifact already); add what each rank has for itself."""
        frozen = {f"student.{name}" for name, p in self._named_parameters() if not p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint["ranks"] = from_each(rank_state.of(self._terms, self.tokens_read))
        none: Tensor = torch.zeros(0, dtype=torch.bool)
        checkpoint["skipped"] = torch.stack(list(self._skipped)).cpu() if self._skipped else none  # alike on all ranks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen weights back beside the saved ones, so that loading stays strict.

        Each rank takes up its own state; with another number of ranks the first one takes what all have counted.
        """
        for name, p in self._named_parameters():
            if not p.requires_grad:
                checkpoint["state_dict"].setdefault(f"student.{name}", p.detach())
        self._held = expect_held(self.student, checkpoint["state_dict"], "student.")
        mine = rank_state.share(checkpoint["ranks"], self.trainer.global_rank, self.trainer.world_size)
        self._terms, self.tokens_read, self._random = mine
        self._skipped.extend(checkpoint["skipped"].unbind())

    def on_train_start(self) -> None:
        """Restore the random state last, after everything that may draw from it; a rank without one draws its own."""
        self._terms = {name: term.to(self.device) for name, term in self._terms.items()}
        self.tokens_read = self.tokens_read.to(self.device)
        self._skipped = deque((skipped.to(self.device) for skipped in self._skipped), self._skipped.maxlen)
        if self._random is not None:
            rank_state.set_random(self._random)
        elif self.trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)
        self._random = None

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The student's parameters under every name that they have in a ``state_dict`` (tied ones have two)."""
        return self.student.named_parameters(remove_duplicate=False)
