"""Generate: the model generates an answer, which must be equal to a right answer after normalisation.

words    lower case, without punctuation and the articles a, an, the   (like SQuAD; Rajpurkar et al. 2016)
number   the last number in the text, without thousands separators     (like GSM8K; Cobbe et al. 2021)
exact    the text without leading and trailing whitespace
"""

from __future__ import annotations

import re
import string
from typing import Literal

from pydantic import Field, field_validator

from distill.core.errors import InputError
from distill.evaluation.tasks.base import Answer, Answers, LanguageModel, asked_hash
from distill.evaluation.tasks.question_files import BETWEEN, FileTask, Row

Normalize = Literal["words", "number", "exact"]
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Generate(FileTask):
    """Generate an answer greedily, and compare it with the right answer after normalisation (exact match)."""

    kind: Literal["generate"] = "generate"
    prompt: str = "{question}"
    """Template of the question, with columns in braces."""
    answer: str = "answer"
    """Column with the right answer, or with a list of right answers."""
    max_new_tokens: int = Field(64, ge=1)
    """Largest number of tokens that the model generates."""
    stop: list[str] = Field(["\n"])
    """Stop strings, at which the answer ends; with `few_shot`, an empty line is a stop string too. Empty: only the
    end-of-text token ends an answer."""
    extract: str | None = None
    """Regular expression whose last match in the generated text (its first group, if it has one) is the answer; unset:
    the whole text."""
    extract_answer: str | None = None
    """Regular expression for the right answer, used in the same way, such as "#### (.+)" for GSM8K."""
    normalize: Normalize = "words"
    """How texts are normalised. words: without case, punctuation and articles; number: the last number; exact:
    unchanged."""

    @field_validator("extract", "extract_answer")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return pattern

    @field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("an empty text would end every answer before it begins; remove it")
        return stop

    def ask(self, lm: LanguageModel, name: str) -> Answers:
        """Generate the answers to all questions, in batches."""
        rows, examples = self.drawn()
        prompts = [self.asked(self.question_of(row), examples) for row in rows]
        stops = [*self.stop, *([BETWEEN] if self.few_shot and not self.chat_template else [])]
        written = lm.written(prompts, new_tokens=self.max_new_tokens, stops=stops)
        answers = []
        for row, prompt, (text, cut) in zip(rows, prompts, written, strict=True):
            wanted = self._accepted(row)
            given = normalized(extracted(text, self.extract), self.normalize)
            answers.append(
                Answer(
                    id=row.place,
                    asked=asked_hash(prompt, wanted, self.max_new_tokens, stops),
                    answer=text.strip(),
                    wanted=wanted[0],
                    right=bool(given) and given in [normalized(one, self.normalize) for one in wanted],
                    cut=cut,
                )
            )
        return Answers(tuple(answers), chance=0.0)

    def rehearse(self, name: str) -> None:
        """Make all questions, and extract all their right answers."""
        super().rehearse(name)
        for row in self.drawn()[0]:
            self._accepted(row)

    def answer_of(self, row: Row) -> str:
        """The first right answer, before extraction, because an example shows how the answer is derived."""
        found = row.value(self.answer)
        return str(found[0]) if isinstance(found, list) and found else row.text(self.answer)

    def _accepted(self, row: Row) -> list[str]:
        found = row.value(self.answer)
        several = found if isinstance(found, list) else [found]
        texts = [extracted(str(one), self.extract_answer) for one in several if isinstance(one, str | int | float)]
        if len(texts) < len(several) or not texts or not all(normalized(one, self.normalize) for one in texts):
            raise InputError(
                f"{row.place}: column {self.answer!r} must hold a text, or a list of texts, which are not empty after "
                "extract_answer and normalize"
            )
        return texts


def extracted(text: str, pattern: str | None) -> str:
    """The last match of a regular expression (its first group, if it has one); empty if there is no match."""
    if pattern is None:
        return text
    found = list(re.finditer(pattern, text))
    return (found[-1][1] if found[-1].re.groups else found[-1][0]) or "" if found else ""


def normalized(text: str, how: Normalize) -> str:
    """A text as it is compared; empty if nothing remains."""
    if how == "number":
        found = _NUMBER.findall(text)
        return _plain(found[-1].replace(",", "")) if found else ""
    if how == "exact":
        return text.strip()
    words = text.lower().translate(_PUNCTUATION).split()
    kept = " ".join(word for word in words if word not in ("a", "an", "the"))
    return kept or text.lower().strip()  # if only articles remain, they are the answer


def _plain(number: str) -> str:
    """A number in its shortest form, so that 18.0 and 18 are equal."""
    whole, point, rest = number.partition(".")
    rest = rest.rstrip("0")
    return f"{whole or '0'}.{rest}" if point and rest else whole or "0"
