"""What a source is: documents or conversations in a fixed order, and a fingerprint of what they say."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill.core.artifact import hash_of
from distill.core.spec import Spec

if TYPE_CHECKING:
    import numpy as np

Message = dict[str, Any]
"""Of a conversation, as chat templates read it: ``role``, ``content`` (text) and, where there are some,
``reasoning_content``, ``tool_calls`` (arguments parsed), ``name`` and ``tool_call_id``."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text that stands for itself: a file, a row, a help topic.

    Attributes:
        id: what a message calls it, such as ``"notes/a.txt"`` or ``"rows.jsonl:17"``.
        text: never empty; can always be written as UTF-8.
    """

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Tokenized(Document):
    """A document that is stored as token ids. Its ``text`` is the ids in hexadecimal, to compare
    documents by.

    Attributes:
        ids: at least one. int64 [tokens]
        is_open: whether the tokenizer's end-of-text token is to follow where it does not yet.
    """

    ids: np.ndarray
    is_open: bool = False

    @classmethod
    def of(cls, id: str, ids: np.ndarray, is_open: bool) -> Tokenized:
        """With the text that belongs to it."""
        return cls(id, ids.astype("<i8").tobytes().hex(), ids, is_open)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that belong together. A chat template makes text of them.

    Attributes:
        id: what a message calls it, such as ``"chat.jsonl:17"``.
        messages: at least one of an assistant among them.
        learned: of each message, whether it is learned from.
        tools: JSON schemas of the functions that the assistant may call.
        arguments: of the chat template, for this conversation alone.
        document: what a teacher may read before it, which the student does not; empty where there is none. It is read
            with ``teacher_reads: document`` alone, which needs a text.
    """

    id: str
    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    document: Any = ""

    @property
    def text(self) -> str:
        """The text of all messages, without roles and template."""
        return said(self.messages)

    @property
    def opening(self) -> str:
        """The text of the messages before the assistant's first."""
        first = next(number for number, message in enumerate(self.messages) if message["role"] == "assistant")
        return said(self.messages[:first])


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that holds no text, or no conversation, which can be used.

    Attributes:
        id: as of a conversation.
        reason: what is wrong, in words that are counted over all rows, such as ``"roles out of order"``.
        detail: what is wrong with this row.
        text: empty; none of it is used.
    """

    id: str
    reason: str
    detail: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Removed(Rejected):
    """A row that could be used and is left out, as the recipe's ``data.clean`` says."""


Item = Document | Conversation | Rejected
"""What a source yields."""


def said(messages: tuple[Message, ...]) -> str:
    """The texts of messages, with what the assistant thinks and calls."""
    texts = []
    for message in messages:
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        texts += [message.get("reasoning_content", ""), message["content"], *(f"{name} {args}" for name, args in calls)]
    return "\n\n".join(text for text in texts if text)


class SourceSpec(Spec):
    """Where text comes from. The order of its documents is always the same."""

    kind: str

    def documents(self) -> Iterator[Item]:
        """Every document or conversation, in a fixed order; each call begins again.

        Raises:
            InputError: the text is not there or cannot be read.
        """
        raise NotImplementedError

    def open_at(self, state: dict[str, Any] | None) -> tuple[Iterator[Item], Callable[[], dict[str, Any]]]:
        """The documents from a position on, and what says the position behind the last one that was given.

        Streams alone have positions. One that is not the beginning is reached without reading what comes before it, but
        for the rest of a file.

        Args:
            state: what the function of an earlier call has said, as JSON keeps it; None: the beginning.

        Raises:
            InputError: the text is not there or cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of what the source reads, in its order. Neither where it lies nor when it was written matters.

        What the recipe says of the source need not be in it; :meth:`identity` adds that.

        Raises:
            InputError: the text is not there.
        """
        raise NotImplementedError

    def identity(self) -> str:
        """Stands for the documents and their order: what is read, and the recipe's keys but for ``path``.

        Raises:
            InputError: the text is not there.
        """
        return hash_of(_without_paths(self.model_dump(mode="json")), self.fingerprint())

    def num_bytes(self) -> int | None:
        """Approximate size of the text in bytes, for the forecast of time; None where only reading shows it."""
        return None

    def paths(self) -> list[str]:
        """Files, folders, globs and addresses that the recipe names; none where the text comes from elsewhere."""
        path = getattr(self, "path", None)
        return [path] if isinstance(path, str) else list(path or ())

    def is_remote(self) -> bool:
        """Whether it reads files at addresses, so that even their names are known only by asking for them."""
        return any("://" in path for path in self.paths())

    def is_stream(self) -> bool:
        """Whether the text is read as it comes and never stored."""
        return False

    def is_at_hand(self) -> bool:
        """Whether it can be read without a download; false for a stream."""
        return not self.is_stream() and not self.is_remote()

    def holds_conversations(self) -> bool:
        """Whether it yields conversations."""
        return False

    def drops_rows(self) -> bool:
        """Whether it yields rows that cannot be used, as :class:`Rejected`, which a recipe may allow."""
        return self.holds_conversations()

    def holds_ids(self) -> bool:
        """Whether it yields documents as :class:`Tokenized` ids."""
        return False

    def split_key(self, document: Document | Conversation) -> str:
        """The text whose hash decides the side of the split; :func:`normalised`, so equal texts are on one side."""
        return normalised(document.text)


def _without_paths(value: Any) -> Any:
    """Keys of a source, and of sources within it, that say more than where the text lies."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key != "path"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def normalised(text: str) -> str:
    """A text without what makes no difference to a reader: case, Unicode forms (NFKC) and the amount of whitespace.

    Two documents of one normalised text are taken for the same when training is kept apart from validation.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


DIGEST_BYTES = 16


def digest(text: str) -> bytes:
    """:data:`DIGEST_BYTES` that stand for a text."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:DIGEST_BYTES]
