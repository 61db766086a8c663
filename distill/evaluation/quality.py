"""How well a student predicts, and how close it is to its teacher: token-exact sums over a whole validation set.

The output heads are called for a chunk of the counted tokens at a time, so that tokens x vocabulary never exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from distill.core.batch import model_inputs
from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.models.head import check_head, hidden_states, output_head
from distill.numerics.kl import kl_of_logits
from distill.numerics.term import LossTerm

#: The figures of a :class:`Quality` that a row of a report has, in its order.
FIGURES = ("perplexity", "loss_nats", "bits_per_byte", "kl_to_teacher", "top1_agreement")


@dataclass(frozen=True)
class Quality:
    """The result of :func:`measure_quality`.

    Attributes:
        perplexity: ``exp(loss_nats)``.
        loss_nats: mean negative log-likelihood of the next token, in nats per token.
        bits_per_byte: the loss in bits per byte of text, so that tokenizers can be compared; None without a byte count.
        kl_to_teacher: KL(teacher || student) at temperature 1, in nats per token; None without a teacher.
        top1_agreement: fraction of positions at which both models have the same most likely token; None without a
            teacher.
        tokens: number of counted tokens.
    """

    perplexity: float
    loss_nats: float
    bits_per_byte: float | None
    kl_to_teacher: float | None
    top1_agreement: float | None
    tokens: int


class TokenSum(Metric):
    """Sum and number of per-token values, exact over micro-batches and ranks: :class:`LossTerm` as a metric.

    A mean of batch means is wrong if the batches have different numbers of tokens. torchmetrics' ``Perplexity`` takes
    the logarithm of a softmax in the dtype of the logits (so unlikely tokens underflow) and sums in float32.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape: one value per token."""
        self.total += values.sum(dtype=torch.float64)
        self.count += values.numel()

    def compute(self) -> Tensor:
        """``[total, count]``, float64."""
        return torch.stack([self.total, self.count])


Chunk = Callable[[slice], Tensor]
"""Places among the counted tokens of a batch -> their logits, float32 [tokens, vocabulary]."""
Predictions = Callable[[dict[str, Tensor]], Chunk]
"""A batch -> its counted predictions."""


@torch.no_grad()
def measure_quality(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[dict[str, Tensor]],
    validation_bytes: int | None = None,
    *,
    chunk_tokens: int = 1024,
) -> Quality:
    """Measure a causal language model on held-out text.

    If the vocabularies are padded to different widths, the two models are compared over the vocabulary that both have,
    and both distributions are renormalised over it. The perplexity always uses the model's whole vocabulary.

    Args:
        model: causal language model of transformers. Left in the mode (training or evaluation) in which it came.
        teacher: the same, or None: then there is nothing to agree with.
        batches: ``input_ids``, ``targets`` and ``mask``, each [batch, sequence], optionally ``attention_mask`` and
            ``position_ids``; see :mod:`distill.core.batch`.
        validation_bytes: UTF-8 bytes of all the text whose tokens count; None: bits per byte are not measured.
        chunk_tokens: tokens whose logits exist at once.

    Raises:
        InputError: no token is counted, a token is not in the vocabulary, or the byte count is not positive.
    """
    modes = [(m, m.training) for m in (model, teacher) if m is not None]
    try:
        for module, _ in modes:
            module.eval()
        theirs = None if teacher is None else predictions_of(teacher)
        return compare_predictions(predictions_of(model), theirs, batches, validation_bytes, chunk_tokens=chunk_tokens)
    finally:
        for module, training in modes:
            module.train(training)


@torch.no_grad()
def compare_predictions(
    own: Predictions,
    teacher: Predictions | None,
    batches: Iterable[dict[str, Tensor]],
    validation_bytes: int | None = None,
    *,
    chunk_tokens: int = 1024,
) -> Quality:
    """Measure whatever makes logits, such as an engine; see :func:`measure_quality`.

    Args:
        own: of what is measured.
        teacher: of its teacher, or None.
        batches: as in :func:`measure_quality`.
        validation_bytes: as there.
        chunk_tokens: as there.

    Raises:
        InputError: as there.
    """
    if validation_bytes is not None and validation_bytes <= 0:
        raise InputError(f"validation_bytes: got {validation_bytes}, expected the size of the validation text in bytes")
    loss, kl, agreement = TokenSum(), TokenSum(), TokenSum()
    for batch in stoppable(batches):
        targets = batch["targets"][batch["mask"]]  # [tokens]
        ours, theirs = own(batch), None if teacher is None else teacher(batch)
        for start in range(0, len(targets), chunk_tokens):
            piece = slice(start, min(start + chunk_tokens, len(targets)))
            student = ours(piece)  # [chunk, vocabulary]
            target = targets[piece].to(student.device)
            if int(target.max()) >= student.size(-1):
                raise InputError(
                    f"validation data: token {int(target.max())} lies outside the model's vocabulary of "
                    f"{student.size(-1)}; use the tokenizer that the model was trained with"
                )
            loss.update(-student.log_softmax(-1).gather(-1, target[:, None]).cpu())
            if theirs is not None:
                other = theirs(piece).to(student.device)
                shared = min(student.size(-1), other.size(-1))
                student, other = student[:, :shared], other[:, :shared]
                kl.update(kl_of_logits(other, student).cpu())
                agreement.update((student.argmax(-1) == other.argmax(-1)).double().cpu())
    return _quality(loss, kl if teacher is not None else None, agreement, validation_bytes)


def predictions_of(model: Any) -> Predictions:
    """Those of a model of transformers, through its output head.

    A model with an operation between its last hidden states and its logits has no head to call; its own forward then
    computes the logits of whole rows, one row at a time.
    """
    device = next(model.parameters()).device
    try:
        check_head(model)
    except InputError:
        return partial(_by_row, model, device)
    head = output_head(model)

    def predictions(batch: dict[str, Tensor]) -> Chunk:
        inputs = model_inputs(batch, device)
        hidden = hidden_states(model, inputs.pop("input_ids"), **inputs)[batch["mask"].to(device)]  # [tokens, hidden]
        return lambda piece: head.logits(hidden[piece]).float()

    return predictions


def _by_row(model: Any, device: torch.device, batch: dict[str, Tensor]) -> Chunk:
    counts = [0, *batch["mask"].sum(-1).cumsum(0).tolist()]  # of tokens before each row, and of all

    def chunk(piece: slice) -> Tensor:
        found = []
        for row, (begin, end) in enumerate(pairwise(counts)):
            part = slice(max(piece.start, begin) - begin, min(piece.stop, end) - begin)
            if part.start < part.stop:
                one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
                logits = model(**model_inputs(one, device), use_cache=False).logits  # [1, sequence, vocabulary]
                found.append(logits[one["mask"].to(device)][part].float())
        return torch.cat(found)

    return chunk


def _quality(loss: TokenSum, kl: TokenSum | None, agreement: TokenSum, validation_bytes: int | None) -> Quality:
    total, count = loss.compute().tolist()
    if not count:
        raise InputError("validation data: no token is counted (the mask is False everywhere); use longer texts")
    nats = _mean(loss)
    return Quality(
        perplexity=math.exp(nats) if nats < 700 else math.inf if nats > 0 else nats,
        loss_nats=nats,
        bits_per_byte=None if validation_bytes is None else total / math.log(2) / validation_bytes,
        kl_to_teacher=None if kl is None else _mean(kl),
        top1_agreement=None if kl is None else _mean(agreement),
        tokens=int(count),
    )


def _mean(metric: TokenSum) -> float:
    return LossTerm(*metric.compute()).per_token().item()
