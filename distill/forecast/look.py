"""The first rows of a source, read once for everything that can be said of a text before a run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from distill.core.tasks import ModelTask
from distill.data.base import Conversation, Document, Item, Rejected, SourceSpec, Tokenized
from distill.data.labelled import labelled
from distill.data.tally import Tally
from distill.models.load import locate
from distill.recipe import Recipe

LOOKED_AT, LOOK_S, LOOK_BYTES = 500, 2.0, 1_000_000
"""Rows, seconds and bytes of each source, whichever is reached first."""
PIECE = 20_000
"""Characters that a tokenizer is given at once, as it takes hundreds of bytes of memory for each of them."""


@dataclass
class Look:
    """What was found.

    Attributes:
        items: the usable rows.
        is_all: whether they are all that the source has.
        tally: of all rows that were read.
    """

    items: list[Document | Conversation | Tokenized] = field(default_factory=list)
    is_all: bool = True
    tally: Tally = field(default_factory=Tally)

    @property
    def texts(self) -> list[str]:
        """Those of the items that are no token ids."""
        return [item.text for item in self.items if not isinstance(item, Tokenized)]

    @property
    def num_ids(self) -> int:
        """Token ids of the items that are some."""
        return sum(len(item.ids) for item in self.items if isinstance(item, Tokenized))

    @property
    def num_bytes(self) -> int:
        """Of the texts, as UTF-8."""
        return sum(len(text.encode("utf-8")) for text in self.texts)

    def add(self, item: Item) -> int:
        """Take an item; about the bytes that it has in memory."""
        if isinstance(item, Rejected):
            self.tally.drop(item)
            return 0
        self.tally.note({})
        self.items.append(item)
        return len(item.text)


def look(source: SourceSpec, task: ModelTask, key: str) -> Look | None:
    """The first rows of a source, as the task reads them; None where that is a download or a stream.

    Args:
        source: of the recipe.
        task: of the recipe.
        key: of the source in the recipe.

    Raises:
        InputError: a file cannot be read.
    """
    if not source.is_at_hand():
        return None
    found, size, until = Look(), 0, time.monotonic() + LOOK_S
    items = source.documents() if task.is_causal else labelled(source, task, key)
    for number, item in enumerate(items):
        if number >= LOOKED_AT or size >= LOOK_BYTES or time.monotonic() > until:
            found.is_all = False
            break
        size += found.add(item)
    return found


def pieces_of(texts: list[str], num_characters: int) -> list[str]:
    """The beginning of texts, in pieces of :data:`PIECE` characters at most, until there are so many characters."""
    pieces, size = list[str](), 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            if size >= num_characters:
                return pieces
            pieces.append(text[start : start + PIECE])
            size += len(pieces[-1])
    return pieces


def tokenizer_of(recipe: Recipe) -> tuple[str, Path] | None:
    """Whose tokenizer the run reads its text with, and its file; None where it is not on this machine, or made by the
    run."""
    wanted = recipe.data.tokenizer
    named = recipe.teacher if wanted == "teacher" else wanted
    if not isinstance(named, str) or named in recipe.stages:
        return None
    file = tokenizer_file(named)
    return None if file is None else (named, file)


def tokenizer_file(reference: str) -> Path | None:
    """The ``tokenizer.json`` of a model; None where it is not on this machine."""
    file = Path(locate(reference)) / "tokenizer.json"
    return file if file.is_file() else None
