"""Batches of documents, encoded by as many processes as the machine has CPUs for, in the order of the batches.

One process reads and writes, the others encode: what is written is the same whatever their number. A text that is
encoded in a second starts no other process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack

from distill.core.forked import Forked
from distill.data.token_chunk import Batch, TokenChunk
from distill.data.token_processes import num_processes, one_thread_each

WORKER_BYTES = 2_000_000
"""Number of bytes of text that one process encodes, in about a second, before others are started; they inherit its
caches."""


def chunks(
    batches: Iterable[Batch], encode: Callable[[Batch], TokenChunk], num_sharing: int = 1
) -> Generator[TokenChunk, None, None]:
    """Encode batches, in their order.

    Close the iterator if it is left early, so that the other processes end.

    Args:
        batches: the batches, which are read as they are needed, a few ahead.
        encode: encodes a batch; see :func:`~distill.data.token_chunk.chunk_of`.
        num_sharing: number of processes of this machine that encode at the same time and share its CPUs.

    Raises:
        InputError: what ``encode`` refuses.
        MachineError: a process was killed.
    """
    number, waiting, size = num_processes(num_sharing), iter(batches), 0
    for batch in waiting:
        chunk = encode(batch)
        yield chunk
        size += chunk.num_bytes
        if number > 1 and size >= WORKER_BYTES:
            break
    else:
        return
    with ExitStack() as stack:
        with one_thread_each():
            workers = stack.enter_context(Forked(encode, number, "tokenizes"))
        yield from workers.map(waiting)
