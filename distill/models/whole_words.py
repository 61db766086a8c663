"""The words of a tokenizer: tokens that are a word of their own between two spaces."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from distill.core.errors import InputError

_LETTERS = re.compile(r"[^\W\d_]{2,}")
_BEFORE = "a"
"""Stands before each word that is tried, as many tokenizers have two tokens of a word: with a space before it, and
without."""


def whole_words(backend: Any, location: str) -> tuple[np.ndarray, list[str]]:
    """The ids of all tokens that are a word of at least two letters, and the words.

    Args:
        backend: of the tokenizer, of class ``tokenizers.Tokenizer``; neither cuts nor fills up.
        location: what a message calls its model.

    Returns:
        int64 [words], rising; and the words in the same order.

    Raises:
        InputError: there are fewer than two.
    """
    ids = sorted(backend.get_vocab(with_added_tokens=False).values())
    texts = [text.strip() for text in backend.decode_batch([[id] for id in ids])]
    likely = [(id, text) for id, text in zip(ids, texts, strict=True) if _LETTERS.fullmatch(text)]
    before = backend.encode(_BEFORE, add_special_tokens=False).ids
    encoded = backend.encode_batch([f"{_BEFORE} {text}" for _, text in likely], add_special_tokens=False)
    whole = [pair for pair, found in zip(likely, encoded, strict=True) if found.ids == [*before, pair[0]]]
    if len(whole) < 2:
        raise InputError(
            f"data.augment.replace_words.model: the tokenizer of {location} has no token that is a whole word, and so "
            "no candidates; name another model"
        )
    return np.array([id for id, _ in whole], np.int64), [text for _, text in whole]


def best(words: list[str], order: list[int], word: str, count: int) -> list[str]:
    """The first ``count`` words of an order that are others than ``word`` and than each other, whatever their case.

    Args:
        words: those of the tokenizer.
        order: numbers of some of them, the best first.
        word: that is to be replaced.
        count: at most.
    """
    seen, found = {word.casefold()}, list[str]()
    for number in order:
        if (key := words[number].casefold()) not in seen and len(found) < count:
            seen.add(key)
            found.append(words[number])
    return found
