"""Search: which architectures fit a budget, and which of them look best before they are built.

Every axis has a grid of sizes, from the whole one down, in multiples that hardware likes. An architecture is a size
for each axis that its config class can take; it is a candidate when it costs no more than the budget and wastes no more
than the tolerance. There may be thousands, so they are ranked by

    loss(candidate) = sum_axes loss(the model cut along that axis alone)

where the right side is measured at a few sizes of each axis and drawn as straight lines between them. That leaves out
how cuts add up, hence those that it puts first are to be measured whole.

Source: the search by enumeration and short training is that of Muralidharan et al. 2024, arXiv 2407.14679; that losses
of single cuts add up well enough to rank by is the premise of Puzzle, Bercovich et al. 2024, arXiv 2411.19146. The
estimate is ours.
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
from distill.pruning.budget import Cost, shown
from distill.pruning.keep import AXIS_OF_KEY, KeepSpec
from distill.pruning.layout import Config, Layout
from distill.pruning.select import target_sizes

SizeKey = Literal[
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_experts", "num_hidden_layers"
]
KNOTS = 4
"""Sizes of an axis at which the loss of cutting it alone is measured."""
HEADS_AND_GROUPS = {"num_attention_heads", "num_key_value_heads"}
MOST_ARCHITECTURES = 2_000_000
"""More than these take minutes to count."""


@dataclass(frozen=True)
class Candidate:
    """An architecture that fits.

    Attributes:
        keep: the sizes that are cut, by the keys of :class:`KeepSpec`.
        sizes: of all axes.
        cost: by the budget's measure.
    """

    keep: dict[str, int]
    sizes: dict[str, int]
    cost: float

    @property
    def name(self) -> str:
        """Names it, also as a folder: ``hidden_size=96,num_hidden_layers=5``."""
        return ",".join(f"{key}={size}" for key, size in self.keep.items())


class Space:
    """The architectures that a model may be cut down to.

    Args:
        layout: the layout of the model's architecture.
        config: the model's.
        axes: what may be cut.
        multiple_of: key -> what its sizes are multiples of; where it is not there 64 for hidden and intermediate size,
            the number of KV groups for heads while groups stay, else 1.
        smallest_share: no size falls below this share of the whole.

    Attributes:
        grid: key -> its sizes, rising; the last is the whole one.

    Raises:
        InputError: the architecture lacks an axis, or an axis can only be cut along with others.
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
            whole = self.before.get(AXIS_OF_KEY[key], 0)
            self._refuse_missing(key, whole)
            step = multiple_of.get(key) or self._default_step(key, axes)
            least = max(whole * smallest_share, 2 if key == "num_hidden_layers" else 1)
            self.grid[key] = [size for size in range(step, whole, step) if size >= least] + [whole]
        if (count := prod(map(len, self.grid.values()))) > MOST_ARCHITECTURES:
            raise InputError(
                f"search: {count:,} architectures are more than can be looked at ({MOST_ARCHITECTURES:,}); raise "
                "search.multiple_of or smallest_share, or name fewer axes"
            )

    def _refuse_missing(self, key: str, whole: int) -> None:
        if not whole or (key == "num_key_value_heads" and self.layout.key("kv_groups", self.config) is None):
            target_sizes(KeepSpec.model_validate({key: 1}), self.config, self.layout)  # says so
        if self.layout.rule_of_hidden(self.config) == "heads_times_head_dim" and key in (
            "hidden_size",
            "num_attention_heads",
        ):
            raise InputError(
                f"search.axes: {key} of {self.layout.model_type} can only be cut together with its counterpart, as its "
                "config holds no size of a head; search the other axes, or name sizes in keep"
            )

    def _default_step(self, key: str, axes: Sequence[str]) -> int:
        if key in ("hidden_size", "intermediate_size"):
            return 64
        grouped = self.before["kv_groups"] != self.before["attention_heads"] and "num_key_value_heads" not in axes
        return self.before["kv_groups"] if key == "num_attention_heads" and grouped else 1

    @property
    def num_architectures(self) -> int:
        """How many there are, the uncut one and impossible ones included."""
        return prod(map(len, self.grid.values()))

    def sizes(self, choice: Mapping[str, int]) -> dict[str, int]:
        """Sizes of all axes, where those that are chosen are known; heads go with their groups."""
        sizes = self.before | {AXIS_OF_KEY[key]: size for key, size in choice.items()}
        per_group = self.before["attention_heads"] // self.before["kv_groups"]
        if "num_attention_heads" not in choice:
            sizes["attention_heads"] = sizes["kv_groups"] * per_group
        elif "num_key_value_heads" not in choice and per_group == 1:
            sizes["kv_groups"] = sizes["attention_heads"]
        return sizes

    def keep(self, choice: Mapping[str, int]) -> dict[str, int]:
        """What of a choice is cut, in a recipe's words; heads and groups, that imply each other, are both named."""
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
        """All architectures that cost from ``least`` to ``most``, in the order of the grid.

        Raises:
            InputError: there are none, with the nearest ones.
        """
        whole = costs.of(self.before)
        if most >= whole:
            raise InputError(
                f"search.budget.{costs.measure}: {shown(costs.measure, most)} cuts nothing, as the model has "
                f"{shown(costs.measure, whole)}; ask for less"
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
        """Choices of the grid between two costs; the longest axis is searched by halves, as costs rise along it."""
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
        what, says = f"search.budget.{costs.measure}", partial(shown, costs.measure)
        if not below:
            raise InputError(
                f"{what}: no architecture of the search has as few as {says(most)}; the smallest has "
                f"{says(min(above))}; lower search.smallest_share or name more axes"
            )
        raise InputError(
            f"{what}: no architecture has {says(least)} to {says(most)}; the nearest have {says(max(below))} and "
            f"{says(min(above))}; raise budget.tolerance, lower search.multiple_of or name more axes"
        )

    def knots(self) -> list[tuple[str, int]]:
        """(key, size) of the cuts along one axis alone at which the loss is to be measured."""
        found = []
        for key, sizes in self.grid.items():
            legal = [size for size in sizes[:-1] if self.possible({key: size})]
            last = min(KNOTS, len(legal)) - 1
            found += [(key, legal[round(i * (len(legal) - 1) / max(1, last))]) for i in range(last + 1)]
        return found

    def corners(self) -> list[dict[str, int]]:
        """The smallest size of each axis alone, and of all at once where that can be built."""
        alone = [{key: min(size for k, size in self.knots() if k == key)} for key in dict(self.knots())]
        together = {key: size for choice in alone for key, size in choice.items()}
        return [*alone, *([together] if len(alone) > 1 and self.possible(together) else [])]

    def unevenness(self, candidate: Candidate) -> float:
        """How far the shares that it keeps of the axes lie apart; 0 is the same share off every axis."""
        shares = [
            candidate.keep.get(key, self.before[AXIS_OF_KEY[key]]) / self.before[AXIS_OF_KEY[key]] for key in self.grid
        ]
        return max(shares) - min(shares)

    def estimate(self, candidate: Candidate, losses: Mapping[tuple[str, int], float]) -> float:
        """The sum over axes of what cutting each of them alone costs, by what was measured at :meth:`knots`."""
        return sum(
            self._between(key, self._alone(key, size, candidate), losses) for key, size in candidate.keep.items()
        )

    def _alone(self, key: str, size: int, candidate: Candidate) -> float:
        """A size as it counts for its axis alone: heads are those of a group, as dropped groups take theirs along."""
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
