"""Activation: a unit matters as much as it is active on real text. Minitron's criterion for width.

    channel_j = sqrt(sum_samples (mean_tokens |a_j|)^2)

with a_j the channel's activation: mean of the absolute value over a sample's tokens, L2 over the samples.

    mlp_neurons       a = input of the down projection
    attention_heads   a = input of the attention's output projection; L2 over the head's channels
    kv_groups         L2 over the channels of all query heads of the group
    hidden_channels   a = what attention and MLP read of the residual stream; summed over these reads

The default for width. Its lead over magnitude grows with the share of MLP neurons that goes; for heads and hidden
channels the two are close. Tokens that the mask leaves out (padding, prompts) do not count.

Source: Muralidharan et al. 2024, arXiv 2407.14679, section 3.1, with (batch = L2, sequence = mean). The paper's head
score takes the norm over the head's channels first; this is the form of NVIDIA's implementation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.core.errors import InputError
from distill.pruning.base import CriterionSpec, Scores, watch
from distill.pruning.layout import WIDTH_AXES, Layout, check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.base import Batches


class Activation(CriterionSpec):
    """Mean absolute activation over tokens, L2 over samples; scores width."""

    axes: ClassVar[tuple[str, ...]] = WIDTH_AXES

    kind: Literal["activation"] = "activation"

    def score(self, model: nn.Module, layout: Layout, batches: Batches) -> Scores:
        """See :meth:`CriterionSpec.score`."""
        return activation(model, layout, batches)


class ChannelNorm:
    """The sum of squares over samples of a channel's mean absolute activation, in fp32."""

    squares: Tensor | float = 0.0

    def add(self, values: Tensor, mask: Tensor) -> None:
        """Add a batch: ``values`` [batch, sequence, channels], ``mask`` bool [batch, sequence]."""
        # Sums of squares overflow float16 and lose their digits in bfloat16. Outside the mask anything may stand.
        absolute = values.float().abs().masked_fill(~mask.unsqueeze(-1), 0.0)
        # A sample without a token that counts adds 0.
        mean = absolute.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        self.squares = self.squares + mean.square().sum(0)

    def add_input(self, given: Tensor, output: Tensor, mask: Tensor) -> None:
        """Watch what enters a module."""
        self.add(given, mask)

    def add_output(self, given: Tensor, output: Tensor, mask: Tensor) -> None:
        """Watch what leaves a module."""
        self.add(output, mask)

    def __call__(self) -> Tensor:
        """Scores [channels]."""
        assert not isinstance(self.squares, float)
        return self.squares.sqrt().cpu()


def activation(model: nn.Module, layout: Layout, batches: Batches) -> Scores:
    """Width scores of a model from calibration batches; see the module and :meth:`CriterionSpec.score`."""
    import torch

    sizes = check(model, layout)
    layers = range(sizes["layers"])
    mlp, attention = [ChannelNorm() for _ in layers], [ChannelNorm() for _ in layers]
    reads = {path.format(layer=layer): ChannelNorm() for layer in layers for path in layout.reads}

    watchers = {path: norm.add_input for path, norm in reads.items()}
    if layout.mlp_down is None:
        raise InputError(f"activation does not score the experts of {layout.model_type} yet")
    for layer in layers:
        watchers[layout.mlp_down.format(layer=layer)] = mlp[layer].add_input
        watchers[layout.attention_out.format(layer=layer)] = attention[layer].add_input
    watch(model, layout, batches, watchers)

    query_channels = torch.stack([norm() for norm in attention])
    return Scores(
        mlp_neurons=torch.stack([norm() for norm in mlp]),
        attention_heads=query_channels.unflatten(1, (sizes["attention_heads"], -1)).norm(dim=-1),
        kv_groups=query_channels.unflatten(1, (sizes["kv_groups"], -1)).norm(dim=-1),
        hidden_channels=torch.stack([norm() for norm in reads.values()]).sum(0),
    )
