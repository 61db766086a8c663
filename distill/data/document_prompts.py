"""Prompts with a document before them, for a teacher that reads more than its student.

    student reads    user: question                  assistant: answer
    teacher reads    user: document, question        assistant: answer

Both rows end with the tokens of the answer. A row of the student becomes that of its teacher by replacing the tokens
before each counted turn. This file maps the ids of a prompt to the ids of the same prompt with its document. The key is
the prompt, so a prompt is also found in packed rows and before sampled answers. Therefore two rows with the same prompt
must have the same document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from distill.core.errors import InputError
from distill.data.base import Conversation, digest
from distill.data.chat_encoder import ChatEncoder
from distill.data.chat_spec import ChatSpec
from distill.data.encoder import Encoded, Row
from distill.data.spec import DataSpec
from distill.data.with_document import messages_with_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AT_ONCE = 256
ANY_LENGTH = 1 << 30


@dataclass
class DocumentPrompts:
    """Ids of prompts with their documents.

    Attributes:
        by_prompt: bytes of the ids of a prompt (int64) -> int64 [tokens] of the prompt with its document.
        num_rows: conversations that have a document.
        num_without: conversations that have none, which the teacher reads as they are.
        num_refused: conversations with a document in which the tokens of the answer differ from those without it.
        longest: tokens of the longest row with its document and answer.
        longest_id: name of that row in messages to the user.
    """

    by_prompt: dict[bytes, np.ndarray] = field(default_factory=dict)
    num_rows: int = 0
    num_without: int = 0
    num_refused: int = 0
    longest: int = 0
    longest_id: str = ""

    def find(self, prompt: np.ndarray) -> np.ndarray | None:
        """The prompt with its document; None if it has none.

        Args:
            prompt: int64 [tokens].
        """
        return self.by_prompt.get(_key(prompt))

    def check(self, positions: int | None) -> None:
        """Check that a teacher can read the rows.

        Args:
            positions: context length of the teacher; None if unknown.

        Raises:
            InputError: no row has a document, some cannot be aligned, or one is too long.
        """
        if not self.by_prompt:
            raise InputError(
                "teacher_reads: document, but no row of the text has a column document; train on the rows of a "
                "synthesize stage (data: <stage>), or on a chat source with this column"
            )
        if self.num_refused:
            raise InputError(
                f"teacher_reads: document: in {self.num_refused:,} of {self.num_rows:,} rows the answer has other "
                "tokens after the document than without it; use a chat template that writes both prompts alike"
            )
        if positions is not None and self.longest > positions:
            raise InputError(
                f"teacher_reads: document: {self.longest_id} has {self.longest:,} tokens with its document, more than "
                f"the teacher's {positions:,} positions; make shorter chunks (make.chunk_words)"
            )


def document_prompts(data: DataSpec, tokenizer: PreTrainedTokenizerFast) -> DocumentPrompts:
    """The prompts of all rows with a document, of training and validation text.

    Args:
        data: the text of a stage.
        tokenizer: the run's tokenizer, with its chat template.

    Raises:
        InputError: a document is not text, or one prompt has several documents.
    """
    found = DocumentPrompts()
    if not data.holds_conversations:
        return found
    encoder = ChatEncoder(tokenizer, data.chat or ChatSpec(), ANY_LENGTH)
    # in validation text every turn of the assistant counts, so it may have further prompts
    encoders = [encoder] if encoder.learn_from == "assistant" else [encoder, encoder.for_validation()]
    reader, openings = _PromptCollector(found, encoders), set[bytes]()
    for some in _batches(item for item in _conversations(data) if item.document):
        openings |= {digest(item.opening) for item in some}
        reader.add(some)
    without = (item for item in _conversations(data) if not item.document)
    for some in _batches(without):
        found.num_without += len(some)
        reader.check([item for item in some if digest(item.opening) in openings])
    return found


def _conversations(data: DataSpec) -> Iterator[Conversation]:
    for _, source in data.sources():
        for item in source.documents() if source.holds_conversations() else ():
            if isinstance(item, Conversation):
                if not isinstance(item.document, str):
                    raise InputError(
                        f"teacher_reads: document: {item.id}: its column document needs a text (got "
                        f"{type(item.document).__name__}); write the text that the teacher shall read"
                    )
                yield item


def _batches(items: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    batches = iter(items)
    while some := list(islice(batches, AT_ONCE)):
        yield some


class _PromptCollector:
    """Collects the prompts.

    Args:
        found: the result, which is filled.
        encoders: the encoders that make rows; the first is that of the training text.
    """

    def __init__(self, found: DocumentPrompts, encoders: Sequence[ChatEncoder]):
        self.found, self.encoders = found, encoders
        self._whose: dict[bytes, str] = {}  # bytes of a prompt -> name of its row

    def add(self, items: Sequence[Conversation]) -> None:
        """Add rows with a document."""
        for number, encoder in enumerate(self.encoders):
            with_documents = [
                replace(item, messages=tuple(messages_with_document(str(item.document), item.messages)))
                for item in items
            ]
            pairs = zip(
                encoder.rows(items, with_bytes=False), encoder.rows(with_documents, with_bytes=False), strict=True
            )
            for item, (student, teacher) in zip(items, pairs, strict=True):
                if isinstance(student, Encoded):  # otherwise the row is dropped from the training text too
                    self.found.num_rows += number == 0
                    prompts = _prompts(student.rows, teacher.rows) if isinstance(teacher, Encoded) else None
                    if prompts is None:
                        self.found.num_refused += number == 0
                    else:
                        self._keep(item.id, prompts)

    def check(self, items: Sequence[Conversation]) -> None:
        """Check that no row without a document has the same prompt as a row with one."""
        for encoder in self.encoders if items else ():
            for item, encoded in zip(items, encoder.rows(items, with_bytes=False), strict=True):
                for row in encoded.rows if isinstance(encoded, Encoded) else ():
                    for start in _starts(row):
                        key = _key(row.ids[:start])
                        if key in self._whose:
                            raise _ambiguous(item.id, self._whose[key], "without a document")

    def _keep(self, id: str, prompts: Iterable[tuple[bytes, np.ndarray, int]]) -> None:
        for key, prompt, length in prompts:
            known = self.found.by_prompt.setdefault(key, prompt)
            if not np.array_equal(known, prompt):
                raise _ambiguous(id, self._whose[key], "with another document")
            self._whose.setdefault(key, id)
            if length > self.found.longest:
                self.found.longest, self.found.longest_id = length, id


def _ambiguous(id: str, other: str, how: str) -> InputError:
    return InputError(
        f"teacher_reads: document: {id} has the same prompt as {other}, {how}, so it is open what the teacher shall "
        "read; leave one of the rows out, or name in the question what it is about"
    )


def _prompts(students: Sequence[Row], teachers: Sequence[Row]) -> list[tuple[bytes, np.ndarray, int]] | None:
    """Return (bytes of the prompt, prompt with the document, tokens of the row with it) per turn that is learned from.

    None if the two rows differ from the first learned token on.
    """
    if len(students) != len(teachers):
        return None
    made = []
    for student, teacher in zip(students, teachers, strict=True):
        ours, theirs = (np.asarray(row.ids, np.int64) for row in (student, teacher))
        assert student.learned is not None
        assert teacher.learned is not None
        first, shown = int(np.argmax(student.learned)), int(np.argmax(teacher.learned))
        is_same = np.array_equal(ours[first:], theirs[shown:])
        if not is_same or not np.array_equal(student.learned[first:], teacher.learned[shown:]):
            return None
        made += [(_key(student.ids[:at]), theirs[: at + shown - first], len(theirs)) for at in _starts(student)]
    return made


def _starts(row: Row) -> list[int]:
    """Index of the first learned token of each turn."""
    assert row.learned is not None
    return [int(at) for at in np.flatnonzero(row.learned & ~np.concatenate([[False], row.learned[:-1]]))]


def _key(prompt: Sequence[int] | np.ndarray) -> bytes:
    """Dictionary key of a prompt. prompt: [tokens]"""
    return np.ascontiguousarray(prompt, np.int64).tobytes()
