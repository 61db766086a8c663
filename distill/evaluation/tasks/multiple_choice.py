"""Multiple choice: the model's answer is the choice with the highest log-likelihood after the question.

    answer            = argmax over choices of log p(choice | question)
    normalised answer = argmax over choices of log p(choice | question) / characters of the choice

The first score prefers short choices, and the second compensates for it; lm-evaluation-harness calls them acc and
acc_norm (Gao et al. 2021). If the question lists the choices and the answer is a letter, both scores are equal and a
question needs one forward pass. But small models choose by the letter and not by the content of the choice.
"""

from __future__ import annotations

import math
import random
from typing import Literal

from pydantic import Field, field_validator, model_validator

from distill.core.errors import InputError
from distill.evaluation.tasks.base import Answer, Answers, LanguageModel, Measure, Prompt, asked_hash
from distill.evaluation.tasks.question_files import FileTask, Row, check_template

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOICE, OPTIONS = "{choice}", "{options}"


class MultipleChoice(FileTask):
    """Choose among given answers by their log-likelihood: accuracy, and length-normalised accuracy."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    prompt: str = "{query}"
    """Template of the question, with columns in braces. {options} is the list of choices with letters; {choice} is the
    choice that is scored (if the choices are within the question, as in Winogrande)."""
    choices: str | list[str] = Field("choices", min_length=1)
    """Column with the list of choices, or a list of templates of the choices."""
    answer: str | int = "gold"
    """Column with the right choice: its index from 0, its text, its label, or a boolean (true is the second choice); or
    an index that is the same for all rows."""
    labels: str | None = None
    """Column with the labels of the choices, such as choices.label, if the answer is a label (A, B, C, D)."""
    continuation: str = "{choice}"
    """Template of the text that is scored after the question."""
    answer_by: Literal["text", "letter"] = "text"
    """What is scored. text: the choice; letter: the letter of the choice in the list that {options} writes."""
    order: Literal["fixed", "shuffled"] = "fixed"
    """Order of the choices. shuffled: a random order for each question, drawn by seed."""
    measure: Measure = "accuracy"
    """Score that is used to compare models, in the verdict, and by `require`."""

    _continuation = field_validator("continuation")(check_template)

    @field_validator("choices")
    @classmethod
    def _several(cls, choices: str | list[str]) -> str | list[str]:
        if isinstance(choices, list):
            for one in choices:
                check_template(one)
            if len(choices) < 2:
                raise ValueError(f"needs two choices or more (got {len(choices)})")
        return choices

    @model_validator(mode="after")
    def _letters_are_shown(self) -> MultipleChoice:
        if self.answer_by == "letter" and OPTIONS not in self.prompt:
            raise ValueError("answer_by: letter needs {options} in the prompt, which lists the choices with letters")
        if self.answer_by == "letter" and self.continuation != CHOICE:
            raise ValueError("continuation has no effect with answer_by: letter; remove it")
        return self

    def ask(self, lm: LanguageModel, name: str) -> Answers:
        """Compute the log-likelihoods of all choices of all questions."""
        rows, examples = self.drawn()
        made = [self._question(row) for row in rows]
        asked = [(self._before(row, choices, k, examples), self.before_answer + texts[k])
                 for row, (choices, texts, _) in zip(rows, made, strict=True) for k in range(len(choices))]  # fmt: skip
        found = iter(zip(asked, lm.log_likelihoods(asked), strict=True))
        answers = []
        for row, (choices, texts, gold) in zip(rows, made, strict=True):
            own = [next(found) for _ in choices]
            nats = [one.nats for _, one in own]
            best, normal = _best(nats), _best([n / len(text) for n, text in zip(nats, texts, strict=True)])
            answers.append(
                Answer(
                    id=row.place,
                    asked=asked_hash([what for what, _ in own], gold),
                    answer="" if best is None else choices[best],
                    wanted=choices[gold],
                    right=best == gold,
                    normalized_answer="" if normal is None else choices[normal],
                    normalized_right=normal == gold,
                    scores=tuple(n if math.isfinite(n) else None for n in nats),
                    cut=any(one.cut for _, one in own),
                )
            )
        chance = sum(1 / len(choices) for choices, _, _ in made) / len(made)
        return Answers(tuple(answers), chance, self.measure)

    def answer_of(self, row: Row) -> str:
        """The scored text of the right choice."""
        _, texts, gold = self._question(row)
        return texts[gold]

    def question_of(self, row: Row) -> str:
        """The question, with the right choice filled in if the template contains it."""
        choices, _, gold = self._question(row)
        return self._filled(row, choices, gold)

    def _before(self, row: Row, choices: list[str], k: int, examples: list[Row]) -> Prompt:
        return self.asked(self._filled(row, choices, k), examples)

    def _filled(self, row: Row, choices: list[str], k: int) -> str:
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        return row.filled(self.prompt, {"choice": choices[k], "options": options})

    def _question(self, row: Row) -> tuple[list[str], list[str], int]:
        """(choices, scored text of each, index of the right choice), in the order in which they are shown."""
        choices, gold = self._choices(row), 0
        gold = self._gold(row, choices)
        if self.order == "shuffled":
            order = random.Random(f"{self.seed} {row.place.rpartition(':')[2]}").sample(
                range(len(choices)), len(choices)
            )
            choices, gold = [choices[k] for k in order], order.index(gold)
        if self.answer_by == "letter":
            return choices, list(LETTERS[: len(choices)]), gold
        texts = [row.filled(self.continuation, {"choice": choice}) for choice in choices]
        if empty := [k for k, text in enumerate(texts) if not text]:
            raise InputError(f"{row.place}: choice {empty[0]} is empty, so it cannot be scored")
        return choices, texts, gold

    def _choices(self, row: Row) -> list[str]:
        if isinstance(self.choices, list):
            return [row.filled(one) for one in self.choices]
        found = row.value(self.choices)
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise InputError(f"{row.place}: column {self.choices!r} must hold a list of texts")
        if not 2 <= len(found) <= len(LETTERS):
            raise InputError(f"{row.place}: {len(found)} choices, expected 2 to {len(LETTERS)}")
        return found

    def _gold(self, row: Row, choices: list[str]) -> int:
        found = self.answer if isinstance(self.answer, int) else row.value(self.answer)
        labels = row.value(self.labels) if self.labels is not None else ()
        if isinstance(found, int):  # or a bool: true is the second choice
            if 0 <= found < len(choices):
                return int(found)
        elif isinstance(found, str):
            for known in (labels, choices):
                if isinstance(known, list) and known.count(found) == 1:
                    return known.index(found)
        raise InputError(
            f"{row.place}: the answer {found!r} is not one of the {len(choices)} choices: expected an index from 0, "
            "the text of a choice, or one of the labels"
        )


def _best(scores: list[float]) -> int | None:
    """Index of the highest score, the first if there are several; None if a score is NaN."""
    if any(math.isnan(score) for score in scores):
        return None
    return max(range(len(scores)), key=scores.__getitem__)
