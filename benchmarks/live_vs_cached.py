"""A live teacher compared with caches of its output: speed, size, fidelity, and quality of the students.

There is one run per seed. A student is pruned from the teacher, and trained on the same tokens in the same order:
without a teacher (cross-entropy), with the live teacher, and from a cache with each codec. Afterwards the training
steps are timed in one process, in turn, so that other load of the machine affects all of them alike. The time includes
decoding the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import distill
from benchmarks import hardware, result
from distill.core.run_folder import Run
from distill.data.loader import train_batches
from distill.data.micro_batches import MicroBatches
from distill.data.packed_rows import PackedRows
from distill.data.packing import read_tokens
from distill.data.teacher_cache.cache import CachedRows, CacheLocation
from distill.data.teacher_cache.head_file import head_file
from distill.losses import CrossEntropy, ForwardKL
from distill.models.load import load_model, locate
from distill.reporting.tradeoff import read_rows
from distill.stages.evaluate.stored_rows import ROWS
from distill.training.cached_teacher import CachedTeacher
from distill.training.module import DistillationModule

CODECS: dict[str, dict[str, Any]] = {
    "top_k 64": {"kind": "top_k", "k": 64},
    "top_k 16": {"kind": "top_k", "k": 16},
    "sampled 50": {"kind": "sampled", "draws": 50},
    "hidden": {"kind": "hidden"},
}
BATCH_SIZE, LENGTH = 8, 256
NO_TEACHER, LIVE = "no teacher", "live"


def stages(keep: dict[str, Any], num_tokens: int, lr: float, caches: Path) -> dict[str, Any]:
    """The stages of one run, with all students."""
    budget = {"num_tokens": num_tokens, "batch_size": BATCH_SIZE, "optimizer": {"lr": lr}}
    distilled = {"kind": "distill", "student": "prune", **budget}
    found: dict[str, Any] = {
        "prune": {"keep": keep},
        slug(NO_TEACHER): {"kind": "finetune", "model": "prune", **budget},
        slug(LIVE): distilled,
    }
    for name, codec in CODECS.items():
        found[f"cache-{slug(name)}"] = {"kind": "cache_teacher", "codec": codec, "folder": str(caches / slug(name))}
        found[slug(name)] = distilled | {"teacher": f"cache-{slug(name)}"}
    students = [slug(name) for name in (NO_TEACHER, LIVE, *CODECS)]
    return found | {"evaluate": {"models": ["prune", *students], "speed": None}}


def slug(name: str) -> str:
    """The name as the name of a stage."""
    return name.replace(" ", "-").replace("_", "-")


def train(options: argparse.Namespace, seed: int) -> Run:
    """The run of a seed; finished stages are not repeated."""
    data: dict[str, Any] = {"train": {"kind": "python_docs"}}
    if options.corpus is not None:
        data = {
            key: {"kind": "jsonl", "path": str(options.corpus / f"{part}.jsonl.gz")}
            for key, part in (("train", "train"), ("validation", "test"))
        }
    recipe = {
        "name": "live-vs-cached",
        "teacher": options.teacher,
        "data": data | {"sequence_length": LENGTH, "validation_tokens": 30_000},
        "seed": seed,
        "stages": stages(yaml.safe_load(options.keep), options.tokens, options.lr, options.work / "caches"),
        "logging": {"wandb": "disabled"},
    }
    loaded = distill.Recipe.from_text(yaml.safe_dump(recipe, sort_keys=False))
    return distill.run(loaded, run_dir=options.work / f"seed-{seed}")


def quality(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Student -> its figures, as mean and standard deviation over the seeds."""
    tables = [read_rows(run.stage("evaluate") / ROWS) for run in runs]
    found: dict[str, dict[str, Any]] = {}
    for name in ("prune", *map(slug, (NO_TEACHER, LIVE, *CODECS))):
        rows = [row for table in tables for row in table if row.name == name]
        found[name] = {
            key: result.spread([getattr(row, key) for row in rows])
            for key in ("perplexity", "kl_to_teacher", "top1_agreement")
        }
    return found


def steppers(run: Run, teacher: str, caches: Path) -> dict[str, Callable[[], None]]:
    """Name -> function that makes one full training step: batch, losses, backward pass, AdamW."""
    (tokens,) = filter(None, (read_tokens(file) for file in (run.folder / "data").glob("train-*.bin")))
    blocks = PackedRows(tokens, LENGTH)
    student = str(run.stage("prune") / "model")
    live = load_model(locate(teacher), dtype="float32")
    found = {
        NO_TEACHER: _stepper(DistillationModule(_student(student), [CrossEntropy()]), blocks),
        LIVE: _stepper(DistillationModule(_student(student), [ForwardKL()], live), blocks),
    }
    for name in CODECS:
        place = CacheLocation.there(caches / slug(name) / "train")
        head = head_file(place.folder.parent)
        cached = CachedTeacher(place.vocabulary, head, whole=place.codec.whole, dtype=torch.float32)
        module = DistillationModule(_student(student), [ForwardKL()], cached)
        found[name] = _stepper(module, CachedRows(blocks, place))
    return found


def _student(folder: str) -> Any:
    return load_model(folder, dtype="float32").train()


def _stepper(module: DistillationModule, blocks: PackedRows) -> Callable[[], None]:
    batches: Iterator[Any] = iter(train_batches(blocks, 0, MicroBatches(BATCH_SIZE)))
    optimizer = torch.optim.AdamW(module.student.parameters(), lr=1e-6, fused=True)
    if module.teacher is not None:
        module.teacher.move(torch.device("cpu"))

    def step() -> None:
        total, _ = module.batch_losses(next(batches), module.losses)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def speeds(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, Any]]:
    """Name -> tokens per second, and speed relative to training without a teacher; the steps are timed in turn."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    per_step = BATCH_SIZE * LENGTH
    return {
        name: {
            "tokens_per_s": per_step / statistics.median(taken),
            "speed_to_no_teacher": statistics.median(
                alone / one for alone, one in zip(seconds[NO_TEACHER], taken, strict=True)
            ),
        }
        for name, taken in seconds.items()
    }


def table(runs: list[Run], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the result: one per training signal, and one for the pruned student before training."""
    caches, learned = options.work / "caches", quality(runs)
    measured = speeds(steppers(runs[0], options.teacher, caches), options.rounds)
    rows: list[dict[str, Any]] = [{"signal": "before training", "seeds": len(runs), **learned["prune"]}]
    for name in (NO_TEACHER, LIVE, *CODECS):
        row = {"signal": name, "seeds": len(runs), **measured[name], **learned[slug(name)]}
        if name in CODECS:
            header = json.loads((caches / slug(name) / "train" / "cache.json").read_text(encoding="utf-8"))
            fidelity = header["fidelity"]
            keys = {"bytes_per_token": "bytes_per_token", "kl": "codec_kl", "gradient_cosine": "codec_gradient_cosine"}
            row |= {ours: fidelity[theirs] for theirs, ours in keys.items()}
        rows.append(row)
    return rows


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="folder of train and test.jsonl.gz; unset: Python's documentation")
    parser.add_argument("--teacher", default="builtin:quickstart-teacher", help="its folder (default: %(default)s)")
    parser.add_argument(
        "--keep", default="{intermediate_size: 160, num_attention_heads: 4}", help="sizes of the student"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models and unfinished runs")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens per training (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = [train(options, seed) for seed in range(options.seeds)]
    rows = table(runs, options)
    for row in rows:
        print(json.dumps(row))
    where = " --corpus BOOKS --teacher TEACHER" if options.corpus else ""
    text = "the corpus" if options.corpus else "Python's documentation"
    file = result.write(
        "live_vs_cached",
        command=f"python -m benchmarks.live_vs_cached{where} --work WORK --tokens {options.tokens} "
        f"--seeds {options.seeds}",
        hardware=hardware.describe(options.threads),
        versions=hardware.versions(),
        rows=rows,
        notes=[
            f"Each student was trained on {options.tokens:,} tokens of {text}, {BATCH_SIZE} x {LENGTH} per step. For "
            "one seed, all students read the same tokens in the same order.",
            f"Speed: median of {options.rounds} steps in CPU seconds; the kinds take turns, and caches are decoded in "
            "the same process. The ratio is the median of the ratios within a round.",
        ],
    )
    print(file)


if __name__ == "__main__":
    main()
