"""Documents that are ids already: checked against the tokenizer, and counted in bytes of their text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from distill.core.errors import InputError
from distill.data.base import Conversation, Document, Rejected, Tokenized
from distill.data.encoder import Encoded, Row, TextEncoder

CHECKED = 20
"""Documents of the training text that are compared with what the tokenizer makes of their text ..."""
CHECKED_TOKENS = 512
"""... and how many ids of each."""
MARGIN = 8
"""Last ids of the compared part, which may differ because the text was cut there."""
NOT_OURS = "ids of another tokenizer"


class TokenEncoder(TextEncoder):
    """As :class:`TextEncoder`, and takes :class:`~distill.data.base.Tokenized` documents, whose ids stay as they are.

    The tokenizer is the right one when the text of the ids becomes the same ids again. Most of the first training
    documents must pass. Every validation document must: only then is it known, to the byte, how much text each id
    stands for. Ids of special tokens stand for none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        self._num_tokens = len(tokenizer)
        added = self._backend.get_added_tokens_decoder()
        self._special = np.array([id for id, token in added.items() if token.special], np.int64)
        self._is_checked = False

    def rows(self, items: Sequence[Any], *, with_bytes: bool) -> list[Encoded | Rejected]:
        """Rows of tokens of each item, or why there are none.

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
        """What the tokenizer makes of the text of ids: ids, and the bytes that each stands for. [tokens] each"""
        text = self._backend.decode(ids.tolist(), skip_special_tokens=False)
        (again,), (counts,) = self.encode_with_bytes([text])
        inner = slice(len(self.start), len(again) - 1)
        return again[inner], counts[inner]

    def _runs(self, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        """The stretches without a special token."""
        edges = np.flatnonzero(np.isin(ids, self._special))
        for start, stop in zip([0, *(edges + 1)], [*edges, len(ids)], strict=True):
            if stop > start:
                yield int(start), int(stop)

    def _check(self, items: Sequence[Tokenized], *, is_enough: bool) -> None:
        """Refuse ids that the tokenizer does not have, and, once, those whose text becomes others.

        Args:
            items: some documents.
            is_enough: whether each of them is compared anyway.

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
