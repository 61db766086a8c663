"""Block influence: a layer matters as much as it turns the residual stream. Scores depth in one pass.

    layer_l = 1 - mean_tokens cos(x_l, x_{l+1})

with x_l the hidden state that enters layer l. The mean runs over all tokens that count, of all samples alike.

The default for depth. It judges each layer as if the others stayed; for a deep cut, a contiguous block of layers
(``keep.layer_choice: contiguous``) does better downstream than the lowest scores one by one.

Source: Men et al. 2024, arXiv 2403.03853, equation 1 (ShortGPT); used by Minitron, arXiv 2407.14679, section 3.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores, watch
from distill.pruning.layout import Layout, check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.base import Batches, Watcher


class BlockInfluence(CriterionSpec):
    """One minus the cosine between a layer's input and output; scores depth."""

    axes: ClassVar[tuple[str, ...]] = ("layers",)

    kind: Literal["block_influence"] = "block_influence"

    def score(self, model: nn.Module, layout: Layout, batches: Batches) -> Scores:
        """See :meth:`CriterionSpec.score`."""
        return block_influence(model, layout, batches)


def block_influence(model: nn.Module, layout: Layout, batches: Batches) -> Scores:
    """Depth scores of a model from calibration batches; see the module and :meth:`CriterionSpec.score`."""
    import torch

    layers = range(check(model, layout)["layers"])
    # Python floats are fp64: the sum over millions of tokens loses nothing.
    turned = [0.0 for _ in layers]

    def watcher(layer: int) -> Watcher:
        def add(given: Tensor, output: Tensor, mask: Tensor) -> None:
            cosine = torch.cosine_similarity(given[mask].float(), output[mask].float(), dim=-1)
            turned[layer] += float((1 - cosine).sum())

        return add

    tokens = watch(model, layout, batches, {layout.block.format(layer=i): watcher(i) for i in layers})
    return Scores(layers=torch.tensor(turned) / tokens)
