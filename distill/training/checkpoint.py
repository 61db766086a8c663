"""Checkpoints that survive a kill: written to a temporary file, synced, renamed, and verified when they are read."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from pytorch_lightning.plugins import TorchCheckpointIO
from torch import Tensor

from distill.core.artifact import hash_of, sync
from distill.core.errors import InputError, MachineError
from distill.core.stored import CHECK


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder and renames it.

    Lightning itself writes to ``$TMPDIR`` first, which is often on another file system; then the move is a copy, which
    a kill can interrupt. Lightning's ``AsyncCheckpointIO`` is not used, because it copies the state on the training
    device, queues any number of copies, reports an error only at the next checkpoint, and deletes old checkpoints
    before the new one is written.

    Args:
        keep: number of checkpoints to keep; older ones are deleted after a new one is written. None keeps all.
        behind: whether to copy the state and write it in a thread while training continues.
    """

    def __init__(self, keep: int | None = None, *, behind: bool = False):
        super().__init__()
        self.keep, self.behind = keep, behind
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint atomically. With ``behind`` its tensors are copied before this method returns.

        Raises:
            MachineError: the disk is full or not writable.
        """
        self.settle()
        self.write(copied(checkpoint) if self.behind else checkpoint, path)

    def write(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Like :meth:`save_checkpoint`, but without a copy: the state's tensors must not change until the write has
        finished."""
        self.settle()
        if self.behind:
            self._in_flight = self._thread.submit(self._write, checkpoint, Path(path))
        else:
            self._write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The state of a checkpoint. If CUDA is available, the file is memory-mapped, so that the processes of a
        machine share its pages and none reads a copy."""
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=torch.cuda.is_available())
        return loaded

    def settle(self, *, wait: bool = True) -> None:
        """Wait until the current write has finished.

        Args:
            wait: whether to wait; if False, only check whether the last write has failed.

        Raises:
            MachineError: the last write has failed.
        """
        if self._in_flight is not None and (wait or self._in_flight.done()):
            written, self._in_flight = self._in_flight, None
            written.result()

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        temporary = target.with_name(f".{target.name}.writing")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**checkpoint, CHECK: outline_hash(checkpoint)}, temporary)
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError | RuntimeError):
                raise
            reason = (
                error.strerror if isinstance(error, OSError) else "only a part of it was written; the disk may be full"
            )
            raise MachineError(f"{target}: checkpoint cannot be written ({reason})") from error
        if self.keep is not None:
            rotate(target.parent, self.keep)


def copied(state: Any, known: dict[Any, Tensor] | None = None) -> Any:
    """A copy of nested containers, with their tensors copied to the CPU.

    Args:
        state: nested dicts, lists and tuples.
        known: copies made so far, so that tensors that share memory (tied weights) are copied once.
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


def outline_hash(checkpoint: dict[str, Any]) -> str:
    """A hash of a checkpoint's keys, shapes, dtypes and plain values. Checksums of the file cover the tensors' data."""
    return hash_of(_outline({key: value for key, value in checkpoint.items() if key != CHECK}))


def _outline(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), *value.shape]
    if isinstance(value, dict):
        return {repr(key): _outline(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_outline(part) for part in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of an optimizer step."""
    return folder / f"step={step:08d}.ckpt"


def checkpoint_step(path: Path) -> int:
    """The optimizer step of a checkpoint, read from its file name."""
    return int(path.stem.removeprefix("step="))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = (path for path in folder.glob("step=*.ckpt") if re.fullmatch(r"step=\d+\.ckpt", path.name))
    return sorted(found, key=checkpoint_step, reverse=True)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and one line about each newer one that is damaged.

    Files are loaded with ``weights_only=True``, because a checkpoint must not run code. All bytes are compared with the
    checksums of the zip file, which ``torch.load`` does not do. Keys, shapes and plain values are compared with the
    hash in the checkpoint. A file is also damaged if its name has another step than its content.
    """
    complaints = []
    for path in checkpoints(folder):
        try:
            if not path.is_file():  # opening a named pipe would block
                raise OSError("no regular file")
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {wrong}")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(loaded, dict) or loaded.get(CHECK) != outline_hash(loaded):
                raise ValueError("its content is not what was written")
            if loaded["global_step"] != checkpoint_step(path):
                raise ValueError(f"its name has step {checkpoint_step(path)}, its content step {loaded['global_step']}")
        except Exception as error:  # damage raises many errors of zip, zlib and pickle
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            complaints.append(f"{path}: damaged ({why})")
            continue
        return path, complaints
    return None, complaints


def check_provenance(path: Path, provenance: dict[str, str]) -> None:
    """Check that a checkpoint was made by the same training.

    Args:
        path: path of a checkpoint from :func:`newest_valid`.
        provenance: hashes of everything that the training reads, by name.

    Raises:
            InputError: a hash differs.
    """
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("provenance", {})
    if others := [name for name in provenance if held.get(name) != provenance[name]]:
        raise InputError(
            f"{path}: belongs to another training ({', '.join(others)} differ); remove it, or restore the "
            "inputs of that training"
        )


@contextmanager
def restoring(path: Path | None, name: str) -> Iterator[None]:
    """Convert an error of Lightning while it restores a checkpoint into one line.

    Args:
        path: checkpoint from which training resumes; None if there is none.
        name: name of the stage.

    Raises:
        InputError: the checkpoint is valid and from this training, but was written by another version.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        calls = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
        restores = any(
            Path(code.co_filename).stem == "checkpoint_connector"
            and code.co_name.startswith(("restore", "_restore", "resume"))
            for code in calls
        )
        if path is None or not restores or isinstance(error, torch.OutOfMemoryError):
            raise
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: does not fit this training ({why}); resume with the version of distill that wrote it, or "
            f"discard it with --from {name}"
        ) from error


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)
