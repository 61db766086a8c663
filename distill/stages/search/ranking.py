"""The ranking that a search leaves: ``search.json`` in the stage's folder, and the same as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.core.artifact import read_json, write_text
from distill.pruning.budget import shown

SEARCH = "search.json"
UNIFORM = "uniform"
"""What the control is called: the same share off every axis, as near as the grid allows."""


def write_ranking(folder: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what was searched and its rows, the chosen architecture first."""
    write_text(folder / SEARCH, json.dumps({**about, "ranking": list(rows)}, indent=2) + "\n")


def ranking(folder: Path, most: int = 10) -> list[list[str]]:
    """The best of a finished search and its uniform control as a table; empty without a search.

    Headings come first, the chosen architecture next.
    """
    if not (folder / SEARCH).is_file():
        return []
    found = read_json(folder / SEARCH)
    keys = list(dict.fromkeys(key for row in found["ranking"] for key in row["keep"]))
    measure, titles = found["measure"], ["estimated KL", "KL when cut", "KL after training", "role"]
    lines = [["", *keys, measure.replace("_", " "), *titles]]
    for place, row in enumerate(found["ranking"], 1):
        if place > most and not row[UNIFORM]:
            continue
        trained = f"{row['trained']['kl']:.4f}" if row["trained"] else "-"
        figures = [shown(measure, row[measure]), f"{row['estimated_kl']:.4f}", f"{row['cut']['kl']:.4f}", trained]
        roles = ["chosen"] * (place == 1) + [UNIFORM] * row[UNIFORM]
        lines.append([str(place), *(str(row["keep"].get(key, "whole")) for key in keys), *figures, ", ".join(roles)])
    return lines


def as_text(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in lines]
