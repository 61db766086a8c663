"""Wanda: a unit matters as much as its activation's norm and the weights that read it, together.

    channel_j = sum_i |W_ij| * sqrt(sum_tokens a_j^2)

with a_j the channel's input to the projection W that writes to the residual stream; the sum runs over all tokens that
count, of all samples alike.

    mlp_neurons       W = down projection
    attention_heads   W = the attention's output projection; summed over the head's channels
    kv_groups         summed over the channels of all query heads of the group

Between activation and fluctuation: it sees the weight as the latter does, and the mean as the former does.

Source: Sun et al. 2023, arXiv 2306.11695, for single weights; summed over a structure as in An et al. 2023,
arXiv 2312.11983, where it is called Wanda-sp. The extension to KV groups is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.layout import Layout
from distill.pruning.outputs import OUTPUT_AXES, output_paths, scores_of_channels
from distill.pruning.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.watch import Passage, Watcher


class Wanda(CriterionSpec):
    """L2 norm of a channel over tokens, times the weights that read it; scores neurons, heads and KV groups."""

    axes: ClassVar[tuple[str, ...]] = OUTPUT_AXES

    kind: Literal["wanda"] = "wanda"

    def watchers(self, layout: Layout, sizes: Mapping[str, int], tally: Tally) -> Iterator[tuple[str, Watcher]]:
        """See :meth:`CriterionSpec.watchers`."""

        def watcher(path: str) -> Watcher:
            def add(passage: Passage) -> None:
                tally.add(path, passage.given.float().square().sum((0, 1)))

            return add

        return ((path, watcher(path)) for path in output_paths(layout, sizes))

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """See :meth:`CriterionSpec.judge`."""
        return scores_of_channels(model, layout, lambda path, weights: wanda(tally[path], weights), power=1)


def wanda(squares: Tensor, weights: Tensor) -> Tensor:
    """What each channel is worth, by the sum of its squares and of the magnitudes that read it; all [channels]."""
    return squares.sqrt() * weights
