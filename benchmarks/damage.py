"""Damages every file of a finished run in several ways, and records how each command reacts.

`python -m benchmarks.damage` writes damage.json; `python -m benchmarks.faults --page` adds it to docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import jinja2
import torch

from benchmarks import hardware, result
from benchmarks.tables import table
from distill.runner import run
from tests.faults.damage import ADDED, COMMANDS, FAULTS, Case, Damages, Outcome, damage_material, damage_recipe

RESULT = result.FOLDER.parent / "damage.json"
OUTCOMES = get_args(Outcome)
_TABLES = (("by fault", "fault"), ("by command", "command"))
WORDS = "damage.md.jinja"


def main() -> None:
    """Damage the files, run the commands, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", nargs="+", type=int, default=list(range(len(COMMANDS))), help="by number, from 0")
    parser.add_argument(
        "--cases", type=Path, help="file of the cases that are done; the same command continues from it"
    )
    options = parser.parse_args()
    cases = _read(options.cases)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        recipe = damage_recipe(*damage_material(Path(place)))
        finished = run(recipe, Path(place) / "run", say=lambda line: None).folder
        done = {(case.file, case.fault, case.command) for case in cases}
        damages = Damages(recipe, finished, Path(place) / "copies", done=done)
        for case in damages.cases(tuple(COMMANDS[number] for number in options.commands)):
            print(case.command, case.fault, case.file, case.outcome, case.said, sep=" | ", flush=True)
            cases.append(case)
            if options.cases is not None:
                with options.cases.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(asdict(case)) + "\n")
    write(cases)


def _read(file: Path | None) -> list[Case]:
    if file is None or not file.exists():
        return []
    whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    file.write_text("".join(whole), encoding="utf-8")  # without a last line that was cut
    return [Case(**json.loads(line)) for line in whole]


def write(cases: Iterable[Case]) -> None:
    """Write the result as JSON."""
    result.write(
        RESULT.stem,
        command="python -m benchmarks.damage",
        hardware=hardware.describe(),
        versions=hardware.versions(),
        rows=rows(cases),
        folder=RESULT.parent,
    )


def rows(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """One row per fault and one per command, with the number of times that each outcome was observed."""
    cases = list(cases)
    found = []
    for (name, key), values in zip(_TABLES, ([*FAULTS, ADDED], COMMANDS), strict=True):
        for value in values:
            seen = Counter(case.outcome for case in cases if getattr(case, key) == value)
            counts = {outcome: seen[outcome] for outcome in OUTCOMES}
            found.append({"table": name, key: value, "times": seen.total()} | counts)
    return found


def section(file: Path = RESULT) -> str:
    """The section on damage of the page on faults."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False)
    environment.globals.update(table=table, columns=_columns)
    return environment.get_template(WORDS).render(**json.loads(file.read_text(encoding="utf-8")))


def _columns(first: str) -> dict[str, str]:
    return {first: first, "times": "times", **{name: name for name in OUTCOMES}}


if __name__ == "__main__":
    main()
