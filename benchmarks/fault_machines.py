"""Faults of the network between two machines: the rows of part ``machines`` of :mod:`benchmarks.faults`.

The machines are network namespaces with two processes each, which torchrun starts and gloo connects.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.core.run_folder import CHECKPOINTS
from distill.training.checkpoint import checkpoints
from distill.training.metrics import read_rows
from tests.faults.machines import Machines, refusal

STEPS = 40
SILENCE_S = 20
CUT_S = 5
SLOW_MBIT = 5
LINE = "the same command goes on"


@dataclass
class Pair:
    """Two machines that run a recipe together.

    Attributes:
        machines: the namespaces.
        recipe: of a training stage ``train``.
        run: folder of the run.
        limit_s: seconds after which a run counts as hung.
        agents: torchrun on each machine.
        logs: what each machine has said.
    """

    machines: Machines
    recipe: Path
    run: Path
    limit_s: float
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def start(self) -> Pair:
        """Start torchrun on both machines."""
        number = len(list(self.run.parent.glob(f"{self.run.name}-*.log")))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.machines.addresses[0]}:29500"]
        torchrun += ["--rdzv-id", f"{self.run.name}-{number}", "--max-restarts", "0"]
        options = [f"stages.train.num_steps={STEPS}", "stages.train.batch_size=4", "compute.checkpoint_every_steps=1"]
        options += ["compute.log_every_steps=1", f"compute.silence_s={SILENCE_S}"]
        command = [*torchrun, "-m", "distill", "run", str(self.recipe), "--run-dir", str(self.run)]
        command += [word for option in options for word in ("--set", option)]
        more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        for machine in (0, 1):
            self.logs.append(self.run.with_name(f"{self.run.name}-{number + machine}.log"))
            # torchrun looks for its own address under its host name, which a namespace shares with the machine
            place = ["--local-addr", self.machines.addresses[machine], "--rdzv-conf", f"is_host={int(machine == 0)}"]
            here = [*command[:3], *place, *command[3:]]
            self.agents.append(self.machines.popen(machine, here, self.logs[-1], **more))
        return self

    def until_saved(self) -> None:
        """Wait for the first checkpoint."""
        until = time.monotonic() + self.limit_s
        while not checkpoints(self.run / "train" / CHECKPOINTS):
            assert all(agent.poll() is None for agent in self.agents), self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.01)

    def said(self) -> str:
        """What both machines have said in this attempt."""
        return "\n".join(log.read_text() for log in self.logs[-2:])

    def ended(self, *machines: int) -> float:
        """Seconds until both processes of each of these machines have said their last line."""
        began = time.monotonic()
        while any(self.logs[-2:][machine].read_text().count(LINE) < 2 for machine in machines):
            assert time.monotonic() - began < self.limit_s, self.said()
            time.sleep(0.1)
        return time.monotonic() - began

    def codes(self) -> list[int]:
        """Exit codes of torchrun on both machines."""
        return [agent.wait(self.limit_s) for agent in self.agents[-2:]]

    def kill(self, machine: int) -> None:
        """SIGKILL of all processes of a machine."""
        names = subprocess.run(
            ["ip", "netns", "pids", self.machines.names[machine]], capture_output=True, text=True, check=True
        )
        for pid in names.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def losses(self) -> list[float]:
        """The training losses, by step."""
        return [row["train/cross_entropy"] for row in read_rows(self.run / "train") if "lr" in row]


def measure(recipe: Path, fresh: Callable[[], Path], repeats: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """One row per fault.

    Args:
        recipe: of a training stage ``train``.
        fresh: a new run folder.
        repeats: number of times for each fault.
        limit_s: seconds after which a run counts as hung.

    Raises:
        SystemExit: network namespaces cannot be made here.
    """
    if (why := refusal()) is not None:
        raise SystemExit(f"part machines: {why}")

    def pair() -> Pair:
        return Pair(machines, recipe, fresh(), limit_s).start()

    def row(fault: str, attempt: Callable[[], bool], did: Callable[[], str]) -> dict[str, Any]:
        began = time.monotonic()
        good = sum(attempt() for _ in range(repeats))
        print(fault, good, repeats, did(), flush=True)
        return {
            "fault": fault,
            "run": "2 machines of 2 processes, ddp, torchrun",
            "times": repeats,
            "what happened": did() if good == repeats else f"{good} of {repeats}: {did()}",
            "lost": "nothing" if good == repeats else f"in {repeats - good} of {repeats}",
            "seconds": round(time.monotonic() - began),
        }

    with Machines() as machines:
        whole, began = pair(), time.monotonic()
        assert whole.codes() == [0, 0], whole.said()
        undisturbed_s, expected = time.monotonic() - began, whole.losses()
        took: list[float] = []

        def held(world: Pair, first: list[int] | None = None) -> bool:
            """Whether the last attempt took the same steps, and no machine called the one before it (first) good.

            After a resume, the sums of four processes are added in another order.
            """
            codes, losses = world.codes(), world.losses()
            near = len(losses) == len(expected) and all(
                abs(one - other) <= 1e-3 * abs(other) for one, other in zip(losses, expected, strict=True)
            )
            good = codes == [0, 0] and near and (first is None or all(first))
            if not good:
                print(first, codes, len(losses), *(log.read_text()[-2000:] for log in world.logs), sep="\n", flush=True)
            return good

        def briefly() -> bool:
            world = pair()
            world.until_saved()
            machines.cut()
            time.sleep(CUT_S)
            machines.mend()
            return held(world)

        yield row(f"network cut for {CUT_S} s", briefly, lambda: "the run waited and continued, losses within 0.1 %")

        def for_good() -> bool:
            world = pair()
            world.until_saved()
            machines.cut()
            took.append(world.ended(0, 1))
            machines.mend()
            codes = world.codes()
            return held(world.start(), codes)

        yield row(
            "network cut",
            for_good,
            lambda: f"every process ends with one line, after at most {max(took):.0f} s; resumed, losses within 0.1 %",
        )

        def killed() -> bool:
            world = pair()
            world.until_saved()
            world.kill(1)
            took.append(world.ended(0))
            codes = world.codes()
            return held(world.start(), codes)

        took.clear()
        yield row(
            "second machine dead (SIGKILL of all its processes)",
            killed,
            lambda: (
                f"the other processes end with one line, after at most {max(took):.0f} s; resumed, losses within 0.1 %"
            ),
        )

        def slowly() -> bool:
            world, began = pair(), time.monotonic()
            good = held(world)
            took.append(time.monotonic() - began)
            return good

        took.clear()
        machines.slow(SLOW_MBIT)
        yield row(
            f"network of {SLOW_MBIT} Mbit/s",
            slowly,
            lambda: f"losses within 0.1 %; {max(took):.0f} s at most, {undisturbed_s:.0f} s without the limit",
        )
