"""Two machines on one: network namespaces of Linux, joined by a virtual cable that can be cut and slowed down.

if (why := refusal()) is not None:
    pytest.skip(why)
with Machines() as machines:
    machines.popen(0, ["torchrun", ...])
    machines.cut()
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

CLONE_NEWNET = 0x40000000
"""From linux/sched.h: ``setns`` shall enter a network namespace."""
PORT = 29511
"""Where the first machine listens; every namespace has all ports to itself."""


def refusal() -> str | None:
    """Why network namespaces cannot be made here; None if they can."""
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    with Machines() as machines:
        return machines.why_not


class Machines:
    """Two network namespaces with a cable; use it as a context.

    Attributes:
        names: of the two namespaces.
        interfaces: end of the cable in each.
        addresses: IP address of each.
        why_not: what ``ip`` said when they could not be made; None if they were.
    """

    def __init__(self) -> None:
        stem = f"distill{os.getpid() % 100_000}"
        self.names = (f"{stem}a", f"{stem}b")
        self.interfaces = (f"d{os.getpid() % 100_000}a", f"d{os.getpid() % 100_000}b")
        self.addresses = ("10.97.0.1", "10.97.0.2")
        self.why_not: str | None = None

    def __enter__(self) -> Machines:
        """Make the namespaces and the cable; what cannot be made is told by :attr:`why_not`."""
        first, second = self.interfaces
        commands = [["netns", "add", name] for name in self.names]
        commands.append(["link", "add", first, "type", "veth", "peer", "name", second])
        for name, interface, address in zip(self.names, self.interfaces, self.addresses, strict=True):
            commands.append(["link", "set", interface, "netns", name])
            commands.append(["-n", name, "address", "add", f"{address}/24", "dev", interface])
            commands.append(["-n", name, "link", "set", "lo", "up"])
            commands.append(["-n", name, "link", "set", interface, "up"])
        for command in commands:
            done = _ip(*command)
            if done.returncode:
                self.why_not = f"ip {' '.join(command)}: {done.stderr.strip()}"
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the namespaces, and the cable with them."""
        for name in self.names:
            _ip("netns", "delete", name)
        _ip("link", "delete", self.interfaces[0])  # where it did not get into its namespace

    def cut(self) -> None:
        """Take the cable out: packets are lost, connections are not told."""
        _must("-n", self.names[0], "link", "set", self.interfaces[0], "down")

    def mend(self) -> None:
        """Put the cable in again."""
        _must("-n", self.names[0], "link", "set", self.interfaces[0], "up")

    def slow(self, megabits: float) -> None:
        """Limit both directions to this many Mbit/s, by a token bucket."""
        for name, interface in zip(self.names, self.interfaces, strict=True):
            bucket = ["rate", f"{megabits}mbit", "burst", "32kbit", "latency", "400ms"]
            command = ["tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", *bucket]
            subprocess.run(command, check=True, capture_output=True)

    def popen(self, machine: int, command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on a machine, as the leader of a process group; it writes into ``log``."""
        more = {"GLOO_SOCKET_IFNAME": self.interfaces[machine]} | environment
        with log.open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[machine], *command],
                env=os.environ | more,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def place_of(self, rank: int, per_machine: int) -> dict[str, str]:
        """The environment of a process as SLURM or a script sets it, where rank 0 holds the store."""
        place: dict[str, Any] = {"RANK": rank, "WORLD_SIZE": 2 * per_machine, "LOCAL_WORLD_SIZE": per_machine}
        place |= {"LOCAL_RANK": rank % per_machine, "MASTER_ADDR": self.addresses[0], "MASTER_PORT": PORT}
        place["GLOO_SOCKET_IFNAME"] = self.interfaces[rank // per_machine]
        return {key: str(value) for key, value in place.items()}


def enter(name: str) -> None:
    """Move this thread, and the threads that it starts, into a network namespace.

    Raises:
        OSError: there is none of this name, or it may not be entered.
    """
    with Path("/var/run/netns", name).open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


def _must(*arguments: str) -> None:
    done = _ip(*arguments)
    assert done.returncode == 0, done.stderr
