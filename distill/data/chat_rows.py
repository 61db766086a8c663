"""Converts a conversation to rows of text as a model sees them in inference, with the spans that it writes itself.

    last = render(messages up to the last turn that is learned from)
    for each turn i of the assistant that is learned from:
        p = render(messages before i, with the generation prompt)        the prompt in inference
        f = render(messages up to i)
        f must start with p; otherwise the training text differs from the inference prompt -> rejected, with the turn
        the model writes f[len(p) : e], e = the end of the last stop token in f; without a stop token -> rejected
        it must contain the message; otherwise the template drops it -> rejected, or counted if it is the reasoning
        last starts with f[:e] -> a span of the conversation's row
        otherwise              -> a separate row f[:e], because the template rewrites the turn later (no reasoning)

Therefore the text before every span is exactly what the model has read when it writes the span. ``{% generation %}`` is
not used, because few templates have it and it also marks headers that no model writes. The length of ``render(messages
before i)`` is not used either, because every fourth template renders a different text without the generation prompt.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill.data.base import Conversation, Message
from distill.data.chat_probe import Probed
from distill.data.chat_spec import LearnFrom
from distill.data.chat_template import ChatTemplate, Refused
from distill.data.message import Unusable

MARK = "\ufdd0"
"""Escape character inside special tokens that appear literally in messages, until the text is tokenized (a Unicode
noncharacter)."""
_ESCAPED = "\\ufdd0"
REASONING_DROPPED = "turns whose reasoning the template leaves out"
OWN_ROWS = "turns as rows of their own"
WRITTEN_OUT = "conversations with special tokens written out, read as text"


@dataclass(frozen=True)
class TextRow:
    """A row before it is tokenized.

    Attributes:
        text: text that the template wrote; special tokens that appear literally in messages are escaped with
            :data:`MARK`.
        spans: (start, end) of what the assistant writes in the text, ascending.
        learned: the spans that are learned from; with ``learn_from: all``, a single span over the whole text.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    learned: tuple[tuple[int, int], ...]


class Rendering:
    """Renders conversations as rows of text.

    Args:
        template: the chat template.
        probed: its properties.
    """

    def __init__(self, template: ChatTemplate, probed: Probed):
        self.template, self.probed = template, probed
        self._guarded = re.compile("|".join(map(re.escape, sorted(probed.guarded, key=len, reverse=True))) or "(?!)")
        self._stop = re.compile("|".join(map(re.escape, probed.stops)))

    def rows(self, conversation: Conversation, learn_from: LearnFrom) -> tuple[list[TextRow], Counter[str]]:
        """The rows of a conversation, and counts of notes to report to the user.

        Raises:
            Unusable: the template's text of the conversation cannot be used.
        """
        noted: Counter[str] = Counter()
        conversation = self._guard(conversation, noted)
        wanted = [number for number, learned in enumerate(conversation.learned) if learned]
        if learn_from == "last":
            wanted = wanted[-1:]
        turns = [self._turn(conversation, number, noted) for number in wanted]
        last, (_, end) = turns[-1]
        main = self._render(conversation, len(conversation.messages), wanted[-1]) if learn_from == "all" else last
        spans = tuple(span for text, span in turns if main.startswith(text[: span[1]]))
        rewritten = [(text, span) for text, span in turns if not main.startswith(text[: span[1]])]
        rows = [TextRow(main, spans, ((0, len(main)),))] if learn_from == "all" else [TextRow(main[:end], spans, spans)]
        noted[OWN_ROWS] += len(rewritten)
        return rows + [TextRow(text[: span[1]], (span,), (span,)) for text, span in rewritten], noted

    def prompt(self, messages: Sequence[Message]) -> str:
        """The prompt, from which the assistant continues; special tokens that appear literally in messages are escaped
        with :data:`MARK`.

        Raises:
            Unusable: the template refuses the messages.
        """
        conversation = self._guard(Conversation("prompt", tuple(messages), ()), Counter())
        return self._render(conversation, len(messages), len(messages), is_prompt=True)

    def _turn(self, conversation: Conversation, number: int, noted: Counter[str]) -> tuple[str, tuple[int, int]]:
        """The text up to and including a turn, and the span in it that the assistant writes."""
        prompt = self._render(conversation, number, number, is_prompt=True)
        text = self._render(conversation, number + 1, number)
        if not text.startswith(prompt):
            raise Unusable("the template changes its prompt", self._changed(number, prompt, text))
        stops = list(self._stop.finditer(text, len(prompt)))
        if not stops:
            raise Unusable(
                "no stop token",
                f"message {number + 1}: the template ends the turn with {text[-20:]!r} and not with "
                + " or ".join(map(repr, self.probed.stops)),
            )
        end = stops[-1].end()
        _check_shown(conversation.messages[number], number + 1, text[len(prompt) : end], noted)
        return text, (len(prompt), end)

    def _render(self, conversation: Conversation, count: int, turn: int, *, is_prompt: bool = False) -> str:
        """Render the first ``count`` messages as text."""
        try:
            text = self.template.render(
                conversation.messages[:count],
                tools=conversation.tools,
                arguments=conversation.arguments,
                is_prompt=is_prompt,
            )
        except Refused as why:
            what = "the prompt for message" if is_prompt else "message"
            raise Unusable("the template refuses it", f"{what} {turn + 1}: {why}") from None
        # a template may JSON-escape the mark as ASCII; leave text that literally contains this escape
        return text.replace(_ESCAPED, MARK) if _ESCAPED in text and MARK in _written(conversation) else text

    def _changed(self, number: int, prompt: str, text: str) -> str:
        same = next(
            (i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text))
        )
        hint = "name a .jinja file that writes both alike"
        if "enable_thinking" in self.template.literal():
            hint = "set data.chat.arguments: {enable_thinking: ...} as the data has it (a row may say it too, in "
            hint += "chat_template_kwargs), or " + "name a .jinja file that writes both alike"
        return (
            f"message {number + 1}: the model would be given {prompt[same : same + 40]!r} where the template writes "
            f"{text[same : same + 40]!r} once the turn is there, so no text has it as the model sees it; {hint}"
        )

    def _guard(self, conversation: Conversation, noted: Counter[str]) -> Conversation:
        """The conversation, in which guarded tokens that appear literally in messages and tools are escaped with
        :data:`MARK`."""
        whole = _written(conversation)
        if MARK not in whole and not self._guarded.search(whole):
            return conversation
        noted[WRITTEN_OUT] += 1
        messages = tuple(
            {key: self._marked(value) for key, value in message.items()} for message in conversation.messages
        )
        return replace(conversation, messages=messages, tools=tuple(map(self._marked, conversation.tools)))

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._guarded.sub(lambda token: token[0][0] + MARK + token[0][1:], value.replace(MARK, ""))
        if isinstance(value, dict):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list) else value


def _written(conversation: Conversation) -> str:
    """A conversation and its tools as one JSON text."""
    return json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, default=repr)


def _check_shown(message: Message, number: int, written: str, noted: Counter[str]) -> None:
    """Check that the content of a message is in the text that the model would write.

    Raises:
        Unusable: the answer or a tool call is not in it.
    """
    thought, _, content = message["content"].rpartition("</think>")
    if content.strip() not in written:
        raise Unusable(
            "the template drops the answer", f"message {number}: its text is not in what the template writes"
        )
    reasoning = [message.get("reasoning_content", ""), thought.rpartition("<think>")[2]]
    noted[REASONING_DROPPED] += any(text.strip() not in written for text in reasoning)
    for call in message.get("tool_calls", ()):
        for text in [call["function"]["name"], *_texts(call["function"]["arguments"])]:
            if text not in written and json.dumps(text, ensure_ascii=False)[1:-1] not in written:
                raise Unusable(
                    "the template drops tool calls", f"message {number}: {text[:40]!r} of a tool call is not written"
                )


def _texts(value: Any) -> Iterator[str]:
    """The strings in a JSON value. Numbers are left out, because they may be written in several ways."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
