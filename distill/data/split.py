"""Splits documents into training and validation text by a hash, independently of order, seed and machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cached_property
from pathlib import Path

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.data.base import DIGEST_BYTES, Conversation, Document, Item, Rejected, SourceSpec, digest, normalised
from distill.data.spec import DataSpec

_STREAM_BYTES_PER_TOKEN = 8  # twice the bytes of an English token, so the text is enough


RULE = "texts are equal when their normalised forms are"
"""Version of the split rule; token files made with another version are rebuilt."""


class Side(Enum):
    """The side of the split on which a document of the training source is."""

    TRAIN = "train"
    VALIDATION = "validation"
    REPEATED = "left out, as a validation source has its text"


class Split:
    """The two sides of a run's text. Texts that are equal as :func:`~distill.data.base.normalised` are never on both.

    Unusable rows are yielded as validation rows if they come from the validation source, otherwise as training rows.

    Without a validation source a document is held out when the hash of its key, read as a number in [0, 1), is below
    ``held_out``. With one, training leaves out every document whose text is also in the validation source.

    Args:
        data: the recipe's ``data`` section.
        key: key of the training source in the recipe.
        read: reads a source; None: :meth:`SourceSpec.documents`.

    Attributes:
        num_repeated: number of training documents that the latest complete pass left out because the validation source
            has them.
        digests: file of :attr:`validation_digests`, from which they are read if it exists.
    """

    digests: Path | None = None

    def __init__(
        self,
        data: DataSpec,
        key: str = "data.train",
        read: Callable[[SourceSpec], Iterator[Item]] | None = None,
    ):
        self.data, self.key = data, key
        self.num_repeated = 0
        self._documents = read or (lambda source: source.documents())

    def training(self) -> Iterator[Item]:
        """Yield the documents to train on, in the source's order; each call starts from the beginning."""
        self.prepare()
        repeated = 0
        for document in stoppable(self._documents(self.data.train)):
            side = self.side_of(document)
            repeated += side is Side.REPEATED
            if side is Side.TRAIN:
                yield document
        self.num_repeated = repeated

    def side_of(self, document: Item) -> Side:
        """The side of a document of the training source."""
        if isinstance(document, Rejected):
            return Side.TRAIN
        if self.data.validation is not None:
            seen = digest(normalised(document.text)) in self.validation_digests
            return Side.REPEATED if seen else Side.TRAIN
        return Side.VALIDATION if self.is_held_out(document) else Side.TRAIN

    def is_held_out(self, document: Item) -> bool:
        """Whether a document is held out for validation, if there is no validation source."""
        return not isinstance(document, Rejected) and self._place(document) < self._threshold

    def to_train(self, documents: Iterable[Item]) -> tuple[list[Item], int]:
        """Filter documents of the training source: (training documents, number skipped as repeated)."""
        sides = [(document, self.side_of(document)) for document in documents]
        kept = [document for document, side in sides if side is Side.TRAIN]
        return kept, sum(side is Side.REPEATED for _, side in sides)

    def trained_of(self, documents: Iterable[Item]) -> Iterator[Item]:
        """Filter documents of the training source: yield the training documents, as they come."""
        return (document for document in stoppable(documents) if self.side_of(document) is Side.TRAIN)

    def to_validate(self, documents: Iterable[Item]) -> tuple[list[Item], int]:
        """Filter documents of the training source: (held-out documents, 0, because none is skipped as repeated)."""
        return [document for document in documents if self.is_held_out(document)], 0

    def prepare(self, *, to_train: bool = True) -> None:
        """Read what :meth:`side_of` depends on, so that processes that are forked have it too.

        Args:
            to_train: False if only :meth:`is_held_out` will be called.

        Raises:
            InputError: there is nothing to split, or a source cannot be read.
        """
        if self.data.validation is None:
            self._threshold  # noqa: B018  # computed once, and kept
        elif to_train:
            self.validation_digests  # noqa: B018

    def read(self, source: SourceSpec) -> Iterator[Item]:
        """Yield all documents of one of the two sources, as this split reads them."""
        return self._documents(source)

    def texts(self) -> Iterator[str]:
        """Yield the texts of :meth:`training`."""
        return (document.text for document in self.training() if not isinstance(document, Rejected))

    def validation(self) -> Iterator[Item]:
        """Yield the documents to validate on; for a stream, as many as the requested validation tokens need."""
        source = self.data.validation or self.data.train
        is_split = self.data.validation is None
        if is_split:
            self._threshold  # noqa: B018  # so that an empty source raises an error in any case
        budget = self.data.validation_tokens * _STREAM_BYTES_PER_TOKEN if source.is_stream() else float("inf")
        for document in stoppable(self._documents(source)):
            if is_split and not self.is_held_out(document):
                continue
            yield document
            if isinstance(document, Rejected):
                continue
            budget -= len(document.text.encode("utf-8"))
            if budget <= 0:
                return

    @cached_property
    def validation_digests(self) -> set[bytes]:
        """Digests of the normalised texts of :meth:`validation`."""
        if self.digests is not None and self.digests.is_file():
            content = self.digests.read_bytes()
            return {content[at : at + DIGEST_BYTES] for at in range(0, len(content), DIGEST_BYTES)}
        seen = (document for document in self.validation() if not isinstance(document, Rejected))
        return {digest(normalised(document.text)) for document in seen}

    def _place(self, document: Document | Conversation) -> float:
        return int.from_bytes(digest(self.data.train.split_key(document))[:8], "big") / 2**64

    @cached_property
    def _threshold(self) -> float:
        """Hash threshold: ``held_out``, or the second-lowest hash if no document would be held out.

        Raises:
            InputError: there is nothing to split.
        """
        lowest: list[float] = []
        rejected: Rejected | None = None
        for document in stoppable(self._documents(self.data.train)):
            if isinstance(document, Rejected):
                rejected = rejected or document
                continue
            place = self._place(document)
            if place < self.data.held_out:
                return self.data.held_out
            lowest = sorted({*lowest, place})[:2]
        if not lowest and rejected is not None:
            raise InputError(f"{self.key}: no row can be used (first {rejected.id}: {rejected.detail})")
        if not lowest:
            raise InputError(f"{self.key}: empty corpus: no document with text in it")
        if len(lowest) == 1:
            raise InputError(f"{self.key}: one document cannot be split; name a validation source, or give more files")
        return lowest[1]
