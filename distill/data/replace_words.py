"""Copies of documents in which some words are replaced: more text on which a student can learn from its teacher.

For each copy of a document, each word is chosen with a probability, and a chosen word is replaced by one that is drawn
from its candidates. What a copy says need not be true or good style: the teacher reads it too, and the student learns
what the teacher predicts there. A loss on the text itself (cross_entropy) would learn the replaced words as if somebody
had written them, so augmentation suits losses on logits or hidden states.

Which words are replaced depends on the text of the document, the number of the copy and the seed alone, not on the
documents around it. Copies follow after all documents of their source, so that a packed row does not hold a document
beside its own copy, which a model could predict by copying.

Source: Jiao et al. 2020, TinyBERT, arXiv 1909.10351, section 3.2 and algorithm 1.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distill.core.errors import MachineError
from distill.data.augment_spec import ReplaceWords
from distill.data.base import Document, Item

WordSpan = tuple[int, int]
"""First character of a word, and the one after its last."""
WORD = re.compile(r"(?<![\w'\u2019])[^\W\d_]{2,}(?![\w'\u2019])")
"""Matches words of at least two letters, but no part of an identifier or of ``don't``."""
TOGETHER = 64
"""Number of documents for whose words candidates are looked up at once."""
RULE = "1: words of two letters and more; copies behind their source"
"""Version of the rules of copies; token files made with another version are rebuilt."""


class Candidates(Protocol):
    """Source of replacement words."""

    def identity(self) -> list[Any]:
        """Everything that decides which words are found, for hashing."""
        ...

    def find(self, texts: Sequence[str], places: Sequence[Sequence[WordSpan]], count: int) -> list[list[list[str]]]:
        """Find words that could replace others.

        Args:
            texts: texts of documents.
            places: per text, the spans of the words to be replaced, in order.
            count: maximum number of candidates per word.

        Returns:
            [text][place] -> candidates, best first; empty if the word is unknown.
        """
        ...


@dataclass(frozen=True, slots=True)
class Copy(Document):
    """A document with words replaced.

    Attributes:
        num_words: number of words in it.
        num_replaced: number of replaced words.
    """

    num_words: int = 0
    num_replaced: int = 0


class WordReplacer:
    """Adds copies to a sequence of documents.

    Args:
        spec: how many copies to make, and how many words to replace.
        candidates: source of replacement words.
        folder: existing folder, in which the documents are kept in a temporary file until their copies are made.
    """

    def __init__(self, spec: ReplaceWords, candidates: Candidates, folder: Path):
        self.spec, self.candidates, self.folder = spec, candidates, folder

    def identity(self) -> list[Any]:
        """Everything that decides which copies are added to a text, for hashing."""
        keys = self.spec.model_dump(mode="json", exclude={"model"})  # whose content is in the candidates' identity
        return [RULE, keys, *self.candidates.identity()]

    def with_copies(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items as they come, then the copies of all documents among them, one pass after the other.

        A copy in which no word could be replaced is left out.

        Raises:
            MachineError: the disk is full.
        """
        try:
            with tempfile.TemporaryFile("w+", encoding="utf-8", dir=self.folder) as waiting:
                for item in items:
                    if type(item) is Document:
                        waiting.write(json.dumps([item.id, item.text]) + "\n")
                    yield item
                for number in range(1, self.spec.copies + 1):
                    waiting.seek(0)
                    for some in _groups(Document(*json.loads(line)) for line in waiting):
                        yield from self._copies(some, number)
        except OSError as error:
            raise MachineError(f"{self.folder}: cannot be written ({error.strerror or error})") from error

    def _copies(self, documents: Sequence[Document], number: int) -> Iterator[Copy]:
        chosen = [self._chosen(document.text, number) for document in documents]
        places = [[place for place, _ in some] for some, _ in chosen]
        found = self.candidates.find([document.text for document in documents], places, self.spec.num_candidates)
        for document, (drawn, num_words), words in zip(documents, chosen, found, strict=True):
            text, num_replaced = replaced(document.text, drawn, words)
            if num_replaced:
                yield Copy(f"{document.id} (copy {number})", text, num_words, num_replaced)

    def _chosen(self, text: str, number: int) -> tuple[list[tuple[WordSpan, float]], int]:
        """Spans of the words to replace, each with a number in [0, 1) that chooses its candidate; and the number of all
        words."""
        places = [match.span() for match in WORD.finditer(text)]
        key = hashlib.sha256(f"{self.spec.seed}/{number}/{text}".encode()).digest()
        draws = np.random.default_rng(int.from_bytes(key, "big")).random((len(places), 2))  # [words, 2]
        return [
            (place, float(which))
            for place, (whether, which) in zip(places, draws, strict=True)
            if whether < self.spec.probability
        ], len(places)


def replaced(text: str, drawn: Sequence[tuple[WordSpan, float]], words: Sequence[Sequence[str]]) -> tuple[str, int]:
    """Return the text with words replaced, and the number of replaced words.

    Args:
        text: text of a document.
        drawn: spans of words, in order, each with a number in [0, 1).
        words: candidates for each span; an empty list leaves the word unchanged.
    """
    pieces, at, count = [], 0, 0
    for ((start, stop), which), some in zip(drawn, words, strict=True):
        if some:
            pieces += [text[at:start], in_case_of(text[start:stop], some[int(which * len(some))])]
            at, count = stop, count + 1
    return "".join([*pieces, text[at:]]), count


def in_case_of(word: str, other: str) -> str:
    """Apply the case of ``word`` (lower, upper, title) to ``other``; mixed case leaves it unchanged."""
    if word.islower():
        return other.lower()
    if word.isupper():
        return other.upper()
    return other[0].upper() + other[1:].lower() if word.istitle() else other


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    some: list[Document] = []
    for document in documents:
        some.append(document)
        if len(some) == TOGETHER:
            yield some
            some = []
    if some:
        yield some
