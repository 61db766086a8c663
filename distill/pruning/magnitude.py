"""Magnitude: a unit matters as much as its weights are large. Reads no data.

    unit_j = sqrt(sum of the squares of all matrix entries that belong to j)

A neuron owns its rows of gate and up and its column of down; a head its rows of q and its columns of the output
projection; a KV group its rows of k and v and all that its query heads own; a hidden channel its slice of every matrix,
embeddings included. Biases and norm weights do not count: they are no matrices.

A control, and for when there is no data. For MLP neurons it falls far behind activation as the cut deepens.

Source: the usual group L2 norm; a baseline in Ma, Fang, Wang 2023, arXiv 2305.11627 (LLM-Pruner).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.layout import WIDTH_AXES, Layout, check, config_of, spans

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.base import Batches


class Magnitude(CriterionSpec):
    """L2 norm of the weights that belong to a unit; scores width without data."""

    axes: ClassVar[tuple[str, ...]] = WIDTH_AXES

    kind: Literal["magnitude"] = "magnitude"

    def score(self, model: nn.Module, layout: Layout, batches: Batches) -> Scores:
        """See :meth:`CriterionSpec.score`; ``batches`` is not read."""
        return magnitude(model, layout)


def magnitude(model: nn.Module, layout: Layout) -> Scores:
    """Width scores of a model from its weights alone; see the module."""
    import torch

    sizes = check(model, layout)
    squares: dict[str, Tensor] = {axis: torch.zeros(sizes["layers"], sizes[axis]) for axis in WIDTH_AXES}
    for name, layer, parameter in layout.named_parameters(config_of(model)):
        weight = model.get_parameter(name).detach()
        if weight.ndim < 2:
            continue
        for dim, dimension in enumerate(parameter.axes):
            entries = weight.movedim(dim, 0).flatten(1).float().square().sum(1).cpu()
            for span in spans(dimension, sizes):
                if span.axis in WIDTH_AXES:
                    owned = entries[span.start : span.start + span.length].unflatten(0, (span.units, span.width))
                    squares[span.axis][layer or 0] += owned.sum(1)
    group_of_heads = squares["attention_heads"].unflatten(1, (sizes["kv_groups"], -1)).sum(-1)
    return Scores(
        mlp_neurons=squares["mlp_neurons"].sqrt(),
        attention_heads=squares["attention_heads"].sqrt(),
        kv_groups=(squares["kv_groups"] + group_of_heads).sqrt(),
        hidden_channels=squares["hidden_channels"].sum(0).sqrt(),
    )
