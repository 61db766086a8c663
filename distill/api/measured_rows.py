"""Measured models, as a list that a notebook shows as a table."""

from __future__ import annotations

from distill.reporting.tables import markdown_table
from distill.reporting.tradeoff import Row


class Rows(list[Row]):
    """Measured models, one :class:`~distill.reporting.tradeoff.Row` each."""

    def of(self, name: str) -> Row:
        """The row of one model.

        Raises:
            KeyError: there is none of this name.
        """
        for row in self:
            if row.name == name:
                return row
        raise KeyError(f"{name}: not measured (measured are {', '.join(row.name for row in self)})")

    def markdown(self) -> str:
        """The rows as a Markdown table; the best values are bold."""
        return markdown_table(self)

    def _repr_markdown_(self) -> str:
        return self.markdown()
