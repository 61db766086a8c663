"""Which documents train and which validate: decided by a hash, so neither order nor seed nor machine matters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from distill.core.errors import InputError
from distill.data.base import Document, digest
from distill.data.spec import DataSpec

_STREAM_BYTES_PER_TOKEN = 8  # twice what a token of English is: enough text for the validation tokens asked for


class Split:
    """The two sides of a run's text. Equal texts are never on both.

    Without a validation source a document is held out when the hash of its key, read as a number in [0, 1), is below
    ``held_out``. With one, training leaves out every document whose text is also in the validation source.

    Attributes:
        num_repeated: training documents that the latest whole reading left out because the validation source has them.
    """

    def __init__(self, data: DataSpec):
        self.data = data
        self.num_repeated = 0

    def training(self) -> Iterator[Document]:
        """The documents to train on, in the source's order; each call begins again."""
        if self.data.validation is not None:
            yield from self._unseen()
            return
        threshold = self._threshold
        for document in self.data.train.documents():
            if self._place(document) >= threshold:
                yield document

    def validation(self) -> Iterator[Document]:
        """The documents to validate on. Of a stream, as many as the validation tokens asked for need."""
        source = self.data.validation or self.data.train
        threshold = self._threshold if self.data.validation is None else float("inf")
        budget = self.data.validation_tokens * _STREAM_BYTES_PER_TOKEN if source.is_stream() else float("inf")
        for document in source.documents():
            if self._place(document) >= threshold:
                continue
            yield document
            budget -= len(document.text.encode("utf-8"))
            if budget <= 0:
                return

    def _unseen(self) -> Iterator[Document]:
        repeated = 0
        for document in self.data.train.documents():
            if digest(document.text) in self._validation_digests:
                repeated += 1
            else:
                yield document
        self.num_repeated = repeated

    @cached_property
    def _validation_digests(self) -> set[bytes]:
        return {digest(document.text) for document in self.validation()}

    def _place(self, document: Document) -> float:
        return int.from_bytes(digest(self.data.train.split_key(document))[:8], "big") / 2**64

    @cached_property
    def _threshold(self) -> float:
        """``held_out``; or, when so small a share of so few documents is none, just above the lowest of them.

        Raises:
            InputError: there is nothing to split.
        """
        lowest: list[float] = []
        for document in self.data.train.documents():
            place = self._place(document)
            if place < self.data.held_out:
                return self.data.held_out
            lowest = sorted({*lowest, place})[:2]
        if not lowest:
            raise InputError("data.train: empty corpus: no document with text in it")
        if len(lowest) == 1:
            raise InputError("data.train: one document cannot be split; name a validation source, or give more files")
        return lowest[1]
