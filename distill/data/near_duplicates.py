"""Finds documents that share most of their text with an earlier one, with MinHash.

The shingles of a document are its word 5-grams. For each of 112 hash functions the smallest hash of all its shingles is
kept; two documents agree in one of them with probability ``J``, the Jaccard similarity of their shingles. The 112 are
split into 14 bands of 8. Documents that agree in a whole band are compared,

    P(compared) = 1 - (1 - J^8)^14          0.3 % at J = 0.35, 36 % at 0.65, 77 % at 0.75, 99.9 % at 0.9

and are near duplicates when at least three quarters of the 112 agree, which estimates ``J`` with a standard error of
0.04.

Sources: Broder 1997 (MinHash); Leskovec et al., Mining of Massive Datasets, section 3.4 (bands); word 5-grams and 14
bands of 8 as in Penedo et al. 2024, arXiv 2406.17557.
"""

from __future__ import annotations

import numpy as np

from distill.data.words import mixed, runs_of

SHINGLE = 5
BANDS, ROWS = 14, 8
SHORTEST = 50
"""Number of words below which a text is never compared, because questions and short answers are alike in form, not in
content."""
THRESHOLD = 0.75
_AT_ONCE = 4096
_SEEDS = mixed(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
"""Seed of each hash function. uint64 [112]"""


class NearDuplicates:
    """The documents that were kept so far. It takes about 4 kB of memory per document."""

    def __init__(self) -> None:
        self._signatures = np.zeros((1024, BANDS * ROWS), np.uint32)
        self._ids: list[str] = []
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]

    def find_or_keep(self, id: str, words: np.ndarray, within: bytes = b"") -> str | None:
        """The ``id`` of an earlier document that this one nearly repeats. If there is none, keep the document for later
        comparisons and return None.

        Args:
            id: name of the document in messages to the user.
            words: hashes of its words. uint64 [words]
            within: group key: only documents with an equal ``within`` are compared.
        """
        if len(words) < SHORTEST:
            return None
        signature = signature_of(words)
        keys = [within + band.tobytes() for band in signature.reshape(BANDS, ROWS)]
        pairs = list(zip(self._bands, keys, strict=True))
        if candidates := sorted({number for band, key in pairs for number in band.get(key, ())}):
            agreeing = (self._signatures[candidates] == signature).mean(1)  # [candidates]
            if agreeing.max() >= THRESHOLD:
                return self._ids[candidates[int(agreeing.argmax())]]
        number = len(self._ids)
        if number == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.zeros_like(self._signatures)])
        self._signatures[number] = signature
        self._ids.append(id)
        for band, key in pairs:
            band.setdefault(key, []).append(number)
        return None


def signature_of(words: np.ndarray) -> np.ndarray:
    """The smallest hash of all shingles for each hash function. uint32 [112]

    Args:
        words: hashes of words, at least :data:`SHINGLE` of them. uint64 [words]
    """
    shingles = np.unique(runs_of(words, SHINGLE))
    smallest = np.full(len(_SEEDS), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), _AT_ONCE):
        hashes = mixed(shingles[start : start + _AT_ONCE, None] ^ _SEEDS)  # [shingles, 112]
        smallest = np.minimum(smallest, hashes.min(0))
    return (smallest >> np.uint64(32)).astype(np.uint32)
