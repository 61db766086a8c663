"""The models of ``real_models`` and their cells: cut, trained, asked; each is measured once and kept in WORK."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import real_model_rows
from benchmarks.matrix import Cell, Matrix, Unfinished
from benchmarks.real_model_cuts import CRITERIA, OURS, Sizes, sizes, stage
from benchmarks.real_model_peers import RECORD, Asked, Peer, attempt
from benchmarks.real_model_tasks import TASKS, section, tasks
from distill.core.artifact import write_text
from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.data.spec import DataSpec
from distill.data.tokenizer import load_tokenizer
from distill.models.configs import config_of
from distill.models.size import measure_size

BATCH_SIZE, LR = 2, 3e-4
"""Sequences per step, and the learning rate of all trainings, which nobody tuned for one of the contenders."""
SEARCH = {"num_measured": 6, "num_sequences": 8, "train": {"num_candidates": 2, "num_tokens": 4096, "batch_size": 2}}
"""Keys of ``prune.search``, for a model that a CPU trains."""


def place(name: str, cut: float) -> str:
    """The folder of a contender at a share, below that of the benchmark."""
    return f"{round(100 * cut)}/{name.replace(' ', '-')}"


def training_place(name: str, cut: float, seed: int, num_tokens: int, kind: str = "distill") -> str:
    """The folder of a training, below that of the benchmark."""
    return f"{place(name, cut)}/{kind}-{num_tokens}/seed-{seed}"


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
        self.quality, self.answers = (
            Matrix(self.folder, options.model, one, only_finished=options.only_finished)
            for one in (data | options.text, data | options.text | {"validation_tokens": 1024})
        )
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
        """The attempt of another library.

        Raises:
            Unfinished: it was not made, and only what is finished is read.
        """
        folder = self.folder / place(name, cut) / "attempt"
        if self.options.only_finished and not (folder / RECORD).is_file():
            raise Unfinished(f"{name} was not tried")
        wanted = self.sizes(cut)
        asked = Asked(
            model=str(self.options.model),
            calibration=str(self.calibration()),
            intermediate_size=wanted.intermediate_size,
            num_hidden_layers=wanted.num_hidden_layers,
        )
        return attempt(name, asked, folder, self.options.environments)

    def cut(self, name: str, cut: float) -> tuple[Path, dict[str, Any]]:
        """(folder of a cut model, its figures before any training).

        Raises:
            LookupError: a library made no model.
        """
        cell = f"{place(name, cut)}/cut"
        if name in OURS:
            stages = {"prune": stage(name, self.sizes(cut), self.options.search)}
            model, reference = self.folder / cell / "prune" / "model", "prune"
        else:
            peer = self.peer(name, cut)
            if peer.folder is None:
                raise LookupError(peer.outcome)
            stages, model, reference = {}, peer.folder, str(peer.folder)
        evaluate = {"evaluate": {"models": [reference], "speed": None}}
        return model, self.quality.run(Cell(cell, {**stages, **evaluate}))[reference]

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
        return self.quality.run(Cell(training_place(name, cut, seed, num_tokens, kind), stages, seed))["trained"]

    def arms(self) -> Iterator[real_model_rows.Measured]:
        """Each model when it was measured: per share all cuts, then per seed all trainings, then all answers."""
        with suppress(Unfinished):
            yield self.teacher(is_asked=False)
        for cut in self.options.cuts:
            able = []
            for name in self.options.contenders:
                with suppress(Unfinished):
                    yield (start := self.start(name, cut))
                    able += [name] * (not start.outcome)
            for seed in range(self.options.seeds):
                for name in able:
                    with suppress(Unfinished):
                        figures = self.trained(name, cut, seed, self.options.tokens)
                        yield real_model_rows.Measured(name, cut, seed, figures)
                if self.asked:
                    yield from self.answers_of_all(able, cut, seed)

    def start(self, name: str, cut: float) -> real_model_rows.Measured:
        """A contender before training, or why no model came of it."""
        try:
            return real_model_rows.Measured(name, cut, None, self.cut(name, cut)[1])
        except LookupError as why:
            return real_model_rows.Measured(name, cut, None, {}, outcome=str(why))

    def answers_of_all(self, names: list[str], cut: float, seed: int) -> Iterator[real_model_rows.Measured]:
        """The uncut model and the trained contenders, each when it was asked the tasks."""
        with suppress(Unfinished):
            yield self.teacher(is_asked=True)
        for name in names:
            with suppress(Unfinished):
                yield self.answered(name, cut, seed)

    def answered(self, name: str, cut: float, seed: int) -> real_model_rows.Measured:
        """A trained contender that was asked the tasks."""
        cell = training_place(name, cut, seed, self.options.tokens)
        figures = self.trained(name, cut, seed, self.options.tokens)
        answers = self.ask(f"{cell}/answers", str(self.folder / cell / "trained" / "model"))
        return real_model_rows.Measured(name, cut, seed, figures, answers)

    def criteria(self) -> Iterator[dict[str, Any]]:
        """A row per criterion for MLP neurons, before training, at the first cut."""
        cut = self.options.cuts[0]
        for name, settings in CRITERIA.items():
            keep = {"intermediate_size": self.sizes(cut).intermediate_size}
            prune = {"kind": "prune", "keep": keep, "mlp_criterion": {"kind": name} | settings}
            stages = {"prune": prune, "evaluate": {"models": ["prune"], "speed": None}}
            with suppress(Unfinished):
                figures = self.quality.run(Cell(place(f"criteria {name.replace(',', '')}", cut), stages))["prune"]
                row = {"table": "criteria", "kept": round(100 * cut), "criterion": name}
                yield row | {key: figures[key] for key in real_model_rows.FIGURES}

    def curve(self) -> Iterator[dict[str, Any]]:
        """A row per budget and method, of the first contender at the first cut."""
        name, cut = self.options.contenders[0], self.options.cuts[0]
        for num_tokens in self.options.curve:
            for kind in ("distill", "finetune"):
                seeds: list[dict[str, Any]] = []
                with suppress(Unfinished):
                    for seed in range(self.options.curve_seeds):
                        seeds.append(self.trained(name, cut, seed, num_tokens, kind))
                if seeds:
                    yield real_model_rows.curve_row(name, cut, num_tokens, kind, seeds)

    def int4(self) -> Iterator[dict[str, Any]]:
        """Rows of the uncut model in Q4_0: rounded, and trained by distillation."""
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
            with suppress(Unfinished):
                figures = self.quality.run(Cell(f"int4/{way.replace(' ', '-')}", stages))["int4"]
                yield {"table": "int4", "way": way, **{key: figures[key] for key in real_model_rows.FIGURES}}
