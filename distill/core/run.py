"""A run: one folder with the recipe, a sub-folder a stage, and a marker in each that says it is finished."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.core.artifact import Artifact, write_text
from distill.core.errors import InputError

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Done:
    """What a finished stage left in its ``DONE`` marker.

    Attributes:
        input_hash: hash of everything that the stage read.
        seconds: wall time, over all its attempts that the run knows of.
        figures: what it measured.
    """

    input_hash: str
    seconds: float
    figures: dict[str, Any]


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

    def begin(self, name: str, input_hash: str) -> Path:
        """The folder of a stage that is about to run.

        Work that was left there with other inputs is moved aside, never deleted and never continued.
        """
        folder = self.stage(name)
        marker = folder / "INPUT"
        if folder.is_dir() and (not marker.is_file() or marker.read_text().strip() != input_hash):
            number = 1
            while (aside := folder.with_name(f"{name}.old-{number}")).exists():
                number += 1
            folder.rename(aside)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(marker, input_hash + "\n")
        return folder

    def finish(self, name: str, done: Done) -> None:
        """Mark a stage as finished."""
        record = {"input_hash": done.input_hash, "seconds": round(done.seconds, 3), "figures": done.figures}
        write_text(self.stage(name) / "DONE", json.dumps(record, indent=2) + "\n")

    def done(self, name: str) -> Done | None:
        """The marker of a finished stage, or None."""
        marker = self.stage(name) / "DONE"
        return Done(**json.loads(marker.read_text())) if marker.is_file() else None

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
            yield
