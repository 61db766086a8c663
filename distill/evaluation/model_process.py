"""A process of its own for one model: what it holds ends with it, and what kills it ends nothing else.

A process's peak memory never falls, so two models in one process would share the larger one's peak. The processes are
forked from a server that has torch and transformers loaded already: a start costs milliseconds instead of seconds.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from distill.core import stop
from distill.core import threads as cpu_threads
from distill.core.errors import MachineError

LOOK_S = 0.2
"""Seconds between two looks at whether the run is to stop."""
REBUILD = (
    "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
    "llama-cpp-python"
)
FIXES = {"distill.exporters.llama_cpp_engine": f"; build it again without this: {REBUILD}"}
"""Module of an engine -> what to do where the processor lacks an instruction that it was built with."""


class Child:
    """A process that does one piece of work, or answers one request after another; a context manager.

    Args:
        work: called in the process with a connection and ``given``; what it sends is received here.
        given: what can be pickled.
        what: of whom an error speaks.
        module: of the engine that the process loads.
    """

    def __init__(self, work: Callable[..., None], *given: Any, what: str, module: str = ""):
        context = _context()
        self._what, self._module = what, module
        self._here, there = context.Pipe(duplex=True)
        self._process = context.Process(target=_live, args=(there, work, given), daemon=True)
        with _without_main(), cpu_threads.withdrawn():  # measured as PyTorch runs it by itself
            self._process.start()
        there.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def send(self, message: Any) -> None:
        """Ask for something.

        Raises:
            MachineError: the process is dead.
        """
        try:
            self._here.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self, timeout_s: float) -> Any:
        """What the process has found next.

        Raises:
            MachineError: an error in there, no answer in time, or the process died; one line.
        """
        until = time.monotonic() + timeout_s
        try:
            while not (is_there := self._here.poll(LOOK_S)) and time.monotonic() < until:
                stop.check()
            if not is_there:
                raise MachineError(f"{self._what}: no answer in {timeout_s:g} s")
            state, result = self._here.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None
        if state == "error":
            raise MachineError(f"{self._what}: {result}")
        return result

    def _ended(self) -> MachineError:
        self._process.join(10)
        return MachineError(f"{self._what}: {_death(self._process.exitcode, self._module)}")


def say(connection: Connection, result: Any) -> None:
    """Send a result from within the process."""
    connection.send(("done", result))


def _live(connection: Connection, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    """The process's whole life: its work, or one line of excuse."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # bars of libraries; what ends the process is sent
    try:
        work(connection, *given)
    except EOFError:
        pass  # nobody asks any more
    except BaseException as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        with suppress(OSError):  # nobody may be listening any more
            connection.send(("error", f"{type(error).__name__}: {first}" if first else type(error).__name__))
    finally:
        connection.close()


def _context() -> Any:
    """The fork server's context, with the child's imports done beforehand; ``spawn`` where the system cannot fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.evaluation.speed_child"])
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the caller's script while a process starts: it would be imported, and so run, a second time in there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_the_parent() -> None:
    """Not disturb what is measured by whoever goes on with the run, when that was killed; asleep until then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _death(exit_code: int | None, module: str) -> str:
    if exit_code == -signal.SIGKILL:
        return "the process was killed (most often: out of memory)"
    if exit_code == -signal.SIGILL:
        return f"the engine ended by an instruction that this processor does not have{FIXES.get(module, '')}"
    return f"the process died (exit code {exit_code})"
