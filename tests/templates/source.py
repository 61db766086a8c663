"""A source to start from: the paragraphs of one text file, each a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from distill.core.errors import InputError
from distill.data.base import Document, SourceSpec, digest


class TemplateSource(SourceSpec):
    """The paragraphs of a text file."""

    kind: Literal["template_source"] = "template_source"
    path: str
    """The file, in UTF-8; paragraphs are divided by empty lines."""

    def documents(self) -> Iterator[Document]:
        """One document per paragraph, in the order of the file."""
        for number, text in enumerate(self._read().split("\n\n"), start=1):
            if text.strip():
                yield Document(f"{self.path}:{number}", text)

    def fingerprint(self) -> str:
        """A hash of the text."""
        return digest(self._read()).hex()

    def num_bytes(self) -> int | None:
        """The size of the text."""
        return len(self._read().encode("utf-8"))

    def _read(self) -> str:
        try:
            return Path(self.path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read as text ({error}); name another file") from None
