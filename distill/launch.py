"""Starts the processes of a run on this machine and ends them together."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from distill.core import stop, threads
from distill.core.errors import InputError, Interrupted, NotReached, Preempted, RankEnded
from distill.core.outside import check_appendable
from distill.core.world import ADDRESS, PORT, World
from distill.training.spec import ComputeSpec

LOGS = "logs"
"""Folder in a run folder where the ranks but the first write what they have to say."""
GRACE_S = 15.0
"""Seconds that the others have to end by themselves after one has ended badly."""
STOP_S = 120.0
"""The same when one was asked to stop, which it has told the others."""
STOPPED = (Interrupted.exit_code, Preempted.exit_code)


def launch(num_processes: int, order: dict[str, Any], folder: Path) -> None:
    """Run ``distill.worker`` in so many processes until all have ended. Rank 0 speaks; the others write to logs.

    Args:
        num_processes: on this machine.
        order: what the workers do, as JSON.
        folder: of the run.

    Raises:
        RankEnded: one ended badly, and so the others were ended too; it bears that one's exit code.
    """
    from torch.distributed import TCPStore

    # the store lives here, so that it outlives every worker and no port is fought over
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = folder / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    workers: list[subprocess.Popen[str]] = []
    try:
        for rank in range(num_processes):
            with _voice(rank, logs) as out:
                workers.append(_start(rank, num_processes, store.port, out))
            _tell(workers[-1], order)
        with stop.patient(math.inf, held=True):  # each worker has bounds of its own
            failed = _first_that_fails(workers)
    finally:
        _end(workers)
    if failed is not None and not _is_finished(workers, failed):
        raise _ended(workers, failed, logs)


def _start(rank: int, size: int, port: int, out: IO[str] | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "distill.worker"],
        env=dict(os.environ) | threads.shared(size) | place_of(rank, size, port),
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=out,
        text=True,
        start_new_session=True,  # Ctrl-C on a terminal comes to us alone, and we pass it on once
    )


def place_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What tells a process of this machine which rank it is, as environment variables.

    Args:
        rank: from 0.
        size: number of processes, all on this machine.
        port: of a ``TCPStore`` that none of them holds.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, PORT: port}
    # as torchrun's agent does, we hold the store and no worker does
    store = {ADDRESS: "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return {key: str(value) for key, value in place.items()} | store


@contextmanager
def _voice(rank: int, logs: Path) -> Iterator[IO[str] | None]:
    """Where a worker writes; None is where we do."""
    if rank == 0:
        yield None
    else:
        check_appendable(log_of(logs, rank))
        with log_of(logs, rank).open("a", encoding="utf-8") as out:
            yield out


def log_of(logs: Path, rank: int) -> Path:
    """What a rank but the first has said."""
    return logs / f"rank-{rank}.log"


def _tell(worker: subprocess.Popen[str], order: dict[str, Any] | int) -> None:
    """What to do, or later the number of a signal that asks to stop: a pipe loses none, even while Python is starting.

    The pipe stays open: a worker that finds it closed knows that we are gone.
    """
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps(order) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended already, and will be found to have


def _first_that_fails(workers: list[subprocess.Popen[str]]) -> int | None:
    """The rank that ended badly first; None when all end well. A signal that asks to stop is passed on once."""
    is_told = False
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:  # a process that was killed is the cause, one that lost its peer the effect
            return min(failed, key=lambda rank: (codes[rank] or 0, rank))
        if all(code == 0 for code in codes):
            return None
        if stop.asked() and not is_told:
            is_told = True
            for worker in workers:
                _tell(worker, stop.asked())
        time.sleep(0.05)


def _end(workers: list[subprocess.Popen[str]]) -> None:
    """Wait a little for those that still run, then kill them."""
    stopped = next((worker.returncode for worker in workers if worker.returncode in STOPPED), None)
    grace_s = 0.0 if _is_mistake(workers) else STOP_S if stopped else GRACE_S
    until = time.monotonic() + grace_s
    for worker in workers:
        if stopped and worker.poll() is None:  # the signal may have reached one alone
            _tell(worker, signal.SIGINT if stopped == Interrupted.exit_code else signal.SIGTERM)
    for worker in workers:
        try:
            worker.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        assert worker.stdin is not None
        worker.stdin.close()


def _is_mistake(workers: list[subprocess.Popen[str]]) -> bool:
    """Whether the first has found the user's mistake: its line is all there is to say, and nobody has work to save."""
    return bool(workers) and workers[0].returncode == InputError.exit_code


def _is_finished(workers: list[subprocess.Popen[str]], failed: int) -> bool:
    """Whether the signal that stopped a rank came when the first rank, which ends last, had finished all stages."""
    return workers[0].returncode == 0 and workers[failed].returncode in STOPPED


def _ended(workers: list[subprocess.Popen[str]], rank: int, logs: Path) -> RankEnded:
    """Why the workers, which have all ended, did so, when this one was the first to."""
    code = workers[rank].returncode
    if _is_mistake(workers):
        return RankEnded("the recipe or the arguments are wrong (see above)", InputError.exit_code, is_told=True)
    if workers[0].returncode == NotReached.exit_code:
        missed = "a figure that the recipe requires was not reached (see above)"
        return RankEnded(missed, NotReached.exit_code, is_told=True)
    if code in STOPPED:
        is_told = workers[0].returncode in STOPPED
        return RankEnded("stopped; the same command goes on where this one was left", code, is_told=is_told)
    where = "see above" if rank == 0 else f"its log is {log_of(logs, rank)}"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return RankEnded(f"rank {rank} {how} ({where}); the others were stopped", code if code > 0 else 1)


def wanted_processes(compute: ComputeSpec) -> int:
    """How many processes of its own a run starts.

    Raises:
        InputError: several machines, on which it cannot start any; or a number that the rest of compute cannot have.
    """
    if compute.num_nodes > 1:
        raise InputError(
            f"compute.num_nodes: {compute.num_nodes}: start the same command on every machine by torchrun or srun "
            "(docs/multi-gpu.md), or set it to 1"
        )
    import torch

    from distill.training.trainer import resolve_device

    size = compute.devices
    if size == "auto":
        size = torch.cuda.device_count() if resolve_device(compute) == "cuda" else 1
    elif resolve_device(compute) == "cuda" and size > torch.cuda.device_count():
        raise InputError(f"compute.devices: {size}: PyTorch sees {torch.cuda.device_count()} GPUs here; lower it")
    _check_several(compute, int(size), int(size))
    return int(size)


def check_world(compute: ComputeSpec, world: World) -> None:
    """Refuse processes that are not as many as the recipe says, too few for its strategy, or too many for its teacher.

    Raises:
        InputError: with both numbers.
    """
    _check_several(compute, world.size, world.local_size)
    if compute.devices != "auto" and compute.devices * compute.num_nodes != world.size:
        raise InputError(
            f"compute.devices ({compute.devices}) x num_nodes ({compute.num_nodes}) is not the {world.size} processes "
            "that were started; change one of them, or set devices: auto"
        )


def _check_several(compute: ComputeSpec, size: int, num_here: int) -> None:
    if size == 1 and compute.strategy == "fsdp":
        raise InputError("compute.strategy: fsdp shares a model out among processes, and there is one; remove it")
    try:
        compute.check_teacher(num_here)
    except ValueError as error:
        raise InputError(f"compute.{error}") from None
