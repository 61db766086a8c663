"""How far a long piece of work is that has no bar of its own."""

from __future__ import annotations

import time
from typing import TypeVar

from distill.core import stop
from distill.stages.session import StageContext

SECONDS_BETWEEN_LINES = 15.0

T = TypeVar("T")


class ProgressLines:
    """Says now and then how many of so many are done, and when the rest will be.

    Args:
        context: of the stage.
        total: how many there are.
        what: what the line begins with, and what is counted, such as ``("search", "candidates")``.
        every_s: seconds between two lines, at least.
    """

    def __init__(
        self, context: StageContext, total: int, what: tuple[str, str], *, every_s: float = SECONDS_BETWEEN_LINES
    ):
        self._context, self._total, self._what, self._every_s, self._done = context, total, what, every_s, 0
        self._start = self._line = time.monotonic()

    def count(self, result: T) -> T:
        """Count one more result, and pass it on; a run may stop here, as the next one may take long."""
        stop.check()
        self._done, now = self._done + 1, time.monotonic()
        if now - self._line >= self._every_s and self._done < self._total:
            self._line, (work, things) = now, self._what
            left = (now - self._start) / self._done * (self._total - self._done)
            self._context.say(f"{work}: {self._done} of {self._total} {things}, {left:.0f} s left")
        return result
