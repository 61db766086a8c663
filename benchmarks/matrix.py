"""Many small runs: each cell is a recipe with a normal run folder; finished cells are kept, unfinished cells resume.

A cell is finished if its ``figures.json`` exists and was made with the same settings and models. The settings of the
benchmark are compared and not the resolved recipe, so that a new key in distill does not invalidate old cells.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

import distill
from distill.core.artifact import fingerprint, hash_of, write_text
from distill.core.errors import DistillError
from distill.core.run_folder import Run
from distill.reporting.tradeoff import read_rows
from distill.stages.evaluate.stored_rows import ROWS

FIGURES = "figures.json"


@dataclass(frozen=True)
class Cell:
    """One run of a matrix.

    Attributes:
        name: folder of the run, relative to that of the matrix, such as ``forward_kl/seed-0``.
        stages: stages of the recipe. Stages of kind ``evaluate`` give the figures.
        seed: seed of the recipe.
    """

    name: str
    stages: dict[str, Any]
    seed: int = 0


class Unfinished(DistillError):
    """A cell is not finished, and :attr:`Matrix.only_finished` forbids to run it."""


@dataclass(frozen=True)
class Matrix:
    """Cells that share a teacher, a text and a folder.

    Attributes:
        folder: folder of the runs.
        teacher: folder of the teacher.
        data: ``data`` section of the recipes.
        say: function that prints a line.
        only_finished: whether to run nothing and only read finished cells.
    """

    folder: Path
    teacher: Path
    data: dict[str, Any]
    say: Callable[[str], None] = print
    only_finished: bool = False

    def run(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """The figures of every evaluated model, as in a row of a report, by the name of its stage.

        If a stage of kind ``evaluate`` has another name, its models are named ``NAME/MODEL``.

        Raises:
            Unfinished: the cell is not finished, and ``only_finished`` is set.
        """
        recipe = {
            "name": self.folder.name,
            "teacher": str(self.teacher),
            "data": self.data,
            "seed": cell.seed,
            "stages": cell.stages,
            "logging": {"wandb": "disabled"},
        }
        folder = self.folder / cell.name
        made_of = hash_of(recipe, [fingerprint(model) for model in _models(recipe)])
        known = _read(folder / FIGURES)
        if known.get("made_of") != made_of and self.only_finished:
            raise Unfinished(f"{cell.name} is not finished")
        if known.get("made_of") != made_of:
            self._share_tokens(folder)
            run = distill.run(
                distill.Recipe.from_text(yaml.safe_dump(recipe, sort_keys=False)), run_dir=folder, say=_silence
            )
            known = {"made_of": made_of, "figures": dict(_figures(run, cell))}
            write_text(folder / FIGURES, json.dumps(known, indent=2))
            self.say(f"{cell.name}: " + "; ".join(_line(name, row) for name, row in known["figures"].items()))
        return known["figures"]

    def _share_tokens(self, folder: Path) -> None:
        """Share the token files of all runs, which are named by their content, by a link in the new run folder."""
        tokens = self.folder / "tokens"
        tokens.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists():
            (folder / "data").symlink_to(tokens.resolve(), target_is_directory=True)


def _figures(run: Run, cell: Cell) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, stage in cell.stages.items():
        if stage.get("kind", name) == "evaluate":
            prefix = "" if name == "evaluate" else f"{name}/"
            for row in read_rows(run.stage(name) / ROWS):
                yield prefix + row.name, asdict(row)


def _models(value: Any) -> Iterator[str]:
    """All model folders that are named in a recipe."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _models(item)
    elif isinstance(value, str) and os.path.isfile(os.path.join(value, "config.json")):  # false for prompts
        yield value


def _read(file: Path) -> dict[str, Any]:
    """Figures of a cell; empty if it is not finished."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name} perplexity {row['perplexity']:.2f}, KL {row['kl_to_teacher']:.4f}, "
        f"top-1 {row['top1_agreement']:.1%} in {row['training_seconds'] or 0:.0f} s"
    )


def _silence(line: str) -> None:
    """Suppresses the output of a run, because a cell prints one line."""
