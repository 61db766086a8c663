"""Several processes that train together: how they connect, how rank 0 sends orders, and how a lost process is detected.

The tensors of a step are exchanged through torch.distributed. Orders and heartbeats go through the store (``TCPStore``)
by which the processes connected; heartbeats have their own thread. So a process can wait for hours while only rank 0
runs a stage, and still detect within a minute that rank 0 is lost.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.core import stop
from distill.core.errors import MachineError
from distill.core.world import ADDRESS, PORT, World

BEAT_S = 1.0
"""Seconds between two heartbeats."""
MEET_S = 600.0
"""Seconds that a process waits until all others are connected."""
NUM_WATCHED = 3
"""Processes whose heartbeats each process reads, beside that of rank 0."""
COLLECTIVE_S = 1800.0
"""Timeout of collectives, in seconds. It is longer than rank 0 needs to write a checkpoint while the others wait."""


class Ranks:
    """The connection of this process to the others; :func:`meet` creates it.

    Attributes:
        world: all processes of the run, and the rank of this process.

    Args:
        world: all processes of the run, and the rank of this process.
        silence_s: number of seconds without a heartbeat after which a process counts as lost.
        server: the store, in the process that runs it; None in the other processes.
    """

    def __init__(self, world: World, silence_s: float, server: dist.Store | None = None):
        self.world, self.silence_s, self._server = world, silence_s, server
        self._told, self._rounds = 0, 0
        self._closed = threading.Event()
        self._store, self._beats = _client(), _client()  # one client per thread, because a client blocks while it waits
        self._beats.set_timeout(timedelta(seconds=silence_s))  # the process that runs the store may be lost itself
        self._beats.set(f"host/{world.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._beats.set(f"beat/{world.rank}", "0")

    def wait_for_all(self) -> None:
        """Wait for the first heartbeat of each process.

        Raises:
            RuntimeError: a process is missing after ``MEET_S`` seconds.
        """
        keys, until = [f"beat/{rank}" for rank in range(self.world.size)], time.monotonic() + MEET_S
        while not self._store.check(keys):  # polled, because no signal interrupts a wait of the store
            stop.check()
            if time.monotonic() > until:
                raise RuntimeError(f"not all connected in {MEET_S:.0f} s")
            time.sleep(0.05)

    def watch(self) -> None:
        """Start to send heartbeats, and to end this process if another process or the store sends no sign of life."""
        threading.Thread(target=self._watch, daemon=True, name="heartbeats").start()
        threading.Thread(target=self._watch_store, daemon=True, name="store").start()

    def tell(self, order: dict[str, Any] | None) -> None:
        """On rank 0: send an order to all other ranks. The order None ends them."""
        self._store.set(f"order/{self._told}", json.dumps(order))
        self._told += 1

    def hear(self) -> dict[str, Any] | None:
        """On the other ranks: wait for the next order of rank 0.

        Raises:
            MachineError: the process that runs the store is lost.
        """
        key = f"order/{self._told}"
        with _lost_peer_is_one_line(self.world):
            while not self._store.check([key]):
                stop.check()
                time.sleep(0.05)  # polled, because no signal interrupts a wait of the store
            self._told += 1
            order: dict[str, Any] | None = json.loads(self._store.get(key))
        return order

    def leave(self, wait_s: float | None = None) -> None:
        """Announce that this process ends normally. The process that runs the store waits for all others first.

        Args:
            wait_s: largest number of seconds to wait; None for ``silence_s``.
        """
        self._closed.set()
        self._store.set(f"left/{self.world.rank}", "")
        until = time.monotonic() + (self.silence_s if wait_s is None else wait_s)
        while self._server is not None and not self._all_end() and time.monotonic() < until:
            time.sleep(0.05)

    def _all_end(self) -> bool:
        return all(
            self._store.check([f"left/{rank}"]) or self._store.check([f"failed/{rank}"])
            for rank in range(self.world.size)
        )

    def fail(self) -> None:
        """Announce that this process ends with an error.

        Running processes detect it by its missing heartbeats; a process that ends does not wait for it.
        """
        self.share_stop()
        self._closed.set()
        with suppress(Exception):  # the store itself may be gone
            self._store.set(f"failed/{self.world.rank}", "")

    def share_stop(self) -> None:
        """Exchange stop signals with the other processes, because a signal may have reached only one of them."""
        with suppress(Exception):  # the store itself may be gone
            _share_stop(self._store)

    def _watch(self) -> None:
        heard = {rank: (b"", time.monotonic()) for rank in watched(self.world)}
        while not self._closed.wait(BEAT_S):
            self._rounds += 1
            try:
                self._beats.set(f"beat/{self.world.rank}", str(self._rounds))
                _share_stop(self._beats)
                silent = self._silent(heard)
                if silent:  # publish it, because not every process watches that rank
                    self._beats.set("silent", silent)
                elif self._beats.check(["silent"]):
                    silent = self._beats.get("silent").decode()
            except Exception as error:
                return self._give_up(f"the process that runs the store is gone ({_first_line(error)})")
            if silent:
                return self._give_up(f"{silent} has sent no heartbeat for {self.silence_s:.0f} s")

    def _watch_store(self) -> None:
        """End this process if the heartbeats get no answer from the store: a network failure closes no connection."""
        last, num_waits = 0, 0
        # count intervals instead of elapsed time, so that a process resumed after SIGSTOP does not report a timeout
        while not self._closed.wait(BEAT_S):
            num_waits = num_waits + 1 if self._rounds == last else 0
            last = self._rounds
            if num_waits * BEAT_S > self.silence_s:
                where = f"{os.environ.get(ADDRESS)}:{os.environ.get(PORT)}"
                return self._give_up(f"the store at {where} has not answered for {self.silence_s:.0f} s")

    def _silent(self, heard: dict[int, tuple[bytes, float]]) -> str | None:
        """The rank and host of a process that sent no heartbeat for too long and has not left; None if there is none.

        Args:
            heard: rank -> its last heartbeat, and the time when it was received.
        """
        now = time.monotonic()
        for rank, (last, since) in heard.items():
            beat = self._beats.get(f"beat/{rank}")
            if beat != last:
                heard[rank] = (beat, now)
            elif now - since > self.silence_s and not self._beats.check([f"left/{rank}"]):
                return f"rank {rank} ({self._beats.get(f'host/{rank}').decode()})"
        return None

    def _give_up(self, why: str) -> None:
        """End this process immediately, because its main thread may be blocked in a library."""
        if self._closed.is_set():
            return
        print(f"rank {self.world.rank}: {why}; stopped, the same command goes on", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(stop.exit_code(MachineError.exit_code))


def watched(world: World) -> list[int]:
    """The ranks whose heartbeats a process reads: those that follow it, and the first, which all depend on.

    Each rank is watched by others, and the requests to the store grow with the number of processes, not its square.
    """
    following = [(world.rank + step) % world.size for step in range(1, NUM_WATCHED + 1)]
    return [rank for rank in dict.fromkeys([*following, 0]) if rank != world.rank]


def _share_stop(store: dist.Store) -> None:
    if number := stop.asked():
        store.set("asked", str(number))
    elif store.check(["asked"]):
        stop.ask(int(store.get("asked")))


def _tcp(*, is_master: bool = False) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ[ADDRESS],
        int(os.environ[PORT]),
        is_master=is_master,
        wait_for_workers=False,
        timeout=timedelta(seconds=MEET_S),
    )


def _client() -> dist.Store:
    """A connection to the store. It does not see keys from before a restart by torchrun."""
    return dist.PrefixStore(f"distill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _tcp())


@contextmanager
def meet(world: World, silence_s: float, device: str) -> Iterator[Ranks | None]:
    """Connect the processes of a run within the ``with`` block; does nothing if there is only one process.

    Args:
        world: all processes of the run, and the rank of this process.
        silence_s: number of seconds without a heartbeat after which a process counts as lost.
        device: if ``"cuda"``, each process of a machine gets its own GPU, before it loads anything.

    Raises:
        MachineError: the processes cannot connect.
    """
    if world.size == 1:
        yield None
        return
    try:
        # the store runs in torchrun's agent, or in rank 0
        held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        server = None if held or world.rank else _tcp(is_master=True)
        ranks = Ranks(world, silence_s, server)
        ranks.wait_for_all()
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get(ADDRESS)}:{os.environ.get(PORT)}"
        raise MachineError(
            f"rank {world.rank} did not find the other {world.size - 1} processes at {place} ({_first_line(error)})"
        ) from error
    if device == "cuda":
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    ranks.watch()
    try:
        yield ranks
    except BaseException:  # the launcher ends the others, so this process does not wait for them
        ranks.fail()
        raise
    ranks.leave()


@contextmanager
def together(world: World, device: str, name: str) -> Iterator[None]:
    """Create a process group within the ``with`` block, on all processes; does nothing if there is only one process.

    There is no process group outside the block: a library that finds one would wait for the other ranks in stages that
    only rank 0 runs.

    Args:
        world: all processes of the run, which are connected.
        device: device of the tensors, ``"cuda"`` or ``"cpu"``.
        name: name of the stage.

    Raises:
        MachineError: another process is lost.
    """
    if world.size == 1:
        yield
        return
    with _lost_peer_is_one_line(world):
        client = _client()
        store = dist.PrefixStore(f"group/{name}", client)
        if world.rank == 0:
            store.set("first", "")
        while not store.check(["first"]):  # rank 0 may load and calibrate for longer than the library's timeout
            stop.check()
            if client.check(["left/0"]) or client.check(["failed/0"]):
                raise MachineError(f"rank {world.rank}: rank 0 has ended before the training; its log says why")
            time.sleep(0.05)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )
        yield
        dist.destroy_process_group()


@contextmanager
def _lost_peer_is_one_line(world: World) -> Iterator[None]:
    """Convert the error of a collective whose peer is lost into one line."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not (isinstance(error, dist.DistError) or "gloo" in text or "closed by peer" in text):
            raise
        raise MachineError(
            f"rank {world.rank}: another process is gone ({_first_line(error)}); the same command goes on"
        ) from error


def from_first(value: Any) -> Any:
    """Broadcast the value of rank 0 to all ranks."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_each(value: Any) -> list[Any]:
    """Gather the values of all ranks, in the order of ranks, on all ranks."""
    if not several():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks; the result is on the device of ``values``."""
    if several():
        values = values.clone()
        dist.all_reduce(values)
    return values


def largest(value: int) -> int:
    """The largest value of all ranks; it is exchanged on the CPU."""
    if not several():
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def several() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
