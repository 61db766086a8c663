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
"""A local file, or one at an address."""
PACKED = (".gz", ".zst")
"""File name suffixes of compressed files, which are decompressed while they are read."""


def find(paths: str | Sequence[str], suffixes: Sequence[str]) -> list[File]:
    """Find the files at paths and addresses, in folders (recursively) and by globs; sorted, without duplicates.

    Args:
        paths: relative to the current directory; ``~`` and ``**`` are understood. Addresses: see
            :mod:`distill.data.remote`.
        suffixes: file name suffixes to find in folders, such as ``".txt"``; each also with ``.gz`` or ``.zst``
            appended.

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
                outside.status_of(place)  # raises an error that names the kind of file
            if not files:
                raise InputError(f"{path}: no such file or folder, seen from {Path.cwd()}")
        found.update(files)
    return sorted(found, key=lambda file: (file.as_posix(), str(getattr(file, "url", ""))))  # an address has a query


def _counts(name: str, suffixes: Sequence[str]) -> bool:
    return not name.startswith(".") and unpacked(name).endswith(tuple(suffixes))


def unpacked(name: str) -> str:
    """The name of a file without its compression suffix."""
    return name.removesuffix(".gz").removesuffix(".zst")


def form(file: File) -> str:
    """The suffix of the file name, without its compression suffix and dot, such as ``"jsonl"``."""
    return unpacked(file.name).rpartition(".")[2]


@contextmanager
def raw(file: File, *, seekable: bool = False) -> Iterator[IO[bytes]]:
    """Open the bytes of a file as they are stored.

    Args:
        file: the file.
        seekable: whether the reader needs to seek.

    Raises:
        InputError: it cannot be read.
    """
    with file.opened(seekable=seekable) if isinstance(file, Remote) else outside.opened(file) as stream:
        yield stream


@contextmanager
def opened(file: File) -> Iterator[IO[bytes]]:
    """Open the bytes of a file, decompressed if its name ends in ``.gz`` or ``.zst``.

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
"""Largest number of bytes in a document, which is read as a whole. A compressed file of a megabyte can expand to
more."""


def whole(stream: IO[bytes], file: File) -> bytes:
    """Read all bytes of an opened file.

    Raises:
        InputError: it is larger than :data:`LARGEST`.
    """
    data = stream.read(LARGEST + 1)
    _check_size(data, str(file))
    return data


def lines(stream: IO[bytes], file: File) -> Iterator[bytes]:
    """Yield the lines of an opened file, which end only at ``\\n``.

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
"""File name suffixes by which some sources choose how to read a file."""


def fingerprint(files: Sequence[File], root: Path | None = None) -> str:
    """A hash of the bytes of files, in order (64 hex digits). Independent of paths and of names, except the suffixes by
    which the format is chosen.

    A large file is read again only after it has been modified; see :mod:`distill.core.digest`.

    Args:
        files: the files.
        root: if given, paths relative to this folder are included in the hash (they may encode splits).
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
    """SHA-256 of a local file; for a remote file, the checksum reported by the server if there is one."""
    if isinstance(file, Remote):
        return file.checksum() or _remote_sha256(file)
    with outside.opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _remote_sha256(file: Remote) -> str:
    with file.opened() as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def num_bytes(files: Sequence[File]) -> int | None:
    """Total size of files; None if it is unknown, because one is compressed or a server does not report it."""
    if any(file.suffix in PACKED for file in files):
        return None
    sizes = [file.num_bytes() if isinstance(file, Remote) else file.stat().st_size for file in files]
    return sum(size for size in sizes if size is not None) if None not in sizes else None
