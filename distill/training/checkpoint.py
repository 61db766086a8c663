"""Checkpoints that a kill cannot spoil: written beside their place, synced, renamed, rotated, read with care."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pytorch_lightning.plugins import TorchCheckpointIO

from distill.core.artifact import sync
from distill.core.errors import InputError, MachineError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own staging goes through ``$TMPDIR``, which is often another file system, where a move is a copy that
    a kill can cut in two. This one stages beside the target."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` whole or not at all.

        Raises:
            MachineError: the disk is full or not writable.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.writing")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, temporary)
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else "the disk took only a part of it; is it full?"
            raise MachineError(f"{target}: checkpoint cannot be written ({reason})") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return folder / f"step={step:08d}.ckpt"


def checkpoint_step(path: Path) -> int:
    """The optimizer step of a checkpoint, from its name."""
    return int(path.stem.removeprefix("step="))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, newest first."""
    return sorted((p for p in folder.glob("step=*.ckpt") if re.fullmatch(r"step=\d+\.ckpt", p.name)), reverse=True)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, and a line about each that cannot.

    Read with ``weights_only=True``: a checkpoint is data, never code. Every byte is held against the file's checksums,
    which ``torch.load`` does not do.
    """
    complaints = []
    for path in checkpoints(folder):
        try:
            with zipfile.ZipFile(path) as archive:
                if spoilt := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {spoilt}")
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError, zipfile.BadZipFile) as error:
            complaints.append(f"{path}: damaged ({str(error).splitlines()[0]}); taking the one before it")
            continue
        return path, complaints
    return None, complaints


def check_made_of(path: Path, made_of: dict[str, str]) -> None:
    """Refuse a checkpoint of another training, which somebody has put here.

    Args:
        path: that :func:`newest_valid` has found.
        made_of: what the training reads -> its hash.

    Raises:
        InputError: it was made of something else.
    """
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("made_of", {})
    if others := [name for name in made_of if held.get(name) != made_of[name]]:
        raise InputError(
            f"{path}: it is of another training ({', '.join(others)} differ); take it away, or put back what it was "
            "made of"
        )


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)
