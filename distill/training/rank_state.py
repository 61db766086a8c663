"""The state of a rank in a checkpoint: its random state, and its sums since the last row of metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.losses import LossTerm

Random = dict[str, Tensor]
Terms = dict[str, LossTerm]


def of(terms: Terms, tokens_read: Tensor) -> dict[str, Any]:
    """The state of this rank, on the CPU, in types that ``torch.load(weights_only=True)`` accepts."""
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    counted = {name: {"sum": term.sum.cpu(), "count": term.count.cpu()} for name, term in terms.items()}
    return {"random": random, "terms": counted, "tokens_read": tokens_read.cpu()}


def for_rank(ranks: list[dict[str, Any]], rank: int, num_ranks: int) -> tuple[Terms, Tensor, Random | None]:
    """The state with which a rank resumes.

    If the number of ranks is the same, each rank takes its own state. If it has changed, rank 0 takes the sums of all
    ranks.

    Args:
        ranks: saved states from :func:`of`, in the order of ranks.
        rank: rank of this process.
        num_ranks: current number of ranks.

    Returns:
        Terms, number of tokens read, and random state (None for a rank that did not exist before).
    """
    counted = [ranks[rank]] if len(ranks) == num_ranks else ranks if rank == 0 else []
    nothing = LossTerm(torch.zeros(()), torch.zeros((), dtype=torch.int64))
    terms = dict.fromkeys(ranks[0]["terms"], nothing)  # with all names, because terms are summed over ranks by name
    for one in counted:
        terms |= {name: terms.get(name, nothing) + LossTerm(**term) for name, term in one["terms"].items()}
    tokens = sum((one["tokens_read"] for one in counted), torch.zeros((), dtype=torch.int64))
    return terms, tokens, ranks[rank]["random"] if rank < len(ranks) else None


def set_random(state: Random) -> None:
    """Restore the random state."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
