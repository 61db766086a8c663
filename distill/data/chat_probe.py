"""Finds out by rendering how a chat template ends a turn, and which tokens delimit turns.

Neither the template nor the tokenizer states it: ``eos_token`` does not end a turn in Gemma or Phi, and some tokenizers
do not mark their role markers as special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distill.core.errors import InputError
from distill.data.base import Message
from distill.data.chat_template import ChatTemplate, Refused

SAID = ("zqfirstquestion", "zqfirstanswer", "zqsecondquestion", "zqsecondanswer")
"""Texts of the messages in probes: words that no template writes by itself."""
_THOUGHT, _FUNCTION, _ARGUMENT, _SYSTEM = "zqthought", "zqfunction", "zqargument", "zqsystem"
_TOOL = {
    "type": "function",
    "function": {
        "name": _FUNCTION,
        "description": "A function.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}


def _user(number: int) -> Message:
    return {"role": "user", "content": SAID[number]}


def _answer(number: int, **more: Any) -> Message:
    return {"role": "assistant", "content": SAID[number], **more}


_CALL = {
    "id": "call00000",
    "type": "function",
    "function": {"name": _FUNCTION, "arguments": {"city": _ARGUMENT}},
}
_CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: Message = {"role": "tool", "name": _FUNCTION, "tool_call_id": "call00000", "content": "zqresult"}
_TWO_TURNS = [_user(0), _answer(1), _user(2), _answer(3)]
CONVERSATIONS: dict[str, tuple[list[Message], list[dict[str, Any]]]] = {
    "two turns": (_TWO_TURNS, []),
    "a system message": ([{"role": "system", "content": _SYSTEM}, *_TWO_TURNS], []),
    "reasoning": (
        [_user(0), _answer(1, reasoning_content=_THOUGHT, thinking=_THOUGHT), *_TWO_TURNS[2:]],
        [],
    ),
    "tool calls": ([_user(0), _CALLS, _RESULT, _answer(3)], [_TOOL]),
}
"""Conversations on which two templates are compared: name -> (messages, tools)."""


@dataclass(frozen=True)
class Probed:
    """Properties of a chat template that were found by probing.

    Attributes:
        stops: tokens that end a turn of the assistant.
        guarded: tokens that only the template may write; in a message they are text.
        shows_calls: whether the template writes tool calls at all.
    """

    stops: tuple[str, ...]
    guarded: tuple[str, ...]
    shows_calls: bool


def probe(template: ChatTemplate, added: Iterable[str], special: Iterable[str]) -> Probed:
    """Find out the properties of a template, and set the form of messages that it needs.

    Args:
        template: the template, whose ``as_parts`` and ``arguments_as_text`` are set.
        added: added tokens of its tokenizer (matched as a unit in text).
        special: the added tokens that are marked as special.

    Raises:
        InputError: the template refuses the simplest conversation, or writes no stop token.
    """
    tokens = AddedTokens(added)
    last = _in_its_form(template)
    try:
        two = template.render(_TWO_TURNS)
    except Refused:
        two = last  # the template supports one turn only
    stop = _stop(tokens, last, two)
    if stop is None:
        after = last.partition(SAID[1])[2]
        raise InputError(
            f"data.chat.template: it writes no stop token after an answer (but {after!r}), so a model would learn "
            "to answer and never to stop; name a .jinja file that ends each answer with the model's end-of-turn token"
        )
    called = _called(template)
    stops = [stop, *_stops_of_calls(tokens, called, {stop})]
    made = [*_header(template, tokens), *tokens.within(_between(two))]
    guarded = [token for token in dict.fromkeys([*special, *stops, *made]) if len(token.strip()) > 1]
    return Probed(tuple(dict.fromkeys(stops)), tuple(guarded), called is not None)


class AddedTokens:
    """Finds a tokenizer's added tokens in text.

    Args:
        added: the tokens.
    """

    def __init__(self, added: Iterable[str]):
        longest_first = sorted({token for token in added if token.strip()}, key=len, reverse=True)
        self._one = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches
        self._run = re.compile(rf"\s*((?:{self._one.pattern})+)")

    def within(self, text: str) -> list[str]:
        """All tokens in a text."""
        return self._one.findall(text)

    def last_of_first_run(self, text: str) -> str | None:
        """The last token of the run of added tokens at the start of a text; None if it does not start with one."""
        run = self._run.match(text)
        return None if run is None else self.within(run[1])[-1]


def _in_its_form(template: ChatTemplate) -> str:
    """Render a question and an answer; try both forms of content, and keep the one in which both appear."""
    why = "they do not show what was said"
    for template.as_parts in (False, True):
        try:
            text = template.render([_user(0), _answer(1)])
        except Refused as refused:
            why = str(refused)
            continue
        if SAID[0] in text and SAID[1] in text.partition(SAID[0])[2]:
            return text
    raise InputError(f"data.chat.template: it refuses a question and its answer: {why}; name another template")


def _stop(tokens: AddedTokens, last: str, two: str) -> str | None:
    """The stop token: the last added token directly after the answer, common to a final and a non-final turn.

    A template may end the conversation with a further token (Phi 3), which is not the stop token. If a final and a
    non-final turn have no token in common (gpt-oss), it is that of the final turn, because this is what the model
    writes.
    """
    after, within = last.partition(SAID[1])[2], two.partition(SAID[1])[2]
    common = next((i for i, (a, b) in enumerate(zip(after, within, strict=False)) if a != b), len(after))
    return tokens.last_of_first_run(after[:common]) or tokens.last_of_first_run(after)


def _called(template: ChatTemplate) -> str | None:
    """Render a tool call; try both forms of arguments, and keep the one in which they appear. None if neither does."""
    for template.arguments_as_text in (False, True):
        try:
            text = template.render([_user(0), _CALLS], tools=[_TOOL])
        except Refused:
            continue
        if _ARGUMENT in text.partition(SAID[0])[2]:
            return text
    template.arguments_as_text = False
    return None


def _stops_of_calls(tokens: AddedTokens, called: str | None, stops: set[str]) -> Sequence[str]:
    """The token that ends a turn with a tool call, if it differs from the normal stop token."""
    after = tokens.within(called.rpartition(_ARGUMENT)[2]) if called is not None else []
    return after[-1:] if not stops & set(after) else ()


def _header(template: ChatTemplate, tokens: AddedTokens) -> Sequence[str]:
    """The first token that opens the assistant's turn; later tokens, such as <think>, may be generated by the model."""
    try:
        before, prompt = (template.render([_user(0)], is_prompt=is_prompt) for is_prompt in (False, True))
    except Refused:
        return ()
    return tokens.within(prompt[len(before) :])[:1] if prompt.startswith(before) else ()


def _between(two: str) -> str:
    """The text between an answer and the next question."""
    return two.partition(SAID[1])[2].partition(SAID[2])[0]


def differences(one: ChatTemplate, other: ChatTemplate) -> list[str]:
    """One line per conversation of :data:`CONVERSATIONS` for which two templates render different text."""
    for template in (one, other):
        with suppress(InputError):  # a refusal appears as a difference below
            _in_its_form(template)
            _called(template)
    found = []
    for name, (messages, tools) in CONVERSATIONS.items():
        for is_prompt in (False, True):
            shown = messages[:-1] if is_prompt else messages
            ours, theirs = (_or_refusal(template, shown, tools, is_prompt) for template in (one, other))
            if ours != theirs:
                start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
                start = min(len(ours), len(theirs)) if ours.startswith(theirs) or theirs.startswith(ours) else start
                cut = slice(max(0, start - 10), start + 40)
                what = f"{name}, to be answered" if is_prompt else name
                found.append(f"{what}: {ours[cut]!r} against {theirs[cut]!r}")
    return found


def _or_refusal(template: ChatTemplate, messages: Any, tools: Any, is_prompt: bool) -> str:
    try:
        return template.render(messages, tools=tools, is_prompt=is_prompt)
    except Refused as refused:
        return f"refuses: {refused}"
