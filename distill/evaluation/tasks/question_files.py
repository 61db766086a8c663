"""Questions in JSON Lines files: prompts by templates, random selection, and few-shot examples.

A template is a text with columns in braces: ``"{question}\\nAnswer:"``. ``{choices.text}`` is a key of a mapping,
``{choices.0}`` is an item of a list, and ``{{`` is a brace.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from pydantic import field_validator, model_validator

from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.data import files
from distill.data.files import File
from distill.data.remote import is_remote
from distill.evaluation.tasks.base import Prompt, TaskSpec

QUESTIONS = Path(__file__).parent / "questions"
"""Folder of the question files that come with the package."""
BUILTIN = "builtin:"
BETWEEN = "\n\n"
"""Separator after the description and after each example."""


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        place: location, as ``file:line``.
        columns: values by name.
    """

    place: str
    columns: Mapping[str, Any]

    def value(self, path: str) -> Any:
        """The value of a column, or a value within it.

        Raises:
            InputError: it does not exist.
        """
        value: Any = self.columns
        for part in path.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                has = ", ".join(map(repr, value)) if isinstance(value, Mapping) else type(value).__name__
                raise InputError(f"{self.place}: no column {path!r} (it has {has})")
        return value

    def text(self, path: str) -> str:
        """A value as text, for a prompt.

        Raises:
            InputError: it does not exist, or is a list or a mapping.
        """
        value = self.value(path)
        if isinstance(value, str | int | float):
            return str(value)
        raise InputError(f"{self.place}: column {path!r} must hold text (got {type(value).__name__})")

    def filled(self, template: str, more: Mapping[str, str] | None = None) -> str:
        """Fill a template with the values of this row.

        Args:
            template: template; see the top of this file.
            more: values of names that are not columns.
        """
        parts = []
        for literal, name, _, _ in Formatter().parse(template):
            parts.append(literal)
            if name is not None:
                parts.append(more[name] if more and name in more else self.text(name))
        return "".join(parts)


def check_template(template: str) -> str:
    """Check a template and return it.

    Raises:
        ValueError: braces are not closed, or contain more than the name of a column.
    """
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; write a literal brace twice") from None
    for _, name, form, conversion in fields:
        if not name or form or conversion:
            raise ValueError(f"{template!r}: braces hold the name of a column, such as {{question}}")
    return template


class FileTask(TaskSpec):
    """A task whose questions are rows of a file."""

    path: str
    """File with the questions (`.jsonl`, `.jsonl.gz`), relative to the current directory, or its URL;
    builtin:python_names comes with distill."""
    prompt: str
    """Template of the question, with columns in braces."""
    delimiter: str = " "
    """Text between a question and its answer; not used with `chat_template`."""
    description: str = ""
    """Text before the examples and the question; with `chat_template`, the system message."""
    few_shot_path: str | None = None
    """File with the examples of `few_shot`; unset: they are drawn from `path`, and are not asked."""

    _templates = field_validator("prompt")(check_template)

    @model_validator(mode="after")
    def _examples_are_shown(self) -> FileTask:
        if self.few_shot_path is not None and not self.few_shot:
            raise ValueError("few_shot_path has no effect without few_shot; set few_shot, or remove it")
        return self

    def files(self) -> list[File]:
        """The files with the questions and the examples."""
        return [file for place in self._places() for file in found(place)]

    def check(self) -> None:
        """Check that the local files exist."""
        for place in self._places():
            if not is_remote(place):
                found(place)

    def _places(self) -> list[str]:
        return [place for place in (self.path, self.few_shot_path) if place is not None]

    def answer_of(self, row: Row) -> str:
        """The right answer as text, for an example."""
        raise NotImplementedError

    def question_of(self, row: Row) -> str:
        """The question as text."""
        return row.filled(self.prompt)

    def drawn(self) -> tuple[list[Row], list[Row]]:
        """Select (questions, examples).

        Raises:
            InputError: there are too few rows, or a row is not valid.
        """
        rows = _rows(found(self.path))
        examples: list[Row] = []
        if self.few_shot:
            own = self.few_shot_path is None
            choice = rows if own else _rows(found(str(self.few_shot_path)))
            if self.few_shot >= len(choice) + (not own):
                raise InputError(
                    f"few_shot ({self.few_shot}) needs more rows than {choice[0].place.rpartition(':')[0]} has"
                )
            chosen = random.Random(f"examples {self.seed}").sample(range(len(choice)), self.few_shot)
            examples = [choice[index] for index in chosen]
            rows = [row for index, row in enumerate(rows) if index not in chosen] if own else rows
        if self.limit is not None and self.limit < len(rows):
            rows = [rows[index] for index in sorted(random.Random(self.seed).sample(range(len(rows)), self.limit))]
        return rows, examples

    def rehearse(self, name: str) -> None:
        """Make all questions and right answers once."""
        rows, examples = self.drawn()
        for row in [*rows, *examples]:
            self.question_of(row)
            self.answer_of(row)

    def asked(self, question: str, examples: list[Row]) -> Prompt:
        """The prompt of a question, with the examples before it."""
        shown = [(self.question_of(row), self.answer_of(row)) for row in examples]
        if not self.chat_template:
            texts = [f"{asked}{self.delimiter}{answer}{BETWEEN}" for asked, answer in shown]
            return (self.description + BETWEEN if self.description else "") + "".join(texts) + question
        turns = [("system", self.description)] if self.description else []
        for asked, answer in shown:
            turns += [("user", asked), ("assistant", answer)]
        return tuple({"role": role, "content": text} for role, text in [*turns, ("user", question)])

    @property
    def before_answer(self) -> str:
        """The text with which an answer begins."""
        return "" if self.chat_template else self.delimiter


def found(path: str) -> list[File]:
    """The files at a path; ``builtin:NAME`` is a file of the package.

    Raises:
        InputError: the file does not exist.
    """
    if not path.startswith(BUILTIN):
        return files.find(path, [".jsonl"])
    file = QUESTIONS / f"{path.removeprefix(BUILTIN)}.jsonl"
    if file not in (known := sorted(QUESTIONS.glob("*.jsonl"))):
        raise InputError(f"{path}: no such questions; there are {', '.join(BUILTIN + one.stem for one in known)}")
    return [file]


def _rows(places: list[File]) -> list[Row]:
    rows = []
    for file in places:
        with files.opened(file) as stream:
            for number, line in enumerate(stoppable(files.lines(stream, file)), start=1):
                if line.strip():
                    rows.append(_parsed(line, f"{file.as_posix()}:{number}"))
    if not rows:
        raise InputError(f"{places[0]}: has no rows; a task needs at least one question")
    return rows


def _parsed(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # fails for an unpaired surrogate
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not a row of JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row must be a JSON object (got {type(row).__name__})")
    return Row(place, row)
