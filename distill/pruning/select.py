"""Choose the units of a plan: check the sizes that the architecture can have, then take the units of highest score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
        InputError: a size is larger than the model's, or not possible with grouped-query attention or the config class.
    """
    before = layout.sizes(config)
    keep = keep.resolved(before)
    wanted: dict[str, tuple[str, Any]] = {axis: (key, getattr(keep, key)) for key, axis in AXIS_OF_KEY.items()}
    if keep.layers is not None:
        wanted["layers"] = ("num_hidden_layers", len(keep.layers))
        if wrong := [layer for layer in keep.layers if not 0 <= layer < before["layers"]]:
            last = before["layers"] - 1
            raise InputError(f"keep.layers: the model has no layer {wrong[0]} (expected indices from 0 to {last})")
    after = dict(before)
    for axis, (key, size) in wanted.items():
        if size is None:
            continue
        if axis not in before or (axis == "kv_groups" and layout.key(axis, config) is None):
            without = "KV groups of several heads" if axis == "kv_groups" else axis
            raise InputError(f"keep.{key}: {layout.model_type} has no {without}; remove the key")
        if size > before[axis]:
            raise InputError(f"keep.{key} ({size}) is more than the model has (expected 1 to {before[axis]})")
        after[axis] = size
    if keep.num_key_value_heads is None and before["kv_groups"] == before["attention_heads"]:
        after["kv_groups"] = after["attention_heads"]  # multi-head attention: one group per head
    _settle_heads(keep, before, after)
    _check_experts(config, before, after)
    _check_hidden(layout, config, before, after)
    return after


def _settle_heads(keep: KeepSpec, before: Sizes, after: dict[str, int]) -> None:
    """Set the number of query heads: the same in each KV group, and at most as many as there are."""
    per_group, groups = before["attention_heads"] // before["kv_groups"], after["kv_groups"]
    if keep.group_choice == "pool" and before["kv_groups"] % groups:
        raise InputError(
            f"keep.num_key_value_heads ({groups}) must divide the model's {before['kv_groups']} KV groups, because "
            "group_choice: pool averages equally many neighbours; use a divisor, or group_choice: drop"
        )
    # with pool and silence, each kept group takes the query heads of equally many removed groups
    most = before["attention_heads"] if keep.group_choice != "drop" else groups * per_group
    heads = keep.num_attention_heads
    if not isinstance(heads, int):  # a percentage is resolved by now
        if most % groups:
            raise InputError(
                f"keep.num_key_value_heads ({groups}) must divide the {most} query heads, because all of them stay "
                f"with group_choice: {keep.group_choice}; use a divisor, or group_choice: drop"
            )
        after["attention_heads"] = most
        return
    if heads % groups:
        fits = range(groups, most + 1, groups)
        raise InputError(
            f"keep.num_attention_heads ({heads}) must be a multiple of the {groups} kept KV groups; "
            f"try {min(fits, key=lambda size: abs(size - heads))}, or also set num_key_value_heads"
        )
    if heads > most:
        raise InputError(
            f"keep.num_attention_heads ({heads}) is more than the {most} query heads of the {groups} kept KV groups; "
            f"lower it, or keep more groups (group_choice: drop removes the {per_group} heads of each removed group)"
        )


def _check_experts(config: Config, before: Sizes, after: Sizes) -> None:
    chosen = config.get("num_experts_per_tok")
    if "experts" in before and chosen is not None and after["experts"] < chosen:
        raise InputError(
            f"keep.num_experts ({after['experts']}) must be at least the number of experts per token "
            f"(num_experts_per_tok: {chosen}); keep {chosen} or more"
        )


def _check_hidden(layout: Layout, config: Config, before: Sizes, after: Sizes) -> None:
    """Raise for a hidden size that the config class rejects, or from which it would derive another ``head_dim``."""
    heads, hidden, head_dim = after["attention_heads"], after["hidden_channels"], before["head_dim"]
    rule = layout.rule_of_hidden(config)
    if rule == "multiple_of_heads" and hidden % heads:
        lower = hidden - hidden % heads
        raise InputError(
            f"keep: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}), as the config class "
            f"of {layout.model_type} requires; try hidden_size {f'{lower} or ' if lower else ''}{lower + heads}"
        )
    if rule == "heads_times_head_dim" and hidden != heads * head_dim:
        fitting = max(1, min(round(hidden / head_dim), before["attention_heads"]))
        raise InputError(
            f"keep: hidden_size ({hidden}) must be num_attention_heads ({heads}) x {head_dim} = {heads * head_dim}, "
            f"because the config of {layout.model_type} has no head_dim; cut both, such as hidden_size "
            f"{fitting * head_dim} with num_attention_heads {fitting}"
        )


def kept_layers(scores: Scores, keep: KeepSpec, before: Sizes) -> tuple[int, ...]:
    """The layers that stay; always including the first and the last, unless ``keep.layers`` lists them.

    With ``layer_choice: contiguous`` the removed layers are neighbours: the block with the lowest score, measured for
    the block or summed over its layers. One block interrupts the residual stream at one place, scattered layers at
    several (Sreenivas et al. 2024, arXiv 2408.11796, section on depth pruning).
    """
    total = before["layers"]
    if keep.layers is not None:
        return keep.layers
    count = keep.num_layers_of(total)
    drop = total - count
    if drop == 0:
        return tuple(range(total))
    if count < 2:
        raise InputError(
            f"keep.num_hidden_layers ({count}) must be 2 or more, because the first and the last layer stay; "
            "list the layers in keep.layers to remove one of them"
        )
    if keep.layer_choice == "contiguous":
        costs = _block_scores(scores, total, drop)
        start = 1 + costs.index(min(costs))
        return tuple(layer for layer in range(total) if not start <= layer < start + drop)
    values = required_scores(scores, "layers", (total,), "num_hidden_layers")
    return (0, *(1 + layer for layer in best(values[1:-1], count - 2)), total - 1)


def _block_scores(scores: Scores, total: int, drop: int) -> list[float]:
    """Scores of all blocks of ``drop`` neighbouring layers that contain neither the first nor the last layer."""
    if scores.layer_blocks is not None:
        return required_scores(scores, "layer_blocks", (total - drop + 1,), "num_hidden_layers")[
            1 : total - drop
        ].tolist()
    values = required_scores(scores, "layers", (total,), "num_hidden_layers")
    return [float(values[start : start + drop].sum()) for start in range(1, total - drop)]


def kept_experts(scores: Scores, layers: tuple[int, ...], before: Sizes, after: Sizes) -> Rows | None:
    """The kept experts per layer; None if the model has none."""
    return _kept_per_layer(scores, "experts", "num_experts", layers, before, after) if "experts" in before else None


def kept_channels(scores: Scores, before: Sizes, after: Sizes) -> tuple[int, ...]:
    """The kept hidden channels, the same for all layers."""
    size, wanted = before["hidden_channels"], after["hidden_channels"]
    if size == wanted:
        return tuple(range(size))
    return best(required_scores(scores, "hidden_channels", (size,), "hidden_size"), wanted)


def kept_neurons(scores: Scores, experts: Rows | None, layers: tuple[int, ...], before: Sizes, after: Sizes) -> Rows:
    """The kept MLP neurons per layer; in a mixture of experts, neuron n of expert e has the index e * neurons + n."""
    if experts is None:
        return _kept_per_layer(scores, "mlp_neurons", "intermediate_size", layers, before, after)
    size, wanted = before["mlp_neurons"], after["mlp_neurons"]
    if size == wanted:
        return tuple(tuple(e * size + neuron for e in row for neuron in range(size)) for row in experts)
    values = required_scores(scores, "mlp_neurons", (before["layers"], before["experts"], size), "intermediate_size")
    return tuple(
        tuple(e * size + neuron for e in row for neuron in best(values[layer, e], wanted))
        for layer, row in zip(layers, experts, strict=True)
    )


def _kept_per_layer(scores: Scores, axis: str, key: str, layers: tuple[int, ...], before: Sizes, after: Sizes) -> Rows:
    if before[axis] == after[axis]:
        return (tuple(range(before[axis])),) * len(layers)
    return best_per_layer(required_scores(scores, axis, (before["layers"], before[axis]), key), layers, after[axis])


def best_per_layer(values: Tensor, layers: tuple[int, ...], count: int) -> Rows:
    """The ``count`` units of highest score in each kept layer."""
    return tuple(best(values[layer], count) for layer in layers)


def best(values: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the ``count`` highest values, ascending; of equal values the first is taken."""
    return tuple(sorted(values.argsort(descending=True, stable=True)[:count].tolist()))


def required_scores(scores: Scores, axis: str, shape: tuple[int, ...], what: str) -> Tensor:
    """The scores of an axis.

    Args:
        scores: of the model.
        axis: the axis.
        shape: their expected shape.
        what: the recipe key that needs them, for the message.

    Raises:
        InputError: the axis was not scored, or the shape differs.
    """
    values: Tensor | None = getattr(scores, axis)
    if values is None:
        kind = "block_influence" if axis == "layers" else "activation"
        raise InputError(f"keep.{what} needs scores of {axis}, but there are none; add a criterion such as {kind}")
    if tuple(values.shape) != shape:
        raise InputError(
            f"the scores of {axis} have shape {tuple(values.shape)}, expected {shape}; compute them for this model"
        )
    return values
