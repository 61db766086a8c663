"""Choose the KV groups and query heads that stay, and the removed heads that are merged into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.pruning.base import Scores
from distill.pruning.keep import AXIS_OF_KEY
from distill.pruning.select import Rows, Sizes, best, best_per_layer, required_scores

if TYPE_CHECKING:
    from torch import Tensor

    from distill.pruning.keep import KeepSpec


def kept_groups(scores: Scores, keep: KeepSpec, layers: tuple[int, ...], before: Sizes, after: Sizes) -> Rows:
    """The KV groups that stay in each layer; all groups where they are pooled."""
    size, wanted = before["kv_groups"], after["kv_groups"]
    if size == wanted or keep.group_choice == "pool":
        return (tuple(range(size)),) * len(layers)
    # with one KV group per head and only heads given, the scores of the heads decide
    key = "num_attention_heads" if keep.num_key_value_heads is None else "num_key_value_heads"
    return best_per_layer(required_scores(scores, AXIS_OF_KEY[key], (before["layers"], size), key), layers, wanted)


def kept_heads(
    scores: Scores, keep: KeepSpec, groups: Rows, layers: tuple[int, ...], before: Sizes, after: Sizes
) -> Rows:
    """The query heads that stay in each layer: the best of each KV group, the same number per group, in group order."""
    new = after["attention_heads"] // after["kv_groups"]
    members = [_members(row, keep, before, after) for row in groups]
    if all(len(heads) == new for row in members for heads in row):
        return tuple(tuple(head for heads in row for head in heads) for row in members)
    shape = (before["layers"], before["attention_heads"])
    values = required_scores(scores, "attention_heads", shape, "num_attention_heads")
    return tuple(
        tuple(heads[i] for heads in row for i in best(values[layer, heads], new))
        for layer, row in zip(layers, members, strict=True)
    )


def merged_heads(
    scores: Scores, keep: KeepSpec, groups: Rows, layers: tuple[int, ...], before: Sizes, after: Sizes
) -> Rows | None:
    """For each query head that stays, the removed head that is merged into it, or itself where there is none.

    With the L heads of a group sorted by score, of which K stay, head i <= K becomes

        head_i + (head_i - head_{2K-i+1})        where 2K - i + 1 <= L

    so the kept head of lowest score is paired with the removed head of highest score (Muralidharan et al. 2024,
    arXiv 2407.14679, who merge query heads only where KV groups are shared).

    Returns:
        One head per entry of :func:`kept_heads`; None if nothing is merged.

    Raises:
        InputError: every head has a KV group of its own, so removing it also removes keys and values.
    """
    if keep.head_choice == "drop":
        return None
    new = after["attention_heads"] // after["kv_groups"]
    members = [_members(row, keep, before, after) for row in groups]
    if before["attention_heads"] == before["kv_groups"]:
        raise InputError(
            "keep.head_choice: merge needs query heads that share a KV group, but this model has one KV group per "
            "head; use head_choice: drop"
        )
    if all(len(heads) == new for row in members for heads in row):
        return None
    shape = (before["layers"], before["attention_heads"])
    values = required_scores(scores, "attention_heads", shape, "num_attention_heads")
    return tuple(
        tuple(head for heads in row for head in _merge_partners(values[layer, heads], heads, new))
        for layer, row in zip(layers, members, strict=True)
    )


def _merge_partners(values: Tensor, heads: list[int], new: int) -> list[int]:
    order = values.argsort(descending=True, stable=True).tolist()
    partner = {
        own: order[2 * new - i - 1] if 2 * new - i - 1 < len(heads) else own for i, own in enumerate(order[:new])
    }
    return [heads[partner[own]] for own in sorted(partner)]


def _members(groups: tuple[int, ...], keep: KeepSpec, before: Sizes, after: Sizes) -> list[list[int]]:
    """The candidate query heads of each KV group of the pruned model; ``groups`` are the kept groups of one layer."""
    per_group = before["attention_heads"] // before["kv_groups"]

    def heads_of(some: tuple[int, ...]) -> list[int]:
        return [group * per_group + head for group in some for head in range(per_group)]

    if keep.group_choice == "pool":
        run = before["kv_groups"] // after["kv_groups"]
        return [heads_of(groups[start : start + run]) for start in range(0, len(groups), run)]
    own = [heads_of((group,)) for group in groups]
    if keep.group_choice == "silence":
        orphans = heads_of(tuple(group for group in range(before["kv_groups"]) if group not in groups))
        share = len(orphans) // len(groups)
        return [heads + orphans[i * share : (i + 1) * share] for i, heads in enumerate(own)]
    return own
