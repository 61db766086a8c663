"""Activation: a unit is as important as its activations on calibration text are large. Minitron's criterion for width.

    channel_j = sqrt(sum_samples (mean_tokens |a_j|)^2)

with a_j the channel's activation. The default takes the mean absolute value over a sample's tokens and the L2 norm over
the samples. ``sequence`` and ``batch`` choose other reductions: ``l2`` is the root of the sum of squares, ``variance``
the mean squared distance from the mean.

    mlp_neurons       a = input of the down projection
    attention_heads   a = input of the attention's output projection; L2 over the head's channels
    kv_groups         L2 over the channels of all query heads of the group
    hidden_channels   a = input of every attention and MLP (after a pre-norm, where there is one); summed over them
    experts           mean of router weight * |output|_2 over the tokens routed to the expert; the expert's neurons as
                      above, with a = 0 for a token that is routed to other experts

The default for width. The more MLP neurons are cut, the larger its lead over magnitude; for heads and hidden channels
the two are close. Tokens that the mask excludes (padding, prompts) are not counted.

Source: Muralidharan et al. 2024, arXiv 2407.14679, section 3.1, with (batch = L2, sequence = mean). The paper's head
score takes the norm over the head's channels first; this is the form of NVIDIA's implementation. Experts: Lasby et al.
2025, arXiv 2510.13999 (REAP), with the router weights as the model computes them, without another normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import WIDTH_AXES, Layout, config_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.observe import ExpertObserver, ExpertTokens, ModuleIO, Observer


class Activation(CriterionSpec):
    """Mean absolute activation over tokens, L2 over samples; scores width, and experts by their weighted output."""

    axes: ClassVar[tuple[str, ...]] = (*WIDTH_AXES, "experts")

    kind: Literal["activation"] = "activation"
    sequence: Literal["mean", "l2", "variance"] = "mean"
    """Reduction over the tokens of one sample; mean is the mean of the absolute values."""
    batch: Literal["l2", "mean", "variance"] = "l2"
    """Reduction over the samples."""

    def observers(self, layout: Layout, sizes: Mapping[str, int], statistics: Statistics) -> Iterator[tuple[str, Any]]:
        """See :meth:`CriterionSpec.observers`."""

        def channels(path: str) -> Observer:
            def add(module_io: ModuleIO) -> None:
                # module_io.mask: [batch, sequence]; a sample that is masked out entirely is not counted
                statistics.add(f"{path} samples", module_io.mask.any(1).sum())
                _add_samples(statistics, path, activation(module_io.input, module_io.mask, self.sequence))

            return add

        def experts(path: str) -> ExpertObserver:
            def add(routed: ExpertTokens) -> None:
                name = f"{path} {routed.expert}"
                statistics.add(f"{name} samples", (routed.tokens_of_samples > 0).sum())
                _add_samples(statistics, name, expert_activation(routed, self.sequence))
                statistics.add(f"{name} tokens", routed.weights.new_tensor(len(routed.weights)))
                statistics.add(f"{name} output", (routed.weights.float() * routed.output.float().norm(dim=-1)).sum())

            return add

        for layer in range(sizes["layers"]):
            for path in (layout.mlp_down, layout.attention_out, *layout.reads):
                if path is not None:
                    yield path.format(layer=layer), channels(path.format(layer=layer))
            if layout.experts is not None:
                yield layout.experts.format(layer=layer), experts(layout.experts.format(layer=layer))

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""
        import torch

        sizes = layout.sizes(config_of(model))
        layers = range(sizes["layers"])

        def rows(path: str) -> Tensor:  # [layers, channels]
            return torch.stack([self._channels(statistics, path.format(layer=layer)) for layer in layers])

        found = {} if layout.experts is None else self._experts(statistics, layout.experts, sizes)
        if layout.mlp_down is not None:
            found["mlp_neurons"] = rows(layout.mlp_down)
        queries = rows(layout.attention_out)  # [layers, heads x head size]
        found |= {
            "attention_heads": queries.unflatten(1, (sizes["attention_heads"], -1)).norm(dim=-1),
            "kv_groups": queries.unflatten(1, (sizes["kv_groups"], -1)).norm(dim=-1),
            "hidden_channels": torch.stack([rows(path).sum(0) for path in layout.reads]).sum(0),
        }
        return Scores(**{axis: values.float() for axis, values in found.items()})

    def _experts(self, statistics: Statistics, experts: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Scores of the experts [layers, experts] and of their neurons [layers, experts, intermediate].

        An expert to which no token was routed scores 0.
        """
        import torch

        names = [[f"{experts.format(layer=i)} {e}" for e in range(sizes["experts"])] for i in range(sizes["layers"])]
        output = torch.stack(
            [torch.stack([statistics[f"{n} output"] / statistics[f"{n} tokens"] for n in row]) for row in names]
        )
        neurons = torch.stack([torch.stack([self._channels(statistics, n) for n in row]) for row in names])
        return {"experts": output.nan_to_num(0.0), "mlp_neurons": neurons}

    def _channels(self, statistics: Statistics, path: str) -> Tensor:
        """Scores of the channels of the module at ``path``, [channels]."""
        samples, total, squares = (statistics[f"{path} {name}"] for name in ("samples", "sum", "squares"))
        if self.batch == "l2":
            return squares.sqrt()
        mean = total / samples
        return mean if self.batch == "mean" else (squares / samples - mean.square()).clamp(min=0)


def _add_samples(statistics: Statistics, name: str, samples: Tensor) -> None:
    """Add one value per sample and channel, [batch, channels], to the sums over the samples."""
    statistics.add(f"{name} sum", samples.double().sum(0))  # [channels]
    statistics.add(f"{name} squares", samples.double().square().sum(0))  # [channels]


def activation(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """Reduce activations over the tokens: one value per sample and channel, fp32.

    Args:
        values: [batch, sequence, channels], zeros where the mask is False.
        mask: bool [batch, sequence].
        how: ``mean`` of the absolute values, ``l2``, or ``variance`` around the mean.

    Returns:
        [batch, channels]; zeros for a sample that is masked out entirely.
    """
    import torch

    tokens = mask.sum(1, keepdim=True).clamp(min=1)  # [batch, 1]
    # summed in fp32, because sums overflow float16 and lose precision in bfloat16
    if how == "mean":
        return values.abs().sum(1, dtype=torch.float32) / tokens
    if how == "l2":
        return values.float().square().sum(1).sqrt()
    return centred(values, mask)[1] / tokens


def expert_activation(routed: ExpertTokens, how: str) -> Tensor:
    """As :func:`activation` for the neurons of one expert, [batch, intermediate].

    A token that is routed to other experts enters the reduction with activation 0.
    """
    import torch

    batch = len(routed.tokens_of_samples)

    def over_tokens(values: Tensor) -> Tensor:  # [tokens, intermediate] -> [batch, intermediate]
        return values.new_zeros(batch, values.shape[1], dtype=torch.float32).index_add_(0, routed.samples, values)

    neurons = routed.neurons.float()  # [tokens, intermediate]
    tokens = routed.tokens_of_samples.clamp(min=1).unsqueeze(1)  # [batch, 1]
    if how == "mean":
        return over_tokens(neurons.abs()) / tokens
    squares = over_tokens(neurons.square())
    return squares.sqrt() if how == "l2" else squares / tokens - (over_tokens(neurons) / tokens).square()


def centred(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the sum of squared distances from it over each sample's tokens, fp32 [batch, channels] each.

    Args:
        values: [batch, sequence, channels], zeros where the mask is False.
        mask: bool [batch, sequence].
    """
    import torch

    mean = values.sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True).clamp(min=1)  # [batch, channels]
    distance = (values.float() - mean.unsqueeze(1)).masked_fill_(~mask.unsqueeze(-1), 0)  # [batch, sequence, channels]
    return mean, distance.square_().sum(1)
