"""How a plan is chosen: sizes that the architecture can take, and the best units for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.pruning.base import Scores
from distill.pruning.keep import AXIS_OF_KEY
from distill.pruning.layout import Config, Layout

if TYPE_CHECKING:
    from torch import Tensor

    from distill.pruning.keep import KeepSpec

Rows = tuple[tuple[int, ...], ...]
Sizes = Mapping[str, int]


def target_sizes(keep: KeepSpec, config: Config, layout: Layout) -> dict[str, int]:
    """Axis sizes of the pruned model.

    Raises:
        InputError: larger than present, or what grouped-query attention or the config class cannot take.
    """
    before = layout.sizes(config)
    wanted = {axis: (key, getattr(keep, key)) for key, axis in AXIS_OF_KEY.items()}
    if keep.layers is not None:
        wanted["layers"] = ("num_hidden_layers", len(keep.layers))
        if wrong := [layer for layer in keep.layers if not 0 <= layer < before["layers"]]:
            last = before["layers"] - 1
            raise InputError(f"keep.layers names {wrong[0]}, which the model does not have (expected 0 to {last})")
    after = dict(before)
    for axis, (key, size) in wanted.items():
        if size is None:
            continue
        if axis not in before or (axis == "kv_groups" and layout.key(axis, config) is None):
            without = "KV groups apart from its heads" if axis == "kv_groups" else axis
            raise InputError(f"keep.{key}: {layout.model_type} has no {without}; leave it out")
        if size > before[axis]:
            raise InputError(f"keep.{key} ({size}) is more than the model has (expected 1 to {before[axis]})")
        after[axis] = size
    if keep.num_key_value_heads is None and before["kv_groups"] == before["attention_heads"]:
        after["kv_groups"] = after["attention_heads"]  # a head and its group are one
    _settle_heads(keep, before, after)
    _check_experts(config, before, after)
    _check_hidden(layout, config, before, after)
    return after


def _settle_heads(keep: KeepSpec, before: Sizes, after: dict[str, int]) -> None:
    """Settle the number of query heads; the same number must stay in each KV group, and none may be made up."""
    per_group, groups = before["attention_heads"] // before["kv_groups"], after["kv_groups"]
    if keep.group_choice == "pool" and before["kv_groups"] % groups:
        raise InputError(
            f"keep.num_key_value_heads ({groups}) must divide the {before['kv_groups']} KV groups, as neighbours are "
            "averaged in runs of one length; choose a divisor or group_choice drop"
        )
    # Every group that stays takes over the query heads of as many others.
    most = before["attention_heads"] if keep.group_choice != "drop" else groups * per_group
    if keep.num_attention_heads is None:
        if most % groups:
            raise InputError(
                f"keep.num_key_value_heads ({groups}) must divide the {most} query heads, all of which stay with "
                f"group_choice {keep.group_choice}"
            )
        after["attention_heads"] = most
        return
    heads = keep.num_attention_heads
    if heads % groups:
        fits = range(groups, most + 1, groups)
        raise InputError(
            f"keep.num_attention_heads ({heads}) must be a multiple of the {groups} KV groups that stay; "
            f"try {min(fits, key=lambda size: abs(size - heads))}, or also name num_key_value_heads"
        )
    if heads > most:
        raise InputError(
            f"keep.num_attention_heads ({heads}) is more than {groups} KV groups have (expected at most "
            f"{most}); a group that is dropped takes its {per_group} query heads along"
        )


def _check_experts(config: Config, before: Sizes, after: Sizes) -> None:
    chosen = config.get("num_experts_per_tok")
    if "experts" in before and chosen is not None and after["experts"] < chosen:
        raise InputError(
            f"keep.num_experts ({after['experts']}) is fewer than the {chosen} experts that each token is given "
            f"(num_experts_per_tok); keep {chosen} or more"
        )


def _check_hidden(layout: Layout, config: Config, before: Sizes, after: Sizes) -> None:
    """Refuse a hidden size that the config class would refuse, or from which it would derive another ``head_dim``."""
    heads, hidden, head_dim = after["attention_heads"], after["hidden_channels"], before["head_dim"]
    rule = layout.rule_of_hidden(config)
    if rule == "multiple_of_heads" and hidden % heads:
        lower = hidden - hidden % heads
        raise InputError(
            f"keep: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}), which the config class "
            f"of {layout.model_type} demands; try hidden_size {f'{lower} or ' if lower else ''}{lower + heads}"
        )
    if rule == "heads_times_head_dim" and hidden != heads * head_dim:
        fitting = max(1, min(round(hidden / head_dim), before["attention_heads"]))
        raise InputError(
            f"keep: hidden_size ({hidden}) must be num_attention_heads ({heads}) x {head_dim} = {heads * head_dim}, as "
            f"the config of {layout.model_type} holds no size of a head; cut both, such as hidden_size "
            f"{fitting * head_dim} with num_attention_heads {fitting}"
        )


def kept_layers(scores: Scores, keep: KeepSpec, before: Sizes) -> tuple[int, ...]:
    """Layers that stay; the first and the last always, unless they are named one by one.

    A contiguous block is the one with the lowest score, measured as a whole or summed: cutting neighbours leaves one
    seam in the residual stream, where scattered cuts leave many (Sreenivas et al. 2024, arXiv 2408.11796, section on
    depth pruning).
    """
    total = before["layers"]
    if keep.layers is not None:
        return keep.layers
    count = keep.num_hidden_layers or total
    drop = total - count
    if drop == 0:
        return tuple(range(total))
    if count < 2:
        raise InputError(
            f"keep.num_hidden_layers ({count}) must be 2 or more, as the first and the last layer stay; "
            "name the layers in keep.layers to drop one of them"
        )
    if keep.layer_choice == "contiguous":
        costs = _block_scores(scores, total, drop)
        start = 1 + costs.index(min(costs))
        return tuple(layer for layer in range(total) if not start <= layer < start + drop)
    values = scores_of(scores, "layers", (total,), "num_hidden_layers")
    return (0, *(1 + layer for layer in best(values[1:-1], count - 2)), total - 1)


def _block_scores(scores: Scores, total: int, drop: int) -> list[float]:
    """What each block of ``drop`` layers is worth, the first beginning at layer 1, the last ending before the last."""
    if scores.layer_blocks is not None:
        return scores_of(scores, "layer_blocks", (total - drop + 1,), "num_hidden_layers")[1 : total - drop].tolist()
    values = scores_of(scores, "layers", (total,), "num_hidden_layers")
    return [float(values[start : start + drop].sum()) for start in range(1, total - drop)]


def kept_experts(scores: Scores, layers: tuple[int, ...], before: Sizes, after: Sizes) -> Rows | None:
    """Experts that stay; None where there are none."""
    return _kept_rows(scores, "experts", "num_experts", layers, before, after) if "experts" in before else None


def kept_channels(scores: Scores, before: Sizes, after: Sizes) -> tuple[int, ...]:
    """Hidden channels that stay, in the whole model."""
    size, wanted = before["hidden_channels"], after["hidden_channels"]
    if size == wanted:
        return tuple(range(size))
    return best(scores_of(scores, "hidden_channels", (size,), "hidden_size"), wanted)


def kept_neurons(scores: Scores, experts: Rows | None, layers: tuple[int, ...], before: Sizes, after: Sizes) -> Rows:
    """MLP neurons that stay; in a mixture of experts those of each expert that stays, numbered expert by expert."""
    if experts is None:
        return _kept_rows(scores, "mlp_neurons", "intermediate_size", layers, before, after)
    size, wanted = before["mlp_neurons"], after["mlp_neurons"]
    if size == wanted:
        return tuple(tuple(e * size + neuron for e in row for neuron in range(size)) for row in experts)
    values = scores_of(scores, "mlp_neurons", (before["layers"], before["experts"], size), "intermediate_size")
    return tuple(
        tuple(e * size + neuron for e in row for neuron in best(values[layer, e], wanted))
        for layer, row in zip(layers, experts, strict=True)
    )


def _kept_rows(scores: Scores, axis: str, key: str, layers: tuple[int, ...], before: Sizes, after: Sizes) -> Rows:
    if before[axis] == after[axis]:
        return (tuple(range(before[axis])),) * len(layers)
    return rows_of(scores_of(scores, axis, (before["layers"], before[axis]), key), layers, after[axis])


def rows_of(values: Tensor, layers: tuple[int, ...], count: int) -> Rows:
    """The units of highest score of each layer that stays."""
    return tuple(best(values[layer], count) for layer in layers)


def best(values: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the highest values, rising; of equal ones the first."""
    return tuple(sorted(values.argsort(descending=True, stable=True)[:count].tolist()))


def scores_of(scores: Scores, axis: str, shape: tuple[int, ...], what: str) -> Tensor:
    """The scores of an axis.

    Raises:
        InputError: there are none, or they are of another model.
    """
    values: Tensor | None = getattr(scores, axis)
    if values is None:
        kind = "block_influence" if axis == "layers" else "activation"
        raise InputError(f"no scores of {axis}, which cutting {what} needs; add a criterion for them, such as {kind}")
    if tuple(values.shape) != shape:
        raise InputError(f"the scores of {axis} are {tuple(values.shape)}, expected {shape}; score this very model")
    return values
