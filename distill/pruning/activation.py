"""Activation: a unit matters as much as it is active on real text. Minitron's criterion for width.

    channel_j = sqrt(sum_samples (mean_tokens |a_j|)^2)

with a_j the channel's activation: mean of the absolute value over a sample's tokens, L2 over the samples. Both
can be chosen: ``l2`` is the root of the sum of squares, ``variance`` the mean squared distance from the mean.

    mlp_neurons       a = input of the down projection
    attention_heads   a = input of the attention's output projection; L2 over the head's channels
    kv_groups         L2 over the channels of all query heads of the group
    hidden_channels   a = what attention and MLP read of the residual stream, so after a norm that stands before them;
                      summed over all of them
    experts           mean over the tokens sent to the expert of router weight * |output|_2; its neurons as above,
                      with a = 0 where a token is sent elsewhere

The default for width. Its lead over magnitude grows with the share of MLP neurons that goes; for heads and hidden
channels the two are close. Tokens that the mask leaves out (padding, prompts) do not count.

Source: Muralidharan et al. 2024, arXiv 2407.14679, section 3.1, with (batch = L2, sequence = mean). The paper's head
score takes the norm over the head's channels first; this is the form of NVIDIA's implementation. Experts: Lasby et al.
2025, arXiv 2510.13999 (REAP), without the router's renormalisation, which is the model's own affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.layout import WIDTH_AXES, Layout, config_of
from distill.pruning.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.watch import ExpertWatcher, Passage, Routed, Watcher


class Activation(CriterionSpec):
    """Mean absolute activation over tokens, L2 over samples; scores width, and experts by what they add."""

    axes: ClassVar[tuple[str, ...]] = (*WIDTH_AXES, "experts")

    kind: Literal["activation"] = "activation"
    sequence: Literal["mean", "l2", "variance"] = "mean"
    """How a channel's tokens in one sample become one value; mean is that of the absolute value."""
    batch: Literal["l2", "mean", "variance"] = "l2"
    """How the samples' values become one score."""

    def watchers(self, layout: Layout, sizes: Mapping[str, int], tally: Tally) -> Iterator[tuple[str, Any]]:
        """See :meth:`CriterionSpec.watchers`."""

        def channels(path: str) -> Watcher:
            def add(passage: Passage) -> None:
                # A sample without a token that counts is none.
                tally.add(f"{path} samples", passage.mask.any(1).sum())
                _add_samples(tally, path, activation(passage.given, passage.mask, self.sequence))

            return add

        def experts(path: str) -> ExpertWatcher:
            def add(routed: Routed) -> None:
                name = f"{path} {routed.expert}"
                tally.add(f"{name} samples", (routed.tokens_of_samples > 0).sum())
                _add_samples(tally, name, expert_activation(routed, self.sequence))
                tally.add(f"{name} tokens", routed.weights.new_tensor(len(routed.weights)))
                tally.add(f"{name} output", (routed.weights.float() * routed.output.float().norm(dim=-1)).sum())

            return add

        for layer in range(sizes["layers"]):
            for path in (layout.mlp_down, layout.attention_out, *layout.reads):
                if path is not None:
                    yield path.format(layer=layer), channels(path.format(layer=layer))
            if layout.experts is not None:
                yield layout.experts.format(layer=layer), experts(layout.experts.format(layer=layer))

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """See :meth:`CriterionSpec.judge`."""
        import torch

        sizes = layout.sizes(config_of(model))
        layers = range(sizes["layers"])

        def rows(path: str) -> Tensor:
            return torch.stack([self._channels(tally, path.format(layer=layer)) for layer in layers])

        found = {} if layout.experts is None else self._experts(tally, layout.experts, sizes)
        if layout.mlp_down is not None:
            found["mlp_neurons"] = rows(layout.mlp_down)
        queries = rows(layout.attention_out)
        found |= {
            "attention_heads": queries.unflatten(1, (sizes["attention_heads"], -1)).norm(dim=-1),
            "kv_groups": queries.unflatten(1, (sizes["kv_groups"], -1)).norm(dim=-1),
            "hidden_channels": torch.stack([rows(path).sum(0) for path in layout.reads]).sum(0),
        }
        return Scores(**{axis: values.float() for axis, values in found.items()})

    def _experts(self, tally: Tally, experts: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Scores of the experts and of the neurons in each; 0 for an expert that no token was sent to."""
        import torch

        names = [[f"{experts.format(layer=i)} {e}" for e in range(sizes["experts"])] for i in range(sizes["layers"])]
        output = torch.stack([torch.stack([tally[f"{n} output"] / tally[f"{n} tokens"] for n in row]) for row in names])
        neurons = torch.stack([torch.stack([self._channels(tally, n) for n in row]) for row in names])
        return {"experts": output.nan_to_num(0.0), "mlp_neurons": neurons}

    def _channels(self, tally: Tally, path: str) -> Tensor:
        """Scores of the channels at a path, [channels]."""
        samples, total, squares = (tally[f"{path} {name}"] for name in ("samples", "sum", "squares"))
        if self.batch == "l2":
            return squares.sqrt()
        mean = total / samples
        return mean if self.batch == "mean" else (squares / samples - mean.square()).clamp(min=0)


def _add_samples(tally: Tally, name: str, samples: Tensor) -> None:
    """Add the values of a batch's samples, [batch, channels]."""
    tally.add(f"{name} sum", samples.double().sum(0))
    tally.add(f"{name} squares", samples.double().square().sum(0))


def activation(values: Tensor, mask: Tensor, how: str) -> Tensor:
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


def expert_activation(routed: Routed, how: str) -> Tensor:
    """As :func:`activation`, for the neurons of an expert, which are 0 for tokens that are sent elsewhere."""
    import torch

    batch = len(routed.tokens_of_samples)

    def over_tokens(values: Tensor) -> Tensor:
        return values.new_zeros(batch, values.shape[1], dtype=torch.float32).index_add_(0, routed.samples, values)

    neurons, tokens = routed.neurons.float(), routed.tokens_of_samples.clamp(min=1).unsqueeze(1)
    if how == "mean":
        return over_tokens(neurons.abs()) / tokens
    squares = over_tokens(neurons.square())
    return squares.sqrt() if how == "l2" else squares / tokens - (over_tokens(neurons) / tokens).square()


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
