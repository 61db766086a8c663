"""The questions of an exam, and the choices of their multiple-choice form."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from distill.core.errors import InputError
from distill.stages.synthesize.candidate import words_of
from distill.stages.synthesize.exam_spec import Question
from distill.stages.synthesize.row_files import read_lines

_QUESTION: TypeAdapter[Question] = TypeAdapter(Question)


def read_questions(file: Path, stage: str) -> list[Question]:
    """The questions that a stage has made.

    Args:
        file: where they are.
        stage: its name, for messages.

    Raises:
        InputError: there are none.
    """
    try:
        found = [_QUESTION.validate_python(row) for row in read_lines(file)]
    except ValidationError as error:
        raise InputError(f"{file}: no exam question ({error.errors()[0]['msg']}); run {stage} again") from None
    if not found:
        raise InputError(f"questions: {stage} has made no exam question; give its make an exam, as exam: {{}}")
    return found


def choices_of(questions: Sequence[Question], count: int, seed: int) -> list[tuple[list[str], int] | None]:
    """The choices of each question, and the place of the right one.

    Wrong choices are answers to other questions of the same group, so that all sound alike. The key is checked: no
    wrong choice says the same words as the right one, or the same as another choice. None where there are too few.

    Args:
        questions: of the exam.
        count: choices of each.
        seed: decides the choices and their order.
    """
    made: list[tuple[list[str], int] | None] = []
    for number, question in enumerate(questions):
        dice = random.Random(f"{seed} {number} {question.question}")
        others = [one.answer for one in questions if one.group == question.group and one is not question]
        dice.shuffle(others)
        chosen, said = [question.answer], [set(words_of(question.answer))]
        for other in others:
            words = set(words_of(other))
            if len(chosen) < count and words and not any(words <= one or one <= words for one in said):
                chosen.append(other)
                said.append(words)
        if len(chosen) < max(2, count):
            made.append(None)
            continue
        order = list(range(len(chosen)))
        dice.shuffle(order)
        made.append(([chosen[place] for place in order], order.index(0)))
    return made
