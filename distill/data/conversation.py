"""Converts rows of chat data in their various formats to a :class:`~distill.data.base.Conversation`.

    messages                [{"role": "user", "content": "..."}, ...]; content may be a list of text parts
    conversations           [{"from": "human", "value": "..."}, ...], the older form
    prompt, response        also prompt and completion (texts, or lists of messages), question and answer, and
                            instruction, input and output

In addition, a row may have ``system``, ``tools`` (a list, or its JSON), ``chat_template_kwargs`` and ``document``,
which only a teacher reads (``teacher_reads: document``). A message with ``"weight": 0`` or ``"train": false`` is read
and not learned from. Arguments of tool calls that are given as JSON text are parsed, because templates expect a mapping
and would escape a text once more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from distill.data.base import Conversation
from distill.data.message import (
    Unusable,
    check_order,
    is_learned,
    listed,
    message_of,
    role_of,
    tool_of,
    wrong_type,
)

LISTS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
)
INPUTS = ("input", "context")
"""Columns whose text follows an instruction."""
SYSTEMS = ("system", "system_prompt")


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None: the known names.

    Attributes:
        messages: column of the messages.
        prompt: column of the user's text; set together with ``response``.
        response: column of the assistant's text.
    """

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None


def conversation_of(row: Any, id: str, columns: Columns) -> Conversation:
    """Read the conversation in a row.

    Args:
        row: the row as it was read; a dict (column -> value) unless it is malformed.
        id: name of the row in messages to the user.
        columns: columns to read.

    Raises:
        Unusable: the row holds no usable conversation.
    """
    if not isinstance(row, dict):
        raise Unusable("not an object", f"a row must be a JSON object (got {type(row).__name__})")
    raw = _raw(row, columns)
    system = next((row[name] for name in SYSTEMS if row.get(name)), None)
    if system is not None and not (isinstance(raw[0], dict) and role_of(raw[0], 1) == "system"):
        raw = [{"role": "system", "content": system}, *raw]
    messages = tuple(message_of(message, number) for number, message in enumerate(raw, 1))
    learned = tuple(is_learned(message, number) for number, message in enumerate(raw, 1))
    check_order(messages)
    if not any(learned):
        raise Unusable("nothing to learn from", "every message of the assistant has weight 0")
    tools = tuple(tool_of(tool) for tool in listed(row.get("tools"), "tools"))
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise wrong_type("chat_template_kwargs", "a mapping", arguments)
    try:
        document = row.get("document") or ""  # not validated here; it is only read with teacher_reads: document
        said = [messages, tools, document if isinstance(document, str) else ""]
        json.dumps(said, ensure_ascii=False, default=repr).encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable("not text", "it holds half of a surrogate pair, which is no text") from None
    return Conversation(id, messages, learned, tools, arguments, document)


def dialect_of(row: Any, columns: Columns) -> str:
    """Names of the columns that hold the conversation of a row, for messages to the user.

    Raises:
        Unusable: the row has none of the known columns.
    """
    if isinstance(row, dict) and (name := _list_column(row, columns)) is not None:
        return name
    if isinstance(row, dict) and (pair := _pair(row, columns)) is not None:
        return " and ".join(pair)
    raise Unusable("no such column", _lacking(row, columns))


def _list_column(row: dict[str, Any], columns: Columns) -> str | None:
    if columns.prompt is not None:
        return None
    names = LISTS if columns.messages is None else (columns.messages,)
    return next((name for name in names if row.get(name) is not None), None)


def _pair(row: dict[str, Any], columns: Columns) -> tuple[str, str] | None:
    if columns.messages is not None:
        return None
    pairs = PAIRS if columns.prompt is None or columns.response is None else ((columns.prompt, columns.response),)
    return next((pair for pair in pairs if all(row.get(name) is not None for name in pair)), None)


def _lacking(row: Any, columns: Columns) -> str:
    wanted = columns.messages or (columns.prompt and f"{columns.prompt} and {columns.response}")
    there = ", ".join(map(repr, row)) if isinstance(row, dict) and row else "none"
    return f"no column {wanted or 'messages, conversations, or prompt and response'} (it has {there})"


def _raw(row: dict[str, Any], columns: Columns) -> list[Any]:
    """The messages as they are stored."""
    if (name := _list_column(row, columns)) is not None:
        messages = listed(row[name], name)
    elif (pair := _pair(row, columns)) is not None:
        messages = [message for name, role in zip(pair, ("user", "assistant"), strict=True) for message in
                    _said_by(row, name, role)]  # fmt: skip
    else:
        raise Unusable("no such column", _lacking(row, columns))
    if not messages:
        raise Unusable("no assistant turn", "it has no messages")
    return messages


def _said_by(row: dict[str, Any], name: str, role: str) -> list[Any]:
    """The messages of one column of a pair."""
    value = row[name]
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise wrong_type(name, "text, or a list of messages", value)
    if name == "instruction":
        more = next((row[column] for column in INPUTS if row.get(column)), "")
        if not isinstance(more, str):
            raise wrong_type("input", "text", more)
        value = f"{value}\n\n{more}" if more else value
    return [{"role": role, "content": value}]
