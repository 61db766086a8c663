"""Block influence: the score of a layer is how much it changes the direction of the residual stream. Scores depth.

    layer_l = 1 - mean_tokens cos(x_l, x_{l+1})

with x_l the hidden state that enters layer l. The mean is over all unmasked tokens of all samples.

The default for depth; it needs one forward pass. It scores each layer as if all others stayed. Where many layers are
cut, dropping a contiguous block (``keep.layer_choice: contiguous``) gives better downstream results than dropping the
layers of lowest score.

Source: Men et al. 2024, arXiv 2403.03853, equation 1 (ShortGPT); used by Minitron, arXiv 2407.14679, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import Layout, config_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.observe import ModuleIO, Observer


class BlockInfluence(CriterionSpec):
    """One minus the cosine between a layer's input and output; scores depth."""

    axes: ClassVar[tuple[str, ...]] = ("layers",)

    kind: Literal["block_influence"] = "block_influence"

    def observers(
        self, layout: Layout, sizes: Mapping[str, int], statistics: Statistics
    ) -> Iterator[tuple[str, Observer]]:
        """See :meth:`CriterionSpec.observers`."""

        def watcher(path: str) -> Observer:
            def add(module_io: ModuleIO) -> None:
                influence = block_influence(module_io.input, module_io.output)  # [batch, sequence]
                statistics.add(f"{path} influence", (influence * module_io.mask).double().sum())
                statistics.add(f"{path} tokens", module_io.mask.sum())

            return add

        paths = (layout.block.format(layer=layer) for layer in range(sizes["layers"]))
        return ((path, watcher(path)) for path in paths)

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """See :meth:`CriterionSpec.compute_scores`."""
        import torch

        paths = [layout.block.format(layer=layer) for layer in range(layout.sizes(config_of(model))["layers"])]
        means = [statistics[f"{path} influence"] / statistics[f"{path} tokens"] for path in paths]
        return Scores(layers=torch.stack(means).float())


def block_influence(input: Tensor, output: Tensor) -> Tensor:
    """One minus the cosine of a layer's input and output, fp32.

    Args:
        input: [batch, sequence, hidden].
        output: [batch, sequence, hidden].

    Returns:
        [batch, sequence].
    """
    import torch

    return 1 - torch.cosine_similarity(input.float(), output.float(), dim=-1)
