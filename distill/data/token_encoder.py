"""Checks documents that are token ids already against the tokenizer, and counts the bytes of their text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from distill.core.errors import InputError
from distill.data.base import Conversation, Document, Rejected, Tokenized
from distill.data.encoder import Encoded, Row, TextEncoder

CHECKED = 20
"""Number of documents of the training text whose ids are compared with the tokenizer's encoding of their text."""
CHECKED_TOKENS = 512
"""Number of ids compared per document."""
MARGIN = 8
"""Number of ids at the end of the compared part that may differ, because the text was cut there."""
NOT_OURS = "ids of another tokenizer"


class TokenEncoder(TextEncoder):
    """As :class:`TextEncoder`, and accepts :class:`~distill.data.base.Tokenized` documents, whose ids are not changed.

    The tokenizer is the right one if decoding and encoding return the same ids. Most of the first training documents
    must pass, and every validation document, because otherwise the exact number of bytes per id is unknown. Ids of
    special tokens count 0 bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        self._num_tokens = len(tokenizer)
        added = self._backend.get_added_tokens_decoder()
        self._special = np.array([id for id, token in added.items() if token.special], np.int64)
        self._is_checked = False

    def rows(self, items: Sequence[Any], *, with_bytes: bool) -> list[Encoded | Rejected]:
        """Encode each item as rows of tokens, or say why it is rejected.

        Raises:
            InputError: the ids belong to another tokenizer.
        """
        given = [item for item in items if isinstance(item, Tokenized)]
        self._check(given, is_enough=with_bytes)
        texts: list[Document | Conversation] = [item for item in items if not isinstance(item, Tokenized)]
        made = iter(super().rows(texts, with_bytes=with_bytes))
        return [self._row(item, with_bytes) if isinstance(item, Tokenized) else next(made) for item in items]

    def _row(self, item: Tokenized, with_bytes: bool) -> Encoded | Rejected:
        ids = item.ids
        if item.is_open and ids[-1] != self.end:
            ids = np.append(ids, self.end)
        if not with_bytes:
            return Encoded([Row(ids)], num_bytes=0)
        sizes = np.zeros(len(ids), np.uint32)
        for start, stop in self._runs(ids):
            again, counts = self._again(ids[start:stop])
            if not np.array_equal(again, ids[start:stop]):
                return Rejected(item.id, NOT_OURS, "its text becomes other ids, so the bytes of an id are not known")
            sizes[start:stop] = counts
        return Encoded([Row(ids, None, sizes)], num_bytes=int(sizes.sum()))

    def _again(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decode ids, and encode their text again. Return (ids, bytes of text per id), [tokens] each."""
        text = self._backend.decode(ids.tolist(), skip_special_tokens=False)
        (again,), (counts,) = self.encode_with_bytes([text])
        inner = slice(len(self.start), len(again) - 1)
        return again[inner], counts[inner]

    def _runs(self, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield the spans without a special token."""
        edges = np.flatnonzero(np.isin(ids, self._special))
        for start, stop in zip([0, *(edges + 1)], [*edges, len(ids)], strict=True):
            if stop > start:
                yield int(start), int(stop)

    def _check(self, items: Sequence[Tokenized], *, is_enough: bool) -> None:
        """Reject out-of-range ids; on the first call, also ids that do not survive decode and encode.

        Args:
            items: some documents.
            is_enough: whether to check only the range of the ids, because every document is compared later.

        Raises:
            InputError: an id is out of range, or the ids are those of another tokenizer.
        """
        for item in items:
            if (largest := int(item.ids.max())) >= self._num_tokens:
                raise InputError(
                    f"{item.id}: token id {largest}, but the tokenizer has {self._num_tokens:,} tokens; the ids were "
                    "made by another one, or dtype is wrong"
                )
        if is_enough or self._is_checked or not items:
            return
        self._is_checked = True
        looked = items[:CHECKED]
        wrong = [item for item in looked if not self._comes_back(item.ids[:CHECKED_TOKENS], len(item.ids))]
        if 2 * len(wrong) > len(looked):
            raise InputError(
                f"{wrong[0].id}: the text of these ids becomes other ids, as in {len(wrong)} of the first "
                f"{len(looked)} documents; they were made by another tokenizer than data.tokenizer names, or dtype is "
                "wrong"
            )

    def _comes_back(self, ids: np.ndarray, length: int) -> bool:
        for start, stop in self._runs(ids):
            again, _ = self._again(ids[start:stop])
            sure = stop - start if stop < len(ids) or len(ids) == length else max(0, stop - start - MARGIN)
            if not np.array_equal(again[:sure], ids[start : start + sure]):
                return False
        return True
