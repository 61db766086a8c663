"""Counts of the rows of a text that were used, and of those that were not, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from distill.core.errors import InputError
from distill.data.base import Rejected, Removed

TOO_LONG = "too long"
_HINTS = {TOO_LONG: "raise data.sequence_length, or set data.chat.too_long: cut_turns"}
_HOPELESS = 200
"""Number of rows after which reading stops if none of them is usable."""
_EXAMPLES = 3
"""Number of example rows per reason for which ``data.clean`` leaves rows out."""


@dataclass
class Tally:
    """Counts of a text's rows.

    Attributes:
        num_read: number of rows that were read, including dropped ones.
        dropped: reason -> number of rows.
        first: reason, or note on a document -> the first such row, with file and line.
        noted: note on used rows -> count.
        removed: reason why ``data.clean`` left rows out -> number of rows. They are not among the dropped.
        examples: reason of ``removed`` -> the first few of its rows, with file and line.
        copies: counts of the copies that ``data.augment`` has added: ``num`` copies, ``words`` in them and ``replaced``
            words. They are not among the rows that were read.
    """

    num_read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        """Number of unusable rows, for any reason."""
        return sum(self.dropped.values())

    @property
    def num_removed(self) -> int:
        """Number of usable rows that the recipe excludes."""
        return sum(self.removed.values())

    @property
    def num_used(self) -> int:
        """Number of rows that were read and used."""
        return self.num_read - self.num_dropped - self.num_removed

    def drop(self, row: Rejected) -> None:
        """Count a row that is not used."""
        self.num_read += 1
        if isinstance(row, Removed):
            self.removed[row.reason] = self.removed.get(row.reason, 0) + 1
            if len(examples := self.examples.setdefault(row.reason, [])) < _EXAMPLES:
                examples.append(f"{row.id} {row.detail}")
            return
        self.dropped[row.reason] = self.dropped.get(row.reason, 0) + 1
        self.first.setdefault(row.reason, f"{row.id}: {row.detail}")

    def note(self, noted: Mapping[str, int], id: str | None = None) -> None:
        """Count a used row; if its ``id`` is given, remember the first row with each note."""
        self.num_read += 1
        self.noted = dict(Counter(self.noted) + Counter(noted))
        if id is not None:
            for what in noted:
                self.first.setdefault(what, id)

    def add_copy(self, num_words: int, num_replaced: int) -> None:
        """Count a copy of a document with ``num_words`` words, of which ``num_replaced`` are replaced."""
        for key, count in (("num", 1), ("words", num_words), ("replaced", num_replaced)):
            self.copies[key] = self.copies.get(key, 0) + count

    def add(self, other: Tally) -> None:
        """Count the rows of another part of the text, which follows this one."""
        self.num_read += other.num_read
        for ours, theirs in (
            (self.dropped, other.dropped),
            (self.noted, other.noted),
            (self.removed, other.removed),
            (self.copies, other.copies),
        ):
            for key, count in theirs.items():
                ours[key] = ours.get(key, 0) + count
        for reason, row in other.first.items():
            self.first.setdefault(reason, row)
        for reason, examples in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += examples[: _EXAMPLES - len(known)]

    def is_hopeless(self) -> bool:
        """Whether many rows were read and none is usable."""
        return self.num_read == self.num_dropped == _HOPELESS

    def check(self, what: str, most: float) -> None:
        """Check that not too many rows of a text are unusable.

        Args:
            what: the text's key in the recipe.
            most: largest fraction of unusable rows.

        Raises:
            InputError: the fraction is exceeded; names each reason and its first row.
        """
        if self.num_dropped <= most * self.num_read:
            return
        hints = [hint for reason, hint in _HINTS.items() if reason in self.dropped]
        raise InputError(
            f"{what}: {self.num_dropped:,} of {self.num_read:,} rows cannot be used "
            f"({self.num_dropped / self.num_read:.1%}; data.max_dropped allows {most:.1%}): {self.reasons()}; "
            + "; ".join([*hints, "fix them, or raise data.max_dropped to leave them out"])
        )

    def reasons(self) -> str:
        """Every reason with its count and its first row, the most frequent first."""
        ordered = sorted(self.dropped.items(), key=lambda item: -item[1])
        return "; ".join(f"{count:,} {reason} (first {self.first[reason]})" for reason, count in ordered)

    def lines(self, what: str) -> list[str]:
        """Lines for the user: what was dropped, and further notes; empty if there are none."""
        lines = [
            f"{what}: {count:,} {note}" + (f" (first {self.first[note]})" if note in self.first else "")
            for note, count in self.noted.items()
            if count
        ]
        if self.num_dropped:
            lines.insert(0, f"{what}: left out {self.num_dropped:,} of {self.num_read:,} rows: {self.reasons()}")
        if self.num_removed:
            why = "; ".join(
                f"{count:,} {reason} (first {', '.join(self.examples[reason])})"
                for reason, count in sorted(self.removed.items(), key=lambda item: -item[1])
            )
            share = f"{self.num_removed:,} of {self.num_read:,} rows ({self.num_removed / self.num_read:.1%})"
            lines.append(f"{what}: data.clean left out {share}: {why}")
        if self.copies:
            num, words, replaced = (self.copies[key] for key in ("num", "words", "replaced"))
            lines.append(
                f"{what}: data.augment added {num:,} copies of documents, in which {replaced:,} of {words:,} words "
                f"({replaced / words:.1%}) are replaced"
            )
        return lines
