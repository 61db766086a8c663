"""The layers and hidden channels of the original model that a pruned model consists of, after any number of cuts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.core.stored import read_stored

PLAN = "plan.json"
"""The file in a pruned model's folder that names the kept layers and channels."""


@dataclass(frozen=True)
class Origin:
    """Indices of the kept layers and hidden channels in the original model, ascending.

    Attributes:
        layers: one index per layer of the pruned model.
        hidden_channels: one index per hidden channel of the pruned model.
    """

    layers: tuple[int, ...]
    hidden_channels: tuple[int, ...]

    @classmethod
    def read(cls, file: Path) -> Origin:
        """Read it from a plan that the prune stage has written.

        Raises:
            InputError: the file is not such a plan.
        """
        return read_stored(file, cls, "run the prune stage again")

    def cut_again(self, later: Origin) -> Origin:
        """The origin of a model that was pruned from this one.

        Args:
            later: the indices of its layers and channels in this model.

        Returns:
            Their indices in the original model.
        """
        return Origin(
            tuple(self.layers[i] for i in later.layers),
            tuple(self.hidden_channels[i] for i in later.hidden_channels),
        )
