"""A thread that writes down each second what the machine does, into ``hardware.jsonl`` of the run's folder."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.core.outside import check_appendable
from distill.tracking.counters import Counters

SAMPLES = "hardware.jsonl"
EVERY_S = 1.0
PATIENCE_S = 5.0
"""Seconds that a run waits for a sample: a driver or a file system may not answer."""


class HardwareLog:
    """Samples in the background. A line is ``{"at": seconds since 1970, "session": ..., "stage": ..., ...}``, with what
    :meth:`~distill.tracking.counters.Counters.sample` returns.

    Counters of energy count on between two lines of one session, which is one call of ``distill run``. There is a line
    at the start and at the end of each stage too, so the time between two lines belongs to the stage named in the
    second. Nothing that goes wrong here ends a run: it is said once, and the log ends.

    Args:
        file: appended to.
        counters: what reads the machine.
        every_s: seconds between two lines.
    """

    def __init__(self, file: Path, counters: Counters | None = None, every_s: float = EVERY_S):
        self.stage = ""
        self._file, self._counters, self._every_s = file, counters or Counters(), every_s
        self._session = f"{time.time():.0f}"
        self._wanted, self._answered = threading.Event(), threading.Event()
        self._is_over = self._is_silent = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="hardware")

    def start(self) -> None:
        """Begin with a first line."""
        self._thread.start()
        self._write_now()

    def stop(self) -> None:
        """Write a last line, and end."""
        self._is_over = True
        self._wanted.set()
        self._thread.join(timeout=PATIENCE_S)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """What is sampled in the block belongs to the stage."""
        self._write_now()
        self.stage = stage
        try:
            yield
        finally:
            self._write_now()
            self.stage = ""

    def _write_now(self) -> None:
        """Let the thread write a line, and wait for it; after one that did not come, for none."""
        if not self._is_silent:
            self._answered.clear()
            self._wanted.set()
            self._is_silent = not self._answered.wait(PATIENCE_S)

    def _run(self) -> None:
        try:
            check_appendable(self._file)
            with self._file.open("a", encoding="utf-8") as stream:
                is_over = False
                while not is_over:
                    self._wanted.wait(self._every_s)
                    self._wanted.clear()
                    is_over = self._is_over
                    stream.write(json.dumps(self._line()) + "\n")
                    stream.flush()
                    self._answered.set()
        except Exception as error:
            print(f"{self._file}: not written any more ({error}); the run goes on", file=sys.stderr)
        finally:
            self._is_silent = True
            self._answered.set()
            self._counters.close()

    def _line(self) -> dict[str, Any]:
        return {"at": round(time.time(), 2), "session": self._session, "stage": self.stage, **self._counters.sample()}


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's log, in the order of the file; one that is cut short or damaged is left out."""
    return Samples(folder).read()


class Samples:
    """Reads the log of a run folder, and at each further call only what was added.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self._file, self._at, self._found = folder / SAMPLES, 0, list[dict[str, Any]]()

    def read(self) -> list[dict[str, Any]]:
        """All samples so far, in the order of the file; a line that is cut short or damaged is left out."""
        if not self._file.is_file():
            return []
        with self._file.open("rb") as stream:
            if self._file.stat().st_size < self._at:  # another file
                self._at, self._found = 0, []
            stream.seek(self._at)
            added = stream.read()
        whole = added.rfind(b"\n") + 1  # the rest is being written
        self._at += whole
        self._found += filter(None, map(_sample, added[:whole].split(b"\n")))
        return self._found


def _sample(line: bytes) -> dict[str, Any] | None:
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(sample, dict) and isinstance(sample.get("at"), int | float) and isinstance(sample.get("stage"), str):
        return sample
    return None
