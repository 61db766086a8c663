"""What the files of a finished stage were when it finished, and what has become of them since."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from distill.core.digest import several, sha256_of
from distill.core.errors import InputError
from distill.core.outside import LARGEST_TEXT
from distill.core.stored import read_checked, write_checked

SEAL = ".seal.json"
BINARY = {".safetensors", ".ckpt", ".gguf", ".onnx", ".png"}
"""Suffixes of files that nobody edits as text."""


@dataclass(frozen=True)
class Mark:
    """One file as it was.

    Attributes:
        bytes: its size.
        mtime_ns: time of its last write. Where it and the size are the same, the file need not be read to be believed
            when nothing depends on it.
        sha256: of all its bytes, 64 hex digits.
    """

    bytes: Annotated[int, Field(ge=0)]
    mtime_ns: int
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


Marks = Mapping[str, Mark]
"""Path within a folder, with ``/`` -> the file."""
_MARKS: TypeAdapter[dict[str, Mark]] = TypeAdapter(dict[str, Mark])


@dataclass(frozen=True)
class Change:
    """A file that is not what it was.

    Attributes:
        name: path within the folder.
        kind: ``"gone"``; ``"damaged"``: other bytes, which are no text; ``"edited"``: other text, maybe on purpose;
            ``"added"``.
        detail: what was expected and what is there.
    """

    name: str
    kind: Literal["gone", "damaged", "edited", "added"]
    detail: str

    def line(self, folder: Path, stage: str) -> str:
        """What has happened to which file of which stage."""
        said = {
            "gone": f"is gone, and stage {stage} made it",
            "added": f"is not of stage {stage}, which made this folder",
        }
        return f"{folder / self.name}: {said.get(self.kind, f'is not what stage {stage} made ({self.detail})')}"


def marks_of(folder: Path, names: Iterable[str]) -> dict[str, Mark]:
    """Files of a folder as they are now.

    Args:
        folder: whose files.
        names: paths within it.

    Raises:
        InputError: one cannot be read.
    """

    def mark(name: str, stop: Event) -> Mark:
        digest, status = sha256_of(folder / name, stop), (folder / name).stat()
        return Mark(status.st_size, status.st_mtime_ns, digest)

    names = [*names]
    return dict(zip(names, several(mark, names), strict=True))


def files_of(folder: Path, leave_out: Iterable[str] = ()) -> list[str]:
    """Paths within a folder of its regular files, but for hidden ones; links to other folders are not followed.

    Args:
        folder: where to look.
        leave_out: names of files and folders directly in it that do not count.
    """
    return [name for name in sorted(_names(folder, {*leave_out})) if (folder / name).is_file()]


def seal(folder: Path) -> None:
    """Write down in a folder what its files are."""
    marks = marks_of(folder, files_of(folder))
    write_checked(folder / SEAL, {name: asdict(mark) for name, mark in marks.items()})


def is_sealed(folder: Path) -> bool:
    """Whether the files of a folder are those that :func:`seal` has seen; every byte is read."""
    try:
        marks = read_checked(folder / SEAL, _MARKS, "")
    except InputError:
        return False
    return not changes(folder, marks, read=True)


def changes(folder: Path, marks: Marks, within: str = "", *, read: bool, lasting: bool = False) -> list[Change]:
    """What differs from what the files were.

    Args:
        folder: that the names of ``marks`` start from.
        marks: the files as they were.
        within: a file or folder in it that alone is looked at; "" is all. To a folder that is named here no file may
            have been added, as whoever reads it may read that too; hidden ones do not count.
        read: whether to read every byte. Else only files whose size or time of writing is not the same are read.
        lasting: whether a large file that another process has read need not be read again.

    Raises:
        InputError: a file cannot be read.
    """
    names = [name for name in marks if not within or name == within or _is_in(name, within)]
    found = several(lambda name, stop: _change(folder, name, marks[name], stop, read, lasting), names)
    if within and (folder / within).is_dir():
        there = (f"{within}/{name}" for name in sorted(_names(folder / within, set())))
        found += [Change(name, "added", "") for name in there if name not in marks]
    return [change for change in found if change is not None]


def _is_in(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")


def _change(folder: Path, name: str, mark: Mark, stop: Event, read: bool, lasting: bool) -> Change | None:
    file = folder / name
    try:
        status = file.stat()
    except OSError:  # a link that leads nowhere too
        return Change(name, "gone", "")
    if not stat.S_ISREG(status.st_mode):
        return Change(name, "damaged", "no regular file")
    if not read and (status.st_size, status.st_mtime_ns) == (mark.bytes, mark.mtime_ns):
        return None
    detail = f"{mark.bytes:,} bytes expected, {status.st_size:,} found"
    if status.st_size == mark.bytes:
        digest = sha256_of(file, stop, lasting=lasting)
        if digest == mark.sha256:
            return None
        detail = f"SHA-256 {mark.sha256[:12]} expected, {digest[:12]} found"
    return Change(name, "edited" if _is_text(file) else "damaged", detail)


def _is_text(file: Path) -> bool:
    """Whether somebody may have edited the file: it is text, and JSON where its name says so."""
    try:
        if file.stat().st_size > LARGEST_TEXT or file.suffix in BINARY:
            return False
        text = file.read_bytes().decode("utf-8")
        if file.suffix == ".json":
            json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    return bool(text) and "\0" not in text


def _names(folder: Path, leave_out: set[str]) -> Iterator[str]:
    """Paths within a folder of all that is no folder and not hidden."""
    for place, folders, files in os.walk(folder):
        at = Path(place).relative_to(folder)
        skipped = leave_out if place == str(folder) else set()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        yield from ((at / name).as_posix() for name in files if not name.startswith(".") and name not in skipped)
