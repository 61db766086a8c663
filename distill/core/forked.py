"""A function applied to many items in processes that are forked from this one; the results come in the items' order.

A fork has the function and all that it refers to without pickling or importing; items and results go through pipes. It
must not touch a GPU. The processes end with the block that they serve, and with this process, however it ends.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Generic, TypeVar

from distill.core import stop
from distill.core.errors import MachineError

AHEAD = 4
"""Items per process that may be taken before the oldest result is there."""
LOOK_S = 0.5

Item = TypeVar("Item")
Result = TypeVar("Result")


def can_fork() -> bool:
    """Whether forks of a process with threads are safe enough here: on Linux, where data loaders rely on them too."""
    return sys.platform == "linux"


class Forked(Generic[Item, Result]):
    """Processes that apply a function.

    Args:
        function: of an item; the same item must give the same result in every process.
        num_processes: how many, besides this one.
        what: they do, for messages, such as ``"tokenizes"``.
    """

    def __init__(self, function: Callable[[Item], Result], num_processes: int, what: str):
        self.function, self.num_processes, self.what = function, num_processes, what
        self._workers: dict[Connection, Any] = {}

    def __enter__(self) -> Forked[Item, Result]:
        try:
            for _ in range(self.num_processes):
                self._start()
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, OSError):
                raise MachineError(f"a process that {self.what} cannot be started ({error.strerror})") from error
            raise
        return self

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        inherited = [ours, *self._workers]
        worker = context.Process(target=_work, args=(self.function, theirs, inherited, os.getpid()), daemon=True)
        try:
            worker.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._workers[ours] = worker

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ours, worker in self._workers.items():
            worker.kill()  # it keeps nothing
            worker.join()
            worker.close()
            ours.close()
        self._workers.clear()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The result for each item, in the order of the items. They are taken as they are needed, a few ahead.

        Raises:
            Exception: what the function raised, once the results before it are given.
            MachineError: a process was killed.
            Stopped: a signal came.
        """
        idle, busy, done = [*self._workers], dict[Connection, int](), dict[int, tuple[bool, Any]]()
        num_taken = num_given = 0
        for item in items:
            while not idle or num_taken - num_given >= AHEAD * self.num_processes:
                idle += self._collected(busy, done)
                while num_given in done:
                    yield _given(*done.pop(num_given))
                    num_given += 1
            worker = idle.pop()
            self._send(worker, item)
            busy[worker] = num_taken
            num_taken += 1
        while num_given < num_taken:
            while num_given not in done:
                self._collected(busy, done)
            yield _given(*done.pop(num_given))
            num_given += 1

    def _collected(self, busy: dict[Connection, int], done: dict[int, tuple[bool, Any]]) -> list[Connection]:
        """Wait a moment for results, and move them from ``busy`` to ``done``. Returns whose they are."""
        stop.check()
        ready = [worker for worker in wait([*busy], LOOK_S) if isinstance(worker, Connection)]
        for worker in ready:
            try:
                done[busy.pop(worker)] = worker.recv()
            except (EOFError, OSError):
                raise self._killed(worker) from None
        return ready

    def _send(self, worker: Connection, item: Item) -> None:
        try:
            worker.send(item)
        except OSError:
            raise self._killed(worker) from None

    def _killed(self, worker: Connection) -> MachineError:
        process = self._workers[worker]
        process.join(LOOK_S)
        code = process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        hint = "; is there too little memory?" if code == -signal.SIGKILL else ""
        return MachineError(f"a process that {self.what} was {how}{hint}")


def _given(is_result: bool, value: Any) -> Any:
    if not is_result:
        raise value
    return value


def _work(function: Callable[[Any], Any], pipe: Connection, inherited: list[Connection], parent: int) -> None:
    """What a forked process does: answer each item, until nobody is there any more."""
    stop.in_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it ends
    for other in inherited:
        other.close()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while os.getppid() == parent:
            item = pipe.recv()
            try:
                answer = (True, function(item))
            except Exception as error:
                answer = (False, _portable(error))
            pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """The exception, or another one with its text where it cannot be sent."""
    told = "".join(traceback.format_exception(error))
    try:
        copy.copy(error)  # makes it anew from its arguments, as the other end of the pipe does
        ForkingPickler.dumps(error)
    except Exception:
        return RuntimeError(told)
    return error
