"""Progress of reading a text: a bar on a terminal, a line every 30 seconds in a log, nothing for the first two."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import rich.progress as rp
from rich.console import Console

_QUIET_S = 2.0
_LINE_EVERY_S = 30.0


class Progress:
    """Counts bytes of text towards a total that may be unknown; writes to standard error.

    Args:
        what: name of the task, such as ``"tokenizing train"``.
        total_bytes: size of the text; None if unknown.
    """

    def __init__(self, what: str, total_bytes: int | None):
        self.what = what
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._start = self._last_line = time.monotonic()
        self._bar: object | None = None

    def __enter__(self) -> Progress:
        return self

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more bytes as done."""
        self.done_bytes += num_bytes
        now = time.monotonic()
        if now - self._start < _QUIET_S:
            return
        if sys.stderr.isatty():
            self._draw()
        elif now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            print(f"{self.what}: {self._state(now)}", file=sys.stderr, flush=True)

    def _state(self, now: float) -> str:
        done = f"{self.done_bytes / 1e6:.1f} MB"
        if not self.total_bytes:
            return done
        left_s = (now - self._start) / self.done_bytes * max(0, self.total_bytes - self.done_bytes)
        return f"{done} of {self.total_bytes / 1e6:.1f} MB, {left_s:.0f} s left"

    def _draw(self) -> None:
        if self._bar is None:
            columns = (rp.TextColumn(self.what), rp.BarColumn(), rp.DownloadColumn(), rp.TimeRemainingColumn())
            self._bar = rp.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self.what, total=self.total_bytes)
        assert isinstance(self._bar, rp.Progress)
        self._bar.update(self._bar.task_ids[0], completed=self.done_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
