"""Search: enumerate the architectures that fit a budget, and rank them before any is built.

Every axis has a grid of sizes, from the original size down, in multiples that suit hardware kernels. An architecture is
one size per axis, if the config class accepts the combination. It is a candidate if its cost is within the budget and
at most the tolerance below it. There may be thousands of candidates, so they are ranked by an estimate:

    loss(candidate) = sum_axes loss(the model cut along that axis alone)

The right side is measured at a few sizes of each axis and interpolated linearly. It ignores interactions between axes,
so the best-ranked candidates should then be measured themselves.

Source: enumeration and short training as in Muralidharan et al. 2024, arXiv 2407.14679; additivity of the losses of
single cuts is assumed by Puzzle, Bercovich et al. 2024, arXiv 2411.19146. The estimate is ours.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Literal

from distill.core.errors import InputError
from distill.pruning.budget import Cost, format_cost
from distill.pruning.keep import AXIS_OF_KEY, KeepSpec
from distill.pruning.layout import Config, Layout
from distill.pruning.select import target_sizes

SizeKey = Literal[
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_experts", "num_hidden_layers"
]
KNOTS = 4
"""Number of sizes per axis at which the loss of cutting only that axis is measured."""
HEADS_AND_GROUPS = {"num_attention_heads", "num_key_value_heads"}
MOST_ARCHITECTURES = 2_000_000
"""Enumerating more than this takes minutes."""


@dataclass(frozen=True)
class Candidate:
    """An architecture that fits the budget.

    Attributes:
        keep: the reduced sizes, by the keys of :class:`KeepSpec`.
        sizes: the sizes of all axes.
        cost: in the budget's measure.
    """

    keep: dict[str, int]
    sizes: dict[str, int]
    cost: float

    @property
    def name(self) -> str:
        """Its name, also used for folders: ``hidden_size=96,num_hidden_layers=5``."""
        return ",".join(f"{key}={size}" for key, size in self.keep.items())


class SearchSpace:
    """The architectures to which a model can be cut.

    Args:
        layout: the layout of the model's architecture.
        config: of the model.
        axes: the sizes that may be reduced.
        multiple_of: key -> step of its grid. The default is 64 for hidden and intermediate size, the number of KV
            groups for heads if the groups are not cut, and 1 otherwise.
        smallest_share: lower limit of every size, as a fraction of the original size.

    Attributes:
        grid: key -> its sizes, ascending; the last is the original size.

    Raises:
        InputError: the architecture has no such axis, an axis can only be cut together with another, or the space is
            too large to enumerate.
    """

    def __init__(
        self,
        layout: Layout,
        config: Config,
        axes: Sequence[SizeKey],
        multiple_of: Mapping[SizeKey, int],
        smallest_share: float,
    ):
        self.layout, self.config, self.before = layout, config, layout.sizes(config)
        self.grid: dict[str, list[int]] = {}
        for key in axes:
            original = self.before.get(AXIS_OF_KEY[key], 0)
            self._refuse_missing(key, original)
            step = multiple_of.get(key) or self._default_step(key, axes)
            least = max(original * smallest_share, 2 if key == "num_hidden_layers" else 1)
            self.grid[key] = [size for size in range(step, original, step) if size >= least] + [original]
        if (count := prod(map(len, self.grid.values()))) > MOST_ARCHITECTURES:
            raise InputError(
                f"search: the grid has {count:,} architectures, expected at most {MOST_ARCHITECTURES:,}; raise "
                "search.multiple_of or search.smallest_share, or list fewer search.axes"
            )

    def _refuse_missing(self, key: str, original: int) -> None:
        if not original or (key == "num_key_value_heads" and self.layout.key("kv_groups", self.config) is None):
            target_sizes(KeepSpec.model_validate({key: 1}), self.config, self.layout)  # raises with the reason
        if self.layout.rule_of_hidden(self.config) == "heads_times_head_dim" and key in (
            "hidden_size",
            "num_attention_heads",
        ):
            raise InputError(
                f"search.axes: hidden_size and num_attention_heads of {self.layout.model_type} must be cut together "
                f"(got {key}), because its config has no head_dim; remove it from search.axes, or set both in keep"
            )

    def _default_step(self, key: str, axes: Sequence[str]) -> int:
        if key in ("hidden_size", "intermediate_size"):
            return 64
        grouped = self.before["kv_groups"] != self.before["attention_heads"] and "num_key_value_heads" not in axes
        return self.before["kv_groups"] if key == "num_attention_heads" and grouped else 1

    def sizes(self, choice: Mapping[str, int]) -> dict[str, int]:
        """The sizes of all axes for the chosen sizes; query heads follow their KV groups if they are not chosen."""
        sizes = self.before | {AXIS_OF_KEY[key]: size for key, size in choice.items()}
        per_group = self.before["attention_heads"] // self.before["kv_groups"]
        if "num_attention_heads" not in choice:
            sizes["attention_heads"] = sizes["kv_groups"] * per_group
        elif "num_key_value_heads" not in choice and per_group == 1:
            sizes["kv_groups"] = sizes["attention_heads"]
        return sizes

    def keep(self, choice: Mapping[str, int]) -> dict[str, int]:
        """The reduced sizes of a choice as keys of :class:`KeepSpec`.

        If heads or groups are reduced, both are included, because each implies the other.
        """
        cut = {key for key, size in choice.items() if size != self.before[AXIS_OF_KEY[key]]}
        if cut & HEADS_AND_GROUPS:
            cut |= HEADS_AND_GROUPS & choice.keys()
        return {key: choice[key] for key in self.grid if key in cut}

    def possible(self, choice: Mapping[str, int]) -> bool:
        """Whether the architecture can be built."""
        try:
            target_sizes(KeepSpec.model_validate(self.keep(choice)), self.config, self.layout)
        except InputError:
            return False
        return True

    def candidates(self, costs: Cost, least: float, most: float) -> list[Candidate]:
        """All architectures whose cost is from ``least`` to ``most``, in the order of the grid.

        Raises:
            InputError: there are none; the message gives the nearest costs.
        """
        original = costs.of(self.before)
        if most >= original:
            raise InputError(
                f"search.budget.{costs.measure}: {format_cost(costs.measure, most)} is not below the model's own "
                f"{format_cost(costs.measure, original)}; choose a smaller budget"
            )
        found = [candidate for choice in self._within(costs, least, most) if (candidate := self._at(choice, costs))]
        if not found:
            self._explain(costs, least, most)
        return found

    def _at(self, choice: Mapping[str, int], costs: Cost) -> Candidate | None:
        if not self.possible(choice):
            return None
        sizes = self.sizes(choice)
        return Candidate(self.keep(choice), sizes, costs.of(sizes))

    def _within(self, costs: Cost, least: float, most: float) -> Iterator[dict[str, int]]:
        """Choices of the grid between two costs, by bisection along the longest axis: the cost is monotonic."""
        longest = max(self.grid, key=lambda key: len(self.grid[key]))
        sizes = self.grid[longest]
        for some in product(*(self.grid[key] for key in self.grid if key != longest)):
            rest = dict(zip((key for key in self.grid if key != longest), some, strict=True))
            cost = partial(self._cost, costs, rest, longest)
            start, end = bisect_left(sizes, least, key=cost), bisect_right(sizes, most, key=cost)
            yield from ({**rest, longest: size} for size in sizes[start:end])

    def _cost(self, costs: Cost, rest: Mapping[str, int], key: str, size: int) -> float:
        return costs.of(self.sizes({**rest, key: size}))

    def _explain(self, costs: Cost, least: float, most: float) -> None:
        below = [c.cost for choice in self._within(costs, 0, least) if (c := self._at(choice, costs))]
        above = [c.cost for choice in self._within(costs, most, float("inf")) if (c := self._at(choice, costs))]
        what, show = f"search.budget.{costs.measure}", partial(format_cost, costs.measure)
        if not below:
            raise InputError(
                f"{what}: the smallest architecture of the search has {show(min(above))}, expected at most "
                f"{show(most)}; lower search.smallest_share or list more search.axes"
            )
        raise InputError(
            f"{what}: no architecture of the search has {show(least)} to {show(most)}; the nearest have "
            f"{show(max(below))} and {show(min(above))}; raise search.budget.tolerance, lower search.multiple_of or "
            "list more search.axes"
        )

    def knots(self) -> list[tuple[str, int]]:
        """(key, size) of the single-axis cuts whose loss is measured: :data:`KNOTS` sizes spread over each axis."""
        found = []
        for key, sizes in self.grid.items():
            legal = [size for size in sizes[:-1] if self.possible({key: size})]
            last = min(KNOTS, len(legal)) - 1
            found += [(key, legal[round(i * (len(legal) - 1) / max(1, last))]) for i in range(last + 1)]
        return found

    def corners(self) -> list[dict[str, int]]:
        """The smallest size of each axis alone, and of all axes together if that can be built."""
        smallest = [{key: min(size for k, size in self.knots() if k == key)} for key in dict(self.knots())]
        together = {key: size for choice in smallest for key, size in choice.items()}
        return [*smallest, *([together] if len(smallest) > 1 and self.possible(together) else [])]

    def unevenness(self, candidate: Candidate) -> float:
        """Largest minus smallest kept fraction over the axes; 0 if every axis is cut by the same fraction."""
        shares = [
            candidate.keep.get(key, self.before[AXIS_OF_KEY[key]]) / self.before[AXIS_OF_KEY[key]] for key in self.grid
        ]
        return max(shares) - min(shares)

    def estimate(self, candidate: Candidate, losses: Mapping[tuple[str, int], float]) -> float:
        """Estimated loss: the sum over axes of the interpolated loss of cutting that axis alone.

        Args:
            candidate: the architecture.
            losses: measured losses at :meth:`knots`.
        """
        return sum(
            self._between(key, self._single(key, size, candidate), losses) for key, size in candidate.keep.items()
        )

    def _single(self, key: str, size: int, candidate: Candidate) -> float:
        """The size for a cut along this axis alone.

        Where KV groups are cut as well, the number of heads is scaled to all groups, because the heads that a removed
        group takes along are already in the loss of that axis.
        """
        if key == "num_attention_heads" and "num_key_value_heads" in candidate.keep:
            return size * self.before["kv_groups"] / candidate.keep["num_key_value_heads"]
        return size

    def _between(self, key: str, size: float, losses: Mapping[tuple[str, int], float]) -> float:
        known = sorted((at, loss) for (axis, at), loss in losses.items() if axis == key)
        points = [*known, (self.before[AXIS_OF_KEY[key]], 0.0)]
        right = min(max(1, bisect_left([at for at, _ in points], size)), len(points) - 1)
        if len(points) == 1:
            return 0.0
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)
