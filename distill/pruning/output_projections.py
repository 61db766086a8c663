"""The output projections of attention and MLP, which write to the residual stream, and scores from their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from distill.pruning.base import Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import Layout, config_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.observe import ModuleIO, Observer

OUTPUT_AXES = ("mlp_neurons", "attention_heads", "kv_groups")
"""Axes whose units are inputs of these projections."""
CHANNELS_AT_ONCE = 64


def output_paths(layout: Layout, sizes: Mapping[str, int]) -> Iterator[str]:
    """Module paths of the MLP's and the attention's output projection of every layer; experts have none."""
    for layer in range(sizes["layers"]):
        if layout.mlp_down is not None:
            yield layout.mlp_down.format(layer=layer)
        yield layout.attention_out.format(layer=layer)


def square_observers(paths: Iterable[str], statistics: Statistics) -> Iterator[tuple[str, Observer]]:
    """Observers that add, per module, the squares of its inputs over all tokens that count: [channels]."""

    def watcher(path: str) -> Observer:
        def add(module_io: ModuleIO) -> None:
            statistics.add(path, module_io.input.float().square().sum((0, 1)))

        return add

    return ((path, watcher(path)) for path in paths)


def output_axis_scores(
    model: nn.Module, layout: Layout, channels: Callable[[str, Tensor], Tensor], *, power: Literal[1, 2]
) -> Scores:
    """Scores of neurons, heads and KV groups from the weights W [hidden, channels] of the output projections.

    The score of a head is the sum over its channels, and that of a KV group the sum over its heads. The neurons of a
    mixture of experts are not scored.

    Args:
        model: see :meth:`CriterionSpec.score`.
        layout: the layout of its architecture.
        channels: (module path, ``sum_i |W_ij| ** power`` fp64 [channels]) -> scores of the input channels, [channels].
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
            # in chunks of channels and in place, because an fp64 copy of the full weight is slower than the sum
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
