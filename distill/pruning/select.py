"""How a plan is chosen: sizes that the architecture can take, and the best units for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.pruning.base import Scores
from distill.pruning.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from distill.pruning.keep import KeepSpec

Rows = tuple[tuple[int, ...], ...]


def target_sizes(keep: KeepSpec, before: dict[str, int], layout: Layout) -> dict[str, int]:
    """Axis sizes of the pruned model.

    Raises:
        InputError: larger than present, or what grouped-query attention or the config class cannot take.
    """
    after = dict(before)
    wanted = {
        "hidden_channels": ("hidden_size", keep.hidden_size),
        "mlp_neurons": ("intermediate_size", keep.intermediate_size),
        "attention_heads": ("num_attention_heads", keep.num_attention_heads),
        "kv_groups": ("num_key_value_heads", keep.num_key_value_heads),
        "layers": ("num_hidden_layers", keep.num_hidden_layers if keep.layers is None else len(keep.layers)),
    }
    for axis, (key, size) in wanted.items():
        if size is not None and size > before[axis]:
            raise InputError(f"keep.{key} ({size}) is more than the model has (expected 1 to {before[axis]})")
        after[axis] = size or before[axis]
    _check_groups(keep, before, after)
    heads, hidden = after["attention_heads"], after["hidden_channels"]
    if layout.hidden_divisible_by_heads and hidden % heads:
        lower = hidden - hidden % heads
        raise InputError(
            f"keep: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}), which the config class "
            f"of {layout.model_type} demands; try hidden_size {f'{lower} or ' if lower else ''}{lower + heads}"
        )
    return after


def _check_groups(keep: KeepSpec, before: dict[str, int], after: dict[str, int]) -> None:
    """Settle the number of query heads; the same number must stay in each KV group, and none may be made up."""
    per_group, groups = before["attention_heads"] // before["kv_groups"], after["kv_groups"]
    if keep.num_attention_heads is None:
        after["attention_heads"] = groups * per_group
        return
    heads = keep.num_attention_heads
    if heads % groups:
        fits = [groups * n for n in range(1, per_group + 1)]
        raise InputError(
            f"keep.num_attention_heads ({heads}) must be a multiple of the {groups} KV groups that stay; "
            f"try {min(fits, key=lambda size: abs(size - heads))}, or also name num_key_value_heads"
        )
    if heads > groups * per_group:
        raise InputError(
            f"keep.num_attention_heads ({heads}) is more than {groups} KV groups have (expected at most "
            f"{groups * per_group}); a group that is dropped takes its {per_group} query heads along"
        )


def kept_layers(scores: Scores, keep: KeepSpec, before: dict[str, int]) -> tuple[int, ...]:
    """Layers that stay; the first and the last always, unless they are named one by one.

    A contiguous block is the one with the lowest sum of scores: cutting neighbours leaves one seam in the residual
    stream, where scattered cuts leave many (Sreenivas et al. 2024, arXiv 2408.11796, section on depth pruning).
    """
    total = before["layers"]
    if keep.layers is not None:
        if wrong := [layer for layer in keep.layers if not 0 <= layer < total]:
            raise InputError(f"keep.layers names {wrong[0]}, which the model does not have (expected 0 to {total - 1})")
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
    values = _scores_of(scores, "layers", (total,), "num_hidden_layers")
    if keep.layer_choice == "contiguous":
        sums = [float(values[start : start + drop].sum()) for start in range(1, total - drop)]
        start = 1 + sums.index(min(sums))
        return tuple(layer for layer in range(total) if not start <= layer < start + drop)
    return (0, *(1 + layer for layer in _best(values[1:-1], count - 2)), total - 1)


def kept_rows(
    scores: Scores, axis: str, layers: tuple[int, ...] | None, before: dict[str, int], after: dict[str, int]
) -> Rows:
    """Units of an axis that stay, a row for each layer that stays; one row when ``layers`` is None."""
    if before[axis] == after[axis]:
        return (tuple(range(before[axis])),) * (1 if layers is None else len(layers))
    if layers is None:
        return (_best(_scores_of(scores, axis, (before[axis],), axis), after[axis]),)
    values = _scores_of(scores, axis, (before["layers"], before[axis]), axis)
    return tuple(_best(values[layer], after[axis]) for layer in layers)


def kept_heads(
    scores: Scores, groups: Rows, layers: tuple[int, ...], before: dict[str, int], after: dict[str, int]
) -> Rows:
    """Query heads that stay: the best of each KV group that stays, as many in each."""
    old = before["attention_heads"] // before["kv_groups"]
    new = after["attention_heads"] // after["kv_groups"]
    if old == new:
        return tuple(tuple(g * old + head for g in row for head in range(old)) for row in groups)
    values = _scores_of(scores, "attention_heads", (before["layers"], before["attention_heads"]), "num_attention_heads")
    return tuple(
        tuple(g * old + head for g in row for head in _best(values[layer, g * old : (g + 1) * old], new))
        for layer, row in zip(layers, groups, strict=True)
    )


def _best(values: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the highest values, rising; of equal ones the first."""
    return tuple(sorted(values.argsort(descending=True, stable=True)[:count].tolist()))


def _scores_of(scores: Scores, axis: str, shape: tuple[int, ...], what: str) -> Tensor:
    values: Tensor | None = getattr(scores, axis)
    if values is None:
        kind = "block_influence" if axis == "layers" else "activation"
        raise InputError(f"no scores of {axis}, which cutting {what} needs; add a criterion for them, such as {kind}")
    if tuple(values.shape) != shape:
        raise InputError(f"the scores of {axis} are {tuple(values.shape)}, expected {shape}; score this very model")
    return values
