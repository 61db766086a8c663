"""Hours of small runs: a recipe a cell, each an ordinary run folder; what is finished is kept, what is not goes on.

A cell is finished when its ``figures.json`` stands and was made of the same settings and models: the settings that the
benchmark writes, not the resolved recipe, so that a new key in distill does not repeat what was measured before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

import distill
from distill.core.artifact import fingerprint, hash_of, write_text
from distill.core.errors import DistillError
from distill.core.run import Run
from distill.stages.evaluate import ROWS
from distill.tracking.tradeoff import from_json

FIGURES = "figures.json"


@dataclass(frozen=True)
class Cell:
    """One run of a matrix.

    Attributes:
        name: its folder below the matrix's, such as ``forward_kl/seed-0``.
        stages: of its recipe; those of kind ``evaluate`` measure, the one of that name first of all.
        seed: of its recipe.
    """

    name: str
    stages: dict[str, Any]
    seed: int = 0


class Unfinished(DistillError):
    """A cell that is to be told and not to be run has not run to its end."""


@dataclass(frozen=True)
class Matrix:
    """Cells that share a teacher, a text and a folder.

    Attributes:
        folder: where the runs go.
        teacher: folder of the teacher.
        data: the recipes' ``data`` section.
        say: prints one line for people.
        only_finished: run nothing.
    """

    folder: Path
    teacher: Path
    data: dict[str, Any]
    say: Callable[[str], None] = print
    only_finished: bool = False

    def run(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """Every model that was measured, with the figures of a report's row, by its stage.

        Those of a stage of kind ``evaluate`` with another name stand under ``NAME/MODEL``.

        Raises:
            Unfinished: it has not run to its end, and is not to.
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
        """Let a new run folder find the tokens that another one has made: they are named by their content."""
        tokens = self.folder / "tokens"
        tokens.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists():
            (folder / "data").symlink_to(tokens.resolve(), target_is_directory=True)


def _figures(run: Run, cell: Cell) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, stage in cell.stages.items():
        if stage.get("kind", name) == "evaluate":
            prefix = "" if name == "evaluate" else f"{name}/"
            for row in from_json((run.stage(name) / ROWS).read_text(encoding="utf-8")):
                yield prefix + row.name, asdict(row)


def _models(value: Any) -> Iterator[str]:
    """Every model folder that is named anywhere in a recipe."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _models(item)
    elif isinstance(value, str) and (Path(value) / "config.json").is_file():
        yield value


def _read(file: Path) -> dict[str, Any]:
    """A cell's figures; none when it is not finished."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name} perplexity {row['perplexity']:.2f}, KL {row['kl_to_teacher']:.4f}, "
        f"top-1 {row['top1_agreement']:.1%} in {row['training_seconds'] or 0:.0f} s"
    )


def _silence(line: str) -> None:
    """A run says much; a cell is one line."""
