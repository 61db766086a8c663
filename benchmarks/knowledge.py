"""What a small model learns of a document: closed book before and after each training, and open book (the ceiling).

    python -m benchmarks.knowledge --model MODEL --qna QNA --controls QNA... --work WORK [--seeds 3] [--steps 60]

Five passages of one document are taught by the pairs of `knowledge_questions.jsonl`, which were written for this
benchmark, and by questions that the model writes itself. The exam is the pairs of the qna.yaml, on which nobody trains.
The questions of the controls are about documents that are not trained. All trainings have the same steps and adapters.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import hardware, result
from distill.data.documents import plain
from distill.data.qna_file import read_qna
from distill.numerics.statistics import PairedMeans
from distill.recipe import Recipe
from distill.runner import run

PAIRS = Path(__file__).with_name("knowledge_questions.jsonl")
NAMES = {
    "teacher": "before",
    "prompt_distillation": "prompt distillation",
    "text_training": "training on the rows",
    "raw_document": "training on the document",
}
FACTS = """\
name: knowledge
teacher: {model}
data:
  train: {{kind: chat, path: {work}/replay.jsonl}}
  sequence_length: 512
  packing: padded
stages:
  facts:
    kind: synthesize
    make: {{kind: qna, path: {work}/qna.yaml, documents: {work}/document.md, views: [text], questions_per_view: 5,
      max_new_tokens: 96, answer_tokens: 48, chunk_words: 220,
      exam: {{pairs_per_seed: 0, files: ["{work}/exam.yaml"], controls: {controls}}}}}
    batch_size: 10
compute: {{accelerator: auto}}
logging: {{wandb: disabled, hardware: false}}
"""
TRAINING = """\
name: train
teacher: {model}
seed: {seed}
data:
  train: {{kind: chat, path: "{work}/run/facts/data/rows-00000.jsonl"}}
  sequence_length: 256
  packing: padded
stages:
{arms}  exam:
    {{questions: {work}/run/facts/exam.jsonl, max_new_tokens: {new}, num_choices: 0,
     data: {{train: {{kind: python_questions}}, sequence_length: 256, validation_tokens: 1500, packing: padded}}}}
compute: {{accelerator: auto, checkpoint_every_steps: 1000, log_every_steps: 5}}
logging: {{wandb: disabled, hardware: false}}
"""
ARMS = {
    "prompt_distillation": """\
  prompt_distillation:
    {{kind: distill, student: teacher, teacher: self, teacher_reads: document, {same}, batch_size: 6}}
""",
    "text_training": """\
  text_training: {{kind: finetune, model: teacher, {same}, batch_size: 6}}
""",
    "raw_document": """\
  raw_document:
    {{kind: finetune, model: teacher, {half}, batch_size: 2, data: {{
      train: {{kind: text_files, path: {work}/document.md}},
      validation: {{kind: text_files, path: {work}/val.txt}}, sequence_length: 128, packing: wrapped}}}}
""",
}
SAME = "num_steps: {steps}, optimizer: {{lr: {lr}, weight_decay: 0}}, lora: {{r: 16, alpha: 32}}"


def prepare(work: Path, qna: Path, controls: Sequence[Path]) -> None:
    """Write the document, the seed pairs, the exam and the text of the validation."""
    work.mkdir(parents=True, exist_ok=True)
    found = read_qna(qna)
    contexts = [plain(seed.context or "") for seed in found.seeds]
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    seeds = [
        {
            "context": context,
            "questions_and_answers": [
                {"question": one["question"], "answer": one["answer"]} for one in pairs if one["context"] == number
            ],
        }
        for number, context in enumerate(contexts)
    ]
    content = {
        "version": 3,
        "created_by": "benchmark",
        "domain": found.domain,
        "document_outline": found.outline,
        "seed_examples": seeds,
        "document": {"repo": "r", "commit": "c", "patterns": ["document.md"]},
    }
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=100)
    (work / "qna.yaml").write_text(text, encoding="utf-8")
    (work / "document.md").write_text("\n\n".join(contexts) + "\n", encoding="utf-8")
    shutil.copy(qna, work / "exam.yaml")
    other = "\n\n".join(plain(seed.context or "") for seed in read_qna(controls[0]).seeds)
    (work / "val.txt").write_text(other, encoding="utf-8")
    replay = [{"prompt": f"What is {n} plus {n + 3}?", "response": f"It is {2 * n + 3}."} for n in range(60)]
    (work / "replay.jsonl").write_text("\n".join(json.dumps(row) for row in replay), encoding="utf-8")


def rows_of(exams: Sequence[Path]) -> list[dict[str, Any]]:
    """A row per model and book, means over seeds, and a row per comparison of two trainings."""
    found = [json.loads((exam / "exam.json").read_text(encoding="utf-8")) for exam in exams]
    rows = []
    for first in found[0]["rows"]:
        same = [
            next(row for row in one["rows"] if all(row[key] == first[key] for key in ("model", "book", "group")))
            for one in found
        ]
        scores = {
            score: result.spread([row[score] for row in same])
            for score in ("nats", "f1", "numbers")
            if all(row[score] is not None for row in same)
        }
        bits = result.spread([one["bits_per_byte"][first["model"]] for one in found])
        rows.append(
            {"table": first["group"], "model": NAMES[first["model"]], "book": first["book"]}
            | {"questions": first["questions"], **scores, "bits_per_byte": bits}
        )
    return rows + comparisons(exams)


def comparisons(exams: Sequence[Path]) -> list[dict[str, Any]]:
    """Nats per token of two trainings on the trained questions, each question averaged over seeds, by pairs."""
    answers: dict[tuple[str, str], dict[str, list[float]]] = {}
    for exam in exams:
        for line in (exam / "answers.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["group"] == "trained":
                answers.setdefault((row["model"], row["book"]), {}).setdefault(row["question"], []).append(row["nats"])
    means = {key: [sum(values) / len(values) for values in by.values()] for key, by in answers.items()}
    gap = PairedMeans.of(means["teacher", "open"], means["teacher", "closed"]).difference
    rows = []
    for first, second in (
        ("teacher", "prompt_distillation"),
        ("teacher", "text_training"),
        ("teacher", "raw_document"),
        ("text_training", "prompt_distillation"),
    ):
        if not {first, second} <= {model for model, _ in means}:
            continue
        pairs = PairedMeans.of(means[first, "closed"], means[second, "closed"])
        low, high = pairs.interval()
        rows.append(
            {"table": "pairs", "first": NAMES[first], "second": NAMES[second], "difference": pairs.difference}
            | {"low": low, "high": high, "p": pairs.p(), "gap_closed": -pairs.difference / gap}
        )
    return rows


def main() -> None:
    """Run what is missing, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--qna", type=Path, required=True)
    parser.add_argument("--controls", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--new-tokens", type=int, default=24, help="of a written answer; 0: nats alone")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="trainings; unset: all")
    given = parser.parse_args()
    work, same = given.work.resolve(), SAME.format(steps=given.steps, lr=given.lr)
    half = SAME.format(steps=given.steps // 2, lr=given.lr)  # about as many passes over the document
    prepare(work, given.qna, given.controls)
    controls = json.dumps([str(one) for one in given.controls])
    run(Recipe.from_text(FACTS.format(model=given.model, work=work, controls=controls)), work / "run")
    exams = []
    for seed in range(given.seeds):
        arms = "".join(ARMS[arm].format(work=work, same=same, half=half) for arm in given.arms)
        recipe = Recipe.from_text(
            TRAINING.format(model=given.model, work=work, seed=seed, arms=arms, new=given.new_tokens)
        )
        exams.append(run(recipe, work / f"s{seed}").stage("exam"))
    facts = json.loads((work / "run" / "facts" / "data.json").read_text(encoding="utf-8"))
    dropped = ", ".join(f"{name} {count}" for name, count in facts["dropped"].items())
    result.write(
        "knowledge",
        command=f"python -m benchmarks.knowledge --model MODEL --qna QNA --controls QNA QNA --work WORK --seeds "
        f"{given.seeds} --steps {given.steps} --lr {given.lr} --new-tokens {given.new_tokens}"
        + f" --arms {' '.join(given.arms)}"
        * (given.arms != [*ARMS]),
        hardware=hardware.describe(),
        versions=hardware.versions(),
        rows=rows_of(exams),
        notes=[
            f"Training rows: {facts['rows']} of {facts['rows_before_filters']} before filters (dropped: {dropped}); "
            f"{given.steps} steps of 6 rows, LoRA of rank 16, learning rate {given.lr}, {given.seeds} seeds.",
            "Nats are per token of the reference answer.",
        ],
    )


if __name__ == "__main__":
    main()
