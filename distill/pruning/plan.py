"""Plan: from scores and the sizes to keep to the units that stay, and to the config and parameter count that result.

A pure function of scores, sizes and the config: no model is touched, so a plan can be read, checked and kept before
any weight moves. What the smaller architecture could not be built with is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from distill.core.errors import InputError
from distill.pruning.base import Scores
from distill.pruning.heads import kept_groups, kept_heads, merged_heads
from distill.pruning.keep import KeepSpec
from distill.pruning.layout import Config, Layout
from distill.pruning.select import (
    Rows,
    kept_channels,
    kept_experts,
    kept_layers,
    kept_neurons,
    target_sizes,
)
from distill.pruning.tokens import kept_tokens, moved_tokens


@dataclass(frozen=True)
class Plan:
    """What stays of a model, and what it becomes. Indices are of the unpruned model and rise, but for silent heads.

    Attributes:
        model_type: the architecture.
        layers: the layers that stay.
        mlp_neurons: a row for each layer that stays; in a mixture of experts the neurons of all experts that stay,
            neuron ``n`` of expert ``e`` numbered ``e * neurons + n``.
        attention_heads: a row for each layer that stays, KV group by KV group of the pruned model.
        kv_groups: a row for each layer that stays; all groups when they are pooled.
        hidden_channels: one order for the whole model.
        experts: a row for each layer that stays; None where there are none.
        vocabulary: tokens that stay, in their new order; None keeps all.
        group_choice: what becomes of KV groups; see :class:`KeepSpec`.
        config: config keys that change, with their new values.
        before: axis sizes of the model that the plan is for.
        after: axis sizes of the pruned model.
        parameters_before: number of parameters, tied ones counted once.
        parameters: forecast of the same for the pruned model.
        merged_heads: as ``attention_heads``, the head that each is merged with, or itself; None where none are.
    """

    model_type: str
    layers: tuple[int, ...]
    mlp_neurons: Rows
    attention_heads: Rows
    kv_groups: Rows
    hidden_channels: tuple[int, ...]
    experts: Rows | None
    vocabulary: tuple[int, ...] | None
    group_choice: str
    config: dict[str, Any]
    before: dict[str, int]
    after: dict[str, int]
    parameters_before: int
    parameters: int
    merged_heads: Rows | None = None

    def kept(self, axis: str, layer: int | None) -> tuple[int, ...]:
        """Units of an axis that stay; ``layer`` counts the layers that stay, None is outside of them."""
        if axis == "hidden_channels":
            return self.hidden_channels
        if axis == "vocabulary" and self.vocabulary is not None:
            return self.vocabulary
        rows: Rows | None = getattr(self, axis, None)
        if axis == "vocabulary" or rows is None:
            return tuple(range(self.before[axis]))
        return rows[layer or 0]

    def silent_heads(self, layer: int) -> list[int]:
        """Positions in ``attention_heads[layer]`` of heads whose own KV group is gone: their output is to be zero."""
        per_group, groups = self.before["attention_heads"] // self.before["kv_groups"], self.kv_groups[layer]
        return [i for i, head in enumerate(self.attention_heads[layer]) if head // per_group not in groups]

    def summary(self) -> list[str]:
        """The plan in words, a line for each axis that is cut and one for the parameters."""
        lines = []
        if self.before["layers"] != self.after["layers"]:
            gone = [str(layer) for layer in range(self.before["layers"]) if layer not in self.layers]
            lines.append(f"layers {self.before['layers']} -> {self.after['layers']}, without {', '.join(gone)}")
        for axis in ("mlp_neurons", "attention_heads", "kv_groups", "hidden_channels", "experts", "vocabulary"):
            if self.before.get(axis) != self.after.get(axis):
                whole = axis in ("hidden_channels", "vocabulary")
                where = "" if whole else f" in each of {self.after['layers']} layers"
                name = axis.replace("_", " ").replace("kv", "KV").replace("mlp", "MLP")
                how = {"pool": ", pooled", "silence": ", their heads silent"}.get(self.group_choice, "")
                how = how if axis == "kv_groups" else ""
                how = ", merged" if axis == "attention_heads" and self.merged_heads is not None else how
                lines.append(f"{name} {self.before[axis]} -> {self.after[axis]}{where}{how}")
        share = self.parameters / self.parameters_before
        return [*lines, f"parameters {self.parameters_before:,} -> {self.parameters:,} ({share:.1%})"]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_dict` wrote.

        Raises:
            InputError: it is another thing.
        """

        def rows(key: str) -> Rows | None:
            return None if data.get(key) is None else tuple(map(tuple, data[key]))

        def flat(key: str) -> tuple[int, ...] | None:
            return None if data[key] is None else tuple(data[key])

        try:
            changed = {
                key: rows(key) for key in ("mlp_neurons", "attention_heads", "kv_groups", "experts", "merged_heads")
            }
            return cls(**{**data, **changed, **{key: flat(key) for key in ("layers", "hidden_channels", "vocabulary")}})
        except (KeyError, TypeError) as error:
            raise InputError(f"plan.json is no plan that this version of distill reads ({error}); prune anew") from None


def plan(
    scores: Scores,
    keep: KeepSpec | Mapping[str, Any],
    layout: Layout,
    config: Config,
    vocabulary: Sequence[int] | None = None,
) -> Plan:
    """Choose what stays.

    Width is ranked within each layer; query heads within their KV group, the same number in each, as grouped-query
    attention shares keys by position; neurons of experts within their expert. Depth drops the lowest scores but never
    the first or last layer, whose loss no training makes good, unless ``keep.layers`` says so. Equal scores: the lower
    index stays.

    Args:
        scores: of the axes that ``keep`` cuts; others are not read.
        keep: the sizes to keep.
        layout: the architecture's layout.
        config: ``model.config.to_dict()``, or a parsed ``config.json`` that states all sizes.
        vocabulary: ids of the tokens that stay; the token at position i gets the id i. None keeps all.

    Raises:
        InputError: a size that the model does not have or its architecture cannot take, or scores that are missing or
            of another model.
    """
    if not isinstance(keep, KeepSpec):
        keep = _validated(keep)
    before = layout.sizes(config)
    after = target_sizes(keep, config, layout)
    if keep.vocabulary is not None and vocabulary is None:
        raise InputError("keep.vocabulary names no tokens by itself; give plan() the ids that stay as its vocabulary")
    tokens = None if vocabulary is None else kept_tokens(vocabulary, before)
    after["vocabulary"] = before["vocabulary"] if tokens is None else len(tokens)
    layers = kept_layers(scores, keep, before)
    groups, experts = kept_groups(scores, keep, layers, before, after), kept_experts(scores, layers, before, after)
    changes = config_changes(layout, config, before, after, layers)
    if tokens is not None:
        changes |= moved_tokens(layout, config, tokens)
    return Plan(
        model_type=layout.model_type,
        layers=layers,
        mlp_neurons=kept_neurons(scores, experts, layers, before, after),
        attention_heads=kept_heads(scores, keep, groups, layers, before, after),
        kv_groups=groups,
        hidden_channels=kept_channels(scores, before, after),
        experts=experts,
        vocabulary=tokens,
        group_choice=keep.group_choice,
        config=changes,
        before=before,
        after=after,
        parameters_before=layout.count(config),
        parameters=layout.count({**config, **changes}),
        merged_heads=merged_heads(scores, keep, groups, layers, before, after),
    )


def _validated(keep: Mapping[str, Any]) -> KeepSpec:
    try:
        return KeepSpec.model_validate(keep)
    except ValidationError as error:
        rows = [(".".join(map(str, item["loc"])), item["msg"], item["input"]) for item in error.errors()]
        raise InputError(
            "; ".join(f"keep{'.' if key else ''}{key}: {what} (got {got})" for key, what, got in rows)
        ) from None


def config_changes(
    layout: Layout, config: Config, before: Mapping[str, int], after: Mapping[str, int], layers: Sequence[int]
) -> dict[str, Any]:
    """The config keys that change: sizes, epsilon rescaled, per-layer lists sliced.

    Args:
        layout: the layout of the architecture.
        config: of the unpruned model.
        before: its axis sizes.
        after: those of the pruned model.
        layers: the layers that stay.

    Raises:
        InputError: the config cannot say a size, or a list of it is of another length.
    """
    changes = layout.resized(config, after)
    if before["hidden_channels"] != after["hidden_channels"] and layout.norm_eps_key is not None:
        # The mean of squares over d' of d channels is d / d' times what it was; so must epsilon be.
        ratio = before["hidden_channels"] / after["hidden_channels"]
        changes[layout.norm_eps_key] = config[layout.norm_eps_key] * ratio
    for key in layout.per_layer_keys:
        if config.get(key) is not None and before["layers"] != after["layers"]:
            if len(config[key]) != before["layers"]:
                raise InputError(f"the config's {key} has {len(config[key])} entries, expected {before['layers']}")
            changes[key] = [config[key][layer] for layer in layers]
    return changes
