"""A run: one folder with the recipe, a sub-folder a stage, and a marker in each that says it is finished."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from distill.core.artifact import Artifact, write_text
from distill.core.errors import InputError

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
INPUT = "INPUT"

_HELD: set[IO[str]] = set()
"""Locks of this process. Those that it forks, such as a loader's workers, would hold them too, and outlive a kill."""
os.register_at_fork(after_in_child=lambda: [stream.close() for stream in _HELD])


@dataclass(frozen=True)
class Done:
    """What a finished stage left in its ``DONE`` marker.

    Attributes:
        input_hash: hash of everything that the stage read.
        seconds: wall time of the attempt that finished it.
        figures: what it measured.
        sizes: bytes of every file of the model that it made.
        made: differs each time that the stage runs, so that what was made from an older result is made anew.
    """

    input_hash: str
    seconds: float
    figures: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)
    made: str = field(default_factory=lambda: uuid.uuid4().hex[:8])


def sizes_of(folder: Path) -> dict[str, int]:
    """Name -> bytes of every file in a model folder; empty when there is none."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())} if folder.is_dir() else {}


@dataclass(frozen=True)
class Run:
    """Names and markers inside a run folder."""

    folder: Path

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        return self.folder / name

    def model(self, name: str) -> Artifact:
        """The model that a stage leaves."""
        return Artifact(name, str(self.stage(name) / "model"))

    def begin(self, name: str, input_hash: str, say: Callable[[str], None] = lambda line: None) -> Path:
        """The folder of a stage that is about to run.

        Work that was left there with other inputs is moved aside, never deleted and never continued.
        """
        folder = self.stage(name)
        if folder.is_dir() and not self.has_begun(name, input_hash):
            number = 1
            while (aside := folder.with_name(f"{name}.old-{number}")).exists():
                number += 1
            folder.rename(aside)
            say(f"  its inputs have changed; what was there is now {aside.name}")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / INPUT, input_hash + "\n")
        return folder

    def has_begun(self, name: str, input_hash: str) -> bool:
        """Whether the work in a stage's folder was begun with these inputs."""
        marker = self.stage(name) / INPUT
        return marker.is_file() and marker.read_text(errors="replace").strip() == input_hash

    def is_left(self, name: str) -> bool:
        """Whether a stage was left in the middle of a training (a search's short ones too) that has saved something."""
        return self.done(name) is None and any((self.stage(name) / CHECKPOINTS).rglob("step=*.ckpt"))

    def finish(self, name: str, done: Done) -> None:
        """Mark a stage as finished."""
        write_text(self.stage(name) / "DONE", json.dumps(asdict(done), indent=2) + "\n")

    def done(self, name: str) -> Done | None:
        """The marker of a finished stage; None when there is none, or none that can be read."""
        try:
            return Done(**json.loads((self.stage(name) / "DONE").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def forget(self, name: str) -> None:
        """Take a stage for not begun: no marker, no checkpoint to go on from."""
        (self.stage(name) / "DONE").unlink(missing_ok=True)
        shutil.rmtree(self.stage(name) / CHECKPOINTS, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out of this folder while the block runs.

        Raises:
            InputError: another process works here.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = (self.folder / ".lock").open("a+")
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be used as a run folder ({error.strerror})") from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.seek(0)
                owner = stream.read().strip() or "another process"
                raise InputError(f"{self.folder}: in use by {owner}; wait for it or choose another --run-dir") from None
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
            _HELD.add(stream)
            try:
                yield
            finally:
                _HELD.discard(stream)
