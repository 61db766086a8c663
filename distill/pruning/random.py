"""Random: scores are drawn uniformly from [0, 1). The control that every other criterion should beat.

The scores are the same for the same seed and sizes on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import AXES, WIDTH_AXES, Layout, config_of

if TYPE_CHECKING:
    from torch import nn


class Random(CriterionSpec):
    """Uniform random scores, from a seed; reads neither data nor weights."""

    axes: ClassVar[tuple[str, ...]] = AXES

    kind: Literal["random"] = "random"
    seed: int = Field(0, ge=0)
    """Seed of the scores; no off-value."""

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""
        return random(layout.sizes(config_of(model)), self.seed)


def random(sizes: dict[str, int], seed: int) -> Scores:
    """Uniform scores for the axis sizes that :meth:`Layout.sizes` returns."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {axis: (sizes["layers"], sizes[axis]) for axis in WIDTH_AXES}
    if "experts" in sizes:
        shapes["experts"] = (sizes["layers"], sizes["experts"])
        shapes["mlp_neurons"] = (sizes["layers"], sizes["experts"], sizes["mlp_neurons"])
    shapes["layers"] = (sizes["layers"],)
    rows = {axis: torch.rand(*shape, generator=generator) for axis, shape in shapes.items()}
    return Scores(**{**rows, "hidden_channels": rows["hidden_channels"][0]})
