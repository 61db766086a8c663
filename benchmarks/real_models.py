"""A real chat model, cut by distill and by other libraries, then trained on the same tokens and asked the same tasks.

SmolLM2-135M-Instruct is cut to shares of its parameters outside the embeddings. All cut models are evaluated, and then
distilled from the uncut model with the same loss, learning rate, tokens and seeds, on a mixture of instructions,
grade-school maths and novels that holds no item of the tasks. The figures are perplexity on held-out text, KL
divergence and agreement with the uncut model, and the accuracy on eight tasks, compared in pairs.

    python -m benchmarks.real_models --model MODEL --data DATA --work WORK --cuts 0.72 0.55 0.85

MODEL: folder of SmolLM2-135M-Instruct. DATA: see :mod:`benchmarks.real_model_tasks`. The environments of the other
libraries are made below WORK when they are not there, which needs a package index. Each finished training is kept, and
the result is written again after it. ``--only-finished`` writes it from what is finished so far. ``--parts
criteria`` compares distill's criteria before training, ``curve`` trains one cut for longer, with and without a teacher,
and ``int4`` quantizes the model with and without training.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, real_model_rows, result, tables
from benchmarks.real_model_arms import BATCH_SIZE, LR, SEARCH, RealModels
from benchmarks.real_model_cuts import CONTENDERS, OURS, PEERS, SHARES
from benchmarks.real_model_tasks import TASKS
from distill.core.errors import DistillError

PARTS = {
    "cuts": ("cut", "failed", "trained", "tasks", "pairs"),
    "criteria": ("criteria",),
    "curve": ("curve",),
    "int4": ("int4",),
}
"""Part -> tables of its rows."""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, told in (("model", "folder of the model"), ("data", "folder of text and tasks"), ("work", "of all runs")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=told)
    parser.add_argument(
        "--environments", type=Path, help="folder of the other libraries' environments (default: in WORK)"
    )
    parser.add_argument("--cuts", type=float, nargs="+", default=list(SHARES), help="shares that stay")
    parser.add_argument("--contenders", nargs="+", choices=(*OURS, *PEERS), default=list(CONTENDERS))
    parser.add_argument("--tokens", type=int, default=25_000, help="of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each contender (default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), help="none: only text")
    parser.add_argument("--limit", type=int, default=100, help="questions per task (default: %(default)s)")
    parser.add_argument("--validation-tokens", type=int, default=12_000, help="(default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["cuts"], help="(default: %(default)s)")
    parser.add_argument("--curve", type=int, nargs="+", default=[50_000, 100_000, 200_000], help="budgets of the curve")
    parser.add_argument("--curve-seeds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--only-finished", action="store_true", help="measure nothing; write what is finished")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads (default: %(default)s)")
    parser.set_defaults(text={}, search=SEARCH)
    return parser


def main() -> None:
    """Measure what is missing, and write the result after each model."""
    options = arguments().parse_args()
    options.model, options.data, options.work = (p.resolve() for p in (options.model, options.data, options.work))
    options.environments = (options.environments or options.work / "environments").resolve()
    torch.set_num_threads(options.threads)
    print(tables.table(measure(options), where={"table": "trained"}))


def measure(options: argparse.Namespace, folder: Path = result.FOLDER) -> list[dict[str, Any]]:
    """Measure all parts that are asked for; the rows of the result, which is written after each new model.

    Args:
        options: of :func:`arguments`.
        folder: of the result.
    """
    models = RealModels(options)
    measured: list[real_model_rows.Measured] = []
    others = _rows_of_other_parts(folder / "real_models.json", options.parts)

    def write() -> list[dict[str, Any]]:
        rows = [*real_model_rows.rows(measured), *others]
        _write(options, rows, folder)
        return rows

    if "cuts" in options.parts:
        for one in models.arms():
            measured.append(one)
            write()
    more = {"criteria": models.criteria, "curve": models.curve, "int4": models.int4}
    for part in (part for part in more if part in options.parts):
        for row in more[part]():
            others.append(row)
            write()
    return write()


def _rows_of_other_parts(file: Path, parts: list[str]) -> list[dict[str, Any]]:
    """Rows of an earlier result that belong to parts which are not measured now."""
    if not file.is_file():
        return []
    tables_now = {table for part in parts for table in PARTS[part]}
    return [row for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if row["table"] not in tables_now]


def _write(options: argparse.Namespace, rows: list[dict[str, Any]], folder: Path) -> None:
    cuts = " ".join(map(str, options.cuts))
    budget = f"--tokens {options.tokens} --seeds {options.seeds} --limit {options.limit}"
    result.write(
        "real_models",
        command=f"python -m benchmarks.real_models --model MODEL --data DATA --work WORK --cuts {cuts} {budget} "
        f"--validation-tokens {options.validation_tokens} --parts {' '.join(options.parts)}",
        hardware=hardware.describe(options.threads),
        versions=hardware.versions(),
        rows=rows,
        notes=[
            f"Forward KL on {options.tokens:,} tokens in steps of {BATCH_SIZE} rows of 512, learning rate {LR:g} for "
            "all contenders, which was not tuned for any of them.",
            "The training text holds no item of the tasks and no validation text (`data.clean.decontaminate`).",
            f"Tasks: {options.limit} questions each, drawn with seed 0, the same for all models."
            if any(row["table"] == "tasks" for row in rows)
            else "The models have not been evaluated on the tasks yet.",
            *real_model_rows.missing(rows, options.cuts, options.contenders),
        ],
        folder=folder,
    )


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")
