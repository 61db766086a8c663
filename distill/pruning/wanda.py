"""Wanda: the score of a unit is the norm of its activations times the magnitude of the weights that read it.

    channel_j = sum_i |W_ij| * sqrt(sum_tokens a_j^2)

with a_j the channel's input to the projection W that writes to the residual stream. The sum is over all unmasked tokens
of all samples.

    mlp_neurons       W = down projection
    attention_heads   W = the attention's output projection; summed over the head's channels
    kv_groups         summed over the channels of all query heads of the group

It combines properties of activation and fluctuation: it reads the weights like the latter, and counts the mean
activation like the former.

Source: Sun et al. 2023, arXiv 2306.11695, for single weights; summed over a structure as in An et al. 2023,
arXiv 2312.11983, where it is called Wanda-sp. The extension to KV groups is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import Layout
from distill.pruning.output_projections import OUTPUT_AXES, output_axis_scores, output_paths, square_observers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.observe import Observer


class Wanda(CriterionSpec):
    """L2 norm of a channel over tokens, times the weights that read it; scores neurons, heads and KV groups."""

    axes: ClassVar[tuple[str, ...]] = OUTPUT_AXES

    kind: Literal["wanda"] = "wanda"

    def observers(
        self, layout: Layout, sizes: Mapping[str, int], statistics: Statistics
    ) -> Iterator[tuple[str, Observer]]:
        """See :meth:`CriterionSpec.observers`."""
        return square_observers(output_paths(layout, sizes), statistics)

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""
        return output_axis_scores(model, layout, lambda path, weights: wanda(statistics[path], weights), power=1)


def wanda(squares: Tensor, weights: Tensor) -> Tensor:
    """Score of each channel: its L2 norm over tokens times the summed magnitude of the weights that read it.

    Args:
        squares: sum of squares over tokens, [channels].
        weights: sum_i |W_ij|, [channels].

    Returns:
        [channels].
    """
    return squares.sqrt() * weights
