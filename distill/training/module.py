"""The training module: a student, an optional teacher, and losses. All training stages use it.

One optimizer step, in the order of Lightning's calls. Hooks are methods of this module; the callbacks are in
:mod:`distill.training.record`, ``guard``, ``show_progress``, ``ask``, ``outlook`` and ``saver``:

    for each micro-batch of the step
        0. hook on_before_batch_transfer          find the counted positions, while the batch is on the CPU
        1. hook on_train_batch_start              enable fake quantization or hold its scales, if their step is reached
        2. hook training_step                     compute the losses of the micro-batch, summed over its tokens
        3. Lightning: backward                    of that sum, divided by the number of micro-batches; the gradients
                                                  are accumulated, and then DDP averages them over the ranks
    once per step, after the last micro-batch (hook optimizer_zero_grad freed the gradients before the first one)
        4. hook on_before_optimizer_step          scale the gradients to the mean over all tokens of the step
        5. hook configure_gradient_clipping       clip; mark the step as skipped if its loss or gradient is not finite
        6. torch: AdamW                           update the weights, unless the step is marked
        7. Lightning: learning rate scheduler     set the learning rate of the next step
    then, by Lightning's on_train_batch_end
        8. callback Record                        write a row of metrics, if due
        9. callback Guard                         after skipped steps: warn and save the batches; after too many in a
                                                  row, end the run
       10. callback ShowProgress                  progress bar or line, on rank 0
       11. callback AskQuestions                  score the student on tasks, if due, on rank 0
       12. callback Checkpoints                   save if due and after the last step; save and stop after a signal
       13. hook on_train_batch_end               log the losses, if due and if log=True
    and, if a validation is due
       14. hook validation_step                   for each validation batch; then Record writes a row, and Outlook
                                                  prints a forecast of the final loss

Why a sum and one division (2 and 4). Micro-batches have different numbers of counted tokens, so a mean of their means
would give the tokens of a short micro-batch more weight. Therefore every loss returns a sum, and step 4 divides once,
by the number of tokens of all micro-batches and ranks, before the gradient is clipped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from distill.core.batch import KEPT, batch_of_labels, model_inputs
from distill.core.errors import InputError
from distill.losses import LOSSES, AnyLossSpec, CrossEntropy, LossSpec, LossTerm, StateLossSpec
from distill.losses.head_losses import KL, head_losses
from distill.losses.layer_losses import refusal
from distill.models.head import check_head, hidden_states, output_head
from distill.quantization.fake_quant import switch
from distill.quantization.scales import allocate_held_scales, hold_scales, reset_learned_scales
from distill.training import rank_state
from distill.training.live_teacher import LiveTeacher
from distill.training.on_policy import OnPolicy
from distill.training.ranks import from_each, several, summed
from distill.training.sharded import Sharded, local
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

    Batches are dicts with ``input_ids``, ``targets``, ``mask`` and, if several documents share a row, ``position_ids``;
    see :mod:`distill.core.batch` and :func:`distill.batches`. What a target is, the next token or the class of a text,
    makes no difference here. Batches of transformers' collators, with ``input_ids``, ``labels`` and ``attention_mask``,
    are converted.

    It logs the mean of each loss per token as ``train/<loss>`` every ``log_every_n_steps`` steps of the Trainer, and
    after a validation ``val/cross_entropy`` and, with a teacher, ``val/kl``.

    Args:
        student: model of transformers with an output head. Its parameters that require gradients are trained.
        losses: losses to train on, or their names, of which at least one must be on logits.
        teacher: model with the same vocabulary, which is frozen here, or a :class:`Teacher`; required if a loss needs
            it. It is not registered as a submodule, so it is not in checkpoints or optimizers, and ``train()`` does not
            change it.
        validation: losses that are measured on validation batches, in addition to KL if there is a teacher.
        on_policy: samples sequences from the student for some of the steps; None to train on text only.
        optimizer: settings of AdamW and of the learning rate schedule.
        num_steps: number of optimizer steps over which the schedules (learning rate, settings of losses) run; None for
            the number of steps of the Trainer.
        origin: layers and channels of the teacher from which the student was pruned, for losses on hidden states; None
            if it was not pruned from this teacher.
        quantized_from_step: number of optimizer steps before fake quantization is enabled.
        held_from_step: number of optimizer steps after which the scales of the weights are held constant; None for
            never.
        log: whether to log through the Trainer; False if a callback drains the losses.

    Attributes:
        tokens_read: with ``on_policy``, the number of tokens that this rank has trained on, without padding, int64
            scalar.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        losses: Sequence[AnyLossSpec | str],
        teacher: PreTrainedModel | Teacher | None = None,
        *,
        validation: Sequence[LossSpec] = (CrossEntropy(),),
        on_policy: OnPolicy | None = None,
        optimizer: OptimizerSpec | None = None,
        num_steps: int | None = None,
        origin: Origin | None = None,
        quantized_from_step: int = 0,
        held_from_step: int | None = None,
        log: bool = True,
    ):
        super().__init__()
        specs = [_named(loss) if isinstance(loss, str) else loss for loss in losses]
        if not any(isinstance(loss, LossSpec) for loss in specs):
            raise ValueError("no loss on the predictions to train on; give at least one")
        if teacher is None and any(loss.needs_teacher for loss in specs):
            raise ValueError(f"{[loss.kind for loss in specs if loss.needs_teacher]} need a teacher")
        if len({loss.compares for loss in specs if isinstance(loss, LossSpec)}) > 1:
            raise ValueError("cannot combine losses on logits with losses on scores or embeddings")
        self.student = student
        self.losses = [(loss.kind, loss) for loss in specs]
        self.validation = [(loss.kind, loss) for loss in validation if not loss.needs_teacher or teacher is not None]
        self.optimizer_spec = optimizer or OptimizerSpec()
        self.num_steps = num_steps
        self._logs, self._logged_step = log, 0
        self.quantized_from_step, self.held_from_step = quantized_from_step, held_from_step
        self._renewed = self._held = False
        self.teacher = LiveTeacher(teacher) if isinstance(teacher, torch.nn.Module) else teacher
        self.on_policy = on_policy
        self.tokens_read = torch.zeros((), dtype=torch.int64)
        self._step = Step.begin()
        self._terms: dict[str, LossTerm] = {}
        self._skipped: deque[Tensor] = deque(maxlen=1000)  # bounded, for a Trainer without our Guard
        self._settings: dict[str, float] = {}
        self._random: dict[str, Tensor] | None = None
        check_head(student)
        if self.teacher is not None:
            self.teacher.check([loss for loss in specs if isinstance(loss, LossSpec)])
        inner = [loss for loss in specs if isinstance(loss, StateLossSpec)]
        self.states: StateLosses | None = None
        if inner and self.teacher is not None:
            if self.teacher.model is None:
                raise InputError(f"losses: {refusal(inner)}")
            self.states = StateLosses(inner, student, self.teacher.model, origin)
        if on_policy is not None and (self.teacher is None or self.teacher.model is None):
            raise InputError(
                "on_policy needs a teacher in memory, because a cache has no output for sequences that do not exist "
                "yet; name the model itself as teacher, or remove on_policy"
            )
        if on_policy is not None and all(loss.needs_text for loss in specs if isinstance(loss, LossSpec)):
            raise InputError("on_policy needs a loss that does without the text's next token, such as reverse_kl")

    def setup(self, stage: str) -> None:
        """Put the student into training mode, as ``from_pretrained`` returns models in evaluation mode."""
        if stage == "fit":
            self.student.train()

    def configure_model(self) -> None:
        """Shard the student, the learned projections and the teacher over the ranks, if the strategy is FSDP.

        Raises:
            InputError: the stage uses something that cannot be sharded.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, Sharded):
            return
        if self.on_policy is not None:
            raise InputError("compute.strategy: fsdp cannot sample from the student (on_policy); use ddp")
        maps = self.states.projections.values() if self.states is not None else ()
        strategy.shard(self.student, maps, self.teacher, bf16="bf16" in str(self.trainer.precision))

    def on_fit_start(self) -> None:
        """Move the teacher to the student's device, and reset the sums of an interrupted step."""
        self.on_validation_start()
        self._step = Step.begin(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Enable fake quantization, and hold its scales, when their steps are reached."""
        step = self.trainer.global_step
        if self.quantized_from_step:
            if step == self.quantized_from_step and not self._renewed:  # also if a run resumes at this step
                reset_learned_scales(self.student)
                self._renewed = True
            switch(self.student, enabled=step >= self.quantized_from_step)
        if self.held_from_step is not None and step >= self.held_from_step and not self._held:
            hold_scales(self.student)
            self._held = True

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the losses since the last log, if a log is due."""
        step, every = self.trainer.global_step, getattr(self.trainer, "log_every_n_steps", 50)
        if not self._logs or step == self._logged_step or step % max(1, every):
            return
        self._logged_step = step
        means = {name if "/" in name else f"train/{name}": value for name, value in self.drain_terms().items()}
        self.log_dict(means, prog_bar=True, batch_size=1)

    def on_validation_start(self) -> None:
        """Move the teacher to the student's device."""
        if self.teacher is not None:
            self.teacher.move(self.device)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Compute the counted positions on the CPU, because computing them on a GPU would make the CPU wait for it.

        Drop position ids that equal arange, because models create these by default.
        """
        if "mask" not in batch:
            if not {"input_ids", "labels"} <= batch.keys():
                raise InputError(
                    f"a batch holds {', '.join(batch)}; expected input_ids, targets and mask (distill.batches makes "
                    "them), or input_ids and labels"
                )
            batch = batch_of_labels(batch)
        if self.on_policy is not None:  # on-policy samples replace the batch later
            return batch
        kept = batch["mask"].flatten().nonzero().squeeze(1)  # [tokens]
        if self.device.type == "cuda" and kept.device.type == "cpu":
            kept = kept.pin_memory()  # otherwise the CPU would wait for its copy to the GPU
        places = batch.get("position_ids")
        if places is not None and torch.equal(
            places, torch.arange(places.shape[-1], device=places.device).expand_as(places)
        ):
            batch = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
        return {**batch, KEPT: kept}

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Free the gradients; under DDP set them to zero, because they are views of its buckets.

        If they were freed, the first micro-batches would allocate gradients outside the buckets, a second copy.
        """
        optimizer.zero_grad(set_to_none=not isinstance(self.trainer.strategy, DDPStrategy))

    def on_validation_model_zero_grad(self) -> None:
        """The same before a validation."""
        self.zero_grad(set_to_none=not isinstance(self.trainer.strategy, DDPStrategy))

    def batch_losses(self, batch: Batch, losses: Losses) -> tuple[Tensor, dict[str, LossTerm]]:
        """The weighted sum of the losses over a batch (scalar, with a graph), and each term by name, without a graph.

        See :func:`distill.losses.head_losses.head_losses`, and for losses on hidden states
        :class:`~distill.training.state_losses.StateLosses`.
        """
        targets, mask = batch["targets"], batch["mask"]  # [batch, sequence]
        inner = [(name, loss) for name, loss in losses if isinstance(loss, StateLossSpec)]
        states = self.states if inner else None
        with states.teacher.recording() if states else nullcontext():
            signal = self.teacher.signal(batch) if self.teacher is not None else None
        with states.student.recording() if states else nullcontext():
            hidden = hidden_states(self.student, **model_inputs(batch))  # [batch, sequence, hidden]
        outer = [(name, loss) for name, loss in losses if isinstance(loss, LossSpec)]
        head, kept = output_head(self.student), batch.get(KEPT)
        if (hidden_tokens := batch.get("text_mask")) is None:
            total, terms = head_losses(hidden, head, signal, targets, mask, outer, kept=kept)
        else:  # masked LM with positions: all: text losses use the masked tokens and are scaled by text_weight
            on_text = [pair for pair in outer if pair[1].needs_text]
            others = [pair for pair in outer if not pair[1].needs_text]
            total, terms = hidden.new_zeros(()), dict[str, LossTerm]()
            if on_text:
                total, terms = head_losses(hidden, head, signal, targets, hidden_tokens, on_text)
            total = total * batch["text_weight"]
            if others:
                more, other_terms = head_losses(hidden, head, signal, targets, mask, others, kept=kept)
                total, terms = total + more, terms | other_terms
        if states:
            more, inner_terms = states(batch, inner)
            total, terms = total + more, terms | inner_terms
        return total, terms

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The weighted sum of the losses over the tokens of one micro-batch (not their mean)."""
        losses = self._losses_now()
        if self.on_policy is None:
            total, terms = self.batch_losses(batch, losses)
        else:
            batch, total, terms = self._text_or_samples(self.on_policy, batch, losses)
        self._step.add(total.detach(), batch["mask"].sum(), terms)
        return total

    def _text_or_samples(
        self, policy: OnPolicy, batch: Batch, losses: Losses
    ) -> tuple[Batch, Tensor, dict[str, LossTerm]]:
        """Compute the losses on a micro-batch, or on on-policy samples in its place.

        Returns the batch that was used, the weighted sum, and the unweighted terms by name.
        """
        # index of the micro-batch's first sequence within the step, over all ranks; it determines the random numbers
        first = self._step.sequences * self.trainer.world_size + self.trainer.global_rank * len(batch["input_ids"])
        self._step.sequences += len(batch["input_ids"])
        source = policy.source(self.student, batch, losses, self.trainer.global_step, self._schedule_steps(), first)
        self.tokens_read += source.tokens
        total, terms = self.batch_losses(source.batch, source.losses)
        if source.batch is not batch:
            terms["on_policy/kl"] = terms[KL]
        return source.batch, total, terms | source.figures

    def _losses_now(self) -> list[tuple[str, AnyLossSpec]]:
        """The losses with the values of their schedules at the current step."""
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
        """Scale the gradients to the mean over the step's tokens; this is done before clipping."""
        step = self._step
        if several():
            total, tokens = summed(torch.stack([step.total.double(), step.tokens.double()]))
            step.total, step.tokens = total, tokens.long()
        # Let g be the gradient of the sum of losses of one micro-batch on one rank. Lightning has divided each g by the
        # number of micro-batches A, and DDP or FSDP has divided the sum over ranks by the number of ranks R. So p.grad
        # is
        #     sum of all g / (A R)
        # and the gradient of the mean over the N tokens of the step is
        #     sum of all g / N = p.grad * (A R) / N.
        means = torch.full_like(step.tokens, self.trainer.accumulate_grad_batches * self.trainer.world_size)  # A R
        torch._foreach_mul_(local(gradients_of(optimizer)), LossTerm(means, step.tokens).per_token())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and mark a step as skipped, on all ranks, if its loss or gradient is not finite."""
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            norm = norm_of(optimizer)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            norm = norm_of(optimizer, clip=gradient_clip_val)
        # equal on all ranks: the norm covers all shards, and the total is summed over all ranks
        skipped = ~(norm.isfinite() & self._step.total.isfinite())  # bool scalar, on the device
        # Private API of torch: ``found_inf`` is how a GradScaler tells a fused optimizer not to change weights, moments
        # and step count. There is no public way. Otherwise the CPU would have to read the decision before each step
        # (``if skipped.item()``), and each step would wait for the device.
        optimizer.found_inf = skipped.to(torch.float32)  # type: ignore[attr-defined]
        self._skipped.append(skipped)
        for name, term in self._step.terms.items():
            counted = LossTerm(torch.where(skipped, 0.0, term.sum), torch.where(skipped, 0, term.count))
            self._terms[name] = self._terms[name] + counted if name in self._terms else counted
        self._step = Step.begin(self.device)

    def counted_tokens(self) -> int:
        """Number of counted tokens on all ranks since the last :meth:`drain_terms` (synchronises with the device)."""
        counts = [term.count for term in self._terms.values()]
        return int(summed(torch.stack(counts)).max()) if counts else 0

    def tokens_of_all_ranks(self) -> int:
        """:attr:`tokens_read`, summed over all ranks."""
        return int(summed(self.tokens_read.clone()))

    def drain_terms(self) -> dict[str, float]:
        """Mean of each loss per token, over all ranks, since the last call (synchronises with the device).

        The result also contains metrics of on-policy samples (``on_policy/...``), and the values of scheduled settings
        at the last step (``forward_kl.temperature``). Skipped steps are not counted.
        """
        means = means_of(self._terms)
        self._terms = {}
        return means | self._settings

    def drain_skipped(self) -> list[bool]:
        """Whether each optimizer step since the last call was skipped (synchronises with the device)."""
        skipped = torch.stack(list(self._skipped)).tolist() if self._skipped else []
        self._skipped.clear()
        return skipped

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch to the validation sums: the losses of ``validation``, and KL if there is a teacher."""
        _, terms = self.batch_losses(batch, self.validation)
        for name, term in terms.items():
            self._validation[name] = self._validation[name] + term if name in self._validation else term

    def on_validation_epoch_start(self) -> None:
        """Reset the validation sums."""
        self._validation: dict[str, LossTerm] = {}

    def on_validation_epoch_end(self) -> None:
        """Log the validation losses."""
        if self._logs:
            means = {f"val/{name}": value for name, value in self.validation_means().items()}
            self.log_dict(means, prog_bar=True, batch_size=1, sync_dist=True)  # equal on all ranks already

    def validation_means(self) -> dict[str, float]:
        """Means over the last validation, in nats per token, over all ranks."""
        return means_of(self._validation)

    def configure_optimizers(self) -> Any:
        """AdamW, with weight decay only for matrices, and the learning rate schedule, which is updated per step."""
        spec, num_steps = self.optimizer_spec, self._schedule_steps()
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=spec.lr, betas=spec.betas, fused=True)
        # Private API of torch: this attribute says that a fused optimizer unscales fp16 gradients within its step.
        # Lightning then raises an error for clipping, and the gradients would still be scaled in hooks 4 and 5. With
        # False, Lightning unscales them before these hooks; bf16 has no scale.
        optimizer._step_supports_amp_scaling = False
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: spec.factor(step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule_steps(self) -> int:
        """Number of optimizer steps over which all schedules run."""
        num_steps = self.num_steps or self.trainer.estimated_stepping_batches
        if math.isinf(num_steps):
            raise ValueError(
                "the schedule needs an end: give num_steps here, or max_steps or max_epochs to the Trainer"
            )
        return int(num_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the frozen weights, which are in the student's artifact, and add the state of each rank."""
        frozen = {f"student.{name}" for name, p in self._named_parameters() if not p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint["ranks"] = from_each(rank_state.of(self._terms, self.tokens_read))
        none: Tensor = torch.zeros(0, dtype=torch.bool)
        checkpoint["skipped"] = torch.stack(list(self._skipped)).cpu() if self._skipped else none  # equal on all ranks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the frozen weights again, so that loading can be strict, and restore the state of this rank.

        If the number of ranks has changed, rank 0 takes the sums of all ranks.
        """
        for name, p in self._named_parameters():
            if not p.requires_grad:
                checkpoint["state_dict"].setdefault(f"student.{name}", p.detach())
        self._held = allocate_held_scales(self.student, checkpoint["state_dict"], "student.")
        mine = rank_state.for_rank(checkpoint["ranks"], self.trainer.global_rank, self.trainer.world_size)
        self._terms, self.tokens_read, self._random = mine
        self._skipped.extend(checkpoint["skipped"].unbind())

    def on_train_start(self) -> None:
        """Restore the random state, after everything that may change it; a new rank gets its own seed."""
        self._terms = {name: term.to(self.device) for name, term in self._terms.items()}
        self.tokens_read = self.tokens_read.to(self.device)
        self._skipped = deque((skipped.to(self.device) for skipped in self._skipped), self._skipped.maxlen)
        if self._random is not None:
            rank_state.set_random(self._random)
        elif self.trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)
        self._random = None

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The student's parameters under all their names in a ``state_dict`` (a tied parameter has two names)."""
        return self.student.named_parameters(remove_duplicate=False)


def _named(kind: str) -> AnyLossSpec:
    """The loss of this name with its default settings.

    Raises:
        InputError: there is none.
    """
    if kind not in list(LOSSES):
        raise InputError(f"losses: no loss {kind!r} (there are {', '.join(LOSSES)})")
    return cast("AnyLossSpec", LOSSES[kind]())
