"""The projections that write to the residual stream: what a neuron or a head is worth is what passes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from distill.pruning.base import Scores
from distill.pruning.layout import Layout, config_of

if TYPE_CHECKING:
    from torch import Tensor, nn

OUTPUT_AXES = ("mlp_neurons", "attention_heads", "kv_groups")
"""Axes whose units are inputs of these projections."""
CHANNELS_AT_ONCE = 64


def output_paths(layout: Layout, sizes: Mapping[str, int]) -> Iterator[str]:
    """Module paths of the MLP's and the attention's output projection of every layer; experts have none."""
    for layer in range(sizes["layers"]):
        if layout.mlp_down is not None:
            yield layout.mlp_down.format(layer=layer)
        yield layout.attention_out.format(layer=layer)


def scores_of_channels(
    model: nn.Module, layout: Layout, channels: Callable[[str, Tensor], Tensor], *, power: Literal[1, 2]
) -> Scores:
    """Scores of the output axes, of the projections' weights W [hidden, channels] as ``sum_i |W_ij| ** power`` in fp64.

    A head is worth the sum of its channels, and a KV group that of its heads. Of a mixture of experts the neurons are
    not scored.

    Args:
        model: see :meth:`CriterionSpec.score`.
        layout: the layout of its architecture.
        channels: (module path, the sums [channels]) -> what each input channel is worth, [channels].
        power: of the weights.
    """
    import torch

    sizes = layout.sizes(config_of(model))

    def rows(module: str, axis: str) -> Tensor:
        (dimension,) = [row.axes.index(axis) for row in layout.parameters if row.path == f"{module}.weight"]
        found = []
        for layer in range(sizes["layers"]):
            path = module.format(layer=layer)
            weight = model.get_parameter(f"{path}.weight").detach().movedim(dimension, 0)
            # some channels at a time, in place: a copy of the whole weight in fp64 costs more than the sum
            sums = [
                part.cpu().to(torch.float64, copy=True).abs_().pow_(power).sum(1)
                for part in weight.split(CHANNELS_AT_ONCE)
            ]
            found.append(channels(path, torch.cat(sums)))
        return torch.stack(found)

    queries = rows(layout.attention_out, "attention_heads")
    return Scores(
        mlp_neurons=None if layout.mlp_down is None else rows(layout.mlp_down, "mlp_neurons").float(),
        attention_heads=queries.unflatten(1, (sizes["attention_heads"], -1)).sum(-1).float(),
        kv_groups=queries.unflatten(1, (sizes["kv_groups"], -1)).sum(-1).float(),
    )
