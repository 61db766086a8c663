"""Comparison of the logits of two models on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.core.errors import DistillError, InputError
from distill.core.stop import stoppable
from distill.exporters.base import VerifyResult
from distill.models.size import weight_bytes
from distill.numerics.kl import kl_of_logits
from distill.numerics.term import LossTerm

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
    """Run both models on every batch and compare their logits where ``mask`` is True.

    Log-probabilities are computed in fp64, because rounding errors in fp32 are as large as the bounds of the exporters.

    Args:
        source: batch -> logits [batch, sequence, vocabulary] of the trained model.
        exported: the same for the exported model.
        batches: ``input_ids`` and ``mask``, [batch, sequence].
        folder: of the exported model, for messages.
        num_bytes: size of its weight files; None: the size of the folder's safetensors.

    Raises:
        InputError: the masks select no token.
        DistillError: the shapes of the logits differ.
    """
    parts = [
        part
        for batch in stoppable(batches)
        for part in _compare_batch(source(batch), exported(batch), batch["mask"], folder)
    ]
    if not parts:
        raise InputError("verify: the masks select 0 tokens to compare, expected 1 or more; use more validation data")
    largest, absolute, kl, agree = (torch.cat(column) for column in zip(*parts, strict=True))
    return VerifyResult(
        tokens=len(kl),
        # torch's max and mean propagate NaN, so a NaN in the logits fails the comparison
        max_abs_logit=largest.max().item(),
        mean_abs_logit=absolute.mean().item(),
        kl=LossTerm(kl.sum(), torch.tensor(len(kl))).per_token().item(),
        worst_kl=kl.max().item(),
        top1_agreement=agree.mean().item(),
        weight_bytes=weight_bytes(folder) if num_bytes is None else num_bytes,
    )


@contextmanager
def plain_logits(model: PreTrainedModel) -> Iterator[Logits]:
    """A function for the trained model's logits from ``input_ids`` only, without padding or packed documents.

    This is what engines compute. The model is in evaluation mode inside the context.
    """
    training = model.training
    model.eval()
    try:
        yield lambda batch: model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits.float()
    finally:
        model.train(training)


def _compare_batch(source: Tensor, exported: Tensor, mask: Tensor, folder: Path) -> list[tuple[Tensor, ...]]:
    """Largest and mean absolute difference, KL and agreement of each token, in chunks of tokens to limit the memory."""
    if source.shape != exported.shape:
        raise DistillError(
            f"{folder}: the exported model's logits have shape {list(exported.shape)}, expected "
            f"{list(source.shape)} as "
            "in the trained model; export it again"
        )
    where = mask.to(source.device)
    pairs = zip(source[where].split(CHUNK_TOKENS), exported[where].split(CHUNK_TOKENS), strict=True)
    return [_compare_tokens(ours.double(), theirs.double()) for ours, theirs in pairs if len(ours)]


def _compare_tokens(source: Tensor, exported: Tensor) -> tuple[Tensor, ...]:
    # source, exported: [tokens, vocabulary]
    difference = (source - exported).abs()
    # rounding errors can make the KL of equal distributions -1e-16
    kl = kl_of_logits(source, exported).clamp(min=0)
    agree = (source.argmax(-1) == exported.argmax(-1)).double()
    return tuple(column.cpu() for column in (difference.amax(-1), difference.mean(-1), kl, agree))
