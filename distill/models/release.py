"""Frees the memory of a finished stage, for the next stage and for other processes."""

from __future__ import annotations

import gc

import torch


def give_back_memory() -> None:
    """Collect objects that refer to each other, such as models with hooks, and free what torch keeps of a GPU."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
