"""Encodes documents as token ids, and counts the bytes of text per id."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distill.data.base import Conversation, Document, Rejected, Tokenized
from distill.data.first_tokens import around
from distill.data.word_cache import WordCache
from distill.data.written_out import WrittenOut


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of a document, or of a part of a conversation.

    Attributes:
        ids: token ids, at least one.
        learned: which of them are learned from, bool [tokens]; None: all.
        sizes: UTF-8 bytes of text per token, uint32 [tokens]; None: not counted.
    """

    ids: list[int] | np.ndarray
    learned: np.ndarray | None = None
    sizes: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoding of a document or a conversation.

    Attributes:
        rows: at least one; exactly one for a document.
        noted: note for the user -> count; see :class:`~distill.data.tally.Tally`.
        num_bytes: UTF-8 bytes of its text; None: computed from the item's text.
    """

    rows: list[Row]
    noted: Mapping[str, int] = field(default_factory=dict)
    num_bytes: int | None = None


class TextEncoder:
    """Encodes a text as a document: the tokens that the tokenizer puts before a text, the text, and the end-of-text
    token.

    Special tokens written out in a text are plain text: ``"<|endoftext|>"`` in a file ends nothing.

    Attributes:
        end: id of the end-of-text token.
        start: ids before each document and each row; empty for many tokenizers.
        start_tokens: the token strings of ``start``.
    """

    marks_learned = False
    """Whether its rows have a mask of the tokens that are learned from."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._backend = backend_of(tokenizer)
        self._backend.encode_special_tokens = True
        self._words = WordCache.of(self._backend)
        self.end: int = int(tokenizer.eos_token_id)
        self.start: list[int] = around(tokenizer)[0]
        self.start_tokens: list[str] = [*tokenizer.convert_ids_to_tokens(self.start)]
        self._written_out = WrittenOut.of(tokenizer)

    def identity(self) -> list[Any]:
        """Settings other than the tokenizer that affect the tokens."""
        return [self.start, *["in front of every row"] * bool(self.start)]

    def for_validation(self) -> TextEncoder:
        """The encoder for validation text."""
        return self

    def rows(self, items: Sequence[Document | Conversation], *, with_bytes: bool) -> list[Encoded | Rejected]:
        """Encode each item as rows of tokens, or say why it is rejected.

        Args:
            items: items of a source; this encoder accepts only documents.
            with_bytes: whether to count the bytes of each token.
        """
        assert not any(isinstance(item, Tokenized) for item in items)  # TokenEncoder takes those
        texts = [item.text for item in items]
        noted = [self._written_out.noted(text) for text in texts]
        if not with_bytes:
            return [Encoded([Row(ids)], found) for ids, found in zip(self.encode(texts), noted, strict=True)]
        ids, sizes = self.encode_with_bytes(texts)
        return [Encoded([Row(row, None, counts)], n) for row, counts, n in zip(ids, sizes, noted, strict=True)]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, with start and end tokens. uint32 [tokens] each."""
        words = self._words
        if words is None:
            return [self._framed([found.ids for _, found in pieces]) for pieces in self._encodings(texts, fast=True)]
        whole = iter(words.encode([text for text in texts if len(text) <= PIECE]))
        return [
            self._framed([next(whole)] if len(text) <= PIECE else [words.encode([part])[0] for part in pieces_of(text)])
            for text in texts
        ]

    def encode_with_bytes(self, texts: list[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As :meth:`encode`, and the number of UTF-8 bytes of text per id.

        A character's bytes are counted for the token that completes it, so the counts sum to the bytes of the text
        exactly; start and end tokens count 0.
        """
        ids, counts = [], []
        for pieces in self._encodings(texts, fast=False):
            inner, sizes, left = [], [np.zeros(len(self.start), np.uint32)], 0
            for piece, encoding in pieces:
                inner.append(encoding.ids)
                sizes.append(bytes_of(piece, encoding.offsets))
                left += len(piece.encode("utf-8")) - int(sizes[-1].sum())  # bytes of a piece that produced no token
                if len(sizes[-1]):
                    sizes[-1][0] += left
                    left = 0
            ids.append(self._framed(inner))
            counts.append(np.concatenate([*sizes, np.zeros(1, np.uint32)]))
        return ids, counts

    def _encodings(self, texts: list[str], *, fast: bool) -> Iterator[Iterator[tuple[str, Any]]]:
        """Yield, per text, an iterator over its pieces and their encodings; only one piece of a long text is in memory
        at a time."""
        encode = self._backend.encode_batch_fast if fast else self._backend.encode_batch
        whole = [text for text in texts if len(text) <= PIECE]
        encoded = iter(encode(whole, add_special_tokens=False))
        for text in texts:
            if len(text) <= PIECE:
                yield iter([(text, next(encoded))])
            else:
                yield ((piece, encode([piece], add_special_tokens=False)[0]) for piece in pieces_of(text))

    def _framed(self, pieces: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        return np.concatenate([np.asarray(ids, np.uint32) for ids in (self.start, *pieces, [self.end])])


PIECE = 1 << 20
"""Largest number of characters that a tokenizer gets at once, because it uses hundreds of bytes of memory per
character."""
BOUNDARY = re.compile(r"(?<=\w) (?=\w)")
"""Matches where byte-level tokenizers always separate words: before the space between two words."""


def pieces_of(text: str) -> Iterator[str]:
    """Split a long text into pieces of at most :data:`PIECE` characters, between two words if possible."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        places = [found.start() for found in BOUNDARY.finditer(text, end - PIECE // 2, end)]
        end = places[-1] if places else end
        yield text[start:end]
        start = end
    yield text[start:]


def backend_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A copy of the backend tokenizer without truncation and padding; the original is unchanged."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def bytes_of(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes for each token from its character span [start, end) in the text. uint32 [tokens]."""
    if not offsets:
        return np.zeros(0, np.uint32)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    bytes_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])
    spans = np.asarray(offsets, np.int64)
    # If the spans of two tokens overlap, both hold bytes of one character; its bytes are counted for the later token,
    # which completes it.
    done = np.minimum(spans[:, 1], np.append(spans[1:, 0], len(codes)))
    done = np.maximum.accumulate(done)
    done[-1] = len(codes)  # what the tokenizer dropped at the very end
    return np.diff(bytes_before[done], prepend=0).astype(np.uint32)
