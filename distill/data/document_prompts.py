"""Prompts with a document before them, for a teacher that reads more than its student.

    student reads    user: question                  assistant: answer
    teacher reads    user: document, question        assistant: answer

Both rows end with the same tokens, those of the answer. So a row of the student becomes that of its teacher when the
tokens before the first counted one are replaced, which this file prepares: ids of a prompt -> ids of the same prompt
with its document. The key is the prompt itself, so it is found in packed rows, and before answers that the student has
sampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distill.core.errors import InputError
from distill.data.base import Conversation
from distill.data.chat_encoder import ChatEncoder
from distill.data.chat_spec import ChatSpec
from distill.data.encoder import Encoded, Row
from distill.data.message import Unusable
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
        num_refused: those of them whose answer would be other tokens behind the document.
        longest: tokens of the longest such row, with its answer.
        longest_id: what messages call that row.
    """

    by_prompt: dict[bytes, np.ndarray] = field(default_factory=dict)
    num_rows: int = 0
    num_refused: int = 0
    longest: int = 0
    longest_id: str = ""

    def find(self, prompt: np.ndarray) -> np.ndarray | None:
        """The prompt with its document; None if it has none.

        Args:
            prompt: int64 [tokens].
        """
        return self.by_prompt.get(np.ascontiguousarray(prompt, np.int64).tobytes())

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
                "tokens behind the document than without it; the chat template must write both prompts alike"
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
        tokenizer: of the run, with its chat template.
    """
    found = DocumentPrompts()
    if not data.holds_conversations:
        return found
    encoder = ChatEncoder(tokenizer, data.chat or ChatSpec(), ANY_LENGTH)
    batch: list[Conversation] = []
    for _, source in data.sources():
        for item in source.documents() if source.holds_conversations() else ():
            if isinstance(item, Conversation) and item.document:
                batch.append(item)
            if len(batch) == AT_ONCE:
                _add(found, batch, encoder)
                batch = []
    _add(found, batch, encoder)
    return found


def _add(found: DocumentPrompts, batch: Iterable[Conversation], encoder: ChatEncoder) -> None:
    items = list(batch)
    for item, encoded in zip(items, encoder.rows(items, with_bytes=False), strict=True):
        if not isinstance(encoded, Encoded):
            continue  # no row of the text either
        found.num_rows += 1
        messages = tuple(messages_with_document(item.document, item.messages))
        shown = Conversation(item.id, messages, item.learned, item.tools, item.arguments)
        first = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
        try:
            prompt = np.asarray(encoder.prompt(list(messages[:first])), np.int64)
        except Unusable:
            found.num_refused += 1
            continue
        (whole,) = encoder.rows([shown], with_bytes=False)
        student, teacher = encoded.rows[0], whole.rows[0] if isinstance(whole, Encoded) else None
        if teacher is None or not _agree(student, teacher, prompt):
            found.num_refused += 1
            continue
        start = _first_learned(student)
        key = np.ascontiguousarray(np.asarray(student.ids)[:start], np.int64).tobytes()
        found.by_prompt.setdefault(key, prompt)
        if len(teacher.ids) > found.longest:
            found.longest, found.longest_id = len(teacher.ids), item.id


def _agree(student: Row, teacher: Row, prompt: np.ndarray) -> bool:
    """Whether the teacher's row is the prompt with the document, and then the student's tokens of the answer."""
    ours, theirs = _first_learned(student), _first_learned(teacher)
    prefix = np.asarray(teacher.ids)[:theirs]
    return np.array_equal(prefix, prompt) and np.array_equal(
        np.asarray(student.ids)[ours:], np.asarray(teacher.ids)[theirs:]
    )


def _first_learned(row: Row) -> int:
    assert row.learned is not None
    return int(np.argmax(row.learned))
