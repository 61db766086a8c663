"""Fluctuation: a unit is as important as its output varies around its mean, which a bias could replace (WIFV).

    channel_j = var_tokens(a_j) * sum_i W_ij^2

with a_j the channel's input to the projection W that writes to the residual stream. The variance is over all unmasked
tokens of all samples.

    mlp_neurons       W = down projection
    attention_heads   W = the attention's output projection; summed over the head's channels
    kv_groups         summed over the channels of all query heads of the group

For MLP neurons no criterion without gradients is better right after the cut. The score ignores the mean output of a
unit, which the first training steps restore; for a model that is not trained after the cut, prefer activation.

Source: An et al. 2023, arXiv 2312.11983 (FLAP), the metric WIFV. The paper's normalisation across layers is not needed
here, because units are compared within a layer. The extension to KV groups is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.activation import centred
from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import Layout
from distill.pruning.output_projections import OUTPUT_AXES, output_axis_scores, output_paths

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.observe import ModuleIO, Observer


class Fluctuation(CriterionSpec):
    """Variance of a channel over tokens, times the weights that read it; scores neurons, heads and KV groups."""

    axes: ClassVar[tuple[str, ...]] = OUTPUT_AXES

    kind: Literal["fluctuation"] = "fluctuation"

    def observers(
        self, layout: Layout, sizes: Mapping[str, int], statistics: Statistics
    ) -> Iterator[tuple[str, Observer]]:
        """See :meth:`CriterionSpec.observers`."""

        def watcher(path: str) -> Observer:
            def add(module_io: ModuleIO) -> None:
                tokens = module_io.mask.sum(1, keepdim=True).double()  # [batch, 1]
                mean, squares = centred(module_io.input, module_io.mask)  # [batch, channels] each
                # centred within each sample first: with a large mean, a plain sum of squares would cancel
                statistics.add(f"{path} tokens", tokens.sum())
                statistics.add(f"{path} sum", (tokens * mean).sum(0))
                statistics.add(f"{path} squares", (squares + tokens * mean.double().square()).sum(0))

            return add

        return ((path, watcher(path)) for path in output_paths(layout, sizes))

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""

        def channels(path: str, weights: Tensor) -> Tensor:
            tokens, total, squares = (statistics[f"{path} {name}"] for name in ("tokens", "sum", "squares"))
            variance = (squares / tokens - (total / tokens).square()).clamp(min=0)
            return fluctuation(variance, weights)

        return output_axis_scores(model, layout, channels, power=2)


def fluctuation(variance: Tensor, weights: Tensor) -> Tensor:
    """Score of each channel: its variance over tokens times the sum of the squared weights that read it.

    Args:
        variance: [channels].
        weights: [channels], sum_i W_ij^2.

    Returns:
        [channels].
    """
    return variance * weights
