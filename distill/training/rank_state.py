"""What a checkpoint holds of each rank for itself: random state, and what it has counted since the last row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.losses import LossTerm

Random = dict[str, Tensor]
Terms = dict[str, LossTerm]


def of(terms: Terms, tokens_read: Tensor) -> dict[str, Any]:
    """This rank's, as plain data in the machine's own memory."""
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    counted = {name: {"sum": term.sum.cpu(), "count": term.count.cpu()} for name, term in terms.items()}
    return {"random": random, "terms": counted, "tokens_read": tokens_read.cpu()}


def share(ranks: list[dict[str, Any]], rank: int, num_ranks: int) -> tuple[Terms, Tensor, Random | None]:
    """What a rank takes up: its own; where the number of ranks has changed, the first takes what all have counted.

    Args:
        ranks: of :func:`of`, in order, as they were saved.
        rank: this one.
        num_ranks: now.

    Returns:
        Terms, tokens read, and random state, which a rank that was not there before has none of.
    """
    counted = [ranks[rank]] if len(ranks) == num_ranks else ranks if rank == 0 else []
    nothing = LossTerm(torch.zeros(()), torch.zeros((), dtype=torch.int64))
    terms = dict.fromkeys(ranks[0]["terms"], nothing)  # every rank has every name, as they are summed over ranks
    for one in counted:
        terms |= {name: terms.get(name, nothing) + LossTerm(**term) for name, term in one["terms"].items()}
    tokens = sum((one["tokens_read"] for one in counted), torch.zeros((), dtype=torch.int64))
    return terms, tokens, ranks[rank]["random"] if rank < len(ranks) else None


def set_random(state: Random) -> None:
    """Go on drawing from where this was taken."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
