"""The processes of one run: how many there are and which of them this is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"


@dataclass(frozen=True)
class World:
    """The place of this process among those that train together.

    Attributes:
        rank: number of this process, from 0; the first one reads, writes and speaks for all.
        size: how many there are.
        local_rank: number of this process on its machine, which is also that of its GPU.
        local_size: how many there are on each machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return max(1, self.size // self.local_size)

    @classmethod
    def joined(cls) -> World | None:
        """The world that torchrun, srun or distill itself has started this process in; None when it is alone."""
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            size = int(os.environ["WORLD_SIZE"])
            local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
            return cls(int(os.environ["RANK"]), size, *local)
        # only the tasks of srun have a step; the shell of an sbatch file, or a terminal on a node, is alone
        if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            slurm = os.environ
            size, num_nodes = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm.get("SLURM_STEP_NUM_NODES", 1))
            os.environ.update({key: os.environ.get(key, value) for key, value in _slurm_address(slurm).items()})
            return cls(int(slurm["SLURM_PROCID"]), size, int(slurm["SLURM_LOCALID"]), size // num_nodes)
        return None


SINGLE_PROCESS = World()
"""The world of a process that trains by itself."""


def _slurm_address(slurm: Mapping[str, str]) -> dict[str, str]:
    """Where the first task of a step listens: the first node's name, and a port that the job's number decides."""
    nodes = slurm.get("SLURM_STEP_NODELIST", "127.0.0.1")
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]  # node[03-07,11] -> node03
    return {ADDRESS: first, PORT: str(20000 + int(slurm.get("SLURM_JOB_ID", 0)) % 10000)}
