"""Checkpoints that a kill cannot spoil: written beside their place, synced, renamed, rotated, read with care."""

from __future__ import annotations

import os
import re
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins import TorchCheckpointIO
from torch import Tensor

from distill.core.artifact import sync
from distill.core.errors import InputError, MachineError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own staging goes through ``$TMPDIR``, which is often another file system, where a move is a copy that
    a kill can cut in two. This one stages beside the target.

    Lightning's ``AsyncCheckpointIO`` is not used: it copies the state on the device that trains, queues any number of
    copies, tells an error when the next checkpoint is due, and old ones are rotated before the new one is there.

    Args:
        keep: newest checkpoints of the folder that stay, once a new one is there; None is all.
        behind: write a copy of the state in a thread, while training goes on.
    """

    def __init__(self, keep: int | None = None, *, behind: bool = False):
        super().__init__()
        self.keep, self.behind = keep, behind
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` whole or not at all; behind, of what it is now, whatever becomes of its tensors.

        Raises:
            MachineError: the disk is full or not writable.
        """
        self.settle()
        self.write(copied(checkpoint) if self.behind else checkpoint, path)

    def write(self, checkpoint: dict[str, Any], path: Any) -> None:
        """:meth:`save_checkpoint` of a state that nobody changes any more."""
        self.settle()
        if self.behind:
            self._in_flight = self._thread.submit(self._write, checkpoint, Path(path))
        else:
            self._write(checkpoint, Path(path))

    def settle(self, *, wait: bool = True) -> None:
        """Until nothing is being written any more.

        Args:
            wait: False only looks whether a write has failed.

        Raises:
            MachineError: that of the write.
        """
        if self._in_flight is not None and (wait or self._in_flight.done()):
            written, self._in_flight = self._in_flight, None
            written.result()

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
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
        if self.keep is not None:
            rotate(target.parent, self.keep)


def copied(state: Any, known: dict[Any, Tensor] | None = None) -> Any:
    """The same nest of containers with copies of its tensors in the machine's own memory.

    Args:
        state: of dicts, lists and tuples.
        known: copies that are made already; a tensor with two names (a tied weight) stays one.
    """
    known = {} if known is None else known
    if isinstance(state, Tensor):
        place = (state.device, state.data_ptr(), state.dtype, state.shape, state.stride())
        if place not in known:
            known[place] = state.detach().to("cpu", copy=True)
        return known[place]
    if isinstance(state, dict):
        return {key: copied(value, known) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value, known) for value in state)
    return state


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
        except Exception as error:  # what damage makes of zip, zlib and pickle is not to be told in advance
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            complaints.append(f"{path}: damaged ({why})")
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
