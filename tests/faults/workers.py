"""Runs of the command line in processes of their own that start at once: they are forked from one that has imported it.

with Workers() as workers:
    world = workers.start(["run", "recipe.yaml", "--run-dir", "runs/a"], size=2, log=Path("logs"))
    world[1].send(signal.SIGKILL)
    assert world.wait(60) == [1, -signal.SIGKILL]
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.core import stop
from distill.core.errors import Stopped
from distill.launch import GRACE_S, place_of
from tests.faults.chaos import Kill, Signal, as_on_a_terminal
from tests.faults.machines import Machines, enter


class World:
    """The processes of one run.

    Attributes:
        processes: by rank.
        logs: what each has said, by rank.
    """

    def __init__(self, processes: list[Any], logs: list[Path], store: Any):
        self.processes, self.logs, self._store = processes, logs, store

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a rank a signal."""
        os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes by rank, negative for signals; what has not ended by then is killed.

        Raises:
            TimeoutError: with what the ranks have said.
        """
        if late := self._kill_after(seconds):
            raise TimeoutError(f"ranks {late} did not end in {seconds:.0f} s:\n{self.said()}")
        return [process.exitcode for process in self.processes]

    def end(self, seconds: float = GRACE_S) -> list[int]:
        """The same after one has died: as any launcher, kill what does not end by itself (it may not even have met)."""
        self._kill_after(seconds)
        return [process.exitcode for process in self.processes]

    def _kill_after(self, seconds: float) -> list[int]:
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.processes[rank].kill()
            self.processes[rank].join()
        return late

    def running(self) -> bool:
        """Whether any still runs."""
        return any(process.is_alive() for process in self.processes)

    def said(self) -> str:
        """All that the ranks have said."""
        return "\n".join(f"--- rank {rank}\n{log.read_text()}" for rank, log in enumerate(self.logs) if log.exists())


class Workers:
    """Where worlds are started; use it as a context. Not for a GPU: a device cannot be used after a fork.

    Args:
        also: modules that runs need besides those of :mod:`~tests.faults.preloaded`.
        patches: modules that change the package when they are imported, in the processes of runs only: the server is
            the same for all objects of this class.
    """

    def __init__(self, also: Sequence[str] = (), patches: Sequence[str] = ()) -> None:
        self._patches = list(patches)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.preloaded", *also])
        self._started: list[World] = []

    def start(
        self,
        arguments: Sequence[str],
        *,
        size: int = 1,
        log: Path,
        kill: Kill | Signal | None = None,
        victim: int = 0,
        trace: Path | None = None,
        machines: Machines | None = None,
    ) -> World:
        """Start ``distill`` with these arguments in ``size`` processes.

        Args:
            arguments: of the command line.
            size: number of processes; more than one meet on this machine.
            log: folder for what they say.
            kill: when one of them dies, or is signalled.
            victim: which.
            trace: folder for what each trains on: a line per row of text, the step (from 0) and its token ids.
            machines: two machines for the processes, half of them on each; they meet at the first process.
        """
        from torch.distributed import TCPStore

        log.mkdir(parents=True, exist_ok=True)
        is_held = size > 1 and machines is None
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if is_held else None
        processes, logs = [], []
        for rank in range(size):
            place = place_of(rank, size, store.port) if store is not None else {}
            namespace = None
            if machines is not None:
                place, namespace = machines.place_of(rank, size // 2), machines.names[rank // (size // 2)]
            logs.append(log / f"rank-{rank}.log")
            fault = kill if rank == victim else None
            seen = trace / f"rank-{rank}.txt" if trace is not None else None
            process = self._context.Process(
                target=_work, args=(place, list(arguments), str(logs[-1]), fault, seen, namespace, self._patches)
            )
            process.start()
            processes.append(process)
        self._started.append(World(processes, logs, store))
        return self._started[-1]

    def call(self, function: Callable[..., None], *arguments: Any, log: Path, seconds: float) -> None:
        """Call a function in a process of its own, which may fork others.

        Args:
            function: of a module that can be imported; its arguments are pickled.
            arguments: of the function.
            log: file for what it says.
            seconds: after which it is killed.

        Raises:
            AssertionError: it failed, with what it has said.
        """
        process = self._context.Process(target=_call, args=(function, arguments, str(log)))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode == 0, f"exit code {process.exitcode}:\n{log.read_text()[-3000:]}"

    def __enter__(self) -> Workers:
        """Import everything now, so that no run is charged with it."""
        first = self._context.Process(target=_nothing)
        first.start()
        first.join()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what still runs."""
        for world in self._started:
            for process in world.processes:
                if process.is_alive():
                    process.kill()
                    process.join()


def _nothing() -> None:
    """What the process does whose start starts the server."""


def _call(function: Callable[..., None], arguments: Sequence[Any], log: str) -> None:
    import torch

    _speak_into(log)
    torch.set_num_threads(1)
    function(*arguments)


def _speak_into(log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _work(*arguments: Any) -> None:
    """One process, which hears signals from the beginning."""
    as_on_a_terminal()  # multiprocessing's server ignores Ctrl-C
    stop.listen()
    try:
        _run(*arguments)
    except Stopped:
        sys.excepthook(*sys.exc_info())  # as Python itself would, which multiprocessing does not


def _run(
    place: dict[str, str],
    arguments: list[str],
    log: str,
    kill: Kill | Signal | None,
    trace: Path | None,
    namespace: str | None,
    patches: list[str],
) -> None:
    """Take its place, speak into its log, run the command line."""
    import torch

    from distill.__main__ import main

    _speak_into(log)
    multiprocessing.set_start_method(None, force=True)  # a loader's workers are forked as in any other process
    os.environ.update(place)
    if namespace is not None:
        enter(namespace)
    torch.set_num_threads(1)  # several processes with several threads each would wait for each other's
    if kill is not None:
        kill.arm()
    if trace is not None:
        _trace(trace)
    for module in patches:
        import_module(module)
    sys.argv = ["distill", *arguments]
    main()


def _trace(file: Path) -> None:
    """From now on this process writes down the rows that it trains on."""
    from distill.training.module import DistillationModule

    step = DistillationModule.training_step

    def traced(module: Any, batch: Any, batch_index: int) -> Any:
        with file.open("a") as out:
            out.writelines(f"{module.trainer.global_step} {ids}\n" for ids in batch["input_ids"].tolist())
        return step(module, batch, batch_index)

    DistillationModule.training_step = traced  # type: ignore[assignment, method-assign]
