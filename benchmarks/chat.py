"""A real chat model, pruned to 75 % and distilled on conversations: its answers, and two choices of training tokens.

For each seed, two trainings start from the same pruned model and read the same mixture of conversations and novels in
the same order. One learns only from the assistant's tokens, the other from all tokens. Both learn from the same number
of tokens, so the second reads less text. Both are evaluated on text that no training has read; in conversations, only
on the assistant's tokens.

    python -m benchmarks.chat --model MODEL --data DATA --work WORK

MODEL: folder of a chat model, such as SmolLM2-135M-Instruct. DATA: folder with `instruct/*.json[l].gz` (instruction,
input, output; prompt, response), `gsm8k/train.jsonl.gz` (question, answer) and `books/train.jsonl.gz` (text).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, result, tables
from benchmarks.matrix import Cell, Matrix
from distill.core.errors import DistillError
from distill.data.corpus import Corpus
from distill.data.micro_batches import MicroBatches
from distill.data.spec import DataSpec
from distill.data.tokenizer import load_tokenizer
from distill.models.configs import config_of, count

WEIGHTS = {"instruct": 0.4, "gsm8k": 0.3, "books": 0.3}
"""Fractions of the training tokens."""
SEQUENCE_LENGTH, BATCH_SIZE = 512, 4
LR = 3e-4
FIGURES = ("perplexity", "kl_to_teacher", "top1_agreement")
PROMPTS = {
    "fact": "Explain the theory of relativity in at most 20 words.",
    "factorial": "Write a Python function that returns the factorial of a number.",
    "sort": "Write a Python function that sorts the list 8, 1, 9, 2, 5, 4.",
    "after its training": "Who won the most medals at the 2024 Olympics? Answer in at most 10 words.",
    "industry": "What is OPC UA and where is it used? Answer in at most 10 words.",
    "summary": "Summarize in one sentence: The town had two bridges. The old one was narrow and made of stone, and "
    "only people on foot were allowed on it. The new one, built of steel in 1962, carried the road and the railway. "
    "When the river rose in spring, the new one was closed for a week, and everybody walked over the old one again.",
    "puzzle": "A farmer has 17 animals, chickens and cows. Together they have 44 legs. How many of each are there?",
}
"""Kinds of questions, in our own words, that Red Hat used in an article on the precisions of Mistral 7B."""


def data(folder: Path, learn_from: str) -> dict[str, Any]:
    """The ``data`` section of the recipe."""
    instruct = sorted(str(file) for file in (folder / "instruct").glob("*.gz") if "preference" not in file.name)
    instruct = [file for file in instruct if "seed_tasks" not in file]  # its answers are nested
    return {
        "train": {
            "kind": "mixture",
            "sources": {
                "instruct": {"kind": "chat", "path": instruct},
                "gsm8k": {"kind": "chat", "path": str(folder / "gsm8k" / "train.jsonl.gz")},
                "books": {"kind": "jsonl", "path": str(folder / "books" / "train.jsonl.gz")},
            },
            "weights": WEIGHTS,
        },
        "sequence_length": SEQUENCE_LENGTH,
        "packing": "best_fit",
        "chat": {"learn_from": learn_from},
        "max_dropped": 0.1,
        "validation_tokens": 12_000,
        "calibration_sequences": 32,
    }


def steps_to_learn(
    num_tokens: int, section: Mapping[str, Any], model: Path, folder: Path, seed: int
) -> tuple[int, int]:
    """Number of steps until ``num_tokens`` tokens were learned from, and number of tokens read in these steps.

    Args:
        num_tokens: number of tokens to learn from.
        section: ``data`` section of the recipe.
        model: folder of the model, whose tokenizer and chat template are used.
        folder: folder of the token files.
        seed: seed of the order of the text.
    """
    tokenizer = load_tokenizer(model)
    corpus = Corpus.open(DataSpec.model_validate(section), tokenizer, folder, seed, len(tokenizer))
    learned = read = 0
    for step, batch in enumerate(corpus.train_loader(MicroBatches(size=BATCH_SIZE))):
        if learned >= num_tokens:
            return step, read
        learned += int(batch["mask"].sum())
        read += batch["input_ids"].numel()
    raise AssertionError("the order is endless")


def measure(model: Path, folder: Path, work: Path, num_tokens: int, seeds: int) -> Iterator[list[dict[str, Any]]]:
    """Run all unfinished cells; yields the rows of all finished cells after each pair."""
    cells = {learn: Matrix(work / "chat", model, data(folder, learn)) for learn in ("assistant", "all")}
    start = cells["assistant"].run(
        Cell("start", {"prune": {"keep": {"intermediate_size": _three_quarters(model)}}, "evaluate": {"speed": None}})
    )
    student = work / "chat" / "start" / "prune" / "model"
    trained: dict[str, list[dict[str, Any]]] = {learn: [] for learn in cells}
    for seed in range(seeds):
        for learn, matrix in cells.items():
            steps, read = steps_to_learn(num_tokens, matrix.data, model, matrix.folder / "tokens", seed)
            budget = {
                "num_steps": steps,
                "batch_size": BATCH_SIZE,
                "optimizer": {"lr": LR},
                "validate_every_steps": steps,
            }
            stages: dict[str, Any] = {
                "distill": {"student": str(student), **budget},
                "evaluate": {"models": ["distill"], "speed": None},
            }
            if learn == "assistant" and seed == 0:
                asked = {"models": ["teacher", str(student), "distill"], "prompts": list(PROMPTS.values())}
                stages["report"] = asked | {"new_tokens": 100}
            row = matrix.run(Cell(f"{learn}/seed-{seed}", stages, seed))["distill"]
            trained[learn].append({**row, "steps": steps, "read": read})
        yield rows(start, trained)


def rows(
    start: Mapping[str, Mapping[str, Any]], trained: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Rows of the result: the models before training, both choices with their standard deviation, and their ratio."""
    found: list[dict[str, Any]] = []
    for name, row in start.items():
        sizes = {key: row[key] for key in ("parameters", "non_embedding_parameters")}
        found.append({"table": "start", "model": name, **sizes, **{key: row[key] for key in FIGURES}})
    for learn, runs in trained.items():
        if runs:
            figures = {key: result.spread([run[key] for run in runs]) for key in FIGURES}
            read = result.spread([run["read"] for run in runs])
            found.append({"table": "learn_from", "learn_from": learn, **figures, "read": read, "seeds": len(runs)})
    pairs = list(zip(trained["assistant"], trained["all"], strict=False))
    if pairs:
        ratios = [one["perplexity"] / other["perplexity"] for one, other in pairs]
        found.append({"table": "ratio", "assistant_to_all": result.spread(ratios)})
    return found


def _three_quarters(model: Path) -> int:
    """Intermediate size, a multiple of 64, with 75 % of the parameters outside the embeddings."""
    config = config_of(str(model)) or {}
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    outside = (count(config) or 0) - config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    removed = 0.25 * outside / (3 * hidden * layers)  # gate, up and down
    return int(64 * round((config["intermediate_size"] - removed) / 64))


def main() -> None:
    """Measure, and write the result after each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a chat model")
    parser.add_argument("--data", type=Path, required=True, help="folder with instruct/, gsm8k/ and books/")
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and tokens; unfinished runs resume")
    parser.add_argument("--tokens", type=int, default=24_000, help="tokens to learn from per training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    for found in measure(options.model, options.data, options.work, options.tokens, options.seeds):
        result.write(
            "chat",
            command=f"python -m benchmarks.chat --model MODEL --data DATA --work WORK --tokens {options.tokens} "
            f"--seeds {options.seeds}",
            hardware=hardware.describe(options.threads),
            versions=hardware.versions(),
            rows=found,
            notes=[
                f"Forward KL; each training learned from {options.tokens:,} tokens, in steps of {BATCH_SIZE} rows of "
                f"{SEQUENCE_LENGTH} tokens, with learning rate {LR:g}; weights of the mixture: {WEIGHTS}."
            ],
        )
    print(tables.table(found, where={"table": "learn_from"}))


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")
