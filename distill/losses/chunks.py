"""Sizes of chunks and tiles of tokens. They are computed without torch, so that ``distill check`` can use them."""

from __future__ import annotations


def tokens_at_once(vocabulary: int, num_tokens: int, *, on_cpu: bool) -> int:
    """Number of tokens per chunk: large enough for efficient matrix products, small enough that two buffers of logits
    (student and teacher) take little memory.

    On a CPU, matrix products of fewer than 128 rows lose a third of their speed, and more than 256 rows gain little.
    All chunks of a batch have about the same size, so that no small chunk remains at the end.

    Args:
        vocabulary: number of rows of the head's weight.
        num_tokens: number of tokens of the batch.
        on_cpu: whether the head is on a CPU.
    """
    most = min(256, max(128, 3 * 2**23 // vocabulary)) if on_cpu else max(256, 2**26 // vocabulary)
    return -(-num_tokens // -(-num_tokens // most)) if num_tokens else 1


def numbers_at_once(num_threads: int, *, on_cpu: bool) -> int:
    """Number of logits per tile. CPU: so small that several tiles fit in the cache of a core. GPU: so large that one
    tile occupies the device."""
    return 2**16 * num_threads if on_cpu else 2**25
