"""A document as token ids, and how many bytes of it each id stands for."""

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
    """Tokens that belong together.

    Attributes:
        ids: at least one.
        learned: which of them are learned from, bool [tokens]; None: all.
        sizes: UTF-8 bytes that each stands for, uint32 [tokens]; None: not counted.
    """

    ids: list[int] | np.ndarray
    learned: np.ndarray | None = None
    sizes: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a document or a conversation.

    Attributes:
        rows: at least one; of a document one.
        noted: what the user is told about it -> how often; see :class:`~distill.data.tally.Tally`.
        num_bytes: UTF-8 bytes of its text; None: those of the item's.
    """

    rows: list[Row]
    noted: Mapping[str, int] = field(default_factory=dict)
    num_bytes: int | None = None


class TextEncoder:
    """Text to ids as a document: what the tokenizer puts before a text, the text, the end-of-text token.

    Special tokens written out in a text are plain text: ``"<|endoftext|>"`` in a file ends nothing.

    Attributes:
        end: id of the end-of-text token.
        start: ids before each document and each row; empty for many tokenizers.
        start_tokens: the same as text.
    """

    marks_learned = False
    """Whether some tokens of its rows are not learned from."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._backend = backend_of(tokenizer)
        self._backend.encode_special_tokens = True
        self._words = WordCache.of(self._backend)
        self.end: int = int(tokenizer.eos_token_id)
        self.start: list[int] = around(tokenizer)[0]
        self.start_tokens: list[str] = [*tokenizer.convert_ids_to_tokens(self.start)]
        self._written_out = WrittenOut.of(tokenizer)

    def identity(self) -> list[Any]:
        """Everything except the tokenizer on which the tokens of a text depend."""
        return [self.start, *["in front of every row"] * bool(self.start)]

    def for_validation(self) -> TextEncoder:
        """The one for validation text."""
        return self

    def rows(self, items: Sequence[Document | Conversation], *, with_bytes: bool) -> list[Encoded | Rejected]:
        """Rows of tokens of each item, or why there are none.

        Args:
            items: what a source yields; this encoder takes documents.
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
        """Ids of each text, with its begin and end. uint32 [tokens] each."""
        words = self._words
        if words is None:
            return [self._framed([found.ids for _, found in pieces]) for pieces in self._encodings(texts, fast=True)]
        whole = iter(words.encode([text for text in texts if len(text) <= PIECE]))
        return [
            self._framed([next(whole)] if len(text) <= PIECE else [words.encode([part])[0] for part in pieces_of(text)])
            for text in texts
        ]

    def encode_with_bytes(self, texts: list[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As :meth:`encode`, and how many UTF-8 bytes of the text each id stands for.

        A character's bytes belong to the token that completes it, so the counts of a text sum to its bytes exactly;
        begin and end stand for none.
        """
        ids, counts = [], []
        for pieces in self._encodings(texts, fast=False):
            inner, sizes, left = [], [np.zeros(len(self.start), np.uint32)], 0
            for piece, encoding in pieces:
                inner.append(encoding.ids)
                sizes.append(bytes_of(piece, encoding.offsets))
                left += len(piece.encode("utf-8")) - int(sizes[-1].sum())  # all of a piece without any token
                if len(sizes[-1]):
                    sizes[-1][0] += left
                    left = 0
            ids.append(self._framed(inner))
            counts.append(np.concatenate([*sizes, np.zeros(1, np.uint32)]))
        return ids, counts

    def _encodings(self, texts: list[str], *, fast: bool) -> Iterator[Iterator[tuple[str, Any]]]:
        """Of each text its pieces, each with what the tokenizer makes of it, a piece in memory at a time."""
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
"""Most characters that a tokenizer gets at once, because it takes hundreds of bytes of memory per character."""
BOUNDARY = re.compile(r"(?<=\w) (?=\w)")
"""Where byte-level tokenizers always separate words: before the space between two of them."""


def pieces_of(text: str) -> Iterator[str]:
    """A long text in stretches of at most :data:`PIECE` characters, cut between two words where there are any."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        places = [found.start() for found in BOUNDARY.finditer(text, end - PIECE // 2, end)]
        end = places[-1] if places else end
        yield text[start:end]
        start = end
    yield text[start:]


def backend_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A copy of what encodes, which neither cuts nor fills up; the caller's keeps its settings."""
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
    # A token whose span reaches into the next token's has only a part of that character: the next one completes it.
    done = np.minimum(spans[:, 1], np.append(spans[1:, 0], len(codes)))
    done = np.maximum.accumulate(done)
    done[-1] = len(codes)  # what the tokenizer dropped at the very end
    return np.diff(bytes_before[done], prepend=0).astype(np.uint32)
