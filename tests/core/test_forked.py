"""A function in forked processes: results in order, errors in their place, and no process that outlives its work."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.core.errors import InputError, MachineError, Stopped
from distill.core.forked import AHEAD, Forked

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="forks are used on Linux alone")


def who_and_twice(number: int) -> tuple[int, int]:
    time.sleep(0.002 * (number % 3))
    return os.getpid(), 2 * number


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_results_come_in_the_order_of_the_items_from_every_process() -> None:
    with Forked(who_and_twice, 3, "doubles") as workers:
        results = list(workers.map(range(100)))
        assert [twice for _, twice in results] == [2 * number for number in range(100)]
        processes = {process for process, _ in results}
        assert len(processes) == 3
        assert os.getpid() not in processes
        assert [twice for _, twice in workers.map(range(3))] == [0, 2, 4]
    assert not any(map(is_running, processes))


def test_nothing_to_do_is_done() -> None:
    with Forked(who_and_twice, 2, "doubles") as workers:
        assert list(workers.map([])) == []


def test_items_are_taken_as_they_are_needed() -> None:
    """One that takes long does not let all results behind it fill the memory."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(200):
            taken += 1
            yield number

    def slow_first(number: int) -> int:
        time.sleep(0.5 * (number == 0))
        return number

    with Forked(slow_first, 2, "waits") as workers:
        results = workers.map(items())
        assert next(results) == 0
        assert taken <= AHEAD * 2 + 2
        assert list(results) == list(range(1, 200))


def test_an_error_is_raised_in_its_place() -> None:
    def refuse(number: int) -> int:
        if number >= 5:
            raise InputError(f"{number} is too much")
        return number

    with Forked(refuse, 3, "refuses") as workers:
        results = workers.map(range(20))
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(InputError, match=r"^5 is too much$"):
            next(results)


def test_an_error_that_cannot_be_sent_is_told() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int):
            super().__init__(f"{one} and {two}")

    def fail(number: int) -> int:
        raise Odd(number, 2)

    with Forked(fail, 1, "fails") as workers, pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        list(workers.map([1]))


def test_a_killed_process_is_one_line() -> None:
    def die(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with (
        Forked(die, 2, "tokenizes") as workers,
        pytest.raises(MachineError, match=r"^a process that tokenizes was killed by signal 9; is there too little mem"),
    ):
        list(workers.map(range(10)))


def test_a_stop_ends_them_in_the_middle_of_their_work() -> None:
    def long(number: int) -> int:
        time.sleep(60)
        return number

    def items() -> Iterator[int]:
        yield from (1, 2)
        raise Stopped("enough")

    with Forked(long, 2, "sleeps") as workers:
        processes = [worker.pid for worker in workers._workers.values()]
        with pytest.raises(Stopped):
            list(workers.map(items()))
        assert all(map(is_running, processes))
    assert not any(map(is_running, processes))


def test_where_one_cannot_be_started_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    context, started = multiprocessing.get_context("fork"), list[int]()

    class Process(context.Process):  # type: ignore[misc, name-defined]
        def start(self) -> None:
            if len(started) == 2:
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
            super().start()
            started.append(self.pid)

    monkeypatch.setattr(context, "Process", Process)
    with pytest.raises(MachineError, match=r"^a process that waits cannot be started \(Resource temporarily"):
        Forked(time.sleep, 3, "waits").__enter__()
    assert len(started) == 2
    assert not any(map(is_running, started))


def test_they_do_not_outlive_a_process_that_is_killed() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with Forked(who_and_twice, 2, "doubles") as workers:
                list(workers.map(range(4)))
                os.write(write, " ".join(str(worker.pid) for worker in workers._workers.values()).encode())
                time.sleep(60)
        finally:
            os._exit(1)
    processes = [int(number) for number in os.read(read, 100).split()]
    assert len(processes) == 2
    assert all(map(is_running, processes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until = time.monotonic() + 20
    while any(map(is_running, processes)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(is_running, processes))
    os.close(read)
    os.close(write)
