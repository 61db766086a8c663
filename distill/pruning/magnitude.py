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
from distill.pruning.layout import HEAD_AXES, WIDTH_AXES, Layout, config_of
from distill.pruning.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor, nn


class Magnitude(CriterionSpec):
    """L2 norm of the weights that belong to a unit; scores width without data."""

    axes: ClassVar[tuple[str, ...]] = WIDTH_AXES

    kind: Literal["magnitude"] = "magnitude"

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """See :meth:`CriterionSpec.judge`."""
        import torch

        sizes = layout.sizes(config_of(model))
        squares: dict[str, Tensor] = {axis: torch.zeros(sizes["layers"], sizes[axis]) for axis in WIDTH_AXES}
        for name, layer, parameter in layout.named_parameters(config_of(model)):
            weight = model.get_parameter(name).detach()
            if weight.ndim < 2:
                continue
            for dim, axis in enumerate(parameter.axes):
                if axis not in WIDTH_AXES:
                    continue
                entries = weight.movedim(dim, 0).flatten(1).float().square().sum(1).cpu()
                if axis in HEAD_AXES:
                    entries = entries.unflatten(0, (sizes[axis], -1)).sum(1)
                squares[axis][layer or 0] += entries
        group_of_heads = squares["attention_heads"].unflatten(1, (sizes["kv_groups"], -1)).sum(-1)
        return Scores(
            mlp_neurons=squares["mlp_neurons"].sqrt(),
            attention_heads=squares["attention_heads"].sqrt(),
            kv_groups=(squares["kv_groups"] + group_of_heads).sqrt(),
            hidden_channels=squares["hidden_channels"].sum(0).sqrt(),
        )
