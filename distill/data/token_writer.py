"""Writes encoded documents and conversations, batch by batch, to the open files of a token file; unusable ones are
counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO

import numpy as np

from distill.core.errors import InputError
from distill.data.base import Rejected
from distill.data.tally import Tally
from distill.data.token_chunk import TokenChunk


class TokenWriter:
    """Appends rows to the open files of a token file, and counts.

    Args:
        name: the text's key in the recipe.
        streams: suffix -> open file.
        dtype: dtype of the ids.
        vocabulary_size: every id must be below it.
        gives_up: raise an error if many rows at the start are all unusable.
    """

    def __init__(
        self, name: str, streams: Mapping[str, IO[bytes]], dtype: str, vocabulary_size: int, *, gives_up: bool = True
    ):
        self.name, self.streams, self.dtype, self.vocabulary_size = name, streams, dtype, vocabulary_size
        self.gives_up = gives_up
        self.tally = Tally()
        self.counts = {"num_tokens": 0, "num_documents": 0, "num_bytes": 0, "largest": 0}
        self.counts |= {"num_learned": 0} if ".learned" in streams else {}
        streams[".bounds"].write(bytes(8))

    def add(self, chunk: TokenChunk) -> None:
        """Append an encoded batch.

        Raises:
            InputError: an id outside the model's vocabulary, or many consecutive unusable rows at the start.
        """
        for item in chunk.items:
            if isinstance(item, Rejected):
                self.tally.drop(item)
                if self.gives_up and self.tally.is_hopeless():
                    self.tally.check(f"data.{self.name}", 0.0)
                continue
            if item.words is None:
                self.tally.note(item.noted, None if item.is_conversation else item.id)
            else:
                self.tally.add_copy(*item.words)
            self.counts["num_bytes"] += item.num_bytes
        if chunk.digests is not None:
            self.streams[".digests"].write(chunk.digests)
        if len(chunk.ids):
            self._append(chunk)

    def _append(self, chunk: TokenChunk) -> None:
        ends = np.cumsum(chunk.lengths)  # [rows]
        largest = int(chunk.ids.max())
        if largest >= self.vocabulary_size:
            self._refuse(chunk, ends)
        chunk.ids.astype(self.dtype).tofile(self.streams[".bin"])
        (ends + self.counts["num_tokens"]).tofile(self.streams[".bounds"])
        if ".learned" in self.streams:
            learned = np.ones(len(chunk.ids), bool) if chunk.learned is None else chunk.learned
            learned.tofile(self.streams[".learned"])
            self.counts["num_learned"] += int(learned.sum())
        if chunk.sizes is not None:
            chunk.sizes.tofile(self.streams[".bytes"])
        self.counts["largest"] = max(self.counts["largest"], largest)
        self.counts["num_tokens"] += len(chunk.ids)
        self.counts["num_documents"] += len(chunk.lengths)

    def _refuse(self, chunk: TokenChunk, ends: np.ndarray) -> None:
        """Raise an error that names the first item with an id that is too large."""
        place = int(np.argmax(chunk.ids >= self.vocabulary_size))
        row = int(np.searchsorted(ends, place, "right"))
        used = [item for item in chunk.items if not isinstance(item, Rejected)]
        item = used[int(np.searchsorted(np.cumsum([each.num_rows for each in used]), row, "right"))]
        largest = int(chunk.ids[ends[row] - chunk.lengths[row] : ends[row]].max())
        raise InputError(token_too_large(item.id, largest, self.vocabulary_size))


def token_too_large(where: str, token: int, vocabulary_size: int) -> str:
    """The message for an id outside the model's vocabulary."""
    return (
        f"{where}: token id {token}, but the model's vocabulary has {vocabulary_size} rows; "
        "the tokenizer belongs to another model"
    )
