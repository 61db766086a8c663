"""Tasks asked of the models of an evaluate stage; what a model has answered is kept, so that a kill loses one task."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.core.artifact import hash_of, write_text
from distill.core.errors import InputError
from distill.core.run_folder import CHECKPOINTS
from distill.core.stored import read_checked, write_checked
from distill.data.chat_spec import ChatSpec
from distill.evaluation.tasks.base import Answers, LanguageModel, TaskSpec
from distill.evaluation.tasks.in_memory import ModelInMemory
from distill.reporting.task_scores import TaskScores, to_json
from distill.reporting.tradeoff import Row
from distill.stages.evaluate.score_pairs import compared
from distill.stages.evaluate.stored_rows import SCORES
from distill.stages.progress_lines import ProgressLines
from distill.stages.session import Session, StageContext

FOLDER = "tasks"
"""Folder of the stage with every answer of every model: ``tasks/TASK/MODEL.json``."""


class Asking:
    """Asks models the tasks of a stage.

    Args:
        context: of the stage.
        tasks: by name.
        batch_size: of the stage.
        num_models: how many will be asked.
    """

    def __init__(self, context: StageContext, tasks: Mapping[str, TaskSpec], *, batch_size: int, num_models: int):
        self._context, self._tasks, self._batch_size = context, tasks, batch_size
        self._given: dict[tuple[str, str], Answers] = {}
        self._progress = ProgressLines(context, max(1, len(tasks) * num_models), ("tasks", "asked"))

    def in_memory(self, model: Any, session: Session) -> LanguageModel:
        """A model of transformers that is asked.

        Args:
            model: on its device.
            session: in the model's vocabulary.
        """
        batch_tokens = self._batch_size * session.data.sequence_length
        chat = session.data.chat or ChatSpec()
        return ModelInMemory(model, session.tokenizer(), chat=chat, batch_tokens=batch_tokens)

    def ask(self, reference: str, make: Callable[[], LanguageModel]) -> None:
        """Ask one model everything that it has not answered before a kill.

        An engine is not asked tasks of lm-evaluation-harness, which holds models of transformers only.

        Args:
            reference: of the model.
            make: makes what is asked.

        Raises:
            InputError: a task cannot be asked.
        """
        if not self._tasks:
            return
        lm = make()
        for name, task in self._tasks.items():
            if task.kind == "lm_eval" and lm.model is None:
                self._context.say(f"{reference}: not asked {name}, as lm-evaluation-harness asks transformers only")
                continue
            file, about = self._file(CHECKPOINTS, name, reference), self._about(name, reference)
            given = _kept(file, about)
            if given is None:
                try:
                    given = task.ask(lm, name)
                except InputError as error:
                    raise InputError(f"tasks.{name}: {error}") from None
                write_checked(file, asdict(given), about)
            self._given[name, reference] = self._progress.count(given)

    def add(self, name: str, reference: str, given: Answers) -> None:
        """Add what a model answered elsewhere, so that models are compared in pairs.

        Args:
            name: of the task.
            reference: of the model.
            given: its answers.
        """
        self._given[name, reference] = given

    def finish(self, rows: Sequence[Row]) -> TaskScores:
        """Write every answer to ``tasks/``, and scores and pairs to ``tasks.json``; nothing without tasks."""
        if not self._given:
            return TaskScores()
        for (name, reference), given in self._given.items():
            write_checked(self._file(FOLDER, name, reference), asdict(given), self._about(name, reference))
        scores = compared(rows, self._given)
        write_text(self._context.folder / SCORES, to_json(scores))
        return scores

    def _file(self, folder: str, name: str, reference: str) -> Path:
        """A model may be a path or a Hub id, and another one may differ by what no file name holds."""
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", reference)
        model = plain if plain == reference else f"{plain[-60:]}-{hash_of(reference)[:8]}"
        place = self._context.folder / folder
        return (place / FOLDER if folder == CHECKPOINTS else place) / name / f"{model}.json"

    def _about(self, name: str, reference: str) -> str:
        return f"{self._context.input_hash} {name} {reference}"


def _kept(file: Path, about: str) -> Answers | None:
    """What a model answered before a kill; None where there is nothing that is whole."""
    if not file.is_file():
        return None
    try:
        return read_checked(file, Answers, "", about)
    except InputError:
        return None
