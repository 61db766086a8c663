"""Describes and verifies caches on disk; needs neither the teacher nor the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill.core.errors import InputError, MachineError
from distill.core.outside import is_folder
from distill.data.teacher_cache.cache import CacheLocation
from distill.data.teacher_cache.fidelity import Fidelity
from distill.data.teacher_cache.head_file import head_file, is_whole
from distill.data.teacher_cache.identity import HEADER, read_header
from distill.data.teacher_cache.shards import Shard, open_shards, shard_files


def caches(folder: Path) -> list[CacheLocation]:
    """The caches in a folder: the one that it is itself, or those of the training and the validation text in it.

    Raises:
        InputError: there is none, or one of another version.
    """
    places = sorted([*folder.glob(HEADER), *folder.glob(f"*/{HEADER}")]) if is_folder(folder) else []
    found = [file.parent for file in places]
    if not found:
        raise InputError(f"{folder}: no teacher cache there (no {HEADER} in it or one level below)")
    return [CacheLocation.there(place) for place in found]


def describe(place: CacheLocation) -> str:
    """Describe a cache to the user: its identity, codec, size and fidelity."""
    header, shards, identity = read_header(place.folder), open_shards(place.folder), place.identity
    assert header is not None
    tokens, size = sum(int(shard.sizes.sum()) for shard in shards), sum(shard.num_bytes() for shard in shards)
    settings = ", ".join(f"{key} {value}" for key, value in identity.codec.items() if key != "kind")
    return "\n".join(
        [
            f"{place.folder}: {place.codec.kind}" + (f" ({settings})" if settings else ""),
            f"  teacher {identity.teacher}, tokenizer {identity.tokenizer}, text {identity.text}",
            f"  read as {identity.packing} rows of {identity.window} tokens, vocabulary {place.vocabulary:,}",
            f"  {tokens:,} tokens in {_shards(len(shards))}, {size / 1e6:,.1f} MB, "
            f"{size / max(tokens, 1):.1f} bytes per token",
            f"  when it was begun: {Fidelity(**header['fidelity']).line()}",
        ]
    )


def _shards(count: int) -> str:
    return f"{count} shard" + ("" if count == 1 else "s")


def damages(place: CacheLocation) -> Iterator[str]:
    """Yield one line per damaged shard, or one for the whole cache if it has no shards."""
    if not shard_files(place.folder):
        yield f"{place.folder}: holds nothing"
    for file in shard_files(place.folder):
        try:
            shard = Shard(file)
        except ValueError as error:
            yield str(error)
            continue
        if damaged := shard.damaged():
            yield f"{file}: damaged (rows {_some(damaged)})"
        elif wrong := shard.nonsense(place.codec, place.width, place.identity.window):
            yield f"{file}: not what {place.codec.kind} writes, though its checksums are right (rows {_some(wrong)})"


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def verify(folder: Path) -> str:
    """Verify all checksums, and that every row can be decoded. Returns a one-line summary.

    Raises:
        InputError: there is no cache.
        MachineError: some of it is damaged or gone; names every such file.
    """
    places = caches(folder)
    heads = sorted({head_file(place.folder.parent) for place in places})
    lines = [line for place in places for line in damages(place)]
    lines += [f"{head}: damaged" for head in heads if head.is_file() and not is_whole(head)]
    if lines:
        fix = f"remove {'these' if len(lines) > 1 else 'it'}; the next run writes anew what was there"
        raise MachineError("\n".join([*lines, fix]))
    shards = [shard for place in places for shard in open_shards(place.folder)]
    rows = sum(len(shard.rows) for shard in shards)
    return f"{folder}: {rows:,} rows in {_shards(len(shards))}, every checksum is right and every row can be read"
