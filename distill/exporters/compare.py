"""Two models' logits on the same tokens, as figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.core.errors import DistillError, InputError
from distill.exporters.base import VerifyResult
from distill.models.size import weight_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Logits = Callable[[Mapping[str, Tensor]], Tensor]

CHUNK_TOKENS = 128


@torch.no_grad()
def compare(
    source: Logits,
    exported: Logits,
    batches: Iterable[Mapping[str, Tensor]],
    folder: Path,
    num_bytes: int | None = None,
) -> VerifyResult:
    """Run both on every batch and compare where ``mask`` is True.

    Log-probabilities are taken in fp64: in fp32 their own rounding is of the size of the bounds that are set here.

    Args:
        source: batch -> logits [batch, sequence, vocabulary] of the trained model.
        exported: the same for the exported one.
        batches: ``input_ids`` and ``mask``, [batch, sequence].
        folder: the exported model's, for messages.
        num_bytes: size of its weight files; None for the safetensors of the folder.

    Raises:
        InputError: there is no token to compare.
        DistillError: the vocabularies differ.
    """
    parts = [
        part for batch in batches for part in _compare_batch(source(batch), exported(batch), batch["mask"], folder)
    ]
    if not parts:
        raise InputError("verify: no token to compare; give at least one batch whose mask has a True")
    largest, absolute, kl, agree = (torch.cat(column) for column in zip(*parts, strict=True))
    return VerifyResult(
        tokens=len(kl),
        # torch's max and mean hand a NaN on, and so must these figures
        max_abs_logit=largest.max().item(),
        mean_abs_logit=absolute.mean().item(),
        kl=kl.mean().item(),
        worst_kl=kl.max().item(),
        top1_agreement=agree.mean().item(),
        weight_bytes=weight_bytes(folder) if num_bytes is None else num_bytes,
    )


@contextmanager
def plain_logits(model: PreTrainedModel) -> Iterator[Logits]:
    """The trained model's logits of ``input_ids`` alone, as an engine computes them that knows neither padding nor
    documents that share a row; in evaluation mode for as long as the block lasts."""
    training = model.training
    model.eval()
    try:
        yield lambda batch: model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits.float()
    finally:
        model.train(training)


def _compare_batch(source: Tensor, exported: Tensor, mask: Tensor, folder: Path) -> list[tuple[Tensor, ...]]:
    """Per token: largest and mean absolute difference, KL, agreement; in chunks, for vocabularies are wide."""
    if source.shape != exported.shape:
        raise DistillError(
            f"{folder}: logits have shape {list(exported.shape)}, the trained model's {list(source.shape)}"
        )
    where = mask.to(source.device)
    pairs = zip(source[where].split(CHUNK_TOKENS), exported[where].split(CHUNK_TOKENS), strict=True)
    return [_compare_tokens(ours.double(), theirs.double()) for ours, theirs in pairs if len(ours)]


def _compare_tokens(source: Tensor, exported: Tensor) -> tuple[Tensor, ...]:
    difference = (source - exported).abs()
    log_p, log_q = source.log_softmax(-1), exported.log_softmax(-1)
    # rounding can leave a KL of -1e-16, which is none
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
    agree = (source.argmax(-1) == exported.argmax(-1)).double()
    return tuple(column.cpu() for column in (difference.amax(-1), difference.mean(-1), kl, agree))
