"""Tokenizes a text with all processes of a run, a part each; the result equals the file that one process would write.

Each process reads the source from its beginning, which takes a small part of the time. Documents of a shard that it has
claimed go through the split and the tokenizer, in worker processes; those of other shards are skipped. Where a shard
begins depends on the text alone, so the shards do not depend on the process that makes them. At the end the first
process that finds all of them concatenates them, and the others open the whole file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from distill.core import stop
from distill.core.artifact import make_folder
from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.core.world import World
from distill.data import token_shards
from distill.data.base import Item
from distill.data.encoder import TextEncoder
from distill.data.joined import end_to_end
from distill.data.packing import (
    TokenFile,
    dtype_of,
    file_lock,
    header_of,
    is_enough,
    kinds_of,
    read_tokens,
    writing,
)
from distill.data.progress import Progress
from distill.data.tally import Tally
from distill.data.token_chunk import Batch, Keep, TokenChunk, chunk_of
from distill.data.token_shards import TokenShards
from distill.data.token_workers import chunks
from distill.data.token_writer import TokenWriter

LOOK_S = 0.05
"""Seconds between two checks of the shards of other processes."""
PATIENCE_S = 8.0
"""Seconds that a rank other than 0 delays its error, so that rank 0 can report it first."""
SILENT_S = 30.0
"""Seconds of waiting after which a message says so."""


@dataclass
class SharedText:
    """One side of a text, to be tokenized.

    Attributes:
        path: the ``.bin`` file to write.
        documents: function that returns all documents of the source, in order.
        keep: selects the documents of this side, independently of the other documents.
        encoder: converts text to ids.
        vocabulary_size: every id must be below it.
        with_bytes: whether to write the bytes of text per token and the digests of the texts too.
        total_bytes: size of the text, for the progress bar; None if unknown.
        prepare: called before the source is read, if it has to be read.
        world: the processes of the run; processes without a shared folder each tokenize the whole text.
    """

    path: Path
    documents: Callable[[], Iterable[Item]]
    keep: Keep
    encoder: TextEncoder
    vocabulary_size: int
    with_bytes: bool
    total_bytes: int | None
    prepare: Callable[[], None]
    world: World

    def write(self) -> TokenFile:
        """Tokenize the shards that no other process has claimed, wait for the rest, and open the whole file.

        Raises:
            InputError: an id outside the model's vocabulary, or many consecutive unusable rows at the start. A rank
                other than 0 delays the error, so that rank 0 can report it first.
            MachineError: the disk is full or not writable.
        """
        parts = TokenShards(self.path)
        while (whole := read_tokens(self.path, quietly=True)) is None:
            stop.check()
            self._forget_what_is_damaged()
            make_folder(parts.folder)
            try:
                if parts.files() is None and not self.path.with_suffix(".json").is_file():
                    self._tokenize(parts)
            except InputError:
                parts.release_all()
                if not self.world.rank or not self._is_made_by_others():
                    raise
            finally:
                parts.release_all()
            self._wait(parts)
            if (files := parts.files()) is not None:
                self._join(files)
        parts.remove()
        return whole

    def _forget_what_is_damaged(self) -> None:
        if read_tokens(self.path, quietly=True) is not None or not self.path.with_suffix(".json").is_file():
            return
        with file_lock(self.path.parent):  # another process may have written it anew
            if read_tokens(self.path, quietly=True) is None:
                self.path.with_suffix(".json").unlink(missing_ok=True)

    def _tokenize(self, parts: TokenShards) -> None:
        """Read the source once, and write the shards that can be claimed."""
        self.prepare()
        name = self.path.name.rpartition("-")[0]
        both = self.with_bytes
        encode = partial(chunk_of, encoder=self.encoder, keep=self.keep, with_bytes=both, with_digests=both)
        kinds = kinds_of(self.encoder, with_bytes=both, with_digests=both)
        with (
            Progress(f"tokenizing {name}", self.total_bytes) as progress,
            closing(chunks(self._claimed(parts, progress), encode, self.world.local_size)) as made,
        ):
            for number, some in groupby(made, key=lambda chunk: chunk.shard):
                with writing(parts.path(number), kinds) as (files, header):
                    dtype, limit = dtype_of(self.vocabulary_size), self.vocabulary_size
                    writer = TokenWriter(name, files, dtype, limit, gives_up=number == 0)
                    header |= self._write(writer, some, progress)
                parts.release(number)

    def _write(self, writer: TokenWriter, made: Iterable[TokenChunk], progress: Progress) -> dict[str, Any]:
        """Write one shard. Returns its header."""
        num_repeated = 0
        for chunk in made:
            writer.add(chunk)
            num_repeated += chunk.num_repeated
            progress.advance(chunk.num_bytes)
        return header_of(writer, self.encoder) | {"num_repeated": num_repeated}

    def _claimed(self, parts: TokenShards, progress: Progress) -> Iterator[Batch]:
        """Yield batches of the shards that this process claims; documents of other shards are read and skipped."""
        number, read, is_ours, batch, size = -1, token_shards.CHARACTERS, False, list[Item](), 0
        for document in stoppable(self.documents()):
            if read >= token_shards.CHARACTERS:
                if batch:
                    yield Batch(batch, number)
                number, read, batch, size = number + 1, 0, [], 0
                is_ours = parts.claim(number)
            length = len(document.text)
            read += length
            if not is_ours:
                progress.advance(length)
                continue
            batch.append(document)
            size += length
            if is_enough(batch, size):
                yield Batch(batch, number)
                batch, size = [], 0
        if batch:
            yield Batch(batch, number)
        if number < 0 and parts.claim(0):
            yield Batch([], 0)  # a text without any document is one shard without tokens
        parts.tell_count(max(number, 0) + 1)

    def _wait(self, parts: TokenShards) -> None:
        """Wait until all shards are finished or joined, or one is free for this process to claim."""
        since, is_told = time.monotonic(), False
        while not self.path.with_suffix(".json").is_file():
            missing = [number for number in range(parts.count() or 0) if not parts.is_finished(number)]
            if not missing or any(map(parts.is_free, missing)):
                return
            stop.check()
            if not is_told and time.monotonic() - since > SILENT_S:
                is_told = True
                print(f"{self.path.name}: waiting for shards of other processes", file=sys.stderr, flush=True)
            time.sleep(LOOK_S)

    def _is_made_by_others(self) -> bool:
        """Whether the whole file appears although this process cannot tokenize its part.

        Meanwhile rank 0 probably finds the same error, reports it and ends the run.
        """
        until = time.monotonic() + PATIENCE_S
        while not self.path.with_suffix(".json").is_file():
            if time.monotonic() > until:
                return False
            stop.check()
            time.sleep(LOOK_S)
        return True

    def _join(self, files: list[TokenFile]) -> None:
        tally = Tally()
        for file in files:
            tally.add(file.tally)
        with file_lock(self.path.parent):
            if read_tokens(self.path, quietly=True) is None:
                end_to_end(self.path, files, tally)
