"""The statistics that a criterion collects from the calibration data: named sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Statistics:
    """Named sums in fp64, on the model's device.

    Scores are computed from sums alone and no mean is stored. So the result does not depend on how the calibration data
    is split into batches or ranks: the sums of the parts add up to the sum of all data.

    Attributes:
        sums: name -> sum.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add ``value`` to the sum ``name``, which starts at zero."""
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def __getitem__(self, name: str) -> Tensor:
        """The sum ``name``, moved to the CPU."""
        return self.sums[name].cpu()
