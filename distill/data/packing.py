"""Tokenizes documents once, into a flat file of ids that is memory-mapped afterwards.

The files of ``<name>-<hash>``, each a flat array:

    .bin        uint16 or uint32 [tokens]    the ids of all documents, end to end
    .bounds     int64 [documents + 1]        where each document begins in it, and the end of the last one
    .learned    uint8 [tokens]               1 where a token is learned from; absent when all of them are
    .bytes      uint32 [tokens]              UTF-8 bytes of text per token; validation text only
    .digests    uint8 [16 * texts]           digests of the validation texts; training documents with these digests are
                                             left out
    .json                                    written last: marks the others as complete
"""

from __future__ import annotations

import fcntl
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from distill.core import stop
from distill.core.artifact import sync
from distill.core.errors import InputError, MachineError, unwritable
from distill.core.outside import check_appendable, read_json
from distill.core.seal import Mark, changes, marks_of
from distill.core.stop import stoppable
from distill.core.stored import read_checked, write_checked
from distill.data.base import Item
from distill.data.encoder import TextEncoder
from distill.data.progress import Progress
from distill.data.tally import Tally
from distill.data.token_chunk import Batch, chunk_of
from distill.data.token_workers import chunks
from distill.data.token_writer import TokenWriter

VERSION = 2
"""Format version of token files. Files of another version are rebuilt."""
_HEADER: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 500_000


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk.

    Attributes:
        path: the ``.bin`` file.
        dtype: ``uint16`` or ``uint32``.
        num_tokens: number of ids in it, including start and end tokens.
        num_documents: number of documents in it, or of rows of conversations.
        num_bytes: UTF-8 bytes of their text.
        largest: the largest id.
        filling: id that pads rows; it is the tokenizer's end-of-text token.
        num_repeated: number of documents left out because they are in the validation source too.
        num_learned: number of tokens that are learned from; None: all.
        tally: counts of the source's rows: those that were left out, and what was found in those that are used.
        parts: the sources of a mixture, whose tokens are concatenated in this file; rows are cut from each part
            separately.
        start: ids that the tokenizer puts before a text; each row begins with them.
    """

    path: str
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    largest: int
    filling: int
    num_repeated: int = 0
    num_learned: int | None = None
    tally: Tally = field(default_factory=Tally)
    parts: tuple[Part, ...] = ()
    start: tuple[int, ...] = ()

    def end_of_originals(self) -> int:
        """Number of tokens before the copies that ``data.augment`` added, which are at the end."""
        copies = self.tally.copies.get("num", 0)
        return int(self.bounds()[self.num_documents - copies]) if copies else self.num_tokens

    def ids(self) -> np.ndarray:
        """All ids, memory-mapped. [num_tokens]"""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    def bounds(self) -> np.ndarray:
        """First token of each document, and the end of the last one, memory-mapped. int64 [num_documents + 1]"""
        return np.memmap(Path(self.path).with_suffix(".bounds"), np.int64, mode="r", shape=(self.num_documents + 1,))

    def learned(self) -> np.ndarray | None:
        """Whether each token is learned from, memory-mapped; None: all. bool [num_tokens]"""
        if self.num_learned is None:
            return None
        return np.memmap(Path(self.path).with_suffix(".learned"), np.bool_, mode="r", shape=(self.num_tokens,))

    def bytes_of_tokens(self) -> np.ndarray:
        """UTF-8 bytes of text per token, memory-mapped; validation text only. uint32 [num_tokens]"""
        return np.memmap(Path(self.path).with_suffix(".bytes"), dtype=np.uint32, mode="r", shape=(self.num_tokens,))

    def is_whole(self) -> bool:
        """Whether every file exists and has the right size, and the bounds ascend."""
        width = {"uint16": 2, "uint32": 4}.get(self.dtype, 0)
        sizes = {".bin": self.num_tokens * width, ".bounds": (self.num_documents + 1) * 8}
        if self.num_learned is not None:
            sizes[".learned"] = self.num_tokens
        if (beside := Path(self.path).with_suffix(".bytes")).is_file():
            sizes[beside.suffix] = self.num_tokens * 4
        files = {Path(self.path).with_suffix(suffix): size for suffix, size in sizes.items()}
        if width == 0 or not all(file.is_file() and file.stat().st_size == size for file, size in files.items()):
            return False
        bounds = self.bounds()
        return bool(bounds[0] == 0 and bounds[-1] == self.num_tokens and (bounds[1:] > bounds[:-1]).all())


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
        name: name of the source.
        weight: its fraction of the training tokens, as an integer; see :func:`distill.data.mixture_order.as_whole`.
        tokens: token file of the source alone.
    """

    name: str
    weight: int
    tokens: TokenFile


def read_tokens(path: Path, *, quietly: bool = False, just_written: bool = False) -> TokenFile | None:
    """The finished token file at ``path``; None if there is none or it must be rebuilt.

    Every byte is read, by one process per machine: the others find the digests of large files in the user's cache.

    Args:
        path: the ``.bin`` file.
        quietly: suppress the message if the file must be rebuilt.
        just_written: whether this process has just written it, so that the bytes need not be read again.
    """
    file, out = path.with_suffix(".json"), io.StringIO() if quietly else sys.stderr
    if not file.is_file():
        return None
    try:
        if read_json(file).get("version", 1) != VERSION:
            print(f"{path.name}: of an earlier version of distill; the text is tokenized again", file=out)
            return None
        header = read_checked(file, _HEADER, "")
        marks = TypeAdapter(dict[str, Mark]).validate_python(header.pop("files"))
        tokens = TypeAdapter(TokenFile).validate_python({**header, "path": str(path)})
        whole = not changes(path.parent, marks, read=not just_written, lasting=True) and tokens.is_whole()
    except (InputError, ValidationError, KeyError):
        whole = False
    if not whole:
        print(f"{path.name}: not what was written; the text is tokenized again", file=out)
    return tokens if whole else None


def digests_file(path: Path) -> Path | None:
    """The file of digests that belongs to the token file at ``path``; None if its header names none."""
    file = path.with_suffix(".digests")
    return file if file.name in read_json(path.with_suffix(".json")).get("files", {}) else None


def write_tokens(
    path: Path,
    documents: Iterable[Item],
    encoder: TextEncoder,
    vocabulary_size: int,
    *,
    with_bytes: bool = False,
    total_bytes: int | None = None,
    num_repeated: Callable[[], int] = lambda: 0,
) -> TokenFile:
    """Tokenize documents or conversations into ``path``, completely or not at all.

    Args:
        path: the ``.bin`` file to write.
        documents: items in the order in which they are stored; unusable ones are counted.
        encoder: converts text to ids.
        vocabulary_size: every id must be below it.
        with_bytes: whether to write the bytes of text per token too.
        total_bytes: size of the text, for the progress bar; None if unknown.
        num_repeated: callable that returns the number of skipped documents; called at the end for the header.

    Raises:
        InputError: an id outside the model's vocabulary, or many consecutive unusable rows at the start.
        MachineError: the disk is full or not writable.
    """
    dtype = dtype_of(vocabulary_size)
    encode = partial(chunk_of, encoder=encoder, keep=None, with_bytes=with_bytes)
    with writing(path, kinds_of(encoder, with_bytes=with_bytes)) as (streams, header):
        name = path.name.rpartition("-")[0]
        writer = TokenWriter(name, streams, dtype, vocabulary_size)
        with (
            Progress(f"tokenizing {name}", total_bytes) as progress,
            closing(chunks(map(Batch, batches(documents)), encode)) as made,
        ):
            for chunk in made:
                writer.add(chunk)
                progress.advance(chunk.num_bytes)
        header |= header_of(writer, encoder) | {"num_repeated": num_repeated()}
    tokens = read_tokens(path, just_written=True)
    assert tokens is not None
    return tokens


def dtype_of(vocabulary_size: int) -> str:
    """Dtype in which ids below ``vocabulary_size`` are stored."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def kinds_of(encoder: TextEncoder, *, with_bytes: bool, with_digests: bool = False) -> list[str]:
    """Suffixes of the files of a token file."""
    learned = [".learned"] * encoder.marks_learned
    return [".bin", ".bounds", *learned, *[".bytes"] * with_bytes, *[".digests"] * with_digests]


def header_of(writer: TokenWriter, encoder: TextEncoder) -> dict[str, Any]:
    """The fields of the header for everything that was written."""
    how = {"dtype": writer.dtype, "filling": encoder.end, "start": encoder.start}
    return {**writer.counts, **how, "tally": asdict(writer.tally)}


@contextmanager
def writing(path: Path, kinds: Sequence[str]) -> Iterator[tuple[dict[str, IO[bytes]], dict[str, Any]]]:
    """Write the files of a token file and their header, completely or not at all.

    Args:
        path: the ``.bin`` file.
        kinds: suffixes of the files.

    Yields:
        Suffix -> open file, and the header, to be filled with the fields of :class:`TokenFile`.

    Raises:
        MachineError: the disk is full or not writable.
    """
    files = [path.with_suffix(suffix) for suffix in kinds]
    temporaries = [file.with_name(f".{file.name}.writing") for file in files]
    header: dict[str, Any] = {"version": VERSION}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            yield dict(zip(kinds, [stack.enter_context(file.open("wb")) for file in temporaries], strict=True)), header
        stop.confirm()
        for temporary, file in zip(temporaries, files, strict=True):
            sync(temporary)
            temporary.replace(file)
        marks = marks_of(path.parent, [file.name for file in files])
        write_checked(path.with_suffix(".json"), header | {"files": {name: asdict(one) for name, one in marks.items()}})
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def store_tokens(
    path: Path,
    documents: Sequence[np.ndarray],
    filling: int,
    learned: Sequence[np.ndarray] | None = None,
    start: Sequence[int] = (),
) -> TokenFile:
    """Write token ids that are in memory.

    Args:
        path: the ``.bin`` file to write.
        documents: ids of each document, uint16 or uint32 [tokens], all of one dtype.
        filling: see :class:`TokenFile`.
        learned: per document, which tokens are learned from, bool [tokens]; None: all.
        start: see :class:`TokenFile`; the documents already contain them.
    """
    ids = np.concatenate(documents)
    ids.tofile(path)
    np.cumsum([0, *map(len, documents)], dtype=np.int64).tofile(path.with_suffix(".bounds"))
    if learned is not None:
        np.concatenate(learned).astype(np.bool_).tofile(path.with_suffix(".learned"))
    num_learned = None if learned is None else int(sum(some.sum() for some in learned))
    counts = (len(ids), len(documents), 1, int(ids.max()))
    return TokenFile(str(path), ids.dtype.name, *counts, filling, num_learned=num_learned, start=tuple(start))


def is_enough(batch: Sequence[Item], num_characters: int) -> bool:
    """Whether a batch with ``num_characters`` of text is large enough for one call of the tokenizer."""
    return len(batch) >= _BATCH_DOCUMENTS or num_characters >= _BATCH_CHARACTERS


def batches(documents: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield documents in groups that are large enough for one call of the tokenizer and fit in memory."""
    batch: list[Item] = []
    size = 0
    for document in stoppable(documents):
        batch.append(document)
        size += len(document.text)
        if is_enough(batch, size):
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Lock the folder, so that one process tokenizes and the others find the result.

    Raises:
        MachineError: the folder cannot be written.
        InputError: the lock is not a regular file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_appendable(folder / ".lock")
        lock: Any = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise unwritable(folder, error) from error
    with lock:
        for stale in folder.glob(".*.writing"):  # left by a killed process, because this one holds the lock
            if stale.is_file():
                stale.unlink()
        yield
