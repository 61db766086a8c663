"""Signals that ask the program to stop, and the moments at which it stops.

A signal only sets a flag. The work looks at the flag between two units of it - a step, a batch, a shard, a file - by
:func:`check`, which raises :class:`~distill.core.errors.Stopped`; no ``except Exception`` catches that. Two bounds of
:mod:`~distill.core.listener` hold where nothing looks, as in an import or in a library that waits:

1. ``PATIENCE_S`` after the signal the exception is raised wherever the main thread is, and again if that is lost
   (Python ignores what is raised in a ``__del__``).
2. ``LEAVE_S`` later a thread ends the process, with all that it has started. It ends it at once at a second signal.

Neither loses more than the unit that was being worked on: what is kept is written under another name, synced, renamed.
:func:`confirm` stands before such a rename: once the exception was raised and has not arrived, something has taken it
for an error of its own, and what that has led to is not to be kept.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

from distill.core import listener as bounds
from distill.core.errors import Stopped
from distill.core.listener import KINDS, Listener, is_leaving, kill_children, line, say

WORKER_S = 30.0
"""Seconds that a data loader's worker lives on after a SIGTERM, so that the training can finish its step."""

T = TypeVar("T")

_listener: Listener | None = None


def listen() -> None:
    """Take over the signals for the rest of the process, which is the command line's."""
    global _listener
    if _listener is not None:
        return
    _listener = Listener(ends_process=True)
    _listener.open()
    atexit.register(_turn_deaf)  # registered first, so it runs last
    sys.excepthook, sys.unraisablehook = _told(sys.excepthook), _without_stops(sys.unraisablehook)


def _told(before: Callable[..., None]) -> Callable[..., None]:
    """What Python does with an exception that nothing has caught: a stop is one line and its exit code."""

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, Stopped):
            say(str(error))
            leave(error.exit_code)
        before(kind, error, trace)

    return hook


def _without_stops(before: Callable[[Any], None]) -> Callable[[Any], None]:
    """What Python says of an exception that it drops; a stop is raised again."""
    return lambda dropped: None if isinstance(dropped.exc_value, Stopped) else before(dropped)


def _turn_deaf() -> None:
    """The exit code is decided, and Python is about to give the signals back to the system."""
    for number in KINDS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def listening() -> Iterator[None]:
    """Take over the signals within the block, unless they are already, or another thread than the main one asks.

    Raises:
        Stopped: at the end of the block at the latest; and in place of any error that leaves it after a signal, which
            is likely to be its effect.
    """
    global _listener
    own = None
    if _listener is None and threading.current_thread() is threading.main_thread():
        own = _listener = Listener(ends_process=False)
        own.open()
    try:
        yield
        if own is not None and own.number and not own.is_finished:
            raise own.error()
        confirm()
    except Exception as error:
        if _listener is None or not _listener.number or _listener.is_finished or _is_stop(error):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise _listener.error(f" ({why})") from error
    finally:
        if own is not None:
            _listener = None
            own.close()


def _is_stop(error: Exception) -> bool:
    """Whether it stands for another process, which was stopped."""
    return getattr(error, "exit_code", None) in {kind.exit_code for kind in KINDS.values()}


@contextmanager
def patient(seconds: float | None = None, *, held: bool = False) -> Iterator[None]:
    """Bound the time from a signal to the exception; outside of any such block it is raised at once.

    Args:
        seconds: counted from the signal, or from the beginning of the block; unset: ``PATIENCE_S``.
        held: :func:`check` does nothing within the block, which looks at :func:`asked` by itself.
    """
    listener = _listener
    if listener is None:
        yield
        return
    before = listener.patience_s, listener.is_held
    listener.since, listener.is_held = time.monotonic(), held
    listener.patience_s = bounds.PATIENCE_S if seconds is None else seconds
    try:
        yield
    finally:
        listener.since = time.monotonic()
        listener.patience_s, listener.is_held = before


def asked() -> int:
    """The number of the first signal that has asked for a stop; 0 when none has."""
    return _listener.number if _listener is not None else 0


def ask(number: int) -> None:
    """Ask for a stop as the signal would, from any thread. It is never the second signal."""
    if _listener is not None:
        _listener.ask(number)


def check() -> None:
    """Stop here, between two units of work, if that was asked for. Only the main thread stops.

    Raises:
        Stopped: it was.
    """
    listener = _listener
    if listener is None or not listener.number or listener.is_held or listener.is_finished:
        return
    if threading.current_thread() is threading.main_thread() and not is_leaving():
        raise listener.error()


def confirm() -> None:
    """Refuse to keep a result that may be wrong because the exception was raised on the way to it, and was lost.

    Raises:
        Stopped: once more.
    """
    if _listener is not None and _listener.is_lost():
        raise _listener.error()


def stoppable(items: Iterable[T]) -> Iterator[T]:
    """The same items, with a :func:`check` before each."""
    for item in items:
        check()
        yield item


def stopped(number: int, where: str) -> Stopped:
    """The exception for a signal that this process, or one that works with it, has got.

    Args:
        number: of the signal.
        where: what was reached, such as ``" at step 3, which is saved"``.
    """
    if _listener is None:
        return KINDS[number](line(number, where))
    _listener.ask(number)
    return _listener.error(where)


def finish() -> None:
    """All is done: a signal that comes now only shortens what is left, and the exit code stays 0."""
    if _listener is not None:
        _listener.is_finished = True


def exit_code(otherwise: int) -> int:
    """Of a process that is about to end itself: that of the signal, if there was one."""
    return _listener.exit_code() if _listener is not None and _listener.number else otherwise


def leave(code: int) -> NoReturn:
    """End the process. After a signal nothing of Python's own ending may hold it up, or change its exit code."""
    if _listener is not None and _listener.ends_process and _listener.number and code:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        kill_children()
        os._exit(code)
    sys.exit(code)


def in_worker(_: int = 0) -> None:
    """In a process that reads data for this one: outlive a signal to the whole group for a while, but not our death."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.setitimer(signal.ITIMER_REAL, WORKER_S))
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _in_child() -> None:
    """A fork of this process has no thread that watches, and must not wake ours; its parent says when it ends."""
    global _listener
    if _listener is None:
        return
    signal.set_wakeup_fd(-1)
    for number in _listener.before:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    for end in _listener.pipe:
        with suppress(OSError):
            os.close(end)
    _listener = None


os.register_at_fork(after_in_child=_in_child)
