"""The interface of a criterion: it scores the units of a model (a high score means keep) and never edits the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.layout import Layout, check
from distill.pruning.observe import observe

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from distill.pruning.keep import KeepSpec
    from distill.pruning.observe import Batches, Observer


@dataclass(frozen=True)
class Scores:
    """The importance of every unit of a model: fp32 tensors on the CPU, None for an axis that was not scored.

    A high score means keep. ``Scores(**scores.tensors())`` restores the object, so scores can be stored as a
    safetensors file.

    Attributes:
        mlp_neurons: [layers, intermediate], compared within a layer; in a mixture of experts
            [layers, experts, intermediate], compared within an expert.
        attention_heads: [layers, heads], compared within a layer's KV group.
        kv_groups: [layers, kv_heads], compared within a layer.
        hidden_channels: [hidden], one ranking for the whole model, because all layers share the residual stream.
        experts: [layers, experts], compared within a layer.
        layers: [layers].
        layer_blocks: [layers - n + 1], entry i scores the block of layers i to i + n - 1; replaces ``layers``.
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
                    f"the scores of {axis} contain NaN or infinity, expected finite values; check the model's weights, "
                    "and load it in float32 or bfloat16"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Axis -> scores, without the axes that were not scored."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {axis: tensor for axis, tensor in found.items() if tensor is not None}


class CriterionSpec(Spec):
    """Base class of the criteria.

    A criterion collects statistics from the calibration data in one or both of two ways: through observers in a forward
    pass that all criteria share (:meth:`observers`), or in passes of its own (:meth:`measure`). Then
    :meth:`compute_scores` makes the scores from the statistics and the weights.

    Attributes:
        axes: the axes that the criterion scores.
        kind: its name in a recipe.
    """

    axes: ClassVar[tuple[str, ...]]

    kind: str

    def resolved_for(self, keep: KeepSpec, num_layers: int) -> Self:
        """This criterion with its unset options filled in for the sizes to keep.

        Args:
            keep: the sizes to keep.
            num_layers: of the model to prune.

        Raises:
            InputError: an option contradicts the cut that ``keep`` describes.
        """
        return self

    def observers(
        self, layout: Layout, sizes: Mapping[str, int], statistics: Statistics
    ) -> Iterator[tuple[str, Observer]]:
        """The observers for the shared forward pass, as (module path, function that adds to ``statistics``)."""
        return iter(())

    def measure(self, model: nn.Module, layout: Layout, batches: Batches, statistics: Statistics) -> None:
        """Run the criterion's own passes over ``batches``, if it needs any, and add to ``statistics``."""

    def compute_scores(self, model: nn.Module, layout: Layout, statistics: Statistics) -> Scores:
        """Scores from the collected statistics and the model's weights."""
        raise NotImplementedError

    def score(self, model: nn.Module, layout: Layout, batches: Batches) -> Scores:
        """:func:`score` for this criterion alone."""
        return score([self], model, layout, batches)[0]


def score(criteria: Sequence[CriterionSpec], model: nn.Module, layout: Layout, batches: Batches) -> list[Scores]:
    """Score the units of a model by several criteria; criteria with observers share one pass over the data.

    Args:
        criteria: each scores all its axes.
        model: a plain transformers language model; left unchanged, including its train or eval mode.
        layout: the layout of its architecture.
        batches: dicts of ``input_ids`` int64 [batch, sequence] and ``mask`` bool [batch, sequence]; optionally
            ``attention_mask`` and ``position_ids``. A list, if several criteria read it.

    Returns:
        One :class:`Scores` per criterion.

    Raises:
        InputError: the mask selects no token, a score is not finite, or the layout does not fit the model.
    """
    collected = collect_statistics(criteria, model, layout, batches)
    return [criterion.compute_scores(model, layout, own) for criterion, own in zip(criteria, collected, strict=True)]


def collect_statistics(
    criteria: Sequence[CriterionSpec], model: nn.Module, layout: Layout, batches: Batches
) -> list[Statistics]:
    """The statistics of each criterion on some batches: the part of :func:`score` that reads data.

    Statistics are sums, so the statistics of several parts of the data (one per process, say) can be added.
    """
    sizes = check(model, layout)
    collected = [Statistics() for _ in criteria]
    pairs = list(zip(criteria, collected, strict=True))
    if observers := [pair for criterion, own in pairs for pair in criterion.observers(layout, sizes, own)]:
        observe(model, layout, batches, observers)
    for criterion, own in pairs:
        criterion.measure(model, layout, batches, own)
    return collected
