"""A real chat model, cut by distill and by other libraries, then trained on the same tokens and asked the same tasks.

SmolLM2-135M-Instruct is cut to shares of its parameters outside the embeddings. All cut models are evaluated, and then
distilled from the uncut model with the same loss, learning rate, tokens and seeds, on a mixture of instructions,
grade-school maths and novels that holds no item of the tasks. The figures are perplexity on held-out text, KL
divergence and agreement with the uncut model, and the accuracy on eight tasks, compared in pairs.

    python -m benchmarks.real_models --model MODEL --data DATA --work WORK --cuts 0.72 0.55 0.85

MODEL: folder of SmolLM2-135M-Instruct. DATA: see :mod:`benchmarks.real_model_tasks`. The environments of the other
libraries are made below WORK when they are not there, which needs a package index. Each finished training is kept, and
the result is written again after it, so that the tables can be published before all is finished. ``--parts curve``
trains one cut for longer, with and without a teacher; ``--parts int4`` quantizes the model with and without training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, real_model_rows, result, tables
from benchmarks.matrix import Cell, Matrix
from benchmarks.real_model_cuts import CONTENDERS, OURS, PEERS, Sizes, sizes, stage
from benchmarks.real_model_peers import Asked, Peer, attempt
from benchmarks.real_model_tasks import TASKS, section, tasks
from distill.core.artifact import write_text
from distill.core.errors import DistillError, InputError
from distill.data.corpus import Corpus
from distill.data.spec import DataSpec
from distill.data.tokenizer import load_tokenizer
from distill.models.configs import config_of
from distill.models.size import measure_size

BATCH_SIZE, LR = 2, 3e-4
"""Sequences per step, and the learning rate of all trainings, which nobody tuned for one of the contenders."""
SEARCH = {"num_measured": 6, "num_sequences": 8, "train": {"num_candidates": 2, "num_tokens": 4096, "batch_size": 2}}
"""Keys of ``prune.search``, for a model that a CPU trains."""
PARTS = ("cuts", "curve", "int4")


class RealModels:
    """The cells of the benchmark.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder: Path = options.work / "real_models"
        self.asked = tasks(options.data, options.work, options.limit, tuple(options.tasks))
        data = section(options.data, options.validation_tokens, tuple(TASKS))
        self.quality = Matrix(self.folder, options.model, data | options.text)
        self.answers = Matrix(self.folder, options.model, data | options.text | {"validation_tokens": 1024})
        self.config = config_of(str(options.model)) or {}
        if "intermediate_size" not in self.config:
            raise InputError(f"{options.model}: its config has no intermediate_size, so it cannot be cut here")
        self.outside = measure_size(str(options.model)).non_embedding_parameters

    def sizes(self, cut: float) -> Sizes:
        """What a share leaves."""
        return sizes(self.config, self.outside, cut)

    def teacher(self, *, is_asked: bool) -> real_model_rows.Measured:
        """The uncut model, before or after it was asked the tasks."""
        figures = self.quality.run(Cell("teacher", {"evaluate": {"models": ["teacher"], "speed": None}}))["teacher"]
        answers = self.ask("teacher/answers", "teacher") if is_asked else {}
        return real_model_rows.Measured("teacher", 1.0, None, figures, answers)

    def ask(self, name: str, model: str) -> dict[str, list[bool]]:
        """Task -> whether each question is answered rightly; empty without tasks."""
        if not self.asked:
            return {}
        stages = {"evaluate": {"models": [model], "speed": None, "tasks": self.asked}}
        self.answers.run(Cell(name, stages))
        return real_model_rows.answers_of(self.folder / name / "evaluate")

    def calibration(self) -> Path:
        """A file with the tokens on which distill calibrates its criteria, for the other libraries."""
        to = self.folder / "calibration.json"
        if not to.is_file():
            tokenizer = load_tokenizer(str(self.options.model))
            data = DataSpec.model_validate(self.quality.data)
            corpus = Corpus.open(data, tokenizer, self.folder / "tokens", 0, len(tokenizer))
            rows = [ids.tolist() for batch in corpus.calibration_loader() for ids in batch["input_ids"]]
            write_text(to, json.dumps(rows))
        return to

    def peer(self, name: str, cut: float) -> Peer:
        """The attempt of another library."""
        wanted = self.sizes(cut)
        asked = Asked(
            model=str(self.options.model),
            calibration=str(self.calibration()),
            intermediate_size=wanted.intermediate_size,
            num_hidden_layers=wanted.num_hidden_layers,
        )
        folder = self.folder / f"{cut:.0%}"[:-1] / name.replace(" ", "-") / "attempt"
        return attempt(name, round(100 * cut), asked, folder, self.options.environments)

    def cut(self, name: str, cut: float) -> tuple[Path, dict[str, Any]]:
        """(folder of a cut model, its figures before any training).

        Raises:
            LookupError: a library made no model.
        """
        place = f"{round(100 * cut)}/{name.replace(' ', '-')}/cut"
        if name in OURS:
            stages = {"prune": stage(name, self.sizes(cut), self.options.search)}
            model, reference = self.folder / place / "prune" / "model", "prune"
        else:
            peer = self.peer(name, cut)
            if peer.folder is None:
                raise LookupError(peer.outcome)
            stages, model, reference = {}, peer.folder, str(peer.folder)
        evaluate = {"evaluate": {"models": [reference], "speed": None}}
        return model, self.quality.run(Cell(place, {**stages, **evaluate}))[reference]

    def trained(self, name: str, cut: float, seed: int, num_tokens: int, kind: str = "distill") -> dict[str, Any]:
        """The figures of a cut model after a training.

        Args:
            name: of the contender.
            cut: its share.
            seed: of the order of the text.
            num_tokens: of the training.
            kind: distill, or finetune for cross-entropy without a teacher.
        """
        model, _ = self.cut(name, cut)
        key = "student" if kind == "distill" else "model"
        steps = max(1, num_tokens // (BATCH_SIZE * self.quality.data["sequence_length"]))
        budget = {"num_steps": steps, "batch_size": BATCH_SIZE, "validate_every_steps": steps}
        training = {"kind": kind, key: str(model), **budget, "optimizer": {"lr": LR}}
        stages = {"trained": training, "evaluate": {"models": ["trained"], "speed": None}}
        return self.quality.run(Cell(self.place(name, cut, seed, num_tokens, kind), stages, seed))["trained"]

    def place(self, name: str, cut: float, seed: int, num_tokens: int, kind: str = "distill") -> str:
        """The folder of a training, below that of the benchmark."""
        return f"{round(100 * cut)}/{name.replace(' ', '-')}/{kind}-{num_tokens}/seed-{seed}"

    def arms(self) -> Iterator[real_model_rows.Measured]:
        """Each model when it was measured: per seed all contenders before and after training, then all on the tasks."""
        yield self.teacher(is_asked=False)
        for cut in self.options.cuts:
            failed: set[str] = set()
            for seed in range(self.options.seeds):
                for name in self.options.contenders:
                    yield from self.arm(name, cut, seed, failed)
                if self.asked:
                    yield self.teacher(is_asked=True)
                    for name in self.options.contenders:
                        if name not in failed:
                            yield self.answered(name, cut, seed)

    def arm(self, name: str, cut: float, seed: int, failed: set[str]) -> Iterator[real_model_rows.Measured]:
        """A contender before and after training; ``failed`` gets its name if no model came of it."""
        try:
            _, figures = self.cut(name, cut)
        except LookupError as why:
            failed.add(name)
            yield real_model_rows.Measured(name, cut, None, {}, outcome=str(why))
            return
        yield real_model_rows.Measured(name, cut, None, figures)
        yield real_model_rows.Measured(name, cut, seed, self.trained(name, cut, seed, self.options.tokens))

    def answered(self, name: str, cut: float, seed: int) -> real_model_rows.Measured:
        """A trained contender that was asked the tasks."""
        place = self.place(name, cut, seed, self.options.tokens)
        figures = self.trained(name, cut, seed, self.options.tokens)
        answers = self.ask(f"{place}/answers", str(self.folder / place / "trained" / "model"))
        return real_model_rows.Measured(name, cut, seed, figures, answers)

    def curve(self) -> Iterator[dict[str, Any]]:
        """A row per budget and method, of the first contender at the first cut."""
        name, cut = self.options.contenders[0], self.options.cuts[0]
        for num_tokens in self.options.curve:
            for kind in ("distill", "finetune"):
                seeds = [self.trained(name, cut, seed, num_tokens, kind) for seed in range(self.options.curve_seeds)]
                yield real_model_rows.curve_row(name, cut, num_tokens, kind, seeds)

    def int4(self) -> Iterator[dict[str, Any]]:
        """Rows of the uncut model in Q4_0: rounded, and trained by distillation and by cross-entropy."""
        steps = max(1, self.options.tokens // (BATCH_SIZE * self.quality.data["sequence_length"]))
        ways: dict[str, dict[str, Any]] = {
            "rounded": {"num_tokens": 0},
            "trained by distillation": {"num_steps": steps},
        }
        for way, budget in ways.items():
            training = {"batch_size": BATCH_SIZE, "optimizer": {"lr": LR / 10}, "validate_every_steps": steps}
            keys = budget | (training if "num_steps" in budget else {})
            stages = {"int4": {"kind": "quantize", "student": "teacher", "quantizer": "q4_0", **keys}}
            stages["evaluate"] = {"models": ["int4"], "speed": None}
            figures = self.quality.run(Cell(f"int4/{way.replace(' ', '-')}", stages))["int4"]
            yield {"table": "int4", "way": way, **{key: figures[key] for key in real_model_rows.FIGURES}}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, told in (("model", "folder of the model"), ("data", "folder of text and tasks"), ("work", "of all runs")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=told)
    parser.add_argument(
        "--environments", type=Path, help="folder of the other libraries' environments (default: in WORK)"
    )
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.72, 0.55, 0.85], help="shares that stay")
    parser.add_argument("--contenders", nargs="+", choices=(*OURS, *PEERS), default=list(CONTENDERS))
    parser.add_argument("--tokens", type=int, default=25_000, help="of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each contender (default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), help="none: only text")
    parser.add_argument("--limit", type=int, default=100, help="questions per task (default: %(default)s)")
    parser.add_argument("--validation-tokens", type=int, default=12_000, help="(default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["cuts"], help="(default: %(default)s)")
    parser.add_argument("--curve", type=int, nargs="+", default=[50_000, 100_000, 200_000], help="budgets of the curve")
    parser.add_argument("--curve-seeds", type=int, default=1, help="(default: %(default)s)")
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
    curve: list[dict[str, Any]] = []
    int4: list[dict[str, Any]] = []

    def write() -> list[dict[str, Any]]:
        rows = [*real_model_rows.rows(measured), *curve, *int4]
        _write(options, rows, folder)
        return rows

    if "cuts" in options.parts:
        for one in models.arms():
            measured.append(one)
            write()
    if "curve" in options.parts:
        for row in models.curve():
            curve.append(row)
            write()
    if "int4" in options.parts:
        for row in models.int4():
            int4.append(row)
            write()
    return write()


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
            f"Tasks: {options.limit} questions each, drawn with seed 0, the same for all models.",
            *real_model_rows.missing(rows, options.cuts, options.contenders),
        ],
        folder=folder,
    )


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")
