"""Find and read the files that a source names: files, folders, globs and addresses, plain or compressed."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO, Any

from distill.core import outside
from distill.core.digest import digests
from distill.core.errors import InputError
from distill.data.remote import Remote, is_remote
from distill.data.remote import find as find_remote

File = Path | Remote
"""A file of this machine, or at an address."""
PACKED = (".gz", ".zst")
"""Ends of names of files that are decompressed as they are read."""


def find(paths: str | Sequence[str], suffixes: Sequence[str]) -> list[File]:
    """The files behind paths, addresses, folders (searched to the bottom) and globs; sorted, each once.

    Args:
        paths: relative to the current directory; ``~`` and ``**`` are understood. Addresses: see
            :mod:`distill.data.remote`.
        suffixes: which files of a folder count, such as ``".txt"``; each also with ``.gz`` or ``.zst`` behind it.

    Raises:
        InputError: a path that leads to no file.
    """
    found: set[File] = set()
    for path in [paths] if isinstance(paths, str) else paths:
        if is_remote(path):
            found.update(find_remote(path, lambda name: _counts(name, suffixes), suffixes))
            continue
        files: Sequence[File]
        place = Path(os.path.expanduser(path))
        if os.path.isfile(place):
            files = [place]
        elif outside.is_folder(place):
            files = [file for file in place.rglob("*") if file.is_file() and _counts(file.name, suffixes)]
            if not files:
                raise InputError(
                    f"{path}: no file in this folder ends in {', '.join(suffixes)} (or that with {' or '.join(PACKED)})"
                )
        else:
            files = [Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file()]
            if not files and os.path.lexists(place):
                outside.status_of(place)  # says what it is
            if not files:
                raise InputError(f"{path}: no such file or folder, seen from {Path.cwd()}")
        found.update(files)
    return sorted(found, key=lambda file: (file.as_posix(), str(getattr(file, "url", ""))))  # an address has a query


def _counts(name: str, suffixes: Sequence[str]) -> bool:
    return not name.startswith(".") and unpacked(name).endswith(tuple(suffixes))


def unpacked(name: str) -> str:
    """The name of a file without the end that says how it is compressed."""
    return name.removesuffix(".gz").removesuffix(".zst")


def form(file: File) -> str:
    """The end of its name that says what is in it, such as ``"jsonl"``."""
    return unpacked(file.name).rpartition(".")[2]


@contextmanager
def raw(file: File, *, seekable: bool = False) -> Iterator[IO[bytes]]:
    """A file's bytes as they are stored.

    Args:
        file: where it is.
        seekable: whether it will not be read from its beginning to its end.

    Raises:
        InputError: it cannot be read.
    """
    with file.opened(seekable=seekable) if isinstance(file, Remote) else outside.opened(file) as stream:
        yield stream


@contextmanager
def opened(file: File) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed when its name ends in ``.gz`` or ``.zst``.

    Raises:
        InputError: it cannot be read, or the compressed data is broken.
    """
    with raw(file) as plain:
        try:
            with _decompressed(file, plain) as stream:
                yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{file}: not a whole gzip file ({error}); fetch or pack it again") from None


def _decompressed(file: File, plain: IO[bytes]) -> Any:
    if file.suffix == ".gz":
        return gzip.open(plain)
    if file.suffix != ".zst":
        return nullcontext(plain)
    from distill.data import zstd

    return zstd.decompressed(plain, str(file))


LARGEST = 1 << 30
"""Bytes of a document, which is read as a whole. A packed file of a megabyte can stand for more."""


def whole(stream: IO[bytes], file: File) -> bytes:
    """All of an opened file.

    Raises:
        InputError: it is larger than :data:`LARGEST`.
    """
    data = stream.read(LARGEST + 1)
    _check_size(data, str(file))
    return data


def lines(stream: IO[bytes], file: File) -> Iterator[bytes]:
    """The lines of an opened file, which end at ``\\n`` alone.

    Raises:
        InputError: one is larger than :data:`LARGEST`.
    """
    number = 0
    while line := stream.readline(LARGEST + 1):
        number += 1
        _check_size(line, f"{file}:{number}")
        yield line


def _check_size(data: bytes, place: str) -> None:
    if len(data) > LARGEST:
        raise InputError(f"{place}: more than {LARGEST:,} bytes in one document; is it text? Split it, or leave it out")


_FORMS = (".parquet", ".json", ".csv", ".tsv", ".arrow")
"""Ends of names by which some sources choose how to read a file."""


def fingerprint(files: Sequence[File], root: Path | None = None) -> str:
    """A hash of the bytes of files, in order (64 hex digits). Where they lie, and what they are called, do not matter.

    A large file is read once as long as nobody writes to it; see :mod:`distill.core.digest`.

    Args:
        files: what is read.
        root: a folder in which names mean something, such as the split of a data set; they count from there on.
    """
    total = hashlib.sha256()
    known = (
        dict(zip(local, digests(local), strict=True)) if (local := [f for f in files if isinstance(f, Path)]) else {}
    )
    for file in files:
        packed = file.suffix if file.suffix in PACKED else ""
        plain = Path(file.name.removesuffix(packed)).suffix
        name = plain if plain in _FORMS else "text"
        if root is not None and isinstance(file, Path):
            name = file.relative_to(root).as_posix()
        digest = known[file] if isinstance(file, Path) else content_hash(file)
        total.update(f"{name} {packed}\0{digest}\n".encode())
    return total.hexdigest()


def content_hash(file: File) -> str:
    """What stands for the bytes of a file: their SHA-256; of one at an address, the checksum that the service tells."""
    if isinstance(file, Remote):
        return file.checksum() or _remote_sha256(file)
    with outside.opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _remote_sha256(file: Remote) -> str:
    with file.opened() as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def num_bytes(files: Sequence[File]) -> int | None:
    """How large files are; None when one is compressed and only reading would tell."""
    if any(file.suffix in PACKED for file in files):
        return None
    sizes = [file.num_bytes() if isinstance(file, Remote) else file.stat().st_size for file in files]
    return sum(size for size in sizes if size is not None) if None not in sizes else None
