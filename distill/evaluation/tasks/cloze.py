"""Cloze: predict the last word of a passage, which can only be known from the whole passage.

An answer is right if each token of the word is the most likely token at its position, so nothing has to be generated
and compared. Source: LAMBADA (Paperno et al. 2016, arXiv:1606.06031), as implemented in lm-evaluation-harness.
"""

from __future__ import annotations

import math
from typing import Literal

from distill.core.errors import InputError
from distill.evaluation.tasks.base import Answer, Answers, LanguageModel, asked_hash
from distill.evaluation.tasks.question_files import FileTask, Row


class Cloze(FileTask):
    """Predict the last word of a passage: right if each of its tokens is the most likely token."""

    kind: Literal["cloze"] = "cloze"
    prompt: str = "{context}"
    """Template of the passage without its last word; with `answer: null`, of the whole passage."""
    answer: str | None = "continuation"
    """Column with the last word; null: the last word of the prompt."""

    def ask(self, lm: LanguageModel, name: str) -> Answers:
        """Compute the log-likelihoods of all words."""
        rows, examples = self.drawn()
        words = [self.answer_of(row) for row in rows]
        asked = [
            (self.asked(self.question_of(row), examples), self.before_answer + word)
            for row, word in zip(rows, words, strict=True)
        ]
        found = lm.log_likelihoods(asked)
        answers = [
            Answer(
                id=row.place,
                asked=asked_hash(what),
                answer=word if one.is_greedy else "",
                wanted=word,
                right=one.is_greedy,
                scores=(one.nats if math.isfinite(one.nats) else None,),
                cut=one.cut,
            )
            for row, word, what, one in zip(rows, words, asked, found, strict=True)
        ]
        return Answers(tuple(answers), chance=0.0)

    def answer_of(self, row: Row) -> str:
        """The last word."""
        return self._split(row)[1]

    def question_of(self, row: Row) -> str:
        """The passage without its last word."""
        return self._split(row)[0]

    def _split(self, row: Row) -> tuple[str, str]:
        text = row.filled(self.prompt)
        before, word = text, ""
        if self.answer is not None:
            word = row.text(self.answer)
        elif len(parts := text.rsplit(None, 1)) == 2:
            before, word = parts
        if not word.strip():
            raise InputError(f"{row.place}: there is no last word to predict")
        return before, word
