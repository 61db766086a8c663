"""What a criterion counts while a model reads: named sums, so that two parts of the data add up to the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Tally:
    """Named sums in fp64, wherever the model is.

    Whatever splits the calibration data - batches, ranks - the sums of the parts add up to those of the whole, and the
    scores are made from the sums alone. No mean is ever kept.

    Attributes:
        sums: name -> sum.
    """

    def __init__(self, sums: dict[str, Tensor] | None = None):
        self.sums: dict[str, Tensor] = sums or {}

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum; the first value starts it."""
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def __getitem__(self, name: str) -> Tensor:
        """A sum, on the CPU."""
        return self.sums[name].cpu()

    def __add__(self, other: Tally) -> Tally:
        """The tally of both parts of the data."""
        whole = Tally(dict(self.sums))
        for name, value in other.sums.items():
            whole.add(name, value)
        return whole
