"""Where a student's layers and channels were in the model that it was cut out of, after any number of cuts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.core.artifact import read_json
from distill.core.errors import InputError


@dataclass(frozen=True)
class Origin:
    """What a plan kept of the two axes that run through the whole model. Indices are of the uncut model and rise.

    Attributes:
        layers: one for each of the student's layers.
        hidden_channels: one for each of the student's channels.
    """

    layers: tuple[int, ...]
    hidden_channels: tuple[int, ...]

    @classmethod
    def read(cls, file: Path) -> Origin:
        """From a plan that the prune stage has written."""
        plan = read_json(file)
        try:
            return cls(tuple(plan["layers"]), tuple(plan["hidden_channels"]))
        except (KeyError, TypeError):
            raise InputError(f"{file}: no plan that this version of distill reads; prune anew") from None

    def cut_again(self, later: Origin) -> Origin:
        """The origin of a model that was cut out of this one.

        Args:
            later: where its layers and channels were in this one.
        """
        return Origin(
            tuple(self.layers[i] for i in later.layers),
            tuple(self.hidden_channels[i] for i in later.hidden_channels),
        )
