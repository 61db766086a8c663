"""Removes training rows that repeat other rows or contain rows of a test set.

Rows are checked one after the other, in the order of the sources, before anything is tokenized. Therefore the rows that
are left out depend only on the text and the recipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from distill.core.stop import stoppable
from distill.data.base import Conversation, Document, Item, Rejected, Removed, digest, normalised, said
from distill.data.clean_spec import CleanSpec
from distill.data.mixture_split import OneText
from distill.data.near_duplicates import NearDuplicates
from distill.data.overlap import TestRows
from distill.data.tally import Tally
from distill.data.words import words_of

RULE = "1: equal normalised texts; MinHash of 5 words, 14 bands of 8, 0.75, from 50 words; half of 8-grams"
"""Version of the cleaning rules; token files made with another version are rebuilt."""


RULE_OF_ANSWERS = "1: of conversations that ask the same"


class Cleaner:
    """Cleans the training rows of all sources of a text in one pass, in their order.

    Args:
        spec: which rows are left out.
        texts: the sources; those of a mixture in its order.
    """

    def __init__(self, spec: CleanSpec, texts: Sequence[OneText]):
        self.spec, self.texts = spec, texts
        self._seen: dict[bytes, str] = {}
        self._near = NearDuplicates()
        self._num_read = 0  # number of texts

    def identity(self) -> list[Any]:
        """The cleaning settings, test sets and source order, for hashing. The texts are not included."""
        tests = [source.identity() for _, source in self.spec.tests()]
        rules = [RULE, RULE_OF_ANSWERS] if self.spec.duplicates == "near" else [RULE]
        return [*rules, self.spec.duplicates, self.spec.of_validation, *tests, [text.name for text in self.texts]]

    def training(self, text: OneText) -> Iterator[Item]:
        """Yield the training rows of one of the texts; rows that are left out are yielded as :class:`Removed`.

        Its rows may repeat those of an earlier text, so earlier texts that have not been read yet are read first.

        Raises:
            InputError: a test set, or too many of its rows, cannot be read.
        """
        number = self.texts.index(text)
        if number < self._num_read:
            raise ValueError(f"{text.name!r} was read already; ask for the texts in their order")
        while self._num_read < number and self.spec.duplicates is not None:
            for _ in self._pass(self.texts[self._num_read]):
                pass
        yield from self._pass(text)

    def _pass(self, text: OneText) -> Iterator[Item]:
        self._num_read = self.texts.index(text) + 1
        for item in text.split.training():
            yield self.kept(item)

    def prepare(self) -> None:
        """Read the test sets before processes are forked.

        Raises:
            InputError: a test set, or too many of its rows, cannot be read.
        """
        if self.spec.decontaminate:
            self._tests  # noqa: B018  # computed once, and kept

    def kept(self, item: Item) -> Item:
        """The row of the training side, or a :class:`Removed` that says why it is left out."""
        if isinstance(item, Rejected):
            return item
        needs_words = self.spec.decontaminate or self.spec.duplicates == "near"
        words = words_of(item.text) if needs_words else None
        if words is not None and self.spec.decontaminate and (hit := self._tests.find(item, words)) is not None:
            return Removed(item.id, "in a test set", f"it holds {hit.share:.0%} of {hit.id}")
        if self.spec.duplicates is None:
            return item
        key = _digest(item)
        if (first := self._seen.get(key)) is not None:
            return Removed(item.id, "repeated", f"as {first}")
        self._seen[key] = item.id
        if words is None or self.spec.duplicates == "exact":
            return item
        if isinstance(item, Conversation):
            like_it = self._near.find_or_keep(item.id, words_of(_answered(item)), _asked(item))
        else:
            like_it = self._near.find_or_keep(item.id, words)
        return item if like_it is None else Removed(item.id, "nearly repeated", f"as {like_it}")

    @cached_property
    def _tests(self) -> TestRows:
        return TestRows(self._test_rows())

    def _test_rows(self) -> Iterator[Document | Conversation]:
        for key, source in self.spec.tests():
            tally = Tally()
            for item in stoppable(source.documents()):
                if isinstance(item, Rejected):
                    tally.drop(item)
                else:
                    tally.note({})
                    yield item
            tally.check(key, self.texts[0].data.max_dropped)
            for line in tally.lines(key):
                print(line, file=sys.stderr, flush=True)
        for text in self.texts if self.spec.of_validation else ():
            yield from (item for item in text.split.validation() if not isinstance(item, Rejected))


def _digest(item: Document | Conversation) -> bytes:
    """Hash of the :func:`normalised` item: everything in it that a model reads."""
    if not isinstance(item, Conversation):
        return digest(normalised(item.text))
    texts = [[message["role"], normalised(message["content"])] for message in item.messages]
    more = [{key: value for key, value in message.items() if key != "content"} for message in item.messages]
    return digest(json.dumps([texts, more, item.learned, item.tools, item.arguments], sort_keys=True, default=str))


def _asked(item: Conversation) -> bytes:
    """Hash of the conversation without the assistant's messages."""
    others = [message for message in item.messages if message["role"] != "assistant"]
    texts = [[message["role"], normalised(message["content"])] for message in others]
    return digest(json.dumps([texts, item.learned, item.tools, item.arguments], sort_keys=True, default=str))


def _answered(item: Conversation) -> str:
    """Text of the assistant's messages."""
    return said(tuple(message for message in item.messages if message["role"] == "assistant"))
