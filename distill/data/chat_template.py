"""Renders messages as text with a chat template, in transformers' sandbox.

A template is a program that comes with a model. It may add a system message, move or drop messages, rewrite earlier
turns, or raise an error. :mod:`distill.data.chat_rows` finds out what it does with a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError
from distill.data.base import Message
from distill.data.chat_spec import ChatSpec, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TODAY = (
    "data.chat: the template asks for today's date, with which the text would change from day to day; set "
    "data.chat.today, such as today: 2026-01-01"
)


class Refused(Exception):
    """The template refuses these messages. The text of the exception is the reason."""


class ChatTemplate:
    """A template with its arguments other than the messages.

    Args:
        text: the template, or several by name.
        special: special tokens by name, such as ``bos_token`` -> token.
        arguments: the recipe's ``data.chat.arguments``.
        today: date returned by ``strftime_now``; None raises an error.

    Attributes:
        as_parts: whether the template needs content as a list of parts, ``[{"type": "text", "text": ...}]``.
        arguments_as_text: whether the template needs the arguments of tool calls as JSON text.
    """

    def __init__(
        self, text: Text, special: Mapping[str, Any], arguments: Mapping[str, Any] | None = None,
        today: date | None = None,
    ):  # fmt: skip
        named = {"default": text} if isinstance(text, str) else text
        if "default" not in named:
            raise InputError(f"data.chat.template: none of its templates is called default ({', '.join(named)})")
        self.text, self.today = text, today
        self.given = {**special, **(arguments or {})}
        self._compiled = {name: self._compile(one) for name, one in named.items()}
        self.as_parts = self.arguments_as_text = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, chat: ChatSpec) -> ChatTemplate:
        """The chat template of a tokenizer.

        Raises:
            InputError: the tokenizer has none, or it is not a valid template.
        """
        if not tokenizer.chat_template:
            raise InputError("data.chat.template: the tokenizer has no chat template; name a .jinja file")
        return cls(tokenizer.chat_template, tokenizer.special_tokens_map, chat.arguments, chat.today)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
        is_prompt: bool = False,
    ) -> str:
        """Render messages as text.

        Args:
            messages: plain JSON values; not changed.
            tools: JSON schemas.
            arguments: arguments of the template, for these messages only.
            is_prompt: whether to add the generation prompt.

        Raises:
            Refused: the template raises an error.
            InputError: the template asks for today's date, and ``today`` is None.
        """
        compiled = self._compiled["tool_use" if tools and "tool_use" in self._compiled else "default"]
        given = {**self.given, **(arguments or {})}
        try:
            text = compiled.render(
                **given,
                messages=[self._shaped(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=is_prompt,
            )
        except InputError:
            raise
        except Exception as error:  # whatever a program may raise
            why = " ".join(str(error).split())[:200] or "no reason given"
            raise Refused(f"{why} ({type(error).__name__})") from None
        return str(text)

    def literal(self) -> str:
        """The texts of all its templates."""
        return self.text if isinstance(self.text, str) else "\n".join(self.text.values())

    def _compile(self, text: str) -> Any:
        from jinja2 import TemplateSyntaxError
        from transformers.utils import chat_template_utils

        try:
            # a new environment per template, because its strftime_now is replaced
            compiled = chat_template_utils._cached_compile_jinja_template(text)
        except TemplateSyntaxError as error:
            raise InputError(f"data.chat.template: line {error.lineno}: {error.message}") from None
        compiled.environment.globals["strftime_now"] = self._strftime_now
        return compiled

    def _strftime_now(self, form: str) -> str:
        if self.today is None:
            raise InputError(TODAY)
        return datetime.combine(self.today, time()).strftime(form)

    def _shaped(self, message: Message) -> Message:
        if self.as_parts:
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        if self.arguments_as_text and "tool_calls" in message:
            calls = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        return message
