"""Quality of a text that consists of several parts: of each part, and of the whole text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distill.evaluation.quality import Quality


def together(parts: Sequence[tuple[Quality, int]]) -> Quality:
    """Combine the qualities of several parts of a text, as if the whole text had been measured at once.

    Args:
        parts: (quality of a part, number of bytes of its text) for each part; at least one.
    """
    tokens = sum(quality.tokens for quality, _ in parts)

    def mean(name: str) -> float | None:
        values = [getattr(quality, name) for quality, _ in parts]
        if None in values:
            return None
        return math.fsum(value * quality.tokens for value, (quality, _) in zip(values, parts, strict=True)) / tokens

    nats = mean("loss_nats")
    assert nats is not None
    return Quality(
        perplexity=math.exp(nats) if nats < 700 else math.inf if nats > 0 else nats,
        loss_nats=nats,
        bits_per_byte=nats * tokens / math.log(2) / sum(num_bytes for _, num_bytes in parts),
        kl_to_teacher=mean("kl_to_teacher"),
        top1_agreement=mean("top1_agreement"),
        tokens=tokens,
    )
