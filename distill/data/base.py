"""What a source of text is: documents in a fixed order, and a fingerprint of what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from distill.core.spec import Spec


@dataclass(frozen=True, slots=True)
class Document:
    """One text that stands for itself: a file, a row, a help topic.

    Attributes:
        id: what a message calls it, such as ``"notes/a.txt"`` or ``"rows.jsonl:17"``.
        text: never empty; can always be written as UTF-8.
    """

    id: str
    text: str


class SourceSpec(Spec):
    """Where text comes from. The order of its documents is always the same."""

    kind: str

    def documents(self) -> Iterator[Document]:
        """Every document, in a fixed order; each call begins again.

        Raises:
            InputError: the text is not there or cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash that changes when the documents or their order change. File times do not matter.

        Raises:
            InputError: the text is not there.
        """
        raise NotImplementedError

    def num_bytes(self) -> int | None:
        """About how much text there is, in bytes, for the forecast of time; None when only reading would tell."""
        return None

    def is_stream(self) -> bool:
        """Whether the text is read as it comes and never stored."""
        return False

    def split_key(self, document: Document) -> str:
        """What decides the side of the split. The text itself, so that equal texts fall on one side."""
        return document.text


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]
