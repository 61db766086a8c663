"""Find and read the files that a source names: files, folders and globs, plain or gzipped."""

from __future__ import annotations

import glob
import gzip
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from distill.core.errors import InputError


def find(paths: str | Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files behind paths, folders (searched to the bottom) and globs; sorted, each once.

    Args:
        paths: relative to the current directory; ``~`` and ``**`` are understood.
        suffixes: which files of a folder count, such as ``".txt"``; each also with ``.gz`` behind it.

    Raises:
        InputError: a path that leads to no file.
    """
    found: set[Path] = set()
    for path in [paths] if isinstance(paths, str) else paths:
        place = Path(path).expanduser()
        if place.is_file():
            files = [place]
        elif place.is_dir():
            files = [file for file in place.rglob("*") if file.is_file() and _counts(file, suffixes)]
            if not files:
                raise InputError(f"{path}: no file in this folder ends in {', '.join(suffixes)} (or that with .gz)")
        else:
            files = [Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file()]
            if not files:
                raise InputError(f"{path}: no such file or folder, seen from {Path.cwd()}")
        found.update(files)
    return sorted(found, key=lambda file: file.as_posix())


def _counts(file: Path, suffixes: Sequence[str]) -> bool:
    return not file.name.startswith(".") and file.name.removesuffix(".gz").endswith(tuple(suffixes))


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked when its name ends in ``.gz``.

    Raises:
        InputError: it cannot be read, or the gzip data is broken.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file}: not a whole gzip file ({error}); fetch or pack it again") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None


def fingerprint(files: Sequence[Path]) -> str:
    """A hash of the names and bytes of files, in order (64 hex digits)."""
    total = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                total.update(f"{file.as_posix()}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    return total.hexdigest()


def num_bytes(files: Sequence[Path]) -> int | None:
    """How large files are; None when one is packed and only unpacking would tell."""
    return None if any(file.suffix == ".gz" for file in files) else sum(file.stat().st_size for file in files)
