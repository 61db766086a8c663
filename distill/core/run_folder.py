"""A run: one folder with the recipe, a sub-folder per stage, and a marker in each that says it is finished.

The marker, ``DONE``, holds the SHA-256 of every file that the stage left. Whoever reads such a file later asks for it
by :meth:`Run.result`, which refuses one that has changed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import psutil
from pydantic import Field

from distill.core.artifact import Artifact, sync, write_text
from distill.core.errors import InputError, MachineError
from distill.core.outside import check_appendable, read, status_of
from distill.core.seal import Change, Mark, changes, files_of, marks_of
from distill.core.stored import read_checked, write_checked

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
SCORES_FOLDER = "scores"
"""Folder of a run with the scores of models' units; no stage's, so that they outlive a stage that is planned anew."""
INPUT = "INPUT"
DONE = "DONE"
LOCK = ".lock"
NO_RESULT = (DONE, INPUT, CHECKPOINTS)
"""What a stage's folder holds beside what the stage leaves."""

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
        files: every file that it left, by its path within the stage's folder.
        made: differs each time that the stage runs, so that what was made from an older result is made anew.
    """

    input_hash: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    figures: dict[str, Any]
    files: dict[str, Mark] = field(default_factory=dict)
    made: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def __post_init__(self) -> None:
        # a marker never leads out of the stage's folder
        if wrong := [name for name in self.files if name.startswith("/") or ".." in Path(name).parts]:
            raise ValueError(f"files: {wrong[0]!r} is not within the stage's folder")


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

        Work that was left there with other inputs, or without a word of its inputs, is moved aside, never deleted and
        never continued.
        """
        folder = self.stage(name)
        if folder.is_dir() and not self.has_begun(name, input_hash):
            if (folder / INPUT).exists():
                say(f"  its inputs have changed; what was there is now {self.set_aside(name).name}")
            elif any(folder.iterdir()):
                say(f"  a folder {name} that no run has begun was there; it is now {self.set_aside(name).name}")
        if not (folder / INPUT).is_file():
            self._begin(folder, input_hash)
        return folder

    def _begin(self, folder: Path, input_hash: str) -> None:
        """Make the folder with its marker at once, so that no kill leaves one without."""
        temporary = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        write_text(temporary / INPUT, input_hash + "\n")
        try:
            os.replace(temporary, folder)  # takes the place of an empty folder too
            sync(folder.parent)
        except OSError as error:
            raise MachineError(f"{folder}: cannot be written ({error.strerror})") from None

    def set_aside(self, name: str) -> Path:
        """Move a stage's folder out of the way; where it is now."""
        number = 1
        while (aside := self.folder / f"{name}.old-{number}").exists():
            number += 1
        self.stage(name).rename(aside)
        return aside

    def has_begun(self, name: str, input_hash: str) -> bool:
        """Whether the work in a stage's folder was begun with these inputs."""
        marker = self.stage(name) / INPUT
        return marker.is_file() and marker.read_text(errors="replace").strip() == input_hash

    def is_left(self, name: str) -> bool:
        """Whether a stage was left in the middle of a training (a search's short ones too) that has saved something."""
        marker = self.stage(name) / DONE
        return not marker.exists() and any((self.stage(name) / CHECKPOINTS).rglob("step=*.ckpt"))

    def finish(self, name: str, input_hash: str, seconds: float, figures: dict[str, Any]) -> Done:
        """Mark a stage as finished, with all that is in its folder now, and drop what it would have gone on from."""
        place = self.stage(name)
        files = marks_of(place, files_of(place, NO_RESULT))
        done = Done(input_hash, seconds, figures, files)
        write_checked(self.stage(name) / DONE, asdict(done), about=name)
        self.drop_checkpoints(name)
        return done

    def drop_checkpoints(self, name: str) -> None:
        """Remove the checkpoints of a finished stage: until ``DONE`` stands they are what a kill leaves."""
        shutil.rmtree(self.stage(name) / CHECKPOINTS, ignore_errors=True)

    def done(self, name: str) -> Done | None:
        """The marker of a finished stage; None when there is none.

        Raises:
            InputError: there is one, and it is not as it was written.
        """
        marker = self.stage(name) / DONE
        if not marker.exists():
            return None
        fix = f"put it back, or run the stage again by --from {name}"
        return read_checked(marker, Done, fix, about=name)

    def changes(self, name: str, within: str = "", *, read: bool) -> list[Change]:
        """What has become of the files of a finished stage; see :func:`distill.core.seal.changes`."""
        done = self.done(name)
        return changes(self.stage(name), done.files, within, read=read) if done is not None else []

    def result(self, name: str, file: str) -> Path | None:
        """A file that a finished stage left, as it left it.

        Args:
            name: of the stage.
            file: path within its folder.

        Returns:
            Its path; None when the stage is not finished, or left no such file.

        Raises:
            InputError: the file has changed since, or is gone.
        """
        done = self.done(name)
        if done is None or file not in done.files:
            return None
        self.check(name, file)
        return self.stage(name) / file

    def check(self, name: str, within: str, *, read: bool = True) -> None:
        """Refuse a result of a finished stage that is not what it was.

        Args:
            name: of the stage.
            within: a file or folder in its folder.
            read: whether to read every byte of it, once per process; else only what was written to since.

        Raises:
            InputError: with a line for each file that has changed, is gone, or was added.
        """
        if lines := self.refusals(name, self.changes(name, within, read=read)):
            raise InputError("\n".join(lines))

    def refusals(self, name: str, found: Iterable[Change]) -> list[str]:
        """A line for each change of a stage's files, with the two ways out."""
        place, again = self.stage(name), f"or run the stage again by --from {name}"
        undo = {"added": "take it away"}
        return [f"{change.line(place, name)}; {undo.get(change.kind, 'put it back')}, {again}" for change in found]

    def forget(self, name: str) -> None:
        """Take a stage for not begun: no marker, no checkpoint to go on from."""
        (self.stage(name) / DONE).unlink(missing_ok=True)
        self.drop_checkpoints(name)

    def tidy(self, names: Iterable[str], say: Callable[[str], None] = lambda line: None) -> None:
        """Remove what a kill has left half written in the run's and the stages' folders; put back what it had moved.

        Only with the lock held: nobody writes there meanwhile.
        """
        for place in (self.folder, *(self.stage(name) for name in names)):
            for stale in [*place.glob(".*.writing"), *(place / CHECKPOINTS).rglob(".*.writing")]:
                _remove(stale)
            for aside in place.glob(".*.old"):
                target = place / aside.name[1:].removesuffix(".old")
                if target.exists():
                    _remove(aside)
                else:
                    os.replace(aside, target)
                    say(f"  {target}: put back, as a kill had left it as {aside.name}")

    def is_worked_at(self) -> bool | None:
        """Whether the process that took :meth:`lock` last still lives; None where it is one of another machine."""
        try:
            written, at = read(self.folder / LOCK), status_of(self.folder / LOCK).st_mtime
            _, number, _, host = written.decode("utf-8").split()
        except (InputError, ValueError):
            return False
        if host != socket.gethostname():
            return None
        try:  # a process that began after the lock was taken has only the number in common
            return psutil.Process(int(number)).create_time() <= at + 1
        except (psutil.Error, ValueError):
            return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out of this folder while the block runs.

        Raises:
            InputError: another process works here.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_appendable(self.folder / LOCK)
            stream = (self.folder / LOCK).open("a+")
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
                with suppress(OSError, ValueError):
                    stream.truncate(0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
