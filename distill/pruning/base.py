"""The contract of a criterion: it scores units, high means keep, and edits nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.pruning.layout import Layout, check
from distill.pruning.tally import Tally
from distill.pruning.watch import watch

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from distill.pruning.keep import KeepSpec
    from distill.pruning.watch import Batches, Watcher


@dataclass(frozen=True)
class Scores:
    """Importance of every unit of a model, fp32 on the CPU; None where nothing was scored. High means keep.

    ``Scores(**scores.tensors())`` is a round trip, so the scores may be kept as a safetensors file.

    Attributes:
        mlp_neurons: [layers, intermediate], compared within a layer; in a mixture of experts
            [layers, experts, intermediate], compared within an expert.
        attention_heads: [layers, heads], compared within a layer's KV group.
        kv_groups: [layers, kv_heads], compared within a layer.
        hidden_channels: [hidden], one order for the whole model, as the residual stream runs through it.
        experts: [layers, experts], compared within a layer.
        layers: [layers].
        layer_blocks: [layers - n + 1], of n neighbours from each layer on, taken together; in place of ``layers``.
    """

    mlp_neurons: Tensor | None = None
    attention_heads: Tensor | None = None
    kv_groups: Tensor | None = None
    hidden_channels: Tensor | None = None
    experts: Tensor | None = None
    layers: Tensor | None = None
    layer_blocks: Tensor | None = None

    def __post_init__(self) -> None:
        for axis, tensor in self.tensors().items():
            if not tensor.isfinite().all():
                raise InputError(
                    f"scores of {axis} are not finite; check the model, and load it in float32 or bfloat16"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Axis -> scores, without the axes that were not scored."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {axis: tensor for axis, tensor in found.items() if tensor is not None}

    def merge(self, other: Scores) -> Scores:
        """The scores of both, as of a width and a depth criterion.

        Raises:
            InputError: both score one axis.
        """
        mine, theirs = self.tensors(), other.tensors()
        if twice := mine.keys() & theirs.keys():
            raise InputError(f"two criteria score {', '.join(sorted(twice))}; name one criterion for each axis")
        return Scores(**mine, **theirs)


class CriterionSpec(Spec):
    """What every criterion has: a kind, the axes that it scores, what it counts, and how it judges.

    A criterion counts in one or both of two ways: it watches the pass over the data that it shares with others
    (:meth:`watchers`), or makes passes of its own (:meth:`measure`). It then judges by the tally and the weights.
    """

    axes: ClassVar[tuple[str, ...]]

    kind: str

    def fitted_to(self, keep: KeepSpec, num_layers: int) -> Self:
        """The criterion with what it leaves open settled by the sizes to keep.

        Raises:
            InputError: what it measures is not what the plan will cut.
        """
        return self

    def watchers(self, layout: Layout, sizes: Mapping[str, int], tally: Tally) -> Iterator[tuple[str, Watcher]]:
        """What it wants to see in the shared pass: (module path, function that adds to ``tally``)."""
        return iter(())

    def measure(self, model: nn.Module, layout: Layout, batches: Batches, tally: Tally) -> None:
        """Passes of its own, if it needs any; adds to ``tally``."""

    def judge(self, model: nn.Module, layout: Layout, tally: Tally) -> Scores:
        """The scores that follow from what was counted."""
        raise NotImplementedError

    def score(self, model: nn.Module, layout: Layout, batches: Batches) -> Scores:
        """:func:`score` for this criterion alone."""
        return score([self], model, layout, batches)[0]


def score(criteria: Sequence[CriterionSpec], model: nn.Module, layout: Layout, batches: Batches) -> list[Scores]:
    """Score the units of a model by several criteria; those that only watch share one pass over the data.

    Args:
        criteria: each scores all its axes.
        model: a plain transformers causal language model; unchanged afterwards, its train or eval mode included.
        layout: the layout of its architecture.
        batches: dicts of ``input_ids`` int64 [batch, sequence] and ``mask`` bool [batch, sequence]; optionally
            ``attention_mask`` and ``position_ids``. A list, if several criteria read it.

    Raises:
        InputError: no token counts, an activation is not finite, or the layout does not fit the model.
    """
    tallies = count(criteria, model, layout, batches)
    return [criterion.judge(model, layout, tally) for criterion, tally in zip(criteria, tallies, strict=True)]


def count(criteria: Sequence[CriterionSpec], model: nn.Module, layout: Layout, batches: Batches) -> list[Tally]:
    """What each criterion counts on some batches: the half of :func:`score` that reads data.

    Tallies of several parts of the data, as several processes may make them, add up to that of the whole.
    """
    sizes = check(model, layout)
    tallies = [Tally() for _ in criteria]
    pairs = list(zip(criteria, tallies, strict=True))
    if watchers := [pair for criterion, tally in pairs for pair in criterion.watchers(layout, sizes, tally)]:
        watch(model, layout, batches, watchers)
    for criterion, tally in pairs:
        criterion.measure(model, layout, batches, tally)
    return tallies
