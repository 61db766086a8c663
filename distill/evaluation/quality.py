"""How well a student predicts, and how close it is to its teacher: token-exact sums over a whole validation set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from distill.core.batch import model_inputs
from distill.core.errors import InputError


@dataclass(frozen=True)
class Quality:
    """What :func:`measure_quality` found.

    Attributes:
        perplexity: ``exp(loss_nats)``.
        loss_nats: mean negative log-likelihood of the next token, nats per token.
        bits_per_byte: the same in bits per byte of text, so that tokenizers compare; None without a byte count.
        kl_to_teacher: KL(teacher || student) at temperature 1, nats per token; None without a teacher.
        top1_agreement: share of positions, 0 to 1, where both find the same token likeliest; None without a teacher.
        tokens: number of predictions that counted.
    """

    perplexity: float
    loss_nats: float
    bits_per_byte: float | None
    kl_to_teacher: float | None
    top1_agreement: float | None
    tokens: int


class TokenSum(Metric):
    """Sum and number of per-token values, exact over micro-batches and ranks; whoever reads it divides.

    The mean of batch means is wrong as soon as masks are uneven, and torchmetrics' ``Perplexity`` takes the logarithm
    of a softmax in the logits' own type (an unlikely token underflows to infinity) and sums in float32. Hence this one.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape, one a token."""
        self.total += values.sum(dtype=torch.float64)
        self.count += values.numel()

    def compute(self) -> Tensor:
        """``[total, count]``, float64."""
        return torch.stack([self.total, self.count])


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

    With vocabularies padded to different widths the two models are compared over the tokens that both know, each
    renormalised over those; perplexity always uses the model's own full width.

    Args:
        model: Hugging Face style causal language model; its forward returns an object with ``logits`` [batch, sequence,
            vocabulary]. Left in the mode (training or evaluation) in which it came.
        teacher: the same, or None: then there is nothing to agree with.
        batches: ``{"input_ids": int64 [batch, sequence], "mask": bool [batch, sequence]}``, optionally
            ``attention_mask`` and ``position_ids``; ``mask[b, t]`` says that the prediction of token t+1 counts.
        validation_bytes: UTF-8 bytes of all the text whose tokens count; None: bits per byte are not measured.
        chunk_tokens: tokens whose float32 log-probabilities exist at once.

    Raises:
        InputError: no token counts, a token lies outside the vocabulary, or the byte count is not positive.
    """
    if validation_bytes is not None and validation_bytes <= 0:
        raise InputError(f"validation_bytes: got {validation_bytes}, expected the size of the validation text in bytes")
    device = next(model.parameters()).device
    loss, kl, agreement = TokenSum().to(device), TokenSum().to(device), TokenSum().to(device)
    modes = [(m, m.training) for m in (model, teacher) if m is not None]
    try:
        for module, _ in modes:
            module.eval()
        for batch in batches:
            student_logits, targets = _predictions(model, batch)
            teacher_logits = None if teacher is None else _predictions(teacher, batch)[0]
            for own, other, target in _chunks(student_logits, teacher_logits, targets, chunk_tokens):
                loss.update(-own.log_softmax(-1).gather(-1, target[:, None]))
                if other is not None:
                    shared = min(own.size(-1), other.size(-1))
                    own, other = own[:, :shared], other[:, :shared]
                    kl.update(kl_divergence(own, other))
                    agreement.update((own.argmax(-1) == other.argmax(-1)).double())
    finally:
        for module, training in modes:
            module.train(training)
    return _quality(loss, kl if teacher is not None else None, agreement, validation_bytes)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of each token, [tokens], from float32 logits [tokens, vocabulary] of equal width.

    A token that the teacher rules out (logit of minus infinity) contributes nothing, whatever the student thinks of it.
    """
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    difference = (log_p - log_q).masked_fill_(log_p == -torch.inf, 0.0)
    return (log_p.exp_() * difference).sum(-1)


def _predictions(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the positions that count [tokens, vocabulary], in the model's type, and their targets [tokens]."""
    device = next(model.parameters()).device
    inputs = model_inputs(batch, device)
    mask = batch["mask"].to(device)
    targets = inputs["input_ids"].roll(-1, dims=1)[mask]
    logits = model(**inputs, use_cache=False).logits
    if targets.numel() and int(targets.max()) >= logits.size(-1):
        raise InputError(
            f"validation data: token {int(targets.max())} lies outside the model's vocabulary of {logits.size(-1)}; "
            "use the tokenizer that the model was trained with"
        )
    return logits[mask], targets


def _chunks(
    student: Tensor, teacher: Tensor | None, targets: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Float32 pieces of ``size`` tokens, the teacher's on the student's device."""
    for start in range(0, max(1, len(targets)), size):  # an empty batch counts as asked, too
        piece = slice(start, start + size)
        other = None if teacher is None else teacher[piece].to(student.device).float()
        yield student[piece].float(), other, targets[piece]


def _quality(loss: TokenSum, kl: TokenSum | None, agreement: TokenSum, validation_bytes: int | None) -> Quality:
    total, count = loss.compute().tolist()
    if not count:
        raise InputError("validation data: no token counts (the mask is False everywhere); give it longer texts")
    nats = total / count
    return Quality(
        perplexity=math.exp(nats) if nats < 700 else math.inf if nats > 0 else nats,
        loss_nats=nats,
        bits_per_byte=None if validation_bytes is None else total / math.log(2) / validation_bytes,
        kl_to_teacher=None if kl is None else _mean(kl),
        top1_agreement=None if kl is None else _mean(agreement),
        tokens=int(count),
    )


def _mean(metric: TokenSum) -> float:
    total, count = metric.compute().tolist()
    return total / count
