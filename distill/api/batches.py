"""Texts and conversations in memory as batches of token rows, cut and masked as a recipe does it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.core.errors import InputError
from distill.data.base import Conversation, Document, Rejected
from distill.data.chat_encoder import ChatEncoder
from distill.data.chat_spec import ChatSpec
from distill.data.conversation import Columns, conversation_of
from distill.data.encoder import Row, TextEncoder
from distill.data.message import Unusable
from distill.data.packed_rows import PackedRows
from distill.data.packing import TokenFile
from distill.data.spec import Packing

Batch = dict[str, Tensor]
_AT_ONCE = 512
"""Texts that are tokenized together."""


@dataclass(frozen=True)
class TokensInMemory(TokenFile):
    """Token ids as arrays; the fields are those of :class:`~distill.data.packing.TokenFile`, without a file."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def ids(self) -> np.ndarray:
        """All ids. uint32 [num_tokens]"""
        return self.arrays["ids"]

    def bounds(self) -> np.ndarray:
        """First token of each document, and the end of the last one. int64 [num_documents + 1]"""
        return self.arrays["bounds"]

    def learned(self) -> np.ndarray | None:
        """Whether each token is learned from; None when all are. bool [num_tokens]"""
        return self.arrays.get("learned")

    def bytes_of_tokens(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for. uint32 [num_tokens]"""
        if "sizes" not in self.arrays:
            raise InputError("the bytes of conversations are not counted")
        return self.arrays["sizes"]


class TextRows(PackedRows):
    """Rows of tokens in memory, of which a ``DataLoader`` takes a batch at once."""

    def __getitems__(self, numbers: list[int]) -> Batch:
        """The rows ``numbers`` as one batch, for ``DataLoader``."""
        return self[numbers]


def as_it_is(batch: Any) -> Any:
    """The ``collate_fn`` of rows that already come as a batch."""
    return batch


def batches(
    texts: Iterable[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int = 512,
    batch_size: int = 8,
    packing: Packing = "wrapped",
    shuffle: bool = False,
    seed: int = 0,
) -> DataLoader[Batch]:
    """Tokenize texts or conversations and cut them into rows, as a recipe does.

    All tokens stay in memory. For more text than fits, use a recipe, which keeps the tokens on disk.

    Args:
        texts: strings; or conversations, each a mapping such as ``{"prompt": ..., "response": ...}`` or
            ``{"messages": [{"role": "user", "content": ...}, ...]}``. Of conversations, only what the assistant writes
            counts in the mask.
        tokenizer: a fast tokenizer with an end-of-text token, and a chat template for conversations.
        sequence_length: number of tokens per row, at most.
        batch_size: number of rows per batch; the last batch may have fewer.
        packing: how documents share rows: ``"wrapped"``, ``"documents"``, ``"best_fit"`` or ``"padded"``; see the key
            ``data.packing`` of a recipe.
        shuffle: whether each pass has another order; for training.
        seed: of that order.

    Returns:
        A loader that can be read any number of times, of dicts with ``input_ids`` int64, ``targets`` int64 and ``mask``
        bool, each [batch, sequence], and ``position_ids`` where documents of a row do not see each other.

    Raises:
        InputError: there is no text, a text is empty or a conversation unusable, or the tokenizer does not fit.

    Examples:
        >>> import distill
        >>> teacher, tokenizer = distill.load("builtin:quickstart-teacher")
        >>> batches = distill.batches(["The cat sat.", "A dog ran."], tokenizer, sequence_length=8)
        >>> next(iter(batches))["input_ids"].shape[1]
        8
    """
    rows = TextRows(tokens_of(texts, tokenizer, sequence_length), sequence_length, packing=packing)
    order = torch.Generator().manual_seed(seed)
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, generator=order, collate_fn=as_it_is)


def tokens_of(
    texts: Iterable[str | Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> TokensInMemory:
    """The tokens of texts or conversations, end to end.

    Args:
        texts: see :func:`batches`.
        tokenizer: see there.
        sequence_length: number of tokens that a conversation may have.

    Raises:
        InputError: see there.
    """
    if isinstance(texts, str | Mapping):
        raise InputError(f"texts: got one {type(texts).__name__}, expected a list of texts or of conversations")
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer: got {type(tokenizer).__name__}, expected a fast tokenizer (PreTrainedTokenizerFast) with an "
            "end-of-text token (eos_token)"
        )
    source = iter(texts)
    first = list(islice(source, 1))
    if not first:
        raise InputError("texts: there is none; give at least one")
    is_chat = isinstance(first[0], Mapping)
    if is_chat and not tokenizer.chat_template:
        raise InputError("tokenizer: it has no chat template for conversations; set tokenizer.chat_template")
    encoder = ChatEncoder(tokenizer, ChatSpec(), sequence_length) if is_chat else TextEncoder(tokenizer)
    found: list[Row] = []
    number = 0
    while some := [*first, *islice(source, _AT_ONCE - len(first))]:
        items = [_item(text, f"texts[{number + place}]", is_chat=is_chat) for place, text in enumerate(some)]
        for item, made in zip(items, encoder.rows(items, with_bytes=not is_chat), strict=True):
            if isinstance(made, Rejected):
                raise InputError(f"{item.id}: {made.detail}")
            found += made.rows
        first, number = [], number + len(some)
    return _in_memory(found, encoder)


def _item(text: Any, name: str, *, is_chat: bool) -> Document | Conversation:
    """One text or conversation as a source yields it.

    Raises:
        InputError: it is none.
    """
    if isinstance(text, Mapping) != is_chat or not isinstance(text, str | Mapping):
        raise InputError(f"{name}: got {type(text).__name__}, expected {'a conversation' if is_chat else 'a string'}")
    if isinstance(text, str):
        if not text:
            raise InputError(f"{name}: is empty; leave it out")
        return Document(name, text)
    try:
        return conversation_of(dict(text), name, Columns())
    except Unusable as error:
        raise InputError(f"{name}: {error.detail}") from None


def _in_memory(rows: Sequence[Row], encoder: TextEncoder) -> TokensInMemory:
    ids = np.concatenate([np.asarray(row.ids, np.uint32) for row in rows])
    arrays = {"ids": ids, "bounds": np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64)}
    if encoder.marks_learned:
        arrays["learned"] = np.concatenate([cast("np.ndarray", row.learned) for row in rows]).astype(bool)
    else:
        arrays["sizes"] = np.concatenate([cast("np.ndarray", row.sizes) for row in rows])
    num_learned = int(arrays["learned"].sum()) if encoder.marks_learned else None
    num_bytes = int(arrays["sizes"].sum()) if "sizes" in arrays else 1
    return TokensInMemory(
        path="",
        dtype="uint32",
        num_tokens=len(ids),
        num_documents=len(rows),
        num_bytes=num_bytes,
        largest=int(ids.max()),
        filling=encoder.end,
        num_learned=num_learned,
        start=tuple(encoder.start),
        arrays=arrays,
    )


def on_device(some: Iterable[Mapping[str, Tensor]], device: torch.device) -> list[Batch]:
    """Batches as a list on one device, to be read more than once.

    Raises:
        InputError: there is none, or one lacks a tensor.
    """
    found = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in some]
    if not found:
        raise InputError("batches: there is none; give at least one")
    for key in ("input_ids", "targets", "mask"):
        if any(key not in batch for batch in found):
            raise InputError(
                f"batches: one has no {key!r}; make them by distill.batches(texts, tokenizer), or "
                "distill.core.batch.causal_batch(input_ids, mask)"
            )
    return found
