"""Questions on documents, asked with the closed and the open book, before and after a training.

A question is answered from memory (closed book) or with its document before it (open book). The exam is made by the
synthesize stage before anything is trained. Rows that repeat an exam question are dropped from the training; other rows
may state the same fact in other words, as the facts of a document are what is trained.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.data.files import File, find
from distill.stages.base import View
from distill.stages.checks import check_task
from distill.stages.forecast import Forecast
from distill.stages.synthesize.spec import Synthesize
from distill.stages.synthesize.writer_spec import ServerSpec, WriterChoice
from distill.stages.text import ReadsText

ROWS, PAGE, ANSWERS = "exam.json", "exam.md", "answers.jsonl"


class Exam(ReadsText):
    """Ask models the questions that a synthesize stage has kept out, and compare them question by question."""

    kind: Literal["exam"] = "exam"
    questions: str
    """The synthesize stage that made the questions, or a file of questions, such as runs/NAME/STAGE/exam.jsonl."""
    models: tuple[str, ...] = ()
    """Models to ask; empty: the baseline and every model of the earlier stages."""
    baseline: str = "teacher"
    """Model that the others are compared with: the student before its training."""
    open_book: Literal["baseline", "all", "none"] = "baseline"
    """Models that are also asked with the document before the question: the baseline, whose answers are the ceiling;
    all; or none."""
    num_choices: int = Field(4, ge=0, le=26)
    """Number of choices in the multiple-choice form of each question: the reference answer, and answers to other
    questions of its group, in random order; 0 is off."""
    max_new_tokens: int = Field(64, ge=0)
    """Largest number of tokens of a written answer; 0 writes none, which is much faster and leaves nats and choices."""
    batch_size: int = Field(8, ge=1)
    """Number of rows of data.sequence_length tokens per batch."""
    judge: WriterChoice | None = None
    """Judge that grades the written answers from 1 to 5 against the reference: a model with a chat template, or a
    server, like the writer of synthesize; unset: no grades."""
    forgetting: bool = True
    """Whether to measure bits per byte on the validation text of this stage's data too, which shows forgetting."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The models that are named, and the baseline."""
        found: list[tuple[tuple[str | int, ...], str]] = [(("models", i), one) for i, one in enumerate(self.models)]
        found.append((("baseline",), self.baseline))
        return [*found, (("judge",), self.judge)] if isinstance(self.judge, str) else found

    def same_tokens(self) -> list[tuple[tuple[str | int, ...], str]]:
        """All but the judge, which reads text."""
        return [pair for pair in self.references() if pair[0] != ("judge",)]

    def reads(self, earlier: list[str]) -> list[str]:
        """The questions, and the models that are named, or all."""
        made = [] if self.is_file else [self.questions]
        made += [self.judge] if isinstance(self.judge, str) else []
        return list(dict.fromkeys([self.baseline, *(self.models or earlier), *made]))

    @property
    def is_file(self) -> bool:
        """Whether the questions are in a file that is named."""
        return self.questions.endswith(".jsonl")

    def files(self) -> list[File]:
        """The file of questions."""
        return list(find(self.questions, [".jsonl"])) if self.is_file else []

    def vocabulary_of(self) -> str | None:
        """Each model answers in its own tokens."""
        return None

    def result(self, figures: dict[str, Any]) -> str:
        """The scores."""
        return ROWS

    def shown(self, figures: dict[str, Any]) -> str:
        """The table."""
        return PAGE

    def forecast(self, view: View) -> Forecast:
        """Who is asked.

        Raises:
            InputError: the questions are of no stage that makes some.
        """
        check_task(self, view)
        notes = self.judge.notes() if isinstance(self.judge, ServerSpec) else []
        names = list(view.stages)
        earlier = [name for name in names[: names.index(view.name)] if view.stages[name].makes_data]
        if self.is_file:
            self.files()
        elif self.questions not in earlier:
            raise InputError(
                f"questions: no earlier stage {self.questions!r} that makes an exam (there are "
                f"{', '.join(earlier) or 'none'}); name a synthesize stage whose make has an exam"
            )
        made_by = view.stages.get(self.questions)
        if isinstance(made_by, Synthesize) and (why := made_by.make.why_no_exam()) is not None:
            raise InputError(f"questions: {self.questions}: {why}")
        who = ", ".join(self.models) if self.models else "every model before it"
        return Forecast(reads=self.reading(), does=[f"asks {who} the questions of {self.questions}"], notes=notes)

    def rehearse(self, context: Any) -> None:
        """Compare the models' tokens with the run's, and read the text, on which something must be there to measure."""
        from distill.stages.rehearsal import check_outside, check_writer

        check_outside(context, self.baseline, *self.models)
        check_writer(context, self.judge)
        if self.forgetting and not context.session.awaits_rows:
            context.session.corpus()
