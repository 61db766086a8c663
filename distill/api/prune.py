"""Prune a model in memory: score its units on some text, plan, and cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from distill.api.batches import on_device
from distill.api.spec import checked
from distill.core.errors import InputError
from distill.models.layouts import layout_for
from distill.pruning.base import CriterionSpec, Scores, score
from distill.pruning.keep import KeepSpec
from distill.pruning.origin import Origin
from distill.pruning.plan import Plan, plan
from distill.pruning.select import target_sizes
from distill.pruning.surgery import apply
from distill.stages.prune.scoring import of_axes
from distill.stages.prune.spec import Prune

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Pruned(Generic[Model]):
    """A pruned model, and how it came about.

    Attributes:
        model: the smaller model.
        plan: which units stay; ``plan.summary()`` says it in words.
        scores: the importance of each unit, for the axes that were cut.
        origin: the kept layers and channels, for losses on hidden states: ``DistillationModule(origin=...)``.
    """

    model: Model
    plan: Plan
    scores: Scores
    origin: Origin


def prune(
    model: Model,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    keep: KeepSpec | Mapping[str, Any],
    criterion: CriterionSpec | Mapping[str, Any] | str | None = None,
    mlp_criterion: CriterionSpec | Mapping[str, Any] | str | None = None,
    depth_criterion: CriterionSpec | Mapping[str, Any] | str | None = None,
) -> Model:
    """Prune a model to a smaller model, by the importance of its units on some text.

    It does what the stage ``prune`` does, except for ``reconstruct``, ``search`` and cutting the vocabulary, which need
    a recipe. :func:`prune_with_plan` also returns the plan and the scores.

    Args:
        model: a causal language model of an architecture that pruning supports; not changed.
        batches: calibration data, as :func:`distill.batches` makes it. A hundred rows are enough for widths.
        keep: sizes to keep, as numbers or percentages, such as
            ``{"intermediate_size": "50%", "num_hidden_layers": 12}``; the keys of the stage's ``keep``.
        criterion: scores neurons, heads, hidden channels and experts; its name or its settings. None:
            ``"activation"``.
        mlp_criterion: another one for MLP neurons; None: ``criterion``.
        depth_criterion: scores layers; None: ``"block_influence"``.

    Returns:
        A smaller model of the same class, on the same device and in the same dtype.

    Raises:
        InputError: the architecture is not supported, cannot have a size, or a setting has no effect.

    Examples:
        >>> import distill
        >>> teacher, tokenizer = distill.load("builtin:quickstart-teacher")
        >>> batches = distill.batches(["The cat sat on the mat. " * 20], tokenizer, sequence_length=64)
        >>> student = distill.prune(teacher, batches, keep={"intermediate_size": "50%"})
        >>> teacher.config.intermediate_size, student.config.intermediate_size
        (384, 192)
    """
    return prune_with_plan(
        model,
        batches,
        keep=keep,
        criterion=criterion,
        mlp_criterion=mlp_criterion,
        depth_criterion=depth_criterion,
    ).model


def prune_with_plan(
    model: Model,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    keep: KeepSpec | Mapping[str, Any],
    criterion: CriterionSpec | Mapping[str, Any] | str | None = None,
    mlp_criterion: CriterionSpec | Mapping[str, Any] | str | None = None,
    depth_criterion: CriterionSpec | Mapping[str, Any] | str | None = None,
) -> Pruned[Model]:
    """As :func:`prune`; returns the model with its plan and the scores by which it was made.

    Args:
        model: see :func:`prune`.
        batches: see there.
        keep: see there.
        criterion: see there.
        mlp_criterion: see there.
        depth_criterion: see there.

    Returns:
        The smaller model, the plan, the scores, and the origin of its layers and channels.

    Raises:
        InputError: see there.

    Examples:
        >>> import distill
        >>> teacher, tokenizer = distill.load("builtin:quickstart-teacher")
        >>> batches = distill.batches(["The cat sat on the mat. " * 20], tokenizer, sequence_length=64)
        >>> pruned = distill.prune_with_plan(teacher, batches, keep={"num_hidden_layers": 3})
        >>> pruned.plan.layers[0], pruned.model.config.num_hidden_layers
        (0, 3)
    """
    sizes = keep.model_dump(exclude_unset=True) if isinstance(keep, KeepSpec) else dict(keep)
    criteria = {"criterion": criterion, "mlp_criterion": mlp_criterion, "depth_criterion": depth_criterion}
    given = {key: value for key, value in criteria.items() if value is not None}
    stage = checked(Prune, {"keep": sizes, **given}, "")
    spec = stage.keep
    assert spec is not None
    if spec.vocabulary is not None:
        raise InputError("keep.vocabulary: the tokenizer would change too; use a recipe with a prune stage")
    config = model.config.to_dict()
    layout = layout_for(str(config.get("model_type")))
    stage.check_criteria(layout)
    target_sizes(spec, config, layout)
    choices = stage.choices()
    scores = Scores()
    if choices:
        keys = list(dict.fromkeys(choices.values()))
        num_layers = layout.sizes(config)["layers"]
        chosen = [getattr(stage, key).resolved_for(spec, num_layers) for key in keys]
        made = score(chosen, model, layout, on_device(batches, next(model.parameters()).device))
        scores = of_axes(choices, dict(zip(keys, made, strict=True)))
    the_plan = plan(scores, spec, layout, config)
    origin = Origin(the_plan.layers, the_plan.hidden_channels)
    return Pruned(apply(model, the_plan, layout), the_plan, scores, origin)
