"""Several processes that train together: how they meet, what the first tells the others, and how a dead one is found.

Numbers of a step travel through torch.distributed. All else - what to do next, signs of life - goes through the store
that they met by, the latter in a thread of its own: so a process may wait for hours for a stage that the first one runs
alone, and still learns within a minute that nobody will answer.
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

from distill.core.errors import MachineError
from distill.core.world import ADDRESS, PORT, World

BEAT_S = 1.0
"""Seconds between two signs of life."""
MEET_S = 600.0
"""Seconds that a process waits for the others to come."""
COLLECTIVE_S = 1800.0
"""Seconds that an exchange of numbers may take: that of a living process which writes a checkpoint, at most."""


class Ranks:
    """The other processes, as one of them sees them. Made by :func:`meet`.

    Attributes:
        world: which one this is.

    Args:
        world: likewise.
        silence_s: without a sign of life, after which a process is taken for lost.
        server: the store that all have met by, where this process holds it.
    """

    def __init__(self, world: World, silence_s: float, server: dist.Store | None = None):
        self.world, self.silence_s, self._server = world, silence_s, server
        self._told = 0
        self._closed = threading.Event()
        self._store, self._beats = _client(), _client()  # a client each, as one blocks while it is asked
        self._beats.set_timeout(timedelta(seconds=silence_s))  # whoever holds the store may be the one that is frozen
        self._beats.set(f"host/{world.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._beats.set(f"beat/{world.rank}", "0")

    def wait_for_all(self) -> None:
        """Until each has given its first sign of life.

        Raises:
            RuntimeError: one never does.
        """
        keys, until = [f"beat/{rank}" for rank in range(self.world.size)], time.monotonic() + MEET_S
        while not self._store.check(keys):  # not within the store, where no signal would reach us
            if time.monotonic() > until:
                raise RuntimeError(f"not all came in {MEET_S:.0f} s")
            time.sleep(0.05)

    def watch(self) -> None:
        """Give signs of life from now on, and end this process when another one gives none any more."""
        threading.Thread(target=self._watch, daemon=True, name="signs of life").start()

    def tell(self, order: dict[str, Any] | None) -> None:
        """Rank 0: what all others do next; None ends them."""
        self._store.set(f"order/{self._told}", json.dumps(order))
        self._told += 1

    def hear(self) -> dict[str, Any] | None:
        """Any other rank: wait for what rank 0 tells.

        Raises:
            MachineError: the process that holds the store is gone.
        """
        key = f"order/{self._told}"
        with _lost_peer_is_one_line(self.world):
            while not self._store.check([key]):
                time.sleep(0.05)  # not within the store, where no signal would reach us
            self._told += 1
            order: dict[str, Any] | None = json.loads(self._store.get(key))
        return order

    def leave(self, wait_s: float | None = None) -> None:
        """Say that this process ends as it should; the one that holds the store stays until all have said that they do.

        Args:
            wait_s: most seconds that it stays; unset: as long as a silence may last.
        """
        self._closed.set()
        self._store.set(f"left/{self.world.rank}", "")
        until = time.monotonic() + (self.silence_s if wait_s is None else wait_s)
        while self._server is not None and not self._all_end() and time.monotonic() < until:
            time.sleep(0.05)

    def _all_end(self) -> bool:
        return all(
            self._store.check([f"left/{rank}"]) or self._store.check([f"forsaken/{rank}"])
            for rank in range(self.world.size)
        )

    def forsake(self) -> None:
        """This process ends badly, and what becomes of the others is no news to it; it is still to be missed by those
        that go on, but not waited for by one that ends too."""
        self._closed.set()
        with suppress(Exception):  # the store may be what has gone
            self._store.set(f"forsaken/{self.world.rank}", "")

    def _watch(self) -> None:
        heard = {rank: (b"", time.monotonic()) for rank in range(self.world.size) if rank != self.world.rank}
        number = 0
        while not self._closed.wait(BEAT_S):
            number += 1
            try:
                self._beats.set(f"beat/{self.world.rank}", str(number))
                silent = self._silent(heard)
            except Exception as error:
                return self._give_up(f"the process that they all met by is gone ({_first_line(error)})")
            if silent:
                return self._give_up(f"{silent} has given no sign of life for {self.silence_s:.0f} s")

    def _silent(self, heard: dict[int, tuple[bytes, float]]) -> str | None:
        """Whoever has been silent for too long and has not left, by what was ``heard`` of each and when."""
        now = time.monotonic()
        for rank, (last, since) in heard.items():
            beat = self._beats.get(f"beat/{rank}")
            if beat != last:
                heard[rank] = (beat, now)
            elif now - since > self.silence_s and not self._beats.check([f"left/{rank}"]):
                return f"rank {rank} ({self._beats.get(f'host/{rank}').decode()})"
        return None

    def _give_up(self, why: str) -> None:
        """End at once: the main thread may wait for the lost process in a library, where no exception reaches it."""
        if self._closed.is_set():
            return
        print(f"rank {self.world.rank}: {why}; stopped, the same command goes on", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(MachineError.exit_code)


def _tcp(*, is_master: bool = False) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ[ADDRESS],
        int(os.environ[PORT]),
        is_master=is_master,
        wait_for_workers=False,
        timeout=timedelta(seconds=MEET_S),
    )


def _client() -> dist.Store:
    """A connection to the store; the keys of an attempt before a restart are not seen."""
    return dist.PrefixStore(f"distill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _tcp())


@contextmanager
def meet(world: World, silence_s: float, device: str) -> Iterator[Ranks | None]:
    """Bring the processes of a world together for as long as the block lasts; nothing to do for one alone.

    Args:
        world: of more than one process.
        silence_s: without a sign of life, after which a process is taken for lost.
        device: ``"cuda"`` gives each process of a machine a GPU of its own, before it loads anything onto one.

    Raises:
        MachineError: they do not find each other.
    """
    if world.size == 1:
        yield None
        return
    try:
        # torchrun's agent holds a store for its workers, or leaves it to the first of them; so does distill itself
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
    except BaseException:  # nobody is waited for: whoever started us ends the others
        ranks.forsake()
        raise
    ranks.leave()


@contextmanager
def together(world: World, device: str, name: str) -> Iterator[None]:
    """Let the processes exchange numbers within the block, which all of them must enter; nothing to do for one alone.

    Not for longer: libraries that find a process group wait for the others where the first one works by itself.

    Args:
        world: whose processes have met.
        device: ``"cuda"`` or ``"cpu"``: where the numbers are.
        name: of the stage.

    Raises:
        MachineError: another process is gone.
    """
    if world.size == 1:
        yield
        return
    with _lost_peer_is_one_line(world):
        client = _client()
        store = dist.PrefixStore(f"group/{name}", client)
        if world.rank == 0:
            store.set("first", "")
        while not store.check(["first"]):  # it may read and calibrate for longer than a library waits
            if client.check(["left/0"]) or client.check(["forsaken/0"]):
                raise MachineError(f"rank {world.rank}: the first process has ended before the training; it says why")
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
    """An exchange that fails because another process is gone is the machine's fault, and no traceback of ours."""
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
    """Rank 0's value on every rank."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_each(value: Any) -> list[Any]:
    """The values of all ranks, in order, on every rank."""
    if not several():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks, on the device where the values are."""
    if several():
        values = values.clone()
        dist.all_reduce(values)
    return values


def largest(value: int) -> int:
    """The largest value of any rank; costs the device nothing."""
    if not several():
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def several() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
