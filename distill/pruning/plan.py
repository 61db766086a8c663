"""Plan: from scores and the sizes to keep to the units that stay, and to the config and parameter count that result.

A pure function of scores, sizes and the config: no model is touched, so a plan can be read, checked and kept before
any weight moves. What the smaller architecture could not be built with is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from distill.core.errors import InputError
from distill.pruning.base import Scores
from distill.pruning.keep import KeepSpec
from distill.pruning.layout import Layout
from distill.pruning.select import kept_heads, kept_layers, kept_rows, target_sizes


@dataclass(frozen=True)
class Plan:
    """What stays of a model, and what it becomes. Indices are of the unpruned model and rise.

    Attributes:
        model_type: the architecture.
        layers: the layers that stay.
        mlp_neurons: a row for each layer that stays.
        attention_heads: a row for each layer that stays; grouped by KV group, as the model's own order is.
        kv_groups: a row for each layer that stays.
        hidden_channels: one order for the whole model.
        config: config keys that change, with their new values.
        before: axis sizes of the model that the plan is for.
        after: axis sizes of the pruned model.
        parameters_before: number of parameters, tied ones counted once.
        parameters: forecast of the same for the pruned model.
    """

    model_type: str
    layers: tuple[int, ...]
    mlp_neurons: tuple[tuple[int, ...], ...]
    attention_heads: tuple[tuple[int, ...], ...]
    kv_groups: tuple[tuple[int, ...], ...]
    hidden_channels: tuple[int, ...]
    config: dict[str, Any]
    before: dict[str, int]
    after: dict[str, int]
    parameters_before: int
    parameters: int

    def summary(self) -> list[str]:
        """The plan in words, a line for each axis that is cut and one for the parameters."""
        lines = []
        if self.before["layers"] != self.after["layers"]:
            gone = [str(layer) for layer in range(self.before["layers"]) if layer not in self.layers]
            lines.append(f"layers {self.before['layers']} -> {self.after['layers']}, without {', '.join(gone)}")
        for axis in ("mlp_neurons", "attention_heads", "kv_groups", "hidden_channels"):
            if self.before[axis] != self.after[axis]:
                where = "" if axis == "hidden_channels" else f" in each of {self.after['layers']} layers"
                name = axis.replace("_", " ").replace("kv", "KV").replace("mlp", "MLP")
                lines.append(f"{name} {self.before[axis]} -> {self.after[axis]}{where}")
        share = self.parameters / self.parameters_before
        return [*lines, f"parameters {self.parameters_before:,} -> {self.parameters:,} ({share:.1%})"]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_dict` wrote."""
        rows = {key: tuple(map(tuple, data[key])) for key in ("mlp_neurons", "attention_heads", "kv_groups")}
        flat = {key: tuple(data[key]) for key in ("layers", "hidden_channels")}
        return cls(**{**data, **rows, **flat})


def plan(scores: Scores, keep: KeepSpec | Mapping[str, Any], layout: Layout, config: Mapping[str, Any]) -> Plan:
    """Choose what stays.

    Width is ranked within each layer; query heads within their KV group, the same number in each, as grouped-query
    attention shares keys by position. Depth drops the lowest scores but never the first or last layer, whose loss no
    training makes good, unless ``keep.layers`` says so. Equal scores: the lower index stays.

    Args:
        scores: of the axes that ``keep`` cuts; others are not read.
        keep: the sizes to keep.
        layout: the architecture's layout.
        config: ``model.config.to_dict()``, or a parsed ``config.json`` that states all sizes.

    Raises:
        InputError: a size that the model does not have or its architecture cannot take, or scores that are missing or
            of another model.
    """
    if not isinstance(keep, KeepSpec):
        keep = _validated(keep)
    before = layout.sizes(config)
    after = target_sizes(keep, before, layout)
    layers = kept_layers(scores, keep, before)
    groups = kept_rows(scores, "kv_groups", layers, before, after)
    changes = _config_changes(layout, config, before, after, layers)
    return Plan(
        model_type=layout.model_type,
        layers=layers,
        mlp_neurons=kept_rows(scores, "mlp_neurons", layers, before, after),
        attention_heads=kept_heads(scores, groups, layers, before, after),
        kv_groups=groups,
        hidden_channels=kept_rows(scores, "hidden_channels", None, before, after)[0],
        config=changes,
        before=before,
        after=after,
        parameters_before=layout.count(config),
        parameters=layout.count({**config, **changes}),
    )


def _validated(keep: Mapping[str, Any]) -> KeepSpec:
    try:
        return KeepSpec.model_validate(keep)
    except ValidationError as error:
        rows = [(".".join(map(str, item["loc"])), item["msg"], item["input"]) for item in error.errors()]
        raise InputError(
            "; ".join(f"keep{'.' if key else ''}{key}: {what} (got {got})" for key, what, got in rows)
        ) from None


def _config_changes(
    layout: Layout, config: Mapping[str, Any], before: dict[str, int], after: dict[str, int], layers: tuple[int, ...]
) -> dict[str, Any]:
    """The config keys that change: sizes, head_dim made explicit, epsilon rescaled, per-layer lists sliced."""
    changes: dict[str, Any] = {layout.size_keys[axis]: after[axis] for axis in after if after[axis] != before[axis]}
    if before["hidden_channels"] != after["hidden_channels"] or before["attention_heads"] != after["attention_heads"]:
        # A class that derives head_dim from hidden size and heads would derive another one.
        changes[layout.size_keys["head_dim"]] = before["head_dim"]
    if before["hidden_channels"] != after["hidden_channels"]:
        # The mean of squares over d' of d channels is d / d' times what it was; so must epsilon be.
        ratio = before["hidden_channels"] / after["hidden_channels"]
        changes[layout.norm_eps_key] = config[layout.norm_eps_key] * ratio
    for key in layout.per_layer_keys:
        if config.get(key) is not None and before["layers"] != after["layers"]:
            if len(config[key]) != before["layers"]:
                raise InputError(f"the config's {key} has {len(config[key])} entries, expected {before['layers']}")
            changes[key] = [config[key][layer] for layer in layers]
    return changes
