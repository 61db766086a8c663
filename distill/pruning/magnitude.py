"""Magnitude: a unit is as important as its weights are large. Reads no data.

    unit_j = sqrt(sum of the squares of all matrix entries that belong to j)

    mlp_neurons       rows of gate and up, column of down (of its own expert in a mixture of experts)
    attention_heads   rows of q, columns of the output projection
    kv_groups         rows of k and v, and the entries of the group's query heads
    hidden_channels   a slice of every matrix, embeddings included
    experts           a slice of the stacked weights, and a row of the router

Biases and norm weights are not counted. A control, and a choice where no data is available: for MLP neurons it is far
worse than activation, the more so the more is cut.

Source: the usual group L2 norm; a baseline in Ma, Fang, Wang 2023, arXiv 2305.11627 (LLM-Pruner).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import WIDTH_AXES, Layout, config_of, spans

if TYPE_CHECKING:
    from torch import Tensor, nn


class Magnitude(CriterionSpec):
    """L2 norm of the weights that belong to a unit; scores width without data."""

    axes: ClassVar[tuple[str, ...]] = (*WIDTH_AXES, "experts")

    kind: Literal["magnitude"] = "magnitude"

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""
        return magnitude(model, layout)


def magnitude(model: nn.Module, layout: Layout) -> Scores:
    """Scores of a model from its weights alone; the formula is in the module's docstring."""
    import torch

    sizes = layout.sizes(config_of(model))
    squares: dict[str, Tensor] = {axis: torch.zeros(sizes["layers"], sizes[axis]) for axis in WIDTH_AXES}
    if "experts" in sizes:
        squares["experts"] = torch.zeros(sizes["layers"], sizes["experts"])
        squares["mlp_neurons"] = torch.zeros(sizes["layers"], sizes["experts"], sizes["mlp_neurons"])
    for name, layer, parameter in layout.named_parameters(config_of(model)):
        weight, dimensions = model.get_parameter(name).detach(), parameter.axes
        if weight.ndim < 2:
            continue
        in_experts = dimensions[0] == "experts"
        entries = (weight if in_experts else weight.unsqueeze(0)).float().square()  # [experts or 1, ...]
        if in_experts:
            squares["experts"][layer or 0] += entries.flatten(1).sum(1).cpu()
        for dim, dimension in enumerate(dimensions[1:] if in_experts else dimensions, 1):
            # [experts or 1, size of this dimension]
            sums = entries.movedim(dim, 1).flatten(2).sum(2).cpu() if entries.ndim > 2 else entries.cpu()
            for span in (span for span in spans(dimension, sizes) if span.axis in squares):
                # [experts or 1, units]
                owned = sums[:, span.start : span.start + span.length].unflatten(1, (span.units, span.width)).sum(2)
                per_expert = in_experts and span.axis == "mlp_neurons"
                squares[span.axis][layer or 0] += owned if per_expert else owned.sum(0)
    squares["kv_groups"] += squares["attention_heads"].unflatten(1, (sizes["kv_groups"], -1)).sum(-1)
    squares["hidden_channels"] = squares["hidden_channels"].sum(0)
    return Scores(**{axis: values.sqrt() for axis, values in squares.items()})
