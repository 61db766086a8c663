"""The interface of a source: documents or conversations in a fixed order, and a fingerprint of their content."""

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
"""A chat message in the form that chat templates expect: ``role``, ``content`` (text) and, if present,
``reasoning_content``, ``tool_calls`` (arguments parsed), ``name`` and ``tool_call_id``."""


@dataclass(frozen=True, slots=True)
class Document:
    """One independent text: a file, a row, a help topic.

    Attributes:
        id: name of the document in messages to the user, such as ``"notes/a.txt"`` or ``"rows.jsonl:17"``.
        text: never empty; can always be written as UTF-8.
    """

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Tokenized(Document):
    """A document that is stored as token ids. Its ``text`` is the ids in hexadecimal, by which documents are compared.

    Attributes:
        ids: its token ids, at least one. int64 [tokens]
        is_open: whether to append the end-of-text token if it is missing.
    """

    ids: np.ndarray
    is_open: bool = False

    @classmethod
    def of(cls, id: str, ids: np.ndarray, is_open: bool) -> Tokenized:
        """Build the document, with its ``text``, from token ids."""
        return cls(id, ids.astype("<i8").tobytes().hex(), ids, is_open)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one conversation. A chat template renders them as text.

    Attributes:
        id: name of the conversation in messages to the user, such as ``"chat.jsonl:17"``.
        messages: the messages in order; at least one is the assistant's.
        learned: whether each message is learned from.
        tools: JSON schemas of the functions that the assistant may call.
        arguments: arguments of the chat template, for this conversation only.
        document: text that only the teacher reads before the conversation (with ``teacher_reads: document``); empty if
            there is none. Its type is checked only if that is set.
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
    """A row without a usable text or conversation.

    Attributes:
        id: name of the row in messages to the user.
        reason: kind of the problem, by which rejected rows are counted, such as ``"roles out of order"``.
        detail: what is wrong with this row.
        text: empty; none of it is used.
    """

    id: str
    reason: str
    detail: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Removed(Rejected):
    """A usable row that is left out because of the recipe's ``data.clean``."""


Item = Document | Conversation | Rejected
"""An item that a source yields."""


def said(messages: tuple[Message, ...]) -> str:
    """Text of the messages, including reasoning and tool calls."""
    texts = []
    for message in messages:
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        texts += [message.get("reasoning_content", ""), message["content"], *(f"{name} {args}" for name, args in calls)]
    return "\n\n".join(text for text in texts if text)


class SourceSpec(Spec):
    """A source of text. The order of its documents is always the same."""

    kind: str

    def documents(self) -> Iterator[Item]:
        """Yield every document or conversation, in a fixed order; each call starts from the beginning.

        Raises:
            InputError: the text is not there or cannot be read.
        """
        raise NotImplementedError

    def open_at(self, state: dict[str, Any] | None) -> tuple[Iterator[Item], Callable[[], dict[str, Any]]]:
        """Return an iterator that starts at a saved position, and a function that returns the position after the last
        item yielded.

        Only streams support this. Seeking skips earlier files; at most the start of the current file is read.

        Args:
            state: value returned by that function earlier, after a JSON round trip; None: the start.

        Raises:
            InputError: the text is not there or cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the content that the source reads, in its order. Independent of path and modification time.

        Need not include the source's settings, which :meth:`identity` adds.

        Raises:
            InputError: the text is not there.
        """
        raise NotImplementedError

    def identity(self) -> str:
        """A hash of the content and of all settings except paths.

        Raises:
            InputError: the text is not there.
        """
        return hash_of(_without_paths(self.model_dump(mode="json")), self.fingerprint())

    def num_bytes(self) -> int | None:
        """Approximate size of the text in bytes, for the forecast of time; None if it is known only after reading."""
        return None

    def paths(self) -> list[str]:
        """Files, folders, globs and addresses that the recipe names; empty if the text comes from elsewhere."""
        path = getattr(self, "path", None)
        return [path] if isinstance(path, str) else list(path or ())

    def is_remote(self) -> bool:
        """Whether it reads remote files, whose names are known only after a request to the server."""
        return any("://" in path for path in self.paths())

    def is_stream(self) -> bool:
        """Whether the text is read only as it is needed and never stored as a whole."""
        return False

    def is_at_hand(self) -> bool:
        """Whether it can be read without a download; False for a stream."""
        return not self.is_stream() and not self.is_remote()

    def holds_conversations(self) -> bool:
        """Whether it yields conversations."""
        return False

    def drops_rows(self) -> bool:
        """Whether it may yield unusable rows as :class:`Rejected`; a recipe may allow a fraction of them."""
        return self.holds_conversations()

    def holds_ids(self) -> bool:
        """Whether it yields documents as :class:`Tokenized` ids."""
        return False

    def split_key(self, document: Document | Conversation) -> str:
        """The text whose hash decides the side of the split; :func:`normalised`, so equal texts are on the same
        side."""
        return normalised(document.text)


def _without_paths(value: Any) -> Any:
    """The settings of a source, without its paths, recursively."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key != "path"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def normalised(text: str) -> str:
    """Normalise case, Unicode (NFKC) and whitespace.

    Documents with equal normalised texts count as the same document when validation text is kept out of training.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


DIGEST_BYTES = 16


def digest(text: str) -> bytes:
    """A hash of the text, :data:`DIGEST_BYTES` long."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:DIGEST_BYTES]
