"""Writes the missing rows of a cache, shard by shard. A kill loses one shard, and the same call continues with the same
bytes."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill.core.artifact import hash_of
from distill.core.batch import model_inputs
from distill.core.errors import MachineError
from distill.core.stop import stoppable
from distill.core.stored import write_checked
from distill.data.packed_rows import PackedRows
from distill.data.packing import file_lock
from distill.data.teacher_cache.cache import CacheLocation, ids_of
from distill.data.teacher_cache.fidelity import Fidelity, measure
from distill.data.teacher_cache.identity import HEADER, VERSION
from distill.data.teacher_cache.positions import kept_of
from distill.data.teacher_cache.shards import Coded, checksum, open_shards, shard_file, write_shard

if TYPE_CHECKING:
    from torch import Tensor

    from distill.data.packing import TokenFile

_SHARD_BYTES = 64 << 20
_CHUNK = 512
_SAMPLE_TOKENS = 2048
_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Live:
    """A loaded teacher.

    Attributes:
        hidden: function: batch -> final hidden states [batch, sequence, hidden].
        logits: function: [tokens, hidden] -> [tokens, vocabulary].
        device: device of the inputs of both.
    """

    hidden: Callable[[dict[str, Tensor]], Tensor]
    logits: Callable[[Tensor], Tensor]
    device: torch.device


def fill(
    place: CacheLocation,
    tokens: TokenFile,
    wanted: Sequence[int],
    live: Callable[[], Live],
    *,
    batch_size: int,
    what: str,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Add those of the teacher's rows ``wanted`` that are missing to the cache (see :meth:`CacheLocation.needed`).

    Processes that fill the same cache at once wait for each other.

    Args:
        place: the cache.
        tokens: the text.
        wanted: numbers of rows.
        live: loads the teacher; only called when something is missing.
        batch_size: rows per forward pass.
        what: name of the text in messages to the user, such as ``"train"``.
        say: prints a line.

    Returns:
        The cache's header.

    Raises:
        InputError: the existing cache belongs to another teacher, tokenizer, text or codec, or the codec cannot encode
            this vocabulary.
        MachineError: the disk is full or not writable.
    """
    with file_lock(place.folder):
        missing = place.missing(wanted)
        header = place.header()
        if missing:
            teacher, read = live(), place.rows(tokens)
            header = header or _begin(place, read, missing, teacher)
            _announce(place, Fidelity(**header["fidelity"]), _num_cached(read, missing), what, say)
            _write(place, read, missing, teacher, header["rows_per_shard"], batch_size, what)
        elif wanted:
            say(f"{what}: all {len(wanted):,} rows are in the cache already")
        assert header is not None
        return header


def _begin(place: CacheLocation, read: PackedRows, missing: Sequence[int], live: Live) -> dict[str, Any]:
    """Measure the codec on a sample, spread over the rows to come, and write the header."""
    count = min(len(missing), max(1, _SAMPLE_TOKENS // read.sequence_length))
    sample = [missing[i * len(missing) // count] for i in range(count)]
    pairs = [(hidden, coded.data) for hidden, coded in _encode(place, read, sample, live, count)]
    fidelity = measure(pairs, place.codec, place.width, place.vocabulary, live.logits)
    header = {
        "version": VERSION,
        "identity": asdict(place.identity),
        "width": place.width,
        "vocabulary": place.vocabulary,
        "rows_per_shard": max(1, round(_SHARD_BYTES / (fidelity.bytes_per_token * read.sequence_length))),
        "fidelity": asdict(fidelity),
    }
    write_checked(place.folder / HEADER, header)
    return header


def _announce(place: CacheLocation, fidelity: Fidelity, tokens: int, what: str, say: Callable[[str], None]) -> None:
    """Print the size and fidelity of the cache, and check that the disk has room for it."""
    needed, free = tokens * fidelity.bytes_per_token, shutil.disk_usage(place.folder).free
    say(f"{what}: {tokens:,} tokens as {place.codec.kind}, {fidelity.line()}, {needed / 1e6:,.1f} MB on disk")
    if needed > free:
        raise MachineError(
            f"{place.folder}: the teacher cache needs {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free; "
            "take a smaller codec or num_sequences, or another folder"
        )


def _write(
    place: CacheLocation, read: PackedRows, missing: list[int], live: Live, per_shard: int, batch_size: int, what: str
) -> None:
    progress = RowProgress(f"caching the teacher: {what}", len(missing))
    names = _free_names(place.folder)
    for start in range(0, len(missing), per_shard):
        coded = []
        for _, row in _encode(place, read, missing[start : start + per_shard], live, batch_size):
            coded.append(row)
            progress.advance()
        write_shard(next(names), coded)


def _free_names(folder: Path) -> Iterator[Path]:
    """Names of shards to write: those that do not exist, or are damaged and written again."""
    whole = {shard.file for shard in open_shards(folder)}
    number = 0
    while True:
        if (file := shard_file(folder, number)) not in whole:
            yield file
        number += 1


@torch.inference_mode()
def _encode(
    place: CacheLocation, read: PackedRows, numbers: Sequence[int], live: Live, batch_size: int
) -> Iterator[tuple[Tensor, Coded]]:
    """Yield per row the teacher's hidden states [positions, hidden] and their encoded bytes.

    The positions are all tokens of the row, or, with a mask of learned tokens, those whose next token is learned from.
    The last position of a row is included, because in another packing the text may continue there. Start tokens that
    are inserted before a piece are not included.
    """
    for start in stoppable(range(0, len(numbers), batch_size)):
        some = list(numbers[start : start + batch_size])
        batch = read[some]
        states = live.hidden(model_inputs(batch, live.device))
        for number, state in zip(some, states, strict=True):
            columns = torch.from_numpy(read.columns(number)).to(state.device)
            hidden, cached = state[columns], kept_of(read, number)
            if cached is not None:
                hidden = hidden[torch.from_numpy(cached).to(hidden.device)]
            data = encode_row(place, hidden, number, live)
            yield hidden, Coded(number, len(hidden), checksum(ids_of(read, number)), data)


def _num_cached(read: PackedRows, rows: Sequence[int]) -> int:
    """Number of positions of rows that are cached."""
    if read.tokens.num_learned is None:
        return sum(size for row in rows for _, size in read.rows.spans(row))
    return sum(int(kept.sum()) for row in rows if (kept := kept_of(read, row)) is not None)


def encode_row(place: CacheLocation, hidden: Tensor, number: int, live: Live) -> Tensor:
    """Encode a row as bytes, uint8; they depend only on the row and its cache. hidden: [positions, hidden]"""
    generator = torch.Generator(hidden.device)
    generator.manual_seed(int(hash_of(place.identity.key(), number), 16) % 2**63)
    fields: list[list[Tensor]] = []
    for rows in hidden.split(_CHUNK):
        taught = rows if place.codec.reads == "hidden" else live.logits(rows).float().log_softmax(-1)
        fields.append(place.codec.encode(taught, generator))
    return place.codec.pack([torch.cat(parts).cpu() for parts in zip(*fields, strict=True)], place.width)


class RowProgress:
    """Prints a line to standard error now and then, with the remaining time."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self._start = self._last = time.monotonic()

    def advance(self) -> None:
        """Count one more row."""
        self.done += 1
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_S:
            self._last = now
            left_s = (now - self._start) / self.done * (self.total - self.done)
            line = f"{self.what}: {self.done:,} of {self.total:,} rows, {left_s:.0f} s left"
            print(f"  {line}", file=sys.stderr, flush=True)
