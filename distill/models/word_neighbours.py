"""Words that are like others by a model's embedding matrix.

Two words are compared by the cosine of their embeddings, from which the mean of all words is subtracted first: it is
large in language models and says nothing about a word (Mu and Viswanath 2018, arXiv 1702.01417). A word has neighbours
if it is a token of its own; what the tokenizer cuts into pieces has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.whole_words import best, whole_words

_AT_ONCE = 2**26
"""Cosines that exist at once."""
_CASES = 4
"""Forms in which a word can stand in a vocabulary (``the``, ``The``, ``THE``, ``tHe``): so many times more are ranked
than are wanted."""


class WordNeighbours:
    """Finds them; the neighbours of a word are computed once.

    Args:
        embeddings: of a model. [tokens, hidden]
        backend: of its tokenizer, of class ``tokenizers.Tokenizer``.
        location: what a message calls the model.

    Raises:
        InputError: the tokenizer has no whole words.
    """

    def __init__(self, embeddings: Tensor, backend: Any, location: str):
        ids, self.words = whole_words(backend, location)
        found = embeddings.detach()[torch.from_numpy(ids).to(embeddings.device)].float()  # [words, hidden]
        self._directions = nn.functional.normalize(found - found.mean(0), dim=-1)
        self._number = {word: number for number, word in reversed([*enumerate(self.words)])}
        self._known: dict[tuple[int, int], list[str]] = {}  # (number of a word, how many are wanted) -> its neighbours

    def find(
        self, texts: Sequence[str], places: Sequence[Sequence[tuple[int, int]]], count: int
    ) -> list[list[list[str]]]:
        """See :class:`distill.data.replace_words.Candidates`."""
        numbers = [
            [self._number_of(text[start:stop]) for start, stop in some]
            for text, some in zip(texts, places, strict=True)
        ]
        self._learn(sorted({number for some in numbers for number in some if number is not None}), count)
        return [[[] if number is None else self._known[number, count] for number in some] for some in numbers]

    def _number_of(self, word: str) -> int | None:
        """Of a word in the vocabulary as it is, in small letters or with a capital; None where it is in none."""
        forms = (self._number.get(form) for form in (word, word.lower(), word.capitalize()))
        return next((number for number in forms if number is not None), None)

    def _learn(self, numbers: list[int], count: int) -> None:
        """Find the neighbours of those words whose are not known yet."""
        new = [number for number in numbers if (number, count) not in self._known]
        size = max(1, _AT_ONCE // len(self.words))
        for start in range(0, len(new), size):
            some = new[start : start + size]
            own = self._directions[torch.tensor(some, device=self._directions.device)]  # [some, hidden]
            cosines = own @ self._directions.T  # [some, words]
            nearest = cosines.topk(min(_CASES * (count + 1), len(self.words)), dim=-1).indices.tolist()
            for number, order in zip(some, nearest, strict=True):
                self._known[number, count] = best(self.words, order, self.words[number], count)
