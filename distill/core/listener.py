"""What hears the signals of a process for :mod:`distill.core.stop`: a handler that sets a flag, and a thread that holds
the bounds on what comes of it, whatever the main thread is doing."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.core.errors import Interrupted, Preempted, Stopped

PATIENCE_S = 10.0
"""Seconds from a signal to the exception, where nothing looks."""
LEAVE_S = 15.0
"""Seconds from the exception, or from when it was due, to the end of the process."""
DEBOUNCE_S = 1.0
"""A signal that follows the first one faster is the same one, sent to a process and to its group."""
AGAIN_S = 3.0
"""Seconds between two attempts to raise the exception."""
LOOK_S = 0.2

KINDS: dict[int, type[Stopped]] = {
    signal.SIGINT: Interrupted,
    signal.SIGTERM: Preempted,
    signal.SIGUSR1: Preempted,
    signal.SIGHUP: Preempted,
}
"""The signals that ask for a stop, and what is raised. SIGINT and SIGHUP that whoever started us ignores (``nohup``, a
shell's background job) stay ignored."""


class Listener:
    """What this process was asked, and how long it may take; there is one at a time.

    Args:
        ends_process: whether the process is the command line's, which may be ended, and not a notebook's.

    Attributes:
        number: of the first signal that has asked for a stop; 0 when none has.
        asked_at, raised_at: when, by the monotonic clock; 0 when not yet.
        is_finished: all is done, and there is nothing left to stop.
        is_held: the work looks at the number by itself.
        patience_s, since: what the exception waits for, from when on.
        before: the signals that were taken over, with their handlers.
        pipe: by which the thread is woken.
    """

    def __init__(self, *, ends_process: bool):
        self.ends_process = ends_process
        self.number, self.asked_at, self.raised_at = 0, 0.0, 0.0
        self.is_finished = self.is_held = False
        self.patience_s, self.since = 0.0, time.monotonic()
        self._num_signals, self._first_at, self._is_told = 0, 0.0, False
        self._nudges, self._nudged_at = 0, 0.0
        self.before: dict[int, Any] = {}
        self._main, self.pipe, self._wakeup = threading.main_thread(), (-1, -1), -1
        self._is_closed, self._closing = False, threading.Lock()

    def open(self) -> None:
        """Take over the signals. The kernel wakes the thread by a pipe even while the main thread is in a library."""
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        for number in KINDS:
            if number in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self.before[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(self.pipe[0],), daemon=True, name="signals").start()

    def close(self) -> None:
        """Give the signals back. The thread sends none from here on, which would end a process without our handler."""
        with self._closing:
            self._is_closed = True
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self.pipe[1])  # which ends the thread

    def ask(self, number: int) -> None:
        """Set the flag; the first signal counts."""
        if not self.number:
            self.asked_at, self.number = time.monotonic(), number
            with suppress(OSError):
                os.write(self.pipe[1], b"\xff")  # the thread's bounds begin

    def error(self, where: str = "") -> Stopped:
        """What is to be raised, from now on."""
        self.raised_at = self.raised_at or time.monotonic()
        return KINDS[self.number](line(self.number, where))

    def is_lost(self) -> bool:
        """Whether the exception was raised and is not on its way any more."""
        return bool(self.raised_at) and not self.is_finished and not is_leaving()

    def exit_code(self) -> int:
        """Of a process that ends because of the signal."""
        return 0 if self.is_finished else KINDS[self.number].exit_code

    @property
    def _due(self) -> float:
        return max(self.asked_at, self.since) + self.patience_s

    def _on_signal(self, number: int, frame: Any) -> None:
        self.ask(number)
        is_due = time.monotonic() >= self._due and not self.is_finished
        if (is_due or self._num_signals > 1) and not is_leaving():
            raise self.error()

    def _watch(self, pipe: int) -> None:
        """The thread: count the signals, and hold the bounds."""
        while True:
            if select.select([pipe], [], [], LOOK_S if self.number else None)[0]:
                if not (numbers := os.read(pipe, 64)):
                    return os.close(pipe)
                for number in numbers:
                    self._count(number)
            if self.number:
                self._hold_bounds(time.monotonic())

    def _count(self, number: int) -> None:
        if number not in KINDS:
            return
        if number == signal.SIGTERM and self._nudges:
            self._nudges -= 1  # our own
            return
        self.ask(number)
        if not self._num_signals:
            self._first_at = time.monotonic()
        elif time.monotonic() - self._first_at < DEBOUNCE_S:
            return
        self._num_signals += 1
        if self._num_signals == 2:
            self._end(", at once") if self.ends_process else self._nudge()

    def _hold_bounds(self, now: float) -> None:
        if now > self._due and now > max(self._nudged_at, self.raised_at) + AGAIN_S:
            self._nudge()
        elif now < self._due and now - self.asked_at > DEBOUNCE_S and not self._is_told and not self.raised_at:
            self._is_told = True
            say(
                f"{name_of(self.number)}: stopping {'after this step' if self.is_held else 'soon'}; again stops at once"
            )
        if self.ends_process and now > (self.raised_at or self._due) + LEAVE_S:
            self._end(f", {now - self.asked_at:.0f} s after it, in the middle of something that does not end")

    def _nudge(self) -> None:
        """Let the main thread run :meth:`_on_signal`; a real signal also ends what it waits for."""
        with self._closing:
            if not self._is_closed:
                self._nudges, self._nudged_at = self._nudges + 1, time.monotonic()
                signal.pthread_kill(self._main.ident or 0, signal.SIGTERM)

    def _end(self, how: str) -> None:
        done = f"{name_of(self.number)}: everything is done; what was left to end has been left"
        say(done if self.is_finished else line(self.number, how))
        kill_children()
        os._exit(self.exit_code())


def is_leaving() -> bool:
    """Whether this thread is on its way out already, and at work in some ``finally`` or ``except``."""
    error = sys.exception()
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def kill_children() -> None:
    """Kill all that this process has started, and what these have; without ``/proc`` they end by themselves."""
    for child in _descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _descendants(process: int) -> list[int]:
    children: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, file.read_text().split())
    return children + [deeper for child in children for deeper in _descendants(child)]


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def line(number: int, where: str) -> str:
    by = "" if number == signal.SIGINT else f" by {name_of(number)}"
    return f"stopped{by}{where}; the same command goes on"


def say(line: str) -> None:
    """Not by ``print``, whose lock the main thread may hold."""
    with suppress(OSError):
        os.write(2, (line + "\n").encode())
