"""Prompts for on-policy samples: the start of a row of text, or everything before a turn of the assistant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Prompts:
    """One prompt per row of a batch.

    Attributes:
        ids: token ids, int64 [rows, prompt]. Values after the length of a prompt are ignored.
        lengths: number of tokens of each prompt, int64 [rows].
        places: position ids, int64 [rows, prompt], if a prompt may begin with the end of another document; None if each
            prompt is the beginning of its document.
        are_there: whether a row has anything to continue, bool [rows].
        passages: tokens of the text at the positions of the samples, int64 [rows, new].
    """

    ids: Tensor
    lengths: Tensor
    places: Tensor | None
    are_there: Tensor
    passages: Tensor


def of_text(batch: Batch, start: int, new: int, filling: int) -> Prompts:
    """Take the first ``start`` tokens of each row as prompts.

    Args:
        batch: rows of text.
        start: number of tokens of a prompt.
        new: number of tokens that will be sampled.
        filling: padding id for shorter rows.
    """
    lacking = (0, max(0, start + new - batch["mask"].shape[1]))  # rows may be shorter if the documents are short
    ids = functional.pad(batch["input_ids"], lacking, value=filling)
    places = functional.pad(batch["position_ids"], lacking) if "position_ids" in batch else None
    # False if a row ends within its prompt, [rows]; two positions are read, because a start token (BOS) is never a
    # target
    mask = functional.pad(batch["mask"], lacking)
    are_there = mask[:, start - 2] | mask[:, start - 1] if start > 1 else mask.any(1)
    if places is not None:  # a prompt whose last token starts or ends a document cannot be continued either
        are_there = are_there & (places[:, start] > 0) & (places[:, start - 1] > 0 if start > 1 else True)
    lengths = torch.full((len(ids),), start, device=ids.device)
    seen = None if places is None else places[:, :start]
    return Prompts(ids[:, :start], lengths, seen, are_there, ids[:, start : start + new])


def of_conversations(batch: Batch, drawn: Tensor, most: int, new: int, filling: int) -> Prompts:
    """Take everything before one turn of the assistant as prompt, for each row.

    Args:
        batch: rows of conversations, whose mask is True for the turns of the assistant.
        drawn: random numbers in [0, 1) that choose the turns, float64 [rows].
        most: largest number of tokens of a prompt; turns with a longer prompt are not chosen.
        new: number of tokens that will be sampled.
        filling: padding id.
    """
    ids, mask = batch["input_ids"], batch["mask"]  # [rows, sequence]
    column = torch.arange(mask.shape[1], device=mask.device)
    places = batch.get("position_ids", column.expand_as(mask))  # position of each token in its conversation
    begins = mask & ~functional.pad(mask, (1, 0))[:, :-1] & (places < most)  # predicts the first token of a turn
    count = begins.sum(1)
    wanted = (drawn.to(count.device) * count).long().clamp(max=count - 1) + 1  # index of the chosen turn, from 1
    last = (begins & (begins.cumsum(1) == wanted.unsqueeze(1))).int().argmax(1)  # column of the prompt's last token
    lengths = places.gather(1, last.unsqueeze(1)).squeeze(1) + 1
    lengths = torch.where(count > 0, lengths, 1)
    first = (last - lengths + 1).unsqueeze(1)
    padded = functional.pad(ids, (0, int(lengths.max()) + new + 1), value=filling)
    prompts = padded.gather(1, first + torch.arange(int(lengths.max()), device=ids.device))
    passages = padded.gather(1, last.unsqueeze(1) + 1 + torch.arange(new, device=ids.device))
    return Prompts(prompts, lengths, None, count > 0, passages)
