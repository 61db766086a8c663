"""Implementations of the same training step, as their users would write it: plain loops, distill, TRL's trainers.

Each contender trains a new student for one optimizer step per batch. The measurement hooks the optimizer
(:func:`torch.optim.optimizer.register_optimizer_step_post_hook`), so all contenders are timed in the same way, from
step to step.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from distill.core.batch import model_inputs
from distill.losses import ForwardKL
from distill.losses.head_losses import Signal, head_losses
from distill.models.head import hidden_states, output_head
from distill.training.module import DistillationModule
from distill.training.spec import BudgetSpec, ComputeSpec, OptimizerSpec
from distill.training.trainer import fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]
LOG_EVERY = 5


@dataclass
class Work:
    """The models and batches of a measurement.

    Attributes:
        student: student; each contender trains a copy.
        teacher: frozen teacher.
        batches: one batch per optimizer step.
        device: "cpu" or "cuda".
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    batches: list[Batch]
    device: str

    def fresh(self) -> PreTrainedModel:
        """A copy of the student, in training mode."""
        return copy.deepcopy(self.student).to(self.device).train()

    def on_device(self) -> Iterator[Batch]:
        """The batches, on the device of the models."""
        for batch in self.batches:
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def autocast(self) -> Any:
        """bf16 on a GPU, fp32 on a CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()


def plain_loop(work: Work) -> None:
    """Ten lines of PyTorch: logits of all tokens of both models, KL, clipping, fused AdamW."""

    def loss(student: PreTrainedModel, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = work.teacher(**model_inputs(batch), use_cache=False).logits
        logits = student(**model_inputs(batch), use_cache=False).logits
        log_q, log_p = (side[batch["mask"]].float().log_softmax(-1) for side in (logits, wanted))
        return functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / batch["mask"].sum()

    _loop(work, loss)


def chunked_loop(work: Work) -> None:
    """The same loop with distill's chunked head, without logits of all tokens."""

    def loss(student: PreTrainedModel, batch: Batch) -> Tensor:
        with torch.inference_mode():
            signal = Signal(hidden_states(work.teacher, **model_inputs(batch)), output_head(work.teacher))
        hidden = hidden_states(student, **model_inputs(batch))
        targets = batch["targets"]
        losses = [("forward_kl", ForwardKL())]
        total, _ = head_losses(hidden, output_head(student), signal, targets, batch["mask"], losses)
        return total / batch["mask"].sum()

    _loop(work, loss)


def _loop(work: Work, loss: Callable[[PreTrainedModel, Batch], Tensor]) -> None:
    student = work.fresh()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for batch in work.on_device():
        with work.autocast():
            value = loss(student, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def distill(work: Work) -> None:
    """distill's training: Lightning, with its callbacks, writing metrics to disk."""
    rows = len(work.batches[0]["mask"])
    optimizer = OptimizerSpec(lr=1e-4, weight_decay=0.0, schedule="constant", warmup_steps=0)
    module = DistillationModule(work.fresh(), [ForwardKL()], work.teacher, optimizer=optimizer)
    steps = len(work.batches)
    small = {name: tensor[:1, :8] for name, tensor in work.batches[0].items()}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fit(
            module,
            BudgetSpec(num_steps=steps, batch_size=rows, validate_every_steps=steps),
            ComputeSpec(
                accelerator="gpu" if work.device == "cuda" else "cpu",
                log_every_steps=LOG_EVERY,
                checkpoint_every_steps=10**9,
            ),
            name="distill",
            folder=Path(folder),
            tokens_per_sequence=work.batches[0]["mask"].shape[1],
            train_loader=lambda micro, consumed: work.batches,
            validation_loader=DataLoader([small], batch_size=None),  # type: ignore[arg-type]
        )


def trl_gkd(work: Work) -> None:
    """TRL's GKDTrainer on the given texts (lmbda 0), forward KL (beta 0)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    settings = _trl_settings(work, GKDConfig, lmbda=0.0, beta=0.0, temperature=1.0, seq_kd=False)
    with settings as args:
        GKDTrainer(
            model=work.fresh(),
            teacher_model=work.teacher,
            args=args,
            train_dataset=_numbers(work),
            data_collator=lambda numbers: _for_trl(work, numbers),
            processing_class=_tokenizer(),
        ).train()


def trl_distillation(work: Work) -> None:
    """TRL's DistillationTrainer with the given texts instead of generation, forward KL (beta 0)."""
    from trl import DistillationConfig, DistillationTrainer

    class OnGivenTexts(DistillationTrainer):  # type: ignore[misc]
        def _prepare_inputs(self, numbers: list[dict[str, int]]) -> dict[str, Tensor]:
            batch = {name: tensor.to(work.device) for name, tensor in _for_trl(work, numbers).items()}
            ids, on = batch["input_ids"], batch["attention_mask"]
            completion = (batch["labels"][:, 1:] != -100).long()
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": on[:, :1],
                "completion_ids": ids[:, 1:],
                "completion_mask": completion,
                "num_items_in_batch": completion.sum(),
            }

    settings = _trl_settings(work, DistillationConfig, beta=0.0, temperature=1.0, shuffle_dataset=False)
    with settings as args:
        OnGivenTexts(
            model=work.fresh(),
            teacher_model=work.teacher,
            args=args,
            train_dataset=_numbers(work),
            processing_class=_tokenizer(),
        ).train()


def _numbers(work: Work) -> Any:
    """A dataset of row indices; the collator looks up the rows."""
    from datasets import Dataset

    rows = sum(len(batch["mask"]) for batch in work.batches)
    return Dataset.from_dict({"number": list(range(rows)), "prompt": ["<pad>"] * rows})


def _for_trl(work: Work, numbers: list[dict[str, int]]) -> Batch:
    """The batch that begins with these rows, with TRL's names; rows are padded at the end, as in distill."""
    batch = work.batches[numbers[0]["number"] // len(numbers)]
    ids, mask = batch["input_ids"], batch["mask"]
    labels = ids.clone()
    labels[:, 1:][~mask[:, :-1]] = -100
    sizes = mask.sum(1, keepdim=True) + 1
    attended = (torch.arange(ids.shape[1]) < sizes).long()
    return {"input_ids": ids, "attention_mask": attended, "labels": labels, "prompts": ids[:, :1]}


@contextlib.contextmanager
def _trl_settings(work: Work, config: Any, **more: Any) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        yield config(
            output_dir=folder,
            per_device_train_batch_size=len(work.batches[0]["mask"]),
            gradient_accumulation_steps=1,
            max_steps=len(work.batches),
            learning_rate=1e-4,
            adam_beta2=0.95,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_steps=LOG_EVERY,
            report_to="none",
            save_strategy="no",
            train_sampling_strategy="sequential",
            disable_tqdm=True,
            gradient_checkpointing=False,
            use_cpu=work.device == "cpu",
            bf16=work.device == "cuda",
            dataloader_pin_memory=work.device == "cuda",
            **more,
        )


def _tokenizer() -> Any:
    """TRL asks for one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


CONTENDERS: dict[str, Callable[[Work], None]] = {
    "plain PyTorch loop": plain_loop,
    "loop with distill's head": chunked_loop,
    "distill": distill,
    "TRL GKDTrainer": trl_gkd,
    "TRL DistillationTrainer": trl_distillation,
}
