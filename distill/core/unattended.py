"""What a command that runs for hours needs: it stops between two units of its work, and outlives its reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distill.core import output, stop
from distill.core.errors import MachineError


@contextmanager
def unattended() -> Iterator[None]:
    """A run stops between two units of its work, and goes on when nobody reads what it prints.

    Raises:
        MachineError: another pipe has broken; typer would take that for a reader that has left, and end silently.
    """
    with stop.patient(), output.unread():
        try:
            yield
        except BrokenPipeError as error:
            raise MachineError(
                f"a process that this one talks to is gone ({error}); the same command goes on"
            ) from error
