"""Every form of chat data becomes the same conversation, and what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distill.data.base import Conversation
from distill.data.conversation import Columns, conversation_of, dialect_of
from distill.data.message import Unusable
from tests.data.chats import damaged_rows

EXPECTED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SAME: dict[str, Any] = {
    "messages": {"messages": EXPECTED},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, "i"]}, EXPECTED[1]]},
    "from and value": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "prompt and response": {"prompt": "Hi", "response": "Hello"},
    "prompt and completion": {"prompt": [EXPECTED[0]], "completion": [EXPECTED[1]]},
    "instruction": {"instruction": "Hi", "input": "", "output": "Hello"},
    "question and answer": {"question": "Hi", "answer": "Hello", "id": 7},
    "text of JSON": {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'},
}


def read(row: Any, columns: Columns | None = None) -> Conversation:
    return conversation_of(row, "a.jsonl:1", columns or Columns())


@pytest.mark.parametrize("form", SAME)
def test_every_form_is_the_same_conversation(form: str) -> None:
    found = read(SAME[form])
    assert list(found.messages) == EXPECTED
    assert found.learned == (False, True)
    assert found.text == "Hi\n\nHello"
    assert found.opening == "Hi"


def test_a_document_is_any_value_until_a_teacher_reads_it() -> None:
    assert read({"messages": EXPECTED, "document": "Of A."}).document == "Of A."
    assert list(read({"messages": EXPECTED, "document": {"id": 3, "path": "a.pdf"}}).messages) == EXPECTED


def test_an_instruction_has_its_input_behind_it() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert read(row).messages[0]["content"] == "Add.\n\n1 and 2"
    assert dialect_of(row, Columns()) == "instruction and output"


def test_named_columns_are_read_and_no_others() -> None:
    row = {"messages": EXPECTED, "q": "2+2", "a": "4"}
    assert read(row, Columns(prompt="q", response="a")).text == "2+2\n\n4"
    with pytest.raises(Unusable, match="no column talk"):
        read(row, Columns(messages="talk"))


def test_system_and_tools_stand_beside_the_messages() -> None:
    schema = {"name": "weather", "parameters": {}}
    for tools in ([schema], '[{"name": "weather", "parameters": {}}]'):
        found = read({"messages": EXPECTED, "system": "Be brief.", "tools": tools})
        assert found.messages[0] == {"role": "system", "content": "Be brief."}
        assert found.learned == (False, False, True)
        assert found.tools == ({"type": "function", "function": schema},)
    assert read({"messages": EXPECTED, "system": "", "tools": None}).messages == tuple(EXPECTED)
    assert read({"messages": EXPECTED, "chat_template_kwargs": {"thinks": True}}).arguments == {"thinks": True}


def test_tool_arguments_given_as_text_are_parsed() -> None:
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    rows: list[Any] = [
        {"messages": [EXPECTED[0], {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [EXPECTED[0], {"role": "assistant", "tool_calls": f"[{json.dumps(call)}]"}]},
        {"messages": [EXPECTED[0], {"role": "assistant", "function_call": call["function"]}]},
        {"conversations": [{"from": "human", "value": "Hi"},
                           {"from": "function_call", "value": json.dumps(call["function"])}]},
    ]  # fmt: skip
    for row in rows:
        (made,) = read(row).messages[1]["tool_calls"]
        assert made["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
        assert read(row).messages[1]["content"] == ""


def test_reasoning_is_found_under_its_names() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        found = read({"messages": [EXPECTED[0], EXPECTED[1] | {name: "Be kind."}]}).messages[1]
        assert found["reasoning_content"] == found["thinking"] == "Be kind."


def test_a_message_with_no_weight_is_read_and_not_learned_from() -> None:
    for flag in ({"weight": 0}, {"train": False}, {"training": False}):
        row = {"messages": [*EXPECTED, EXPECTED[0], EXPECTED[1] | flag]}
        assert read(row).learned == (False, True, False, False)
        with pytest.raises(Unusable) as why:
            read({"messages": [EXPECTED[0], EXPECTED[1] | flag]})
        assert why.value.reason == "nothing to learn from"


USER, ANSWER = EXPECTED


def answer_of(content: Any, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": content}


WRONG: list[tuple[Any, str, str]] = [
    (["no object"], "not an object", "must be a JSON object (got list)"),
    ({"text": "Hi"}, "no such column", "no column messages, conversations, or prompt and response (it has 'text')"),
    ({"messages": []}, "no assistant turn", "it has no messages"),
    ({"messages": "Hi"}, "wrong type", "messages is text that is no JSON"),
    ({"messages": 3}, "wrong type", "messages must be a list (got int)"),
    ({"messages": ["Hi"]}, "wrong type", "message 1 must be a mapping with role and content (got str)"),
    ({"messages": [{"content": "Hi"}]}, "wrong type", "message 1 has no role (it has 'content')"),
    ({"messages": [{"role": "judge", "content": "Hi"}]}, "unknown role", "message 1 is of 'judge'"),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "unknown role", "message 1 is of ['user']"),
    ({"messages": [USER]}, "no assistant turn", "nobody answers in it"),
    ({"messages": [ANSWER]}, "roles out of order", "message 1, of the assistant, is the first (expected user, tool)"),
    ({"messages": [USER, USER, ANSWER]}, "roles out of order", "message 2, of the user, follows one of the user"),
    ({"messages": [USER, ANSWER, ANSWER]}, "roles out of order", "message 3, of the assistant, follows one of the"),
    ({"messages": [USER, answer_of("x", "system"), ANSWER]}, "roles out of order", "message 2, of the system"),
    ({"messages": [USER, ANSWER, {"role": "tool", "content": "x"}]}, "roles out of order", "a message that calls none"),
    ({"messages": [USER, answer_of(" \n")]}, "empty assistant turn", "message 2, of the assistant"),
    ({"messages": [USER, answer_of(None)]}, "empty assistant turn", "message 2, of the assistant"),
    ({"messages": [USER, answer_of(5)]}, "wrong type", "message 2: content must be text or a list"),
    ({"messages": [answer_of([{"type": "image", "url": "x"}], "user"), ANSWER]}, "not text", "of type 'image'"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "tool arguments", "are no JSON"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": [1]}]}]}, "tool arguments", "no mapping"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{"arguments": {}}]}]}, "wrong type", "a tool call must be"),
    ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "wrong type", "weight must be 0 or 1"),
    ({"messages": [USER, ANSWER], "tools": [3]}, "wrong type", "tools must be a list of JSON schemas (got int)"),
    ({"messages": [USER, ANSWER | {"content": "\ud800"}]}, "not text", "half of a surrogate pair"),
    ({"prompt": "Hi", "response": 3}, "wrong type", "response must be text, or a list of messages (got int)"),
    ({"messages": EXPECTED, "chat_template_kwargs": 3}, "wrong type", "chat_template_kwargs must be a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason", "detail"), WRONG, ids=[f"{reason}-{i}" for i, (_, reason, _) in enumerate(WRONG)]
)
def test_what_is_wrong_is_named(row: Any, reason: str, detail: str) -> None:
    with pytest.raises(Unusable) as why:
        read(row)
    assert why.value.reason == reason
    assert detail in why.value.detail


def test_500_damaged_conversations_are_read_or_named() -> None:
    """No other error than the one with a reason, whatever stands where something else was expected."""
    reasons, usable = set(), 0
    for row in damaged_rows(500):
        try:
            usable += isinstance(read(row), Conversation)
        except Unusable as why:
            reasons.add(why.reason)
    assert 50 < usable < 450
    assert len(reasons) >= 7, reasons
