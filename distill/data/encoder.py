"""A document as token ids, and how many bytes of it each id stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast


class Encoder:
    """Text to ids as a document: the tokenizer's begin token if it sets one, the text, the end-of-text token.

    Special tokens written out in a text are plain text: ``"<|endoftext|>"`` in a file ends nothing.

    Attributes:
        end: id of the end-of-text token.
        start: ids before each document; empty for most tokenizers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the caller's keeps its settings
        backend.no_truncation()
        backend.no_padding()
        bare = backend.encode("", add_special_tokens=True).ids
        backend.encode_special_tokens = True
        self._backend = backend
        self.end: int = int(tokenizer.eos_token_id)
        self.start: list[int] = bare[:1] if bare[:1] == [tokenizer.bos_token_id] and bare != [self.end] else []

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, with its begin and end."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [[*self.start, *encoding.ids, self.end] for encoding in encodings]

    def encode_with_bytes(self, texts: list[str]) -> tuple[list[list[int]], list[np.ndarray]]:
        """As :meth:`encode`, and how many UTF-8 bytes of the text each id stands for.

        A character's bytes belong to the token that completes it, so the counts of a text sum to its bytes exactly;
        begin and end stand for none.
        """
        import numpy as np

        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        ids = [[*self.start, *encoding.ids, self.end] for encoding in encodings]
        counts = []
        for text, encoding in zip(texts, encodings, strict=True):
            inner = _bytes_of(text, encoding.offsets)
            counts.append(np.concatenate([np.zeros(len(self.start), np.uint32), inner, np.zeros(1, np.uint32)]))
        return ids, counts


def _bytes_of(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Bytes for each token from its character span [start, end) in the text. uint32 [tokens]."""
    import numpy as np

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
