"""Block influence: a layer matters as much as it turns the residual stream. Scores depth in one pass.

    layer_l = 1 - mean_tokens cos(x_l, x_{l+1})

with x_l the hidden state that enters layer l. The mean runs over all tokens that count, of all samples alike.

The default for depth. It judges each layer as if the others stayed; for a deep cut, a contiguous block of layers
(``keep.layer_choice: contiguous``) does better downstream than the lowest scores one by one.

Source: Men et al. 2024, arXiv 2403.03853, equation 1 (ShortGPT); used by Minitron, arXiv 2407.14679, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.pruning.base import CriterionSpec, Scores
from distill.pruning.layout import Layout, config_of
from distill.pruning.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.watch import Passage, Watcher


class BlockInfluence(CriterionSpec):
    """One minus the cosine between a layer's input and output; scores depth."""

    axes: ClassVar[tuple[str, ...]] = ("layers",)

    kind: Literal["block_influence"] = "block_influence"

    def watchers(self, layout: Layout, sizes: Mapping[str, int], tally: Tally) -> Iterator[tuple[str, Watcher]]:
        """See :meth:`CriterionSpec.watchers`."""

        def watcher(path: str) -> Watcher:
            def add(passage: Passage) -> None:
                turned = block_influence(passage.given, passage.output)
                tally.add(f"{path} turned", (turned * passage.mask).double().sum())
                tally.add(f"{path} tokens", passage.mask.sum())

            return add

        paths = (layout.block.format(layer=layer) for layer in range(sizes["layers"]))
        return ((path, watcher(path)) for path in paths)

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """See :meth:`CriterionSpec.judge`."""
        import torch

        paths = [layout.block.format(layer=layer) for layer in range(layout.sizes(config_of(model))["layers"])]
        return Scores(layers=torch.stack([tally[f"{path} turned"] / tally[f"{path} tokens"] for path in paths]).float())


def block_influence(given: Tensor, output: Tensor) -> Tensor:
    """One minus the cosine, fp32: what enters and what leaves, [batch, sequence, hidden] each -> [batch, sequence]."""
    import torch

    return 1 - torch.cosine_similarity(given.float(), output.float(), dim=-1)
