"""Ids of words that were tokenized before, because most words of a text occur several times.

    text = w1 w2 ... wn, cut before each space that follows no whitespace     "Of mice, and men" -> Of| mice,| and| men
    ids(text) = ids(w1) ids(w2) ... ids(wn)

An unknown word that ends with punctuation after a letter or a digit is cut there once more, because its parts may be
known.

The equation holds if no rule of the tokenizer depends on text on both sides of a cut. This is true for byte-level
byte-pair encoding with one of :data:`PATTERNS`, which split the text into pieces that are encoded separately:

- A space begins a piece, or continues whitespace.
- A letter or digit is never in the same piece as a character of :data:`MARKS`.
- The only look-ahead, ``\\s+(?!\\S)``, matches whitespace, which is never directly before a cut.

Also, no added token may contain a cut, or strip the whitespace after it. Other tokenizers get no cache.

It is faster for natural language that is written with spaces, and for most code. For text without spaces, or in which
most words are new, it is not; then it is bypassed, and texts are encoded whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
PATTERNS = frozenset({_GPT2, _LLAMA3, _QWEN2})
MARKS = '.,;:!?")\u201d'
"""Punctuation before which a new word is cut; the apostrophe is not included, because ``'s`` may be a piece."""
LONGEST = 32
"""Maximum number of characters of a word that is kept."""
MOST = 1 << 18
"""Maximum number of words that are kept, about 50 MB; if there are more, all are dropped."""
REST = 15
"""Number of calls that bypass the cache after a call with more than 50 % misses, in characters."""

_CUT = re.compile(r"(?<=\S)(?= )")
_LETTERS = frozenset(
    map(
        chr,
        (
            *range(0x30, 0x3A),
            *range(0x41, 0x5B),
            *range(0x61, 0x7B),
            *range(0xC0, 0xD7),
            *range(0xD8, 0xF7),
            *range(0xF8, 0x250),
            *range(0x410, 0x450),
        ),
    )
)
"""Characters that are letters or digits in every version of Unicode."""
_SPACES = "".join(letter for letter in map(chr, range(0x3001)) if letter.isspace())


def words_of(text: str) -> list[str]:
    """A text cut before each space that follows no whitespace."""
    if any(f"{space} " in text for space in _SPACES if space in text):
        return _CUT.split(text)
    first, *others = text.split(" ")  # the same, four times as fast
    return [*[first] * bool(first), *[f" {word}" for word in others]]


def _parts_of(word: str) -> tuple[str, ...]:
    """The word, or its two parts if it ends with punctuation after a letter or a digit."""
    stem = word.rstrip(MARKS)
    return (stem, word[len(stem) :]) if len(stem) < len(word) and stem[-1:] in _LETTERS else (word,)


def _holds_a_cut(text: str) -> bool:
    return bool(_CUT.search(text)) or any(one in _LETTERS and other in MARKS for one, other in pairwise(text))


class WordCache:
    """Encodes texts as ``backend.encode_batch_fast(texts, add_special_tokens=False)`` does, word by word.

    Args:
        backend: backend of a tokenizer whose words can be encoded one by one; see :meth:`of`.
    """

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        self._known: dict[str, bytes] = {}
        self._resting = 0

    @classmethod
    def of(cls, backend: Tokenizer) -> WordCache | None:
        """A cache for a tokenizer whose words can be encoded one by one; None for any other."""
        made: dict[str, Any] = json.loads(backend.to_str())
        added = [token for token in made["added_tokens"] if not (token["special"] and backend.encode_special_tokens)]
        whole = not any(token["rstrip"] or token["single_word"] or _holds_a_cut(token["content"]) for token in added)
        return cls(backend) if whole and _is_cut_by_a_pattern(made) else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text. uint32 [tokens] each"""
        if self._resting:
            self._resting -= 1
            return [np.frombuffer(ids, np.uint32) for ids in self._encoded(texts)]
        known = self._known
        if len(known) > MOST:
            known.clear()
        cut = [words_of(text) for text in texts]
        new = list(set[str]().union(*cut) - known.keys())
        parts = [_parts_of(word) for word in new]
        unknown = list(set[str]().union(*parts) - known.keys())
        known.update(zip(unknown, self._encoded(unknown), strict=True))
        known.update((word, known[some[0]] + known[some[1]]) for word, some in zip(new, parts, strict=True) if some[1:])
        encoded = [np.frombuffer(b"".join(map(known.__getitem__, words)), np.uint32) for words in cut]
        for word in {*new, *unknown}:
            if len(word) > LONGEST:
                del known[word]
        if 2 * sum(map(len, unknown)) > sum(map(len, texts)):
            self._resting = REST
        return encoded

    def _encoded(self, texts: Sequence[str]) -> list[bytes]:
        made = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32).tobytes() for encoding in made]


def _is_cut_by_a_pattern(made: dict[str, Any]) -> bool:
    """Whether the content of a ``tokenizer.json`` is of the form for which words can be encoded one by one."""
    model, before = made["model"], made["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    *cuts, last = [step for step in steps if step.get("type") != "Digits"] or [{}]
    if model["type"] != "BPE" or model["dropout"] or made["normalizer"] not in (None, {"type": "NFC"}):
        return False
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or not (cuts or last["use_regex"]):
        return False
    return all(
        cut["type"] == "Split"
        and cut["behavior"] == "Isolated"
        and not cut["invert"]
        and cut["pattern"].get("Regex") in PATTERNS
        for cut in cuts
    )
