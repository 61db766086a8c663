"""The number of processes that tokenize, and the environment in which they are started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from distill.core import threads
from distill.core.forked import can_fork

_PARALLEL, _THREADS = "TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"
_OF_TASK = "SLURM_CPUS_PER_TASK"
_NO = ("", "off", "false", "f", "no", "n", "0")


def num_processes(num_sharing: int = 1) -> int:
    """Processes that encode: one per CPU that this process may use, or as the environment of tokenizers says.

    ``TOKENIZERS_PARALLELISM=false`` means one, and ``RAYON_NUM_THREADS`` a number, as for the library itself. With
    SLURM's cpus-per-task, each task has its own CPUs, so they are not divided.

    Args:
        num_sharing: number of processes of this machine that do the same and share its CPUs.
    """
    if not can_fork() or os.environ.get(_PARALLEL, "true").lower() in _NO:
        return 1
    told = os.environ.get(_THREADS, "")
    if told.isdecimal() and int(told):
        return int(told)
    own = os.environ.get(_OF_TASK, "")
    if own.isdecimal() and int(own):
        return min(threads.available(), int(own))
    return max(1, threads.available() // num_sharing)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that are started within the block use one thread each, because a fork has none of its parent's
    threads."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before
