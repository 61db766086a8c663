"""All losses in comparison: the same pruned student and the same tokens; only the loss differs.

One student is pruned from the teacher by activation importance. For each loss, a learning rate is chosen on the
validation books with a third of the budget, because one rate for all would favour the loss for which it was chosen. The
student is then trained with each of several seeds (which determine what it reads, and in which order) and evaluated on
the test books. Controls: cross-entropy from the same pruned weights, and from random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import books, hardware, result, tables
from benchmarks.matrix import Cell, Matrix
from distill.core.errors import DistillError
from distill.losses import LOSSES, LossSpec

KEEP = {"hidden_size": 144, "intermediate_size": 192}
"""Sizes of the student; the teacher has 192 and 384. This is half of the parameters outside the embeddings."""
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
"""First learning rates of the search. It continues by factors of two until both neighbours of the best are worse."""
BATCH_SIZE = 8
CONTROL = "cross_entropy"
FIGURES = ("perplexity", "kl_to_teacher", "top1_agreement")


@dataclass(frozen=True)
class Budget:
    """Number of tokens of the final runs and of the learning rate search, and number of seeds."""

    num_tokens: int
    search_tokens: int
    num_seeds: int


def variants() -> dict[str, dict[str, Any]]:
    """The variants to compare: name -> stage of a recipe, without its budget."""
    found: dict[str, dict[str, Any]] = {CONTROL: {"kind": "finetune"}}
    for kind, spec in LOSSES.items():
        if not spec.needs_teacher or spec.compares == "values":  # the latter are of other tasks
            continue
        if issubclass(spec, LossSpec):
            found[kind] = {"kind": "distill", "losses": [{"kind": kind}]}
        else:  # losses on hidden states, which need a loss on logits too
            found[f"forward_kl+{kind}"] = {"kind": "distill", "losses": [{"kind": "forward_kl"}, {"kind": kind}]}
    mix = [{"kind": "forward_kl", "weight": 0.5}, {"kind": "cross_entropy", "weight": 0.5}]
    found["forward_kl+cross_entropy"] = {"kind": "distill", "losses": mix}
    found["cross_entropy_from_scratch"] = {"kind": "finetune", "weights": "random"}
    return found


def cell(
    name: str, stage: Mapping[str, Any], student: Path, *, num_tokens: int, lr: float, folder: str, seed: int
) -> Cell:
    """A cell that trains the student and evaluates it."""
    start = "model" if stage["kind"] == "finetune" else "student"
    num_steps = num_tokens // (BATCH_SIZE * books.SEQUENCE_LENGTH)
    budget = {
        "num_steps": num_steps,
        "batch_size": BATCH_SIZE,
        "optimizer": {"lr": lr},
        "validate_every_steps": num_steps,
    }
    stages = {
        "student": {**stage, start: str(student), **budget},
        "evaluate": {"models": ["student"], "speed": None},
    }
    return Cell(f"{name}/{folder}", stages, seed)


def measure(corpus: Path, work: Path, budget: Budget) -> Iterator[list[dict[str, Any]]]:
    """Run all unfinished cells; yields the rows of all finished cells after each of them."""
    teacher = books.teacher(corpus, work)
    choosing, reporting = (Matrix(work / "losses", teacher, books.data(corpus, split)) for split in ("valid", "test"))
    stages = {"prune": {"keep": KEEP}, "evaluate": {"models": ["teacher", "prune"], "speed": None}}
    start = reporting.run(Cell("start", stages))
    student = reporting.folder / "start" / "prune" / "model"
    searched: dict[str, dict[float, float]] = {name: {} for name in variants()}
    trained: dict[str, list[dict[str, Any]]] = {name: [] for name in variants()}
    for name, stage in variants().items():
        while (lr := next_rate(searched[name])) is not None:
            one = cell(name, stage, student, num_tokens=budget.search_tokens, lr=lr, folder=f"lr-{lr:g}", seed=0)
            searched[name][lr] = choosing.run(one)["student"]["perplexity"]
    rates = {name: min(found, key=found.__getitem__) for name, found in searched.items()}
    for seed in range(budget.num_seeds):
        for name, stage in variants().items():
            lr = rates[name]
            one = cell(name, stage, student, num_tokens=budget.num_tokens, lr=lr, folder=f"seed-{seed}", seed=seed)
            trained[name].append(reporting.run(one)["student"])
            yield rows(start, searched, rates, trained)


def next_rate(found: Mapping[float, float], first: Sequence[float] = LEARNING_RATES) -> float | None:
    """The next learning rate to try, given the perplexities of others; None if the best rate is known.

    The search stops at a 16th of the first rate. If every rate makes the student worse, smaller rates are always
    better, and the search would not end.

    Args:
        found: learning rate -> perplexity.
        first: first rates of the search, which differ by factors of two.
    """
    for lr in first:
        if lr not in found:
            return lr
    best = min(found, key=found.__getitem__)
    if best == min(found):
        return best / 2 if best > first[0] / 16 else None
    return best * 2 if best == max(found) else None


def rows(
    start: Mapping[str, Mapping[str, Any]],
    searched: Mapping[str, Mapping[float, float]],
    rates: Mapping[str, float],
    trained: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """Rows of the result: models before training, losses (lowest perplexity first), and the search."""
    found = []
    for name, runs in trained.items():
        if runs:
            figures = {key: result.spread([run[key] for run in runs]) for key in FIGURES}
            pairs = zip(runs, trained[CONTROL], strict=False)  # the same seed reads the same tokens
            ratios = [run["perplexity"] / control["perplexity"] for run, control in pairs]
            to_control = None if name == CONTROL else result.spread(ratios)
            row = {"table": "losses", "loss": name, **figures, "to_control": to_control}
            found.append({**row, "lr": f"{rates[name]:g}", "seeds": len(runs)})
    found.sort(key=lambda row: row["perplexity"]["mean"])
    sizes = ("parameters", "non_embedding_parameters")
    models = [{"table": "start", "model": name, **{k: start[name][k] for k in (*sizes, *FIGURES)}} for name in start]
    tried = sorted({lr for found in searched.values() for lr in found})
    search = [
        {"table": "search", "loss": name, **{f"{lr:g}": found.get(lr) for lr in tried}}
        for name, found in searched.items()
    ]
    return [*models, *found, *search]


def main() -> None:
    """Measure, and write the result after each run."""
    parser = books.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=300_000, help="tokens per final run (default: %(default)s)")
    parser.add_argument(
        "--search-tokens", type=int, default=100_000, help="tokens per run of the search (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="final runs of each loss (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = Budget(options.tokens, options.search_tokens, options.seeds)
    found: list[dict[str, Any]] = []
    for found in measure(options.corpus, options.work, budget):
        result.write(
            "losses",
            command="python -m benchmarks.losses --corpus BOOKS --work WORK "
            f"--tokens {options.tokens} --search-tokens {options.search_tokens} --seeds {options.seeds}",
            hardware=hardware.describe(options.threads),
            versions=hardware.versions(),
            rows=found,
            notes=[
                f"Each run was trained on {budget.num_tokens:,} tokens, {BATCH_SIZE} sequences of "
                f"{books.SEQUENCE_LENGTH} per step; the runs of the search on {budget.search_tokens:,}."
            ],
        )
    print(tables.table(found, where={"table": "losses"}))


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")
