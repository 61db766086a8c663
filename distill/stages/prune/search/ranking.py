"""The ranking that a search leaves: ``search.json`` in the stage's folder, and the same as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from distill.core.artifact import write_text
from distill.core.stored import read_stored
from distill.pruning.budget import Measure, format_cost

SEARCH = "search.json"
UNIFORM = "uniform"
"""What the control is called: the same share off every axis, as near as the grid allows."""


class Measured(TypedDict):
    """A candidate that was cut, and maybe trained; what else was measured of it stands beside the KL."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    kl: float


class Ranked(TypedDict):
    """A row of the ranking; its cost stands under the name of the measure."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    keep: dict[str, int]
    estimated_kl: float
    cut: Measured
    trained: Measured | None
    uniform: bool


@dataclass(frozen=True)
class Ranking:
    """What ``search.json`` holds.

    Attributes:
        measure: of the budget.
        ranking: the chosen architecture first.
    """

    measure: Measure
    ranking: Annotated[list[Ranked], Field(min_length=1)]

    def __post_init__(self) -> None:
        if any(not isinstance(row.get(self.measure), int | float) for row in self.ranking):
            raise ValueError(f"a row of the ranking has no {self.measure}")


def write_ranking(folder: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what was searched and its rows, the chosen architecture first."""
    write_text(folder / SEARCH, json.dumps({**about, "ranking": list(rows)}, indent=2) + "\n")


def ranking(file: Path, most: int = 10) -> list[list[str]]:
    """The best of a search and its uniform control as a table: headings first, the chosen architecture next.

    Args:
        file: ``search.json``.
        most: rows, beside the control.

    Raises:
        InputError: it holds no ranking.
    """
    found = read_stored(file, Ranking, "search anew")
    keys = list(dict.fromkeys(key for row in found.ranking for key in row["keep"]))
    measure, titles = found.measure, ["estimated KL", "KL when cut", "KL after training", "role"]
    lines = [["", *keys, measure.replace("_", " "), *titles]]
    for place, row in enumerate(found.ranking, 1):
        if place > most and not row["uniform"]:
            continue
        trained = f"{row['trained']['kl']:.4f}" if row["trained"] else "-"
        cost: Any = {**row}[measure]
        figures = [format_cost(measure, cost), f"{row['estimated_kl']:.4f}", f"{row['cut']['kl']:.4f}", trained]
        roles = ["chosen"] * (place == 1) + [UNIFORM] * row["uniform"]
        lines.append([str(place), *(str(row["keep"].get(key, "whole")) for key in keys), *figures, ", ".join(roles)])
    return lines


def as_text(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in lines]
