"""Hashes of words and of word n-grams, which are compared to find texts that share much of their content."""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from distill.data.base import normalised

_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Scripts without word separators (Thai, Lao, Burmese, Khmer, kana, Han); each character of them counts as a word."""
_WORD = re.compile(rf"[{_WITHOUT_SPACES}]|[^\W{_WITHOUT_SPACES}]+")
_MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, so that multiplying by it loses nothing modulo 2**64; Knuth's golden ratio."""


def words_of(text: str) -> np.ndarray:
    """A hash of each word; case, punctuation, spaces and Unicode forms make no difference. uint64 [words]"""
    return np.array([_hash(word) for word in _WORD.findall(normalised(text))], np.uint64)


def runs_of(words: np.ndarray, length: int) -> np.ndarray:
    """A hash of each n-gram of ``length`` words, in the order of their first words. uint64 [max(words - length + 1,
    0)]"""
    count = max(len(words) - length + 1, 0)
    runs = np.zeros(count, np.uint64)
    for offset in range(length):  # a polynomial in the multiplier, modulo 2**64
        runs = runs * np.uint64(_MULTIPLIER) + words[offset : offset + count]
    return mixed(runs)


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Mix the bits of each number, so that every output bit depends on all input bits (the splitmix64 finalizer).
    uint64"""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@lru_cache(maxsize=1 << 17)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
