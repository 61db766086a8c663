"""Tells Lightning of processes that are there already, whoever started them."""

from __future__ import annotations

import os

from lightning_fabric.plugins import ClusterEnvironment

from distill.core.world import ADDRESS, PORT, World


class Joined(ClusterEnvironment):
    """Tells Lightning of processes that are there already, whoever started them."""

    def __init__(self, world: World):
        super().__init__()
        self.world = world

    @property
    def creates_processes_externally(self) -> bool:
        """They exist."""
        return True

    @property
    def main_address(self) -> str:
        """Where they met."""
        return os.environ[ADDRESS]

    @property
    def main_port(self) -> int:
        """Where they met."""
        return int(os.environ[PORT])

    @staticmethod
    def detect() -> bool:
        """Never found by Lightning itself."""
        return False

    def world_size(self) -> int:
        """See :class:`~distill.core.world.World`."""
        return self.world.size

    def set_world_size(self, size: int) -> None:
        """It is what it is."""

    def global_rank(self) -> int:
        """See :class:`~distill.core.world.World`."""
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        """It is what it is."""

    def local_rank(self) -> int:
        """See :class:`~distill.core.world.World`."""
        return self.world.local_rank

    def node_rank(self) -> int:
        """Number of the machine."""
        return self.world.rank // self.world.local_size
