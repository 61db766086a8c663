"""How many tokens have logits at once: known without torch, so that a forecast counts as the losses do."""

from __future__ import annotations

import math


def tokens_at_once(vocabulary: int, num_tokens: int, *, on_cpu: bool) -> int:
    """Tokens of a chunk: enough to keep the products efficient, few enough to keep its two buffers of logits small.

    On a CPU products of less than 128 rows lose a third of their speed and those of more than 256 gain little. The
    chunks of a batch are of one size, so that none is left over with few tokens.

    Args:
        vocabulary: rows of the head.
        num_tokens: of the batch.
        on_cpu: whether the head is on a CPU.
    """
    most = min(256, max(128, 3 * 2**23 // vocabulary)) if on_cpu else max(256, 2**26 // vocabulary)
    return math.ceil(num_tokens / math.ceil(num_tokens / most)) if num_tokens else 1


def numbers_at_once(num_threads: int, *, on_cpu: bool) -> int:
    """Logits whose losses are taken together: what a core's cache holds several tensors of, or a GPU is busy with."""
    return 2**16 * num_threads if on_cpu else 2**25
