"""Activation: a unit matters as much as it is active on real text. Minitron's criterion for width.

    channel_j = sqrt(sum_samples (mean_tokens |a_j|)^2)

with a_j the channel's activation: mean of the absolute value over a sample's tokens, L2 over the samples. Both
can be chosen: ``l2`` is the root of the sum of squares, ``variance`` the mean squared distance from the mean.

    mlp_neurons       a = input of the down projection
    attention_heads   a = input of the attention's output projection; L2 over the head's channels
    kv_groups         L2 over the channels of all query heads of the group
    hidden_channels   a = what attention and MLP read of the residual stream, so after a norm that stands before them;
                      summed over all of them

The default for width. Its lead over magnitude grows with the share of MLP neurons that goes; for heads and hidden
channels the two are close. Tokens that the mask leaves out (padding, prompts) do not count.

Source: Muralidharan et al. 2024, arXiv 2407.14679, section 3.1, with (batch = L2, sequence = mean). The paper's head
score takes the norm over the head's channels first; this is the form of NVIDIA's implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.layout import WIDTH_AXES, Layout, config_of
from distill.pruning.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.watch import Passage, Watcher


class Activation(CriterionSpec):
    """Mean absolute activation over tokens, L2 over samples; scores width."""

    axes: ClassVar[tuple[str, ...]] = WIDTH_AXES

    kind: Literal["activation"] = "activation"
    sequence: Literal["mean", "l2", "variance"] = "mean"
    """How a channel's tokens in one sample become one value; mean is that of the absolute value."""
    batch: Literal["l2", "mean", "variance"] = "l2"
    """How the samples' values become one score."""

    def watchers(self, layout: Layout, sizes: Mapping[str, int], tally: Tally) -> Iterator[tuple[str, Watcher]]:
        """See :meth:`CriterionSpec.watchers`."""

        def watcher(path: str) -> tuple[str, Watcher]:
            def add(passage: Passage) -> None:
                samples = aggregated(passage.given, passage.mask, self.sequence).double()
                # A sample without a token that counts is none.
                tally.add(f"{path} samples", passage.mask.any(1).sum())
                tally.add(f"{path} sum", samples.sum(0))
                tally.add(f"{path} squares", samples.square().sum(0))

            return path, add

        for layer in range(sizes["layers"]):
            for path in (layout.mlp_down, layout.attention_out, *layout.reads):
                yield watcher(path.format(layer=layer))

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """See :meth:`CriterionSpec.judge`."""
        import torch

        sizes = layout.sizes(config_of(model))
        layers = range(sizes["layers"])
        channels = {
            name: torch.stack([self._channels(tally, path.format(layer=layer)) for layer in layers])
            for name, path in (("mlp", layout.mlp_down), ("attention", layout.attention_out))
        }
        reads = [self._channels(tally, path.format(layer=layer)) for layer in layers for path in layout.reads]
        return Scores(
            mlp_neurons=channels["mlp"].float(),
            attention_heads=channels["attention"].unflatten(1, (sizes["attention_heads"], -1)).norm(dim=-1).float(),
            kv_groups=channels["attention"].unflatten(1, (sizes["kv_groups"], -1)).norm(dim=-1).float(),
            hidden_channels=torch.stack(reads).sum(0).float(),
        )

    def _channels(self, tally: Tally, path: str) -> Tensor:
        """Scores of the channels at a path, [channels]."""
        samples, total, squares = (tally[f"{path} {name}"] for name in ("samples", "sum", "squares"))
        if self.batch == "l2":
            return squares.sqrt()
        mean = total / samples
        return mean if self.batch == "mean" else (squares / samples - mean.square()).clamp(min=0)


def aggregated(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """One value a sample and channel, fp32.

    Args:
        values: [batch, sequence, channels], zeros where the mask is False.
        mask: bool [batch, sequence].
        how: ``mean`` of the absolute values, ``l2``, or ``variance`` around the mean.

    Returns:
        [batch, channels]; zeros for a sample without a token that counts.
    """
    import torch

    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    # Summed in fp32: sums overflow float16 and lose their digits in bfloat16.
    if how == "mean":
        return values.abs().sum(1, dtype=torch.float32) / tokens
    if how == "l2":
        return values.float().square().sum(1).sqrt()
    return centred(values, mask)[1] / tokens


def centred(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sum of squared distances from it) of each sample's tokens, fp32, [batch, channels] each.

    Args:
        values: [batch, sequence, channels], zeros where the mask is False.
        mask: bool [batch, sequence].
    """
    import torch

    mean = values.sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True).clamp(min=1)
    distance = (values.float() - mean.unsqueeze(1)).masked_fill_(~mask.unsqueeze(-1), 0)
    return mean, distance.square_().sum(1)
