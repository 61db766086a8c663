"""The process that traces: it has the guard before it imports torch, and replaces ``torch.cuda`` within itself.

It is ``python -m distill.trace.child SOCKET PARENT [LIBRARY]``, with a connection of ``multiprocessing`` to the parent.
Not a process of ``multiprocessing``, which would import the parent's main module first, and with it maybe torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from distill.core.errors import DistillError, MachineError
from distill.core.orphan import die_with
from distill.trace import guard
from distill.trace.figures import Figures
from distill.trace.jobs import Job


class Tracer:
    """A process that traces one job after the other; a context manager.

    Raises:
        MachineError: on entering, where this machine cannot compile the guard.
    """

    def __enter__(self) -> Tracer:
        library = guard.built()
        self._jobs, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(os.getpid()), *([str(library)] if library is not None else [])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # which gets the progress of a training
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.close()
        self._process.kill()
        self._process.wait()

    def trace(self, job: Job) -> Figures:
        """The figures of a job.

        Raises:
            DistillError: the training raised it.
            RuntimeError: it raised anything else, such as an operation on tensors of two devices.
            MachineError: the process ended.
        """
        try:
            self._jobs.send(job)
            answer = self._jobs.recv()
        except (EOFError, ConnectionError) as error:
            code = self._process.wait(5)
            raise MachineError(f"--trace: the process that traces ended (exit code {code}) in {job.name}") from error
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Figures)
        return answer


def main() -> NoReturn:
    """Trace the jobs that come until the parent closes the connection."""
    end, parent, *library = sys.argv[1:]
    die_with(int(parent))
    jobs = Connection(int(end))
    guard.load(Path(library[0]) if library else None)
    from distill.trace.step import trace

    while True:
        try:
            job: Job = jobs.recv()
        except EOFError:
            sys.exit()
        try:
            answer: object = trace(job)
        except DistillError as error:
            answer = error
        except Exception as error:
            answer = RuntimeError(f"{job.name}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        jobs.send(answer)


if __name__ == "__main__":
    main()
