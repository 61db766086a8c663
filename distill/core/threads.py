"""How many CPU threads PyTorch computes with, and how an idle one waits for the others.

PyTorch's OpenMP library reads both from the environment, once, when it is loaded. By default an idle thread spins: on a
machine with other work it then takes the time of the thread that it waits for, and training becomes several times
slower. ``OMP_WAIT_POLICY=PASSIVE`` lets it sleep, which costs some speed where nothing else runs.

What the user has set is never changed. What distill chooses depends on the machine and never on its load, because
another number of threads may change the last bits of a result.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that set the number of threads."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that set how an idle thread waits."""
OURS = "DISTILL_CHOSE"
"""Variable that tells child processes which of the others distill has set."""
SMALL = 2**15
"""Number of elements of a layer's output below which one thread is used. PyTorch does not split elementwise operations
on fewer elements (``at::internal::GRAIN_SIZE``). It splits matrix products, but these take less time than a second
thread needs to wake up (``benchmarks/threads.py``)."""


def choose() -> None:
    """Set what the user has not set, here and for child processes; once PyTorch is loaded it is too late."""
    if "torch" in sys.modules:
        return
    chosen = {}
    if not any(name in os.environ for name in WAITING):
        chosen["OMP_WAIT_POLICY"] = "PASSIVE"
    # PyTorch counts the cores that it may use, but not the time that a control group (a container) grants on them
    if not any(name in os.environ for name in NUMBER) and available() < affine():
        chosen["OMP_NUM_THREADS"] = str(available())
    os.environ.update(_marked(chosen))


def shared(num_processes: int) -> dict[str, str]:
    """Variables for one of several processes that share this machine; none when the user has set a number.

    Args:
        num_processes: on this machine.
    """
    if users(NUMBER):
        return {}
    return _marked({"OMP_NUM_THREADS": str(max(1, available() // num_processes))})


def users(names: tuple[str, ...]) -> list[str]:
    """Those of the variables that are set, and not by distill, as NAME=VALUE."""
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ and name not in _ours()]


@contextmanager
def withdrawn() -> Iterator[None]:
    """The environment as the user made it, for processes that are to be as fast as PyTorch is by itself."""
    taken = {name: os.environ.pop(name) for name in (*_ours(), OURS) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def described(num_threads: int) -> str:
    """One line: the number of threads and how they wait, each with who chose it.

    Args:
        num_threads: that PyTorch computes with now.
    """
    number, waiting = _who(NUMBER) or "PyTorch's default", _who(WAITING)
    return (
        f"CPU threads: {num_threads} ({number}); how an idle one waits: "
        f"{waiting or 'by default, as PyTorch was loaded before distill could choose'}"
    )


def rule() -> str:
    """One line: when a training runs on one thread; for ``distill doctor``."""
    if set_by_user := users(NUMBER):
        return f"small models train on as many threads as others ({', '.join(set_by_user)}, set by you)"
    return (
        f"small models train on 1 thread: those whose layers have fewer than {SMALL:,} outputs per micro-batch "
        "(tokens x hidden size)"
    )


def _who(names: tuple[str, ...]) -> str:
    if set_by_user := users(names):
        return f"{', '.join(set_by_user)}, set by you"
    chosen = [f"{name}={os.environ[name]}" for name in names if name in _ours()]
    return f"{', '.join(chosen)}, chosen by distill" if chosen else ""


def available() -> int:
    """CPUs that this process may use: those of its affinity, or fewer where its control groups grant less time."""
    return max(1, min(affine(), math.floor(min(granted(), 2**31))))


def affine() -> int:
    """CPUs that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def granted(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs' worth of time that control groups of either version grant this process; infinity without a limit.

    Args:
        groups: the file that names the process's groups.
        root: where the groups are mounted.
    """
    limits = [math.inf]
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        path = PurePosixPath(place.lstrip("/"))
        limits += [_limit(mount / above) for above in (path, *path.parents)]  # a limit above holds below
    return min(limits)


def _limit(group: Path) -> float:
    """CPUs of one group: microseconds of time in a period of so many; "max" or a negative number is no limit."""
    try:
        if (group / "cpu.max").is_file():
            time, period = (group / "cpu.max").read_text().split()
        else:
            time, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if time == "max" or int(time) < 0 else int(time) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file here, or a kernel that writes it otherwise
        return math.inf


def _ours() -> list[str]:
    return [name for name in os.environ.get(OURS, "").split(",") if name in os.environ]


def _marked(chosen: dict[str, str]) -> dict[str, str]:
    """With the note that distill has set these, and what it had set before."""
    return chosen | {OURS: ",".join(dict.fromkeys([*_ours(), *chosen]))} if chosen else {}
