"""Grades of written answers by a judge, who sees question, reference and answer, and not whose answer it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill.stages.exam.scores import Sitting
from distill.stages.session import StageContext
from distill.stages.synthesize.asker import Asker
from distill.stages.synthesize.exam_spec import Question
from distill.stages.synthesize.replies import Replies
from distill.stages.synthesize.requests import Request, asked
from distill.stages.synthesize.writer import writer_of
from distill.stages.synthesize.writer_spec import ServerSpec

GRADE = (
    "Grade an answer from 1 to 5 against the right answer.\n\nQuestion: {question}\nRight answer: {reference}\n"
    "Answer to grade: {answer}\n\n5: it says the same. 4: it says the same with small gaps. 3: half of it is right. 2: "
    "little of it is right. 1: it is wrong or says nothing. Reply with the number alone."
)


def graded(
    judge: str | ServerSpec,
    batch_size: int,
    context: StageContext,
    questions: Sequence[Question],
    sittings: Mapping[tuple[str, str], Sitting],
) -> dict[tuple[str, str], Sitting]:
    """The same answers with grades. Equal answers to a question are graded once; what was graded survives a kill.

    Args:
        judge: a model, or a server.
        batch_size: answers that a model grades at once.
        context: of the stage.
        questions: of the exam.
        sittings: answers to all of them.
    """
    writer = writer_of(judge, batch_size, context)
    asker = Asker(context, writer, Replies(context.folder, writer.identity()))
    requests: list[Request] = []
    for given in sittings.values():
        for question, answer in zip(questions, given.answers, strict=True):
            said = GRADE.format(
                question=question.question, reference=question.answer, answer=answer.text or "(nothing)"
            )
            requests.append(asked(said, 8))
    replies = iter(asker.ask("grades", requests))
    made = {}
    for key, given in sittings.items():
        made[key] = Sitting(tuple(replace(one, grade=grade_in(next(replies).text)) for one in given.answers))
    return made


def grade_in(reply: str) -> int | None:
    """The grade in a reply; None if there is none."""
    found = re.search(r"(?<![\d.])[1-5](?![\d])", reply)
    return int(found[0]) if found else None
