"""Log-likelihoods of continuations, in batches of similar length, without logits of all tokens at once.

Requests with the same input, such as the choices yes and no of one token each, share one row. Rows are sorted by length
and padded on the right, where the padding does not influence a causal model. The output head is called chunk by chunk,
and only for the positions of the continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.core import stop
from distill.core.errors import InputError
from distill.evaluation.tasks.base import LogLikelihood
from distill.losses.head_losses import Head
from distill.models.head import hidden_states, output_head

CHUNK_TOKENS = 1024
"""Number of positions whose float32 log-probabilities exist at once."""


@torch.no_grad()
def log_likelihoods(
    model: Any,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    positions: int,
    batch_tokens: int,
    before_batch: Callable[[], None] = stop.check,
) -> list[LogLikelihood]:
    """The log-likelihood of each continuation, in the order of ``pairs``.

    Args:
        model: causal language model in evaluation mode.
        pairs: (ids of the prompt, ids of its continuation), both not empty.
        positions: context length of the model in tokens; the beginning of a longer prompt is cut off.
        batch_tokens: number of tokens per batch, including padding; a longer row is a batch of its own.
        before_batch: function that is called before each batch; it may raise.

    Raises:
        InputError: a continuation alone is longer than the context length.
    """
    rows: dict[tuple[int, ...], list[int]] = {}  # input ids -> indices of the requests that they answer
    for number, (before, after) in enumerate(pairs):
        if len(after) > positions:
            raise InputError(f"a choice of {len(after)} tokens is longer than the model's {positions} positions")
        rows.setdefault(tuple((before + after)[-(positions + 1) : -1]), []).append(number)
    nats = torch.zeros(len(pairs), dtype=torch.float64)
    greedy = torch.ones(len(pairs), dtype=torch.bool)
    head = output_head(model)
    for batch in batches(sorted(rows, key=len, reverse=True), batch_tokens):
        before_batch()
        hidden, requests, targets = _read(model, batch, [rows[row] for row in batch], pairs)
        for start in range(0, len(requests), CHUNK_TOKENS):
            piece = slice(start, start + CHUNK_TOKENS)
            own, is_likeliest = _chunk(head, hidden[piece], targets[piece].to(hidden.device))
            nats.index_add_(0, requests[piece], own)
            greedy[requests[piece][~is_likeliest]] = False
    is_cut = [len(before) + len(after) > positions + 1 for before, after in pairs]
    return [LogLikelihood(*one) for one in zip(nats.tolist(), greedy.tolist(), is_cut, strict=True)]


def batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Batches of at most ``batch_tokens`` tokens, including padding, from rows that are sorted longest first."""
    batch: list[tuple[int, ...]] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _read(
    model: Any, batch: list[tuple[int, ...]], answered: list[list[int]], pairs: Sequence[tuple[list[int], list[int]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [tokens, hidden], request [tokens] and target [tokens], for all tokens of the continuations."""
    longest = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])  # [rows, longest]
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])  # [rows, longest]
    device = next(model.parameters()).device
    hidden = hidden_states(model, ids.to(device), attention_mask=mask.to(device))  # [rows, longest, hidden]
    places: list[tuple[int, int]] = []
    requests, targets = [], []
    for number, (row, numbers) in enumerate(zip(batch, answered, strict=True)):
        for request in numbers:
            after = pairs[request][1]
            places += [(number, len(row) - len(after) + k) for k in range(len(after))]
            requests += [request] * len(after)
            targets += after
    at = torch.tensor(places, device=device)  # [tokens, 2]
    return hidden[at[:, 0], at[:, 1]], torch.tensor(requests), torch.tensor(targets)


def _chunk(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, float64 [tokens], and whether it is the most likely token, bool [tokens]."""
    logits = head.logits(hidden).float()  # [tokens, vocabulary]
    if int(targets.max()) >= logits.size(-1):
        raise InputError(
            f"token {int(targets.max())} is not in the model's vocabulary of {logits.size(-1)}; use its tokenizer"
        )
    own = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return own.double().cpu(), (logits.argmax(-1) == targets).cpu()
