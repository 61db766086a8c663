"""What the finished stages of a run left for a report, beside their results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from distill.core.errors import InputError
from distill.core.run_folder import Run
from distill.training.metrics import ROWS, read_rows


@dataclass
class Left:
    """What finished stages left beside their results, for a report; what has changed since is left out and noted.

    Attributes:
        run: the run folder.
        notes: a line for each file that was left out.
    """

    run: Run
    notes: list[str] = field(default_factory=list)

    def files(self, stage: str, *wanted: str) -> list[Path]:
        """Paths of files of a stage; none when it is not finished, or one of them is not what it left."""
        try:
            found = [file for name in wanted if (file := self.run.result(stage, name)) is not None]
        except InputError as error:
            self.notes += [f"left out of this report: {line}" for line in str(error).splitlines()]
            return []
        return found if len(found) == len(wanted) else []


def loss_curves(left: Left, stages: Iterable[str]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Losses by stage and term against the tokens trained on; of a stage in the middle of its training those so far."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in stages:
        if left.run.done(name) is not None and not left.files(name, ROWS):
            continue
        series: dict[str, list[tuple[float, float]]] = {}
        for row in read_rows(left.run.stage(name)):
            for key, value in row.items():
                if key.startswith(("train/", "val/", "task/")) and "tokens" in row:
                    series.setdefault(key, []).append((row["tokens"], value))
        if series:
            curves[name] = series
    return curves
