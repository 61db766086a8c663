"""Plan: which units stay, given their scores and the sizes to keep, and the config and parameter count that result.

:func:`plan` is a pure function of scores, sizes and the config. It reads no weights, so a plan can be inspected and
stored before the model is cut. Sizes that the architecture cannot have are rejected here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from distill.core.errors import InputError
from distill.pruning.base import Scores
from distill.pruning.head_choice import kept_groups, kept_heads, merged_heads
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
from distill.pruning.token_ids import kept_tokens, moved_tokens


@dataclass(frozen=True)
class Plan:
    """The units of a model that stay, and the sizes of the pruned model.

    Indices are those of the original model, in ascending order (except for the heads of ``group_choice: silence``).

    Attributes:
        model_type: the architecture.
        layers: the kept layers.
        mlp_neurons: per kept layer, the kept neurons. In a mixture of experts, of all kept experts: neuron ``n`` of
            expert ``e`` has the index ``e * neurons + n``.
        attention_heads: per kept layer, the kept query heads in the order of the pruned model's KV groups.
        kv_groups: per kept layer, the kept KV groups; all groups if they are pooled.
        hidden_channels: the kept channels, the same for all layers.
        experts: per kept layer, the kept experts; None if there are none.
        vocabulary: the kept tokens in their new order; None keeps all.
        group_choice: how KV groups are removed; see :class:`KeepSpec`.
        config: config keys that change, with their new values.
        before: axis sizes of the model that the plan is for.
        after: axis sizes of the pruned model.
        parameters_before: number of parameters, tied ones counted once.
        parameters: the same for the pruned model, computed from its sizes.
        merged_heads: per entry of ``attention_heads``, the head merged into it, or itself; None if none is merged.
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
        """The kept units of an axis.

        Args:
            axis: its name.
            layer: index among the kept layers; None for parameters outside of layers.
        """
        if axis == "hidden_channels":
            return self.hidden_channels
        if axis == "vocabulary" and self.vocabulary is not None:
            return self.vocabulary
        rows: Rows | None = getattr(self, axis, None)
        if axis == "vocabulary" or rows is None:
            return tuple(range(self.before[axis]))
        return rows[layer or 0]

    def silent_heads(self, layer: int) -> list[int]:
        """Positions in ``attention_heads[layer]`` of heads whose KV group was removed: surgery zeroes their output."""
        per_group, groups = self.before["attention_heads"] // self.before["kv_groups"], self.kv_groups[layer]
        return [i for i, head in enumerate(self.attention_heads[layer]) if head // per_group not in groups]

    def summary(self) -> list[str]:
        """The plan as text: one line per axis that is cut, and one for the number of parameters."""
        lines = []
        if self.before["layers"] != self.after["layers"]:
            gone = [str(layer) for layer in range(self.before["layers"]) if layer not in self.layers]
            lines.append(f"layers {self.before['layers']} -> {self.after['layers']}, without {', '.join(gone)}")
        for axis in ("mlp_neurons", "attention_heads", "kv_groups", "hidden_channels", "experts", "vocabulary"):
            if self.before.get(axis) != self.after.get(axis):
                once = axis in ("hidden_channels", "vocabulary")  # not once per layer
                where = "" if once else f" in each of {self.after['layers']} layers"
                name = axis.replace("_", " ").replace("kv", "KV").replace("mlp", "MLP")
                how = {"pool": ", pooled", "silence": ", their heads silent"}.get(self.group_choice, "")
                how = how if axis == "kv_groups" else ""
                how = ", merged" if axis == "attention_heads" and self.merged_heads is not None else how
                lines.append(f"{name} {self.before[axis]} -> {self.after[axis]}{where}{how}")
        share = self.parameters / self.parameters_before
        return [*lines, f"parameters {self.parameters_before:,} -> {self.parameters:,} ({share:.1%})"]

    def to_dict(self) -> dict[str, Any]:
        """The plan as a dict that can be written as JSON."""
        return asdict(self)


def plan(
    scores: Scores,
    keep: KeepSpec | Mapping[str, Any],
    layout: Layout,
    config: Config,
    vocabulary: Sequence[int] | None = None,
) -> Plan:
    """Choose the units that stay.

    Neurons, heads and KV groups are ranked within each layer, the neurons of an expert within that expert, and query
    heads within their KV group. The same number of heads stays in each group, because grouped-query attention assigns
    heads to groups by position. Of the layers, those with the lowest scores are removed, but the first and the last
    stay unless ``keep.layers`` omits them: training does not recover their loss. Of equal scores, the lower index
    stays.

    Args:
        scores: of the axes that ``keep`` cuts; others are not read.
        keep: the sizes to keep.
        layout: the architecture's layout.
        config: ``model.config.to_dict()``, or a parsed ``config.json`` with all sizes.
        vocabulary: ids of the kept tokens; the token at position i gets the id i. None keeps all.

    Raises:
        InputError: the model or its architecture cannot have a size, or scores are missing or of another model.
    """
    if not isinstance(keep, KeepSpec):
        keep = _validated(keep)
    before = layout.sizes(config)
    keep = keep.resolved(before)
    after = target_sizes(keep, config, layout)
    if keep.vocabulary is not None and vocabulary is None:
        raise InputError("keep.vocabulary is set, but plan() got no token ids; pass the ids to keep as vocabulary=")
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
        config: of the original model.
        before: its axis sizes.
        after: those of the pruned model.
        layers: the kept layers.

    Raises:
        InputError: the config has no key for a size, or one of its lists has an unexpected length.
    """
    changes = layout.resized(config, after)
    if before["hidden_channels"] != after["hidden_channels"] and layout.norm_eps_key is not None:
        # with zeros on the removed channels, mean_{d'} x^2 = d / d' * mean_d x^2, so epsilon gets the same factor
        ratio = before["hidden_channels"] / after["hidden_channels"]
        changes[layout.norm_eps_key] = config[layout.norm_eps_key] * ratio
    for key in layout.per_layer_keys:
        if config.get(key) is not None and before["layers"] != after["layers"]:
            if len(config[key]) != before["layers"]:
                raise InputError(f"the config's {key} has {len(config[key])} entries, expected {before['layers']}")
            changes[key] = [config[key][layer] for layer in layers]
    return changes
