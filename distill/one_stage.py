"""One stage without a recipe file: the recipe is made of the arguments, run, and kept in the run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.core.errors import InputError
from distill.core.outside import is_folder
from distill.core.run_folder import RECIPE, Run
from distill.forecast import describe
from distill.models.configs import config_of, positions_of
from distill.models.load import locate
from distill.recipe import Recipe, may_be_model

SEQUENCE_LENGTH = 512
"""Tokens of a row, or as many positions as the model has."""
TEXT_BYTES = 1_000_000
"""Of Python's documentation and library, which is read where no text is named."""
SECTIONS = ("data.", "compute.", "logging.", "seed=", "stages.")
"""Beginnings of overrides that are keys of the recipe; all others are keys of the stage."""
KINDS = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text_files", ".md": "text_files"}


def recipe_of(
    kind: str,
    model: str,
    stage: dict[str, Any],
    settings: Sequence[str] = (),
    *,
    text: str | None = None,
) -> Recipe:
    """The recipe of one stage.

    Args:
        kind: of the stage, which is its name too.
        model: reference of the model that it works on; it is the recipe's teacher, whose tokenizer is used.
        stage: keys of the stage.
        settings: overrides such as ``group_size=64`` (a key of the stage) or ``compute.devices=2``.
        text: file or folder of text, or a Hub id of a data set; None: Python's documentation and library.

    Raises:
        InputError: a reference leads nowhere.
        RecipeError: an argument does not fit; every mistake is told.
    """
    if not may_be_model(model):
        raise InputError(f"{model}: no such folder, and a Hub id is <who>/<model>")
    positions = positions_of(config_of(locate(model)))
    length = SEQUENCE_LENGTH if positions is None else min(SEQUENCE_LENGTH, positions)
    path = Path(model.partition(":")[2] or model)
    # models of runs stand in RUN/STAGE/model; the last name alone would give all of them the same run folder
    is_of_run = path.name == "model" and (path.parents[1] / RECIPE).is_file()
    title = "-".join(path.parts[-3:-1]) if is_of_run else path.name
    title = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{title}-{kind}")[-100:]
    recipe = {
        "name": title.lstrip("-._") or kind,
        "teacher": model,
        "data": {"train": source_of(text), "sequence_length": length},
        "logging": {"wandb": "disabled"},
        "stages": {kind: stage},
    }
    overrides = [one if one.startswith(SECTIONS) else f"stages.{kind}.{one}" for one in settings]
    return Recipe.from_text(yaml.safe_dump(recipe, sort_keys=False), f"distill {kind}", overrides)


def source_of(text: str | None) -> dict[str, Any]:
    """The source of a text that is named on the command line.

    Raises:
        InputError: it ends in what no source reads.
    """
    if text is None:
        return {"kind": "python_docs", "max_bytes": TEXT_BYTES}
    path = Path(text)
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "")
    if is_folder(text):
        return {"kind": "text_files", "path": text}
    if suffix in KINDS:
        return {"kind": KINDS[suffix], "path": text}
    if path.exists():
        raise InputError(f"--text {text}: expected a folder, or a file that ends in {', '.join(KINDS)}")
    if "/" not in text or suffix:
        raise InputError(f"--text {text}: no such file or folder, and a data set of the Hub is <who>/<name>")
    return {"kind": "hub", "path": text}


def run_stage(recipe: Recipe, out: Path | None, command: str) -> Run:
    """Check the recipe, run it, and say where its result is.

    Args:
        recipe: of :func:`recipe_of`.
        out: the run folder; None: ``runs/<name>``.
        command: what the user typed.

    Raises:
        InputError: it cannot be run so.
    """
    describe(recipe)  # finds what would else be found late
    from distill.runner import run

    if recipe.data.train.kind == "python_docs":
        print("text: Python's documentation and library, as --text names no other; your own text is better")
    done = run(recipe, out, command=command)
    (name, stage) = next(iter(recipe.stages.items()))
    marker = done.done(name)
    result = stage.result(marker.figures) if marker is not None else None
    if result is not None:
        print(f"result: {done.stage(name) / result}")
    print(f"as a recipe: {done.folder / RECIPE}")
    return done
