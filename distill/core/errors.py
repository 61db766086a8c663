"""What can go wrong, by whose hand: each error is one clear line for the user and carries its exit code."""

from __future__ import annotations

from pathlib import Path

from distill.core.secrets import redacted


class DistillError(Exception):
    """Base of every error that the command line prints as one line, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """The line, without secrets: it may quote a library, an address or the environment.

        A loader's worker process wraps it in its traceback, which is taken off again.
        """
        line = super().__str__()
        if line.startswith("Caught "):
            line = line.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip()
        return redacted(line)


class InputError(DistillError):
    """The user's files, models or arguments are wrong: say what, where, what was expected and how to fix it."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe has mistakes; all of them are reported at once.

    Attributes:
        mistakes: one finished line each, ``file:line: key: what (got ..., expected ...)``.
    """

    def __init__(self, mistakes: list[str]):
        self.mistakes = mistakes
        super().__init__("\n".join(mistakes))


class GivenUp(BaseException):
    """Raised when a stop signal interrupts work that need not be finished; the caller then saves. Not an
    ``Exception``, for the reason of :class:`Stopped`."""


class NotReached(DistillError):
    """The run is done and saved, and what the recipe requires of its figures was not reached; a line for each miss."""

    exit_code = 3


class MachineError(DistillError):
    """The machine, not the user, is at fault: a full disk, no memory, a device that is not there."""


def unwritable(folder: Path, error: OSError) -> MachineError:
    """The error for a folder in which the system refuses to write, or to lock a file."""
    return MachineError(f"{folder}: cannot be written or locked ({error.strerror or error})")


class Stopped(BaseException):
    """A signal has asked the program to stop (see :mod:`distill.core.stop`); what was done is saved, and the same
    command goes on. Not an ``Exception``: a library that catches those would turn the stop into something else."""

    exit_code = 1


class Interrupted(Stopped):
    """The user asked to stop, by Ctrl-C (SIGINT)."""

    exit_code = 130


class Preempted(Stopped):
    """The machine is wanted for something else (SIGTERM, SIGUSR1), or the terminal is gone (SIGHUP)."""

    exit_code = 75


class RankEnded(DistillError):
    """A process of several ended before its time, and the others with it.

    Attributes:
        exit_code: that of the process which ended first.
        is_told: whether that process has said all there is to say to whoever started us.
    """

    def __init__(self, message: str, exit_code: int, *, is_told: bool = False):
        super().__init__(message)
        self.exit_code, self.is_told = exit_code, is_told
