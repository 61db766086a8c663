"""What a stage leaves behind: a model folder in plain Hugging Face layout, and ``distill.json`` with its lineage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distill.core import stop
from distill.core.digest import digests
from distill.core.errors import InputError, MachineError, unwritable
from distill.core.model_folder import check_folder
from distill.core.outside import is_folder, read

LINEAGE = "distill.json"


@dataclass
class Lineage:
    """Where a model folder comes from.

    Attributes:
        stage: name of the stage that wrote it.
        kind: the stage's kind.
        parent: the model that it was made from, as the recipe names it.
        teacher: the model that it learned from, if any.
        base_model: Hub id or folder at the root of the line.
        licence: the base model's licence as its own folder states it; None when it states none.
        input_hash: hash of everything that the stage read.
        figures: what the stage measured while it made the model (tokens, parameters, ...).
        mask: in words, what of its weights was set to zero and is held there; None when nothing was.
        num_tokens: size of its vocabulary, where that was cut; None when it was not.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    stage: str
    kind: str
    parent: str
    teacher: str | None
    base_model: str
    licence: str | None
    input_hash: str
    figures: dict[str, Any] = field(default_factory=dict)
    mask: str | None = None
    num_tokens: int | None = None


@dataclass(frozen=True)
class Artifact:
    """A model that can be loaded: a local folder or a Hub id, under the name by which the recipe knows it."""

    name: str
    location: str

    @property
    def folder(self) -> Path | None:
        """The folder, or None when the model lives on the Hub."""
        return Path(self.location) if is_folder(self.location) else None

    def lineage(self) -> Lineage | None:
        """The lineage that a stage wrote, or None for a model from outside.

        Raises:
            InputError: the file is damaged, or not what this version of distill writes.
        """
        file = Path(self.location) / LINEAGE
        if not (self.folder and file.is_file()):
            return None
        try:
            return TypeAdapter(Lineage).validate_json(read(file), strict=True)
        except ValidationError:
            raise InputError(
                f"{file}: damaged, or not the lineage that this version of distill writes; make the model anew"
            ) from None


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write ``distill.json`` into a model folder."""
    (folder / LINEAGE).write_text(json.dumps(asdict(lineage), indent=2) + "\n")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place, synced, when the block ends well.

    A kill at any moment leaves the old folder or the new one, never a mixture; in the instant between the two renames
    the old one is ``.<name>.old``, from where the next call puts it back.

    Raises:
        MachineError: the disk is full or not writable.
    """
    temporary, aside = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(aside, folder)
        temporary.mkdir(parents=True)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
                sync(file)
        sync(temporary)
        stop.confirm()
        if folder.exists():
            os.replace(folder, aside)
        os.replace(temporary, folder)
        sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(aside, folder)
        if why := _disk_trouble(error):
            raise MachineError(f"{folder}: cannot be written ({why}); nothing was changed") from error
        raise


def _put_back(aside: Path, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        os.replace(aside, folder)


def _disk_trouble(error: BaseException) -> str | None:
    """What the system said, if it was the system. Safetensors' own error is no OSError but bears its number."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if "(os error " in str(error) else None


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, if they are missing.

    Raises:
        MachineError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def write_text(file: Path, text: str) -> None:
    """Write a small text file whole or not at all; see :func:`write_bytes`. What is no text in it is escaped."""
    write_bytes(file, text.encode("utf-8", "backslashreplace"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        MachineError: the disk is full or not writable.
    """
    if is_folder(file):
        raise InputError(f"{file}: is a folder, expected the name of a file")
    temporary = file.with_name(f".{file.name}.writing")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        sync(temporary)
        stop.confirm()
        os.replace(temporary, file)
        sync(file.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MachineError(f"{file}: cannot be written ({error.strerror or error})") from error
        raise


def sync(path: Path) -> None:
    """Flush a file or folder to the disk (``fsync``)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_of(*parts: Any) -> str:
    """A short, stable hash of JSON-like values (16 hex digits)."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(location: str) -> str:
    """What identifies a model's or tokenizer's content: the names and all bytes of its files. A Hub id is its own.

    Raises:
        InputError: a folder with neither ``config.json`` nor a tokenizer, or with a file that cannot be read.
        MachineError: a file is being written.
    """
    folder = Path(location)
    if not is_folder(folder):
        return location
    files = [file for file in check_folder(folder) if file.name != LINEAGE]
    if not {"config.json", "tokenizer.json", "tokenizer_config.json"} & {file.name for file in files}:
        raise InputError(f"{location}: not a model folder (no config.json in it)")
    return hash_of(*zip((file.name for file in files), digests(files), strict=True))
