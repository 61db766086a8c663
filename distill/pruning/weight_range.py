"""Weight range: the score of an MLP neuron is the norm of its activation times how far its weights reach.

    score_j = sqrt(sum_tokens a_j^2) * sum_W r_W(j) / max_i r_W(i),   r_W(j) = max(W of j) + |min(W of j)|

with a_j the neuron's activation (the input of the down projection), over all unmasked tokens of all samples, and W each
matrix of the MLP: the neuron's row of gate and up, its column of down.

Unlike wanda it reads the weights that write the neuron as well, and of each the extremes, not the sum: a neuron that
answers strongly to a single channel stays. The neurons of a mixture of experts are not scored.

Source: Martra 2025, arXiv 2512.22671 (peak-to-peak magnitude, modulated by activation norms).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import Layout, config_of, spans
from distill.pruning.output_projections import square_observers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.observe import Observer


class WeightRange(CriterionSpec):
    """L2 norm of a neuron's activation, times the range of its weights; scores MLP neurons."""

    axes: ClassVar[tuple[str, ...]] = ("mlp_neurons",)

    kind: Literal["weight_range"] = "weight_range"

    def observers(
        self, layout: Layout, sizes: Mapping[str, int], statistics: Statistics
    ) -> Iterator[tuple[str, Observer]]:
        """See :meth:`CriterionSpec.observers`."""
        down = [] if layout.mlp_down is None else [layout.mlp_down.format(layer=i) for i in range(sizes["layers"])]
        return square_observers(down, statistics)

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""
        if layout.mlp_down is None:
            return Scores()
        config = config_of(model)
        sizes = layout.sizes(config)
        squares = [statistics[layout.mlp_down.format(layer=i)] for i in range(sizes["layers"])]  # fp64 [neurons] each
        reach = [0 * one for one in squares]
        for name, layer, parameter in layout.named_parameters(config):
            for dim, dimension in enumerate(parameter.axes):
                for span in (span for span in spans(dimension, sizes) if span.axis == "mlp_neurons"):
                    weight = model.get_parameter(name).detach()
                    if weight.ndim == 2 and layer is not None:
                        own = weight.narrow(dim, span.start, span.length).movedim(dim, 0)  # [neurons, hidden]
                        reach[layer] += relative_range(own).to(squares[layer])
        scores = squares[0].new_empty((sizes["layers"], sizes["mlp_neurons"]))
        for layer, (one, far) in enumerate(zip(squares, reach, strict=True)):
            scores[layer] = weight_range(one, far)
        return Scores(mlp_neurons=scores.float())


def weight_range(squares: Tensor, reach: Tensor) -> Tensor:
    """Score of each neuron: the norm of its activation times the summed ranges of its weights.

    Args:
        squares: sum of squares over tokens, [neurons].
        reach: sum over the matrices of the MLP of :func:`relative_range`, [neurons].

    Returns:
        [neurons].
    """
    return squares.sqrt() * reach


def relative_range(weight: Tensor) -> Tensor:
    """Range of each neuron's weights, as a fraction of the largest one: [neurons, hidden] -> [neurons]."""
    found = weight.amax(1).float() + weight.amin(1).float().abs()
    return found / found.max().clamp(min=1e-38)
