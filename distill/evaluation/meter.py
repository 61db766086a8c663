"""Energy and load during a piece of work. Figures without a counter are None."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

ENERGY_S = 5.0
"""Seconds of work over which energy is measured; counters of GPUs are updated every 20 to 100 ms."""


class Counters(Protocol):
    """Reads the machine; :class:`distill.tracking.counters.Counters`."""

    def joules(self) -> Mapping[str, float]:
        """Part of the machine -> its counter of energy; empty where there is none."""

    def gpus(self) -> list[dict[str, Any]]:
        """What each GPU does."""


@dataclass
class Meter:
    """Sums up pieces of the same work, such as the steps of decoding.

    Attributes:
        counters: of the machine; None: none is read.
        on_gpu: whether the work runs on a GPU; else the energy of GPUs is not counted.
        seconds: of the pieces so far.
        tokens: that were read or written in them.
    """

    counters: Counters | None
    on_gpu: bool = True
    seconds: float = 0.0
    tokens: int = 0
    _joules: float = 0.0
    _cpu_seconds: float = 0.0
    _loads: list[float] = field(default_factory=list)
    _has_counter: bool = False

    @contextmanager
    def over(self, tokens: int) -> Iterator[None]:
        """The block is a piece of work on so many tokens."""
        started, cpu, before = time.perf_counter(), time.process_time(), self._read()
        yield
        self.seconds += time.perf_counter() - started
        self._cpu_seconds += time.process_time() - cpu
        self.tokens += tokens
        if self.counters is None:
            return
        after = self._read()
        self._has_counter = bool(after)
        self._joules += sum(max(0.0, after[part] - joules) for part, joules in before.items() if part in after)
        self._loads += [gpu["utilization"] for gpu in self.counters.gpus() if "utilization" in gpu]

    def lasts(self, work: Callable[[], Any], seconds: float) -> None:
        """Repeat ``work``, which calls :meth:`over`, until the measured pieces take ``seconds`` in total."""
        while self.seconds < seconds:
            work()

    def joules_per_1000_tokens(self) -> float | None:
        """Of all parts of the machine that have a counter; None where none has, or it has not moved."""
        return 1e3 * self._joules / self.tokens if self._has_counter and self._joules and self.tokens else None

    def cpu_load(self) -> float | None:
        """Percent of all processors that this process used."""
        return 100 * self._cpu_seconds / self.seconds / (os.cpu_count() or 1) if self.seconds else None

    def gpu_load(self) -> float | None:
        """Mean percent of the GPUs; None without one."""
        return statistics.fmean(self._loads) if self._loads else None

    def _read(self) -> Mapping[str, float]:
        joules = {} if self.counters is None else self.counters.joules()
        return {part: count for part, count in joules.items() if self.on_gpu or part != "gpu"}
