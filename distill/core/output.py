"""Standard output and standard error whose reader may leave, as in ``distill run recipe.yaml | head``.

A run goes on without its reader: what is printed from then on is dropped. Any other command ends as the tools of a
shell do, without a word and with exit code 141 (128 + SIGPIPE).
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

UNREAD = 141
"""Exit code of a command that has lost its reader."""
_goes_on = False


class _Stream(io.TextIOWrapper):
    """A standard stream; each line leaves at once, as a log is read while the run goes on, and after a kill."""

    def __init__(self, stream: io.TextIOWrapper):
        # under PYTHONUNBUFFERED the buffer is the raw file, which may write a part of a text and lose the rest
        buffer: Any = (
            stream.buffer if isinstance(stream.buffer, io.BufferedIOBase) else io.BufferedWriter(stream.buffer)
        )
        # what the terminal's encoding lacks is escaped
        super().__init__(buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._lose_reader()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._lose_reader()

    def _lose_reader(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if not _goes_on:
            raise SystemExit(UNREAD)
        if self is sys.stdout:
            print("nobody reads standard output any more; the run goes on without it", file=sys.stderr)


@contextmanager
def guarded() -> Iterator[None]:
    """Let the standard streams lose their readers within the block, and drop what a library's log cannot write."""
    before, raises = (sys.stdout, sys.stderr), logging.raiseExceptions
    logging.raiseExceptions = False  # else a full disk is told by tracebacks of wandb's log before it is told by us
    sys.stdout, sys.stderr = (_Stream(s) if isinstance(s, io.TextIOWrapper) else s for s in before)
    try:
        yield
    finally:
        logging.raiseExceptions = raises
        ours, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), before
        for stream in ours:
            if isinstance(stream, _Stream):
                stream.flush()
                buffer = stream.detach()  # else its end would close what it shares with the one before
                if isinstance(buffer, io.BufferedWriter) and buffer not in [s.buffer for s in before]:
                    buffer.detach()


@contextmanager
def unread() -> Iterator[None]:
    """Go on within the block when nobody reads what is printed."""
    global _goes_on
    before, _goes_on = _goes_on, True
    try:
        yield
    finally:
        _goes_on = before
