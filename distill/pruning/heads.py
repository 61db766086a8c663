"""Which KV groups and query heads stay, and which of these are merged with those that go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.pruning.base import Scores
from distill.pruning.keep import AXIS_OF_KEY
from distill.pruning.select import Rows, Sizes, best, rows_of, scores_of

if TYPE_CHECKING:
    from torch import Tensor

    from distill.pruning.keep import KeepSpec


def kept_groups(scores: Scores, keep: KeepSpec, layers: tuple[int, ...], before: Sizes, after: Sizes) -> Rows:
    """KV groups that stay, or that are pooled: then all of them."""
    size, wanted = before["kv_groups"], after["kv_groups"]
    if size == wanted or keep.group_choice == "pool":
        return (tuple(range(size)),) * len(layers)
    # Where each head has a group of its own and only heads are named, the heads' scores decide.
    key = "num_attention_heads" if keep.num_key_value_heads is None else "num_key_value_heads"
    return rows_of(scores_of(scores, AXIS_OF_KEY[key], (before["layers"], size), key), layers, wanted)


def kept_heads(
    scores: Scores, keep: KeepSpec, groups: Rows, layers: tuple[int, ...], before: Sizes, after: Sizes
) -> Rows:
    """Query heads that stay: the best of each KV group of the pruned model, as many in each, group by group."""
    new = after["attention_heads"] // after["kv_groups"]
    members = [_members(row, keep, before, after) for row in groups]
    if all(len(heads) == new for row in members for heads in row):
        return tuple(tuple(head for heads in row for head in heads) for row in members)
    shape = (before["layers"], before["attention_heads"])
    values = scores_of(scores, "attention_heads", shape, "num_attention_heads")
    return tuple(
        tuple(heads[i] for heads in row for i in best(values[layer, heads], new))
        for layer, row in zip(layers, members, strict=True)
    )


def merged_heads(
    scores: Scores, keep: KeepSpec, groups: Rows, layers: tuple[int, ...], before: Sizes, after: Sizes
) -> Rows | None:
    """For each query head that stays the one that its queries are held against; itself where there is none.

    With the L heads of a group in order of score, of which K stay, head i <= K becomes

        head_i + (head_i - head_{2K-i+1})        where 2K - i + 1 <= L

    so that the last to stay meets the first to go (Muralidharan et al. 2024, arXiv 2407.14679, who take the query heads
    alone where KV groups are shared). None: nothing is merged.

    Raises:
        InputError: every head has a KV group of its own, so that its keys and values go along.
    """
    if keep.head_choice == "drop":
        return None
    new, members = (
        after["attention_heads"] // after["kv_groups"],
        [_members(row, keep, before, after) for row in groups],
    )
    if before["attention_heads"] == before["kv_groups"]:
        raise InputError(
            "keep.head_choice 'merge' needs heads that share keys and values, and this model has a KV group for each "
            "head; use drop"
        )
    if all(len(heads) == new for row in members for heads in row):
        return None
    shape = (before["layers"], before["attention_heads"])
    values = scores_of(scores, "attention_heads", shape, "num_attention_heads")
    return tuple(
        tuple(head for heads in row for head in _partners(values[layer, heads], heads, new))
        for layer, row in zip(layers, members, strict=True)
    )


def _partners(values: Tensor, heads: list[int], new: int) -> list[int]:
    order = values.argsort(descending=True, stable=True).tolist()
    partner = {
        own: order[2 * new - i - 1] if 2 * new - i - 1 < len(heads) else own for i, own in enumerate(order[:new])
    }
    return [heads[partner[own]] for own in sorted(partner)]


def _members(groups: tuple[int, ...], keep: KeepSpec, before: Sizes, after: Sizes) -> list[list[int]]:
    """For each KV group of the pruned model the query heads that may serve it; ``groups`` are those of one layer."""
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
