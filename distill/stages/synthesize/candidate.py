"""A row before it is kept or dropped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distill.core.artifact import hash_of
from distill.data.base import Message

_WORD = re.compile(r"\w+(?:['\u2019.,/-]\w+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")  # of 1897-1912 and 9:30 each part
_NAME = re.compile(r"(?<![.!?:]\s)(?<!^)(?<![\"'(])\b[A-Z][\w'\u2019-]+")


@dataclass(frozen=True)
class Candidate:
    """What may become a row.

    Attributes:
        messages: what is said before the answer.
        answer: what the assistant says; of a row of text the text.
        document: the text that the answer is taken from; empty where there is none.
        source: where it comes from, such as the id of a chunk.
        is_invented: whether a writer has written the question too, who may have repeated placeholders of its prompt.
        finish: how the reply ended; see :class:`~distill.stages.synthesize.requests.Reply`.
        flaw: why the reply could not be read; empty if it could.
        more: what is stored beside it.
    """

    messages: tuple[Message, ...]
    answer: str
    document: str = ""
    source: str = ""
    is_invented: bool = False
    finish: str = "stop"
    flaw: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The last thing that the user says; empty for text."""
        return str(self.messages[-1]["content"]) if self.messages else ""

    @property
    def id(self) -> str:
        """Stands for the row."""
        return hash_of(self.messages, self.answer, self.document)

    def with_more(self, **more: Any) -> Candidate:
        """The same with further values stored beside it."""
        return replace(self, more={**self.more, **more})

    def row(self) -> dict[str, Any]:
        """What is written."""
        more = dict(self.more)
        if not self.messages:
            return {"id": self.id, "text": self.answer, "source": self.source, **more}
        said = [*self.messages, {"role": "assistant", "content": self.answer}]
        document = {"document": self.document} if self.document else {}
        return {"id": self.id, "messages": said, **document, "source": self.source, **more}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.casefold() for word in _WORD.findall(text)]


def numbers_of(text: str) -> set[str]:
    """The numbers in a text, without the commas between thousands."""
    return {re.sub(r",(?=\d{3}\b)", "", number) for number in _NUMBER.findall(text)}


def names_of(text: str) -> set[str]:
    """Words with a capital letter that begin no sentence, in lower case."""
    return {without_possessive(name.casefold()) for name in _NAME.findall(text)}


def without_possessive(word: str) -> str:
    """A word without the 's of a possessive."""
    return word.removesuffix("'s").removesuffix("\u2019s")
