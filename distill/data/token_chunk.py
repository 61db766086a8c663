"""Tokens of a batch of documents or conversations, as arrays that processes exchange and that are written to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distill.data.base import Conversation, Item, Rejected, digest, normalised
from distill.data.encoder import Encoded, TextEncoder
from distill.data.replace_words import Copy


class Used(NamedTuple):
    """An item that is used.

    Attributes:
        id: name of the item in messages to the user.
        noted: see :class:`~distill.data.encoder.Encoded`.
        num_bytes: UTF-8 bytes of its text.
        num_rows: number of rows made from it.
        is_conversation: whether it is a conversation.
        words: number of words in it, and number of those that were replaced; None if it is no augmented copy.
    """

    id: str
    noted: Mapping[str, int]
    num_bytes: int
    num_rows: int
    is_conversation: bool
    words: tuple[int, int] | None = None


class Batch(NamedTuple):
    """A group of items large enough for one tokenizer call, all from one shard.

    Attributes:
        items: the items in order.
        shard: number of the shard.
    """

    items: list[Item]
    shard: int = 0


Keep = Callable[[Sequence[Item]], tuple[list[Item], int]]
"""Function: items -> (items to keep, number skipped because they are in the validation text)."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """A batch of items, encoded.

    Attributes:
        shard: number of its shard.
        items: per item, counts if it is used, otherwise why it is rejected.
        ids: ids of all rows, concatenated. [tokens]
        lengths: number of tokens in each row. int64 [rows]
        learned: which tokens are learned from, bool [tokens]; None: all.
        sizes: UTF-8 bytes of text per token, uint32 [tokens]; None: not counted.
        num_bytes: UTF-8 bytes of all items that were read for it.
        num_repeated: number of items skipped because they are in the validation text.
        digests: digests of all usable items if they are validation texts; training documents with these digests are
            left out. None: not computed.
    """

    shard: int
    items: list[Used | Rejected]
    ids: np.ndarray
    lengths: np.ndarray
    learned: np.ndarray | None
    sizes: np.ndarray | None
    num_bytes: int
    num_repeated: int = 0
    digests: bytes | None = None


def chunk_of(
    batch: Batch, encoder: TextEncoder, keep: Keep | None, *, with_bytes: bool, with_digests: bool = False
) -> TokenChunk:
    """Encode a batch.

    Args:
        batch: the batch.
        encoder: converts text to ids.
        keep: selects the items that are used; None: all.
        with_bytes: whether to count the bytes of text per token.
        with_digests: whether to compute the digests.
    """
    num_bytes = sum(len(item.text.encode("utf-8")) for item in batch.items)
    kept, num_repeated = (batch.items, 0) if keep is None else keep(batch.items)
    usable: list[Any] = [item for item in kept if not isinstance(item, Rejected)]
    encoded = iter(encoder.rows(usable, with_bytes=with_bytes))
    items: list[Used | Rejected] = []
    rows = []
    for item in kept:
        made: Encoded | Rejected = item if isinstance(item, Rejected) else next(encoded)
        if isinstance(made, Rejected):
            items.append(made)
            continue
        counted = len(item.text.encode("utf-8")) if made.num_bytes is None else made.num_bytes
        words = (item.num_words, item.num_replaced) if isinstance(item, Copy) else None
        items.append(Used(item.id, made.noted, counted, len(made.rows), isinstance(item, Conversation), words))
        rows += made.rows
    ids = [np.asarray(row.ids, np.uint32) if isinstance(row.ids, list) else row.ids for row in rows]
    learned = [np.ones(len(row.ids), bool) if row.learned is None else row.learned for row in rows]
    return TokenChunk(
        batch.shard,
        items,
        _joined(ids, np.uint32),
        np.array([len(row.ids) for row in rows], np.int64),
        _joined(learned, np.bool_) if encoder.marks_learned else None,
        _joined([row.sizes for row in rows if row.sizes is not None], np.uint32) if with_bytes else None,
        num_bytes,
        num_repeated,
        b"".join(digest(normalised(item.text)) for item in usable) if with_digests else None,
    )


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
