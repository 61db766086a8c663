"""The order of a mixture's rows: the weights decide which source comes next, and the seed which of its rows.

Each source has an endless list of rows; every pass over the source is shuffled anew. Each row of a list gets a time:

    time = (c + s / 2) / w_i

    c    tokens of source i before the row
    s    tokens of the row
    w_i  weight of source i; the weights sum to 1

All rows are sorted by time. At time ``T`` a source has contributed ``w_i T`` tokens, to within half a row, whatever the
lengths of rows. So after any number of rows, the tokens of a source differ from its share ``w_i`` of all tokens by at
most ``(1 + k w_i) / 2`` rows of the longest length, where ``k`` is the number of sources. With packing ``padded``, rows
are sorted by length within laps of about :data:`LAP` rows, and the bound holds at the end of each lap.

The time to find the row of a position does not grow with the position, because only the passes that contain the
position are computed. With random draws by weight, the relative error of the weights would decrease only as
``1 / sqrt(rows)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distill.data.micro_batches import MicroBatches
from distill.data.order import EndlessOrder, bucketed, shuffled

LAP = 1024
"""Approximate number of rows that are merged at once."""
UNIT = 1_000_000
"""Integer total of the weights, approximately; integers avoid rounding errors in token sums."""


def as_whole(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as integers that sum to about :data:`UNIT`, at least 1 each."""
    return tuple(max(1, round(weight / sum(weights) * UNIT)) for weight in weights)


@dataclass(frozen=True)
class SourceRows:
    """One source of a mixture.

    Attributes:
        weight: its fraction of the tokens, as an integer; see :func:`as_whole`.
        numbers: numbers of its rows. int64 [rows]
        lengths: number of tokens in each row. int64 [rows]
    """

    weight: int
    numbers: np.ndarray
    lengths: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens per pass."""
        return int(self.lengths.sum())


def tokens_per_row(sources: Sequence[SourceRows]) -> float:
    """Average number of tokens in a row of the mixture."""
    rows_per_token = (source.weight * len(source.numbers) / source.num_tokens for source in sources)
    return sum(source.weight for source in sources) / sum(rows_per_token)


def passes(sources: Sequence[SourceRows], num_rows: float) -> list[float]:
    """Number of passes over each source in ``num_rows`` rows of the mixture."""
    tokens, whole = num_rows * tokens_per_row(sources), sum(source.weight for source in sources)
    return [tokens * source.weight / whole / source.num_tokens for source in sources]


@dataclass(frozen=True)
class _Pass:
    """A pass over a source: its rows in order, and twice the tokens up to the middle of each. int64 [rows] both"""

    rows: np.ndarray
    middles: np.ndarray


class MixtureOrder(EndlessOrder):
    """Rows of several sources, each pass over a source shuffled anew.

    Args:
        sources: the sources, each with at least one row.
        seed: decides the order within each source.
        taken: the positions that the rank takes.
        alike: whether rows of similar length are to follow each other.
        purpose: label mixed into the seed.
    """

    def __init__(
        self,
        sources: Sequence[SourceRows],
        seed: int,
        taken: MicroBatches,
        *,
        alike: bool = False,
        purpose: str = "",
    ):
        if not sources or any(not len(source.numbers) for source in sources):
            raise ValueError("a mixture needs at least one row of each source")
        super().__init__(taken)
        self.sources, self.seed, self.alike, self.purpose = sources, seed, alike, purpose
        self._whole = sum(source.weight for source in sources)
        self._lap_tokens = max(1, round(LAP * tokens_per_row(sources)))
        self._sizes = np.zeros(1 + max(int(source.numbers.max()) for source in sources), np.int64)
        for source in sources:
            self._sizes[source.numbers] = source.lengths
        self._passes: dict[int, dict[int, _Pass]] = {}
        self._number, self._start, self._rows = -1, 0, np.zeros(0, np.int64)  # of the current lap

    def row_at(self, position: int) -> int:
        """See :class:`~distill.data.order.EndlessOrder`."""
        while not 0 <= position - self._start < len(self._rows):
            if position == self._start + len(self._rows):
                self._open(self._number + 1)
            else:
                self._open(self._lap_of(position))
        return int(self._rows[position - self._start])

    def _lap_of(self, position: int) -> int:
        """The last lap that begins at the position or before it."""
        lap = position // LAP
        while lap and self._before(lap) > position:
            lap -= 1
        while self._before(lap + 1) <= position:
            lap += 1
        return lap

    def _before(self, lap: int) -> int:
        """Rows of all sources before a lap."""
        return sum(self._rows_before(number, lap) for number in range(len(self.sources)))

    def _rows_before(self, number: int, lap: int) -> int:
        """Number of rows of a source whose time is before the beginning of a lap."""
        source = self.sources[number]
        # the time in half tokens of the source, rounded up: a row is before it if and only if its middle is smaller
        halves = -(-2 * lap * self._lap_tokens * source.weight // self._whole)
        done, rest = divmod(halves, 2 * source.num_tokens)
        within = int(np.searchsorted(self._pass(number, done).middles, rest)) if rest else 0
        return int(done) * len(source.numbers) + within

    def _open(self, lap: int) -> None:
        """Merge the rows of a lap."""
        rows, times = [np.zeros(0, np.int64)], [np.zeros(0)]
        for number, source in enumerate(self.sources):
            first, last = self._rows_before(number, lap), self._rows_before(number, lap + 1)
            for done in range(first // len(source.numbers), -(-last // len(source.numbers))):
                start = done * len(source.numbers)
                some = slice(max(first - start, 0), last - start)
                one = self._pass(number, done)
                rows.append(one.rows[some])
                times.append((one.middles[some] + 2.0 * done * source.num_tokens) / source.weight)
        merged = np.concatenate(rows)[np.argsort(np.concatenate(times), kind="stable")]
        if self.alike and len(merged):
            merged = bucketed(torch.from_numpy(merged), self._sizes, self.seed, f"{self.purpose}lap {lap}").numpy()
        is_next = lap == self._number + 1
        self._start = self._start + len(self._rows) if is_next else self._before(lap)
        self._number, self._rows = lap, merged

    def _pass(self, number: int, done: int) -> _Pass:
        """A pass over a source."""
        kept = self._passes.setdefault(number, {})
        if done not in kept:
            for old in [old for old in kept if old < done - 1 or old > done + 1]:
                del kept[old]
            source = self.sources[number]
            order = shuffled(len(source.numbers), self.seed, f"{self.purpose}source {number} pass {done}").numpy()
            sizes = source.lengths[order]
            kept[done] = _Pass(source.numbers[order], 2 * np.cumsum(sizes) - sizes)
        return kept[done]
