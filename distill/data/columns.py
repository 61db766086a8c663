"""Sources whose rows have columns: the text of a row is one of them, or a template over several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import field_validator

from distill.data.base import Document, Rejected, SourceSpec
from distill.data.message import Unusable
from distill.data.text_template import TextOf

Numbered = tuple[str, Any]
"""(name in messages to the user, row or :class:`Unusable`)."""


class ColumnsSpec(SourceSpec):
    """A source of rows with columns. An unusable row is yielded with the reason, and counted."""

    text: str = "text"
    """The column that holds the text, or a Jinja template over columns, such as "{{ title }}\\n\\n{{ body }}"."""

    def rows(self, columns: frozenset[str] | None) -> Iterator[Numbered]:
        """Yield every row, in a fixed order.

        Args:
            columns: columns to read, for formats that can skip the others; None: all.

        Raises:
            InputError: a file cannot be read, or lacks a column from which the text is built.
        """
        raise NotImplementedError

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names of the classes that a column stores as numbers from 0; None if the source does not name them.

        Raises:
            InputError: the source cannot be read.
        """
        return None

    def documents(self) -> Iterator[Document | Rejected]:
        """Yield one document per row, in order; rows with an empty text are skipped."""
        text_of = TextOf(self.text)
        yield from self.documents_of(self.rows(text_of.columns), text_of)

    def documents_of(self, rows: Iterable[Numbered], text_of: TextOf) -> Iterator[Document | Rejected]:
        """Yield one document per given row, in order; rows with an empty text are skipped."""
        for id, row in rows:
            try:
                if isinstance(row, Unusable):
                    raise row
                text = text_of(row)
            except Unusable as why:
                # the detail may quote a lone surrogate, which cannot be printed
                yield Rejected(id, why.reason, why.detail.encode("utf-8", "backslashreplace").decode())
                continue
            if text.strip():
                yield Document(id, text)

    def drops_rows(self) -> bool:
        """True: unusable rows are yielded as :class:`~distill.data.base.Rejected`."""
        return True

    def missing(self, columns: list[str]) -> str | None:
        """Why the text cannot be built from these columns; None if it can."""
        return TextOf(self.text).missing(columns)

    @field_validator("text")
    @classmethod
    def _is_a_template_that_may_be_used(cls, text: str) -> str:
        TextOf(text)
        return text
