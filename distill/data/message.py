"""Converts messages in their various formats to a :data:`~distill.data.base.Message`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from distill.data.base import Message

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response"), "tool"),
}
"""Name of a role in a row -> the role."""
REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_FOLLOWS = {
    "system": ("",),
    "user": ("", "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role -> the roles that it may follow; "" is the beginning."""


class Unusable(Exception):
    """A row cannot be used.

    Attributes:
        reason: see :class:`~distill.data.base.Rejected`.
        detail: likewise.
    """

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(detail)


def role_of(message: dict[str, Any], number: int) -> str:
    """The role of a message: system, user, assistant or tool.

    Args:
        message: the message as it is stored.
        number: number of the message in its conversation, from 1.

    Raises:
        Unusable: the role is missing or unknown.
    """
    name = message.get("role", message.get("from"))
    if name is None:
        raise Unusable("wrong type", f"message {number} has no role (it has {', '.join(map(repr, message)) or 'none'})")
    if not isinstance(name, str) or name not in ROLES:
        raise Unusable("unknown role", f"message {number} is of {name!r} (expected system, user, assistant or tool)")
    return ROLES[name]


def message_of(message: Any, number: int) -> Message:
    """A message in the form of :data:`~distill.data.base.Message`.

    Args:
        message: the message as it is stored.
        number: number of the message in its conversation, from 1.

    Raises:
        Unusable: a field has the wrong type, or the assistant's message is empty.
    """
    if not isinstance(message, dict):
        raise wrong_type(f"message {number}", "a mapping with role and content", message)
    role = role_of(message, number)
    content = message.get("content", message.get("value"))
    found: Message = {"role": role}
    if message.get("from") == "function_call":
        content, calls = "", listed(content, f"message {number}")
    else:
        one = message.get("function_call")  # the older form of tool calls
        calls = [one] if one else listed(message.get("tool_calls"), f"message {number}: tool_calls")
    found["content"] = _text(content, f"message {number}: content", is_result=role == "tool")
    if role != "assistant":
        return found | {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    if reasoning is not None:
        found["reasoning_content"] = found["thinking"] = _text(reasoning, f"message {number}: reasoning_content")
    if calls:
        found["tool_calls"] = [_call(call, number) for call in calls]
    elif not found["content"].strip():
        raise Unusable("empty assistant turn", f"message {number}, of the assistant, says nothing and calls no tool")
    return found


def _text(content: Any, what: str, *, is_result: bool = False) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, str | dict) for part in content):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        others = [part["type"] for part in parts if part.get("type", "text") not in _TEXT_PARTS]
        if not others and all(isinstance(part.get("text"), str) for part in parts):
            return "".join(part["text"] for part in parts)
        if others and not is_result:
            raise Unusable("not text", f"{what} has a part of type {others[0]!r}; only text can be learned from")
    if is_result and isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False, default=repr)  # a tool's result that was not converted to text
    raise wrong_type(what, "text or a list of text parts", content)


def _call(call: Any, number: int) -> dict[str, Any]:
    what = f"message {number}: a tool call"
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise wrong_type(what, "a mapping with function: {name, arguments}", call)
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise Unusable("tool arguments", f"{what} has arguments that are no JSON ({error})") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise Unusable("tool arguments", f"{what} has arguments that are no mapping (got {type(arguments).__name__})")
    found = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return found | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def tool_of(tool: Any) -> dict[str, Any]:
    """The JSON schema of a function, ``{"type": "function", "function": {...}}``.

    Raises:
        Unusable: it is not a function schema.
    """
    if not isinstance(tool, dict):
        raise wrong_type("tools", "a list of JSON schemas", tool)
    return tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}


def is_learned(message: dict[str, Any], number: int) -> bool:
    """Whether a message is the assistant's and is learned from; see :func:`message_of`."""
    weight, train = message.get("weight"), message.get("train", message.get("training"))
    if weight not in (None, 0, 1) or train not in (None, True, False):
        wrong = weight if weight not in (None, 0, 1) else train
        raise Unusable("wrong type", f"message {number}: weight must be 0 or 1, train true or false (got {wrong!r})")
    return role_of(message, number) == "assistant" and weight != 0 and train is not False


def check_order(messages: Sequence[Message]) -> None:
    """Check that the roles are in a valid order.

    Raises:
        Unusable: the role order is invalid, or there is no assistant message.
    """
    before: Message = {"role": ""}
    for number, message in enumerate(messages, 1):
        role, last = message["role"], before["role"]
        if last not in _FOLLOWS[role]:
            follows = f"follows one of the {last}" if last else "is the first"
            expected = ", ".join(name or "the beginning" for name in _FOLLOWS[role])
            raise Unusable("roles out of order", f"message {number}, of the {role}, {follows} (expected {expected})")
        if role == "tool" and last == "assistant" and not before.get("tool_calls"):
            raise Unusable("roles out of order", f"message {number}, of a tool, follows a message that calls none")
        before = message
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant turn", "nobody answers in it")


def listed(value: Any, what: str) -> list[Any]:
    """Return a value as a list: a list, the JSON text of one, a single dict, or None.

    Raises:
        Unusable: it has another type; ``what`` is the field name in the error.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Unusable("wrong type", f"{what} is text that is no JSON ({error})") from None
    if isinstance(value, dict):
        return [value]
    if value is not None and not isinstance(value, list | str):
        raise wrong_type(what, "a list", value)
    return list(value or ())


def without_nulls(value: Any) -> Any:
    """A value without keys that hold null, at every depth, because parquet gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def wrong_type(what: str, expected: str, got: Any) -> Unusable:
    """The error for a value of the wrong type."""
    return Unusable("wrong type", f"{what} must be {expected} (got {type(got).__name__})")
