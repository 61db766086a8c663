"""The corpus and the teacher of the quality benchmarks.

`python -m benchmarks.books --corpus BOOKS --work WORK` trains the teacher once, with ``recipes/books-teacher.yaml``.
The run can be stopped and resumed. The finished teacher is copied, and later calls use this copy, even if the recipe
changes.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

import distill
from benchmarks import hardware, result
from distill.core.artifact import LINEAGE, replacing
from distill.core.errors import DistillError
from distill.core.run_folder import Run
from distill.training.metrics import read_rows

RECIPE = Path(__file__).parent / "recipes" / "books-teacher.yaml"
SEQUENCE_LENGTH = 256
VALIDATION_TOKENS = 30_000


def data(corpus: Path, validation: Literal["valid", "test"]) -> dict[str, Any]:
    """The ``data`` section of a recipe; use ``valid`` to choose settings, and ``test`` for reported figures."""
    return {
        "train": {"kind": "jsonl", "path": str(corpus / "train.jsonl.gz")},
        "validation": {"kind": "jsonl", "path": str(corpus / f"{validation}.jsonl.gz")},
        "sequence_length": SEQUENCE_LENGTH,
        "validation_tokens": VALIDATION_TOKENS,
    }


def teacher(corpus: Path, work: Path) -> Path:
    """Folder of the teacher. It is trained first if it does not exist."""
    place = work / "books-teacher-final"
    if not place.is_dir():
        recipe = distill.Recipe.load(RECIPE, set=list(_paths(corpus)))
        run = distill.run(recipe, run_dir=work / "books-teacher")
        _write_result(run)
        with replacing(place) as folder:
            # without its lineage it is an external model, at which the lineage of pruned students ends
            ignored = shutil.ignore_patterns(LINEAGE)
            shutil.copytree(run.model("finetune").location, folder, ignore=ignored, dirs_exist_ok=True)
    return place


def arguments(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the common arguments of the quality benchmarks."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train, valid and test.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and half-finished runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads to compute with (default: %(default)s)")
    return parser


def _paths(corpus: Path) -> Iterable[str]:
    """Overrides of the paths in the recipe."""
    sections = data(corpus, "valid")
    return (f"data.{key}.path={sections[key]['path']}" for key in ("train", "validation"))


def _write_result(run: Run) -> None:
    """Write the teacher's validation curve as a result of its own."""
    rows = [row for row in read_rows(run.stage("finetune")) if "val/cross_entropy" in row]
    done = run.done("finetune")
    assert done is not None
    tokens, minutes = done.figures["training_tokens"], done.figures["training_seconds"] / 60
    result.write(
        "books",
        command="python -m benchmarks.books --corpus BOOKS --work WORK",
        hardware=hardware.describe(),
        versions=hardware.versions(),
        rows=[{"tokens": row["tokens"], "validation_perplexity": math.exp(row["val/cross_entropy"])} for row in rows],
        notes=[f"Trained on {tokens:,} tokens in all, in {minutes:.0f} minutes of a machine that did other work too."],
    )


def main() -> None:
    """Train the teacher."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    print(teacher(options.corpus, options.work))


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")
