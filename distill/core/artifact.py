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
from typing import Any

from distill.core.errors import InputError, MachineError

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
        return Path(self.location) if Path(self.location).is_dir() else None

    def lineage(self) -> Lineage | None:
        """The lineage that a stage wrote, or None for a model from outside."""
        file = Path(self.location) / LINEAGE
        if not file.is_file():
            return None
        try:
            return Lineage(**read_json(file))
        except TypeError:
            raise InputError(
                f"{file}: not the lineage that this version of distill writes; make the model anew"
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


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file that something else may have written, or damaged.

    Raises:
        InputError: it holds none, or cannot be read.
    """
    try:
        found = json.loads(file.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{file}: cannot be read as JSON ({why}); it is damaged, fetch or make it anew") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds {type(found).__name__}, expected a JSON object; fetch or make it anew")
    return found


def write_text(file: Path, text: str) -> None:
    """Write a small text file whole or not at all; see :func:`write_bytes`."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        MachineError: the disk is full or not writable.
    """
    if file.is_dir():
        raise InputError(f"{file}: is a folder, expected the name of a file")
    temporary = file.with_name(f".{file.name}.writing")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise MachineError(f"{file}: cannot be written ({error.strerror or error})") from error


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


SAMPLES, SAMPLE_BYTES = 256, 1 << 18
CONTENT = {".json", ".safetensors", ".model", ".txt", ".jinja"}


def fingerprint(location: str) -> str:
    """What identifies a model's or tokenizer's content: names, sizes, and bytes spread evenly over each file.

    Files up to 64 MiB are read whole, of larger ones 256 pieces of 256 KiB from head to tail: training or merging
    changes weights everywhere. A Hub id is its own fingerprint.

    Raises:
        InputError: a folder with neither ``config.json`` nor a tokenizer.
    """
    folder = Path(location)
    if not folder.is_dir():
        return location
    files = [file for file in sorted(folder.iterdir()) if file.suffix in CONTENT and file.name != LINEAGE]
    if not {"config.json", "tokenizer.json", "tokenizer_config.json"} & {file.name for file in files}:
        raise InputError(f"{location}: not a model folder (no config.json in it)")
    return hash_of(*((file.name, file.stat().st_size, _digest(file)) for file in files))


def _digest(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for sample in range(SAMPLES):
                stream.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
