"""The processes of a run, for Lightning. They were started by torchrun, SLURM or distill, and are connected."""

from __future__ import annotations

import os

from lightning_fabric.plugins import ClusterEnvironment

from distill.core.world import ADDRESS, PORT, World


class ExternalCluster(ClusterEnvironment):
    """Tells Lightning the ranks of a :class:`~distill.core.world.World`. It starts no processes.

    Args:
        world: all processes of the run, and the rank of this process.
    """

    def __init__(self, world: World):
        super().__init__()
        self.world = world

    @property
    def creates_processes_externally(self) -> bool:
        """True: all processes exist before Lightning starts."""
        return True

    @property
    def main_address(self) -> str:
        """Host of the store through which the processes connected."""
        return os.environ[ADDRESS]

    @property
    def main_port(self) -> int:
        """Port of that store."""
        return int(os.environ[PORT])

    @staticmethod
    def detect() -> bool:
        """False: Lightning does not choose this environment by itself."""
        return False

    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.world.size

    def set_world_size(self, size: int) -> None:
        """Do nothing: the number of processes is fixed."""

    def global_rank(self) -> int:
        """Rank of this process among all processes."""
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the rank is fixed."""

    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return self.world.local_rank

    def node_rank(self) -> int:
        """Index of the machine."""
        return self.world.rank // self.world.local_size
