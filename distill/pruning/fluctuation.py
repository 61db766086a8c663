"""Fluctuation: a unit matters as much as its output varies around its mean, which a bias could stand for (WIFV).

    channel_j = var_tokens(a_j) * sum_i W_ij^2

with a_j the channel's input to the projection W that writes to the residual stream; the variance runs over all tokens
that count, of all samples alike.

    mlp_neurons       W = down projection
    attention_heads   W = the attention's output projection; summed over the head's channels
    kv_groups         summed over the channels of all query heads of the group

For MLP neurons as good as any criterion without gradients right after the cut. It measures what is lost when the mean
is made good, which the first steps of training do; without any training, activation is the safer choice.

Source: An et al. 2023, arXiv 2312.11983 (FLAP), the metric WIFV; its weights for one threshold over all layers are
not needed here, as units are compared within a layer. The extension to KV groups is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.activation import centred
from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.layout import Layout
from distill.pruning.outputs import OUTPUT_AXES, output_paths, scores_of_channels
from distill.pruning.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.watch import Passage, Watcher


class Fluctuation(CriterionSpec):
    """Variance of a channel over tokens, times the weights that read it; scores neurons, heads and KV groups."""

    axes: ClassVar[tuple[str, ...]] = OUTPUT_AXES

    kind: Literal["fluctuation"] = "fluctuation"

    def watchers(self, layout: Layout, sizes: Mapping[str, int], tally: Tally) -> Iterator[tuple[str, Watcher]]:
        """See :meth:`CriterionSpec.watchers`."""

        def watcher(path: str) -> Watcher:
            def add(passage: Passage) -> None:
                tokens = passage.mask.sum(1, keepdim=True).double()
                mean, squares = centred(passage.given, passage.mask)
                # Centred within a sample first: the plain sum of squares would cancel where the mean is large.
                tally.add(f"{path} tokens", tokens.sum())
                tally.add(f"{path} sum", (tokens * mean).sum(0))
                tally.add(f"{path} squares", (squares + tokens * mean.double().square()).sum(0))

            return add

        return ((path, watcher(path)) for path in output_paths(layout, sizes))

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """See :meth:`CriterionSpec.judge`."""

        def channels(path: str, weights: Tensor) -> Tensor:
            tokens, total, squares = (tally[f"{path} {name}"] for name in ("tokens", "sum", "squares"))
            variance = (squares / tokens - (total / tokens).square()).clamp(min=0)
            return fluctuation(variance, weights)

        return scores_of_channels(model, layout, channels, power=2)


def fluctuation(variance: Tensor, weights: Tensor) -> Tensor:
    """What each channel is worth, by its variance over tokens and the squared weights that read it; all [channels]."""
    return variance * weights
