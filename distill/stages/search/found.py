"""What a search has measured so far, kept as it comes, and how far it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.core.artifact import read_json, write_text
from distill.core.errors import InputError
from distill.stages.base import StageContext

SECONDS_BETWEEN_LINES = 15.0


class Found:
    """Measurements in a file; another process goes on from there.

    Args:
        file: where they are kept.
    """

    def __init__(self, file: Path):
        self._file = file
        self._all: dict[str, Any] = {}
        if file.is_file():
            with suppress(InputError):  # damaged: what it held is measured anew
                self._all = read_json(file)

    def get(self, kind: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured before, or is now."""
        key = f"{kind} {name}"
        if key not in self._all:
            self._all[key] = measure()
            write_text(self._file, json.dumps(self._all))
        found: dict[str, Any] = self._all[key]
        return found


class Pace:
    """Says now and then how many of so many are done, and when the rest will be."""

    def __init__(self, context: StageContext, total: int, *, every_s: float = SECONDS_BETWEEN_LINES):
        self._context, self._total, self._every_s, self._done = context, total, every_s, 0
        self._start = self._line = time.monotonic()

    def of(self, result: dict[str, Any]) -> dict[str, Any]:
        """Count one more result, and pass it on."""
        self._done, now = self._done + 1, time.monotonic()
        if now - self._line >= self._every_s and self._done < self._total:
            self._line = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._context.say(f"search: {self._done} of {self._total} candidates, {left:.0f} s left")
        return result
