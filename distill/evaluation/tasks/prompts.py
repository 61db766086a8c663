"""Encodes prompts and continuations as the model reads them in use.

If a tokenizer adds a begin token (Llama, Gemma), the prompt has it once. A chat template writes its own begin token, so
none is added. There is no end token between a prompt and its continuation.

A plain prompt and its continuation are encoded together, so that words are split as in a text, and the tokens after
those of the prompt belong to the continuation. Whitespace at the end of the prompt is moved to the continuation,
because a token usually begins with its space. lm-evaluation-harness does the same, so the scores are comparable.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from distill.core.errors import InputError
from distill.data.chat_encoder import ChatEncoder
from distill.data.chat_spec import ChatSpec
from distill.data.encoder import backend_of
from distill.data.message import Unusable
from distill.evaluation.tasks.base import Prompt


class PromptEncoder:
    """Encodes prompts.

    Args:
        tokenizer: tokenizer of the model.
        chat: chat settings of the recipe, for prompts that are messages.

    Attributes:
        begin: ids that the tokenizer adds before a text; empty for most tokenizers.
        nothing: ids of an empty prompt: ``begin``, else the begin token or the end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat: ChatSpec):
        self._tokenizer, self._chat = tokenizer, chat
        self._backend: Any = backend_of(tokenizer)
        self._backend.encode_special_tokens = True  # special tokens that occur in a question are encoded as text
        inner = self._ids("a")
        framed = self._backend.encode("a", add_special_tokens=True).ids
        at = next((place for place in range(len(framed)) if framed[place : place + len(inner)] == inner), 0)
        self.begin: list[int] = framed[:at]
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.nothing: list[int] = self.begin or [int(first)]
        self._chat_encoder: ChatEncoder | None = None

    def prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt.

        Raises:
            InputError: there is no chat template, or it does not accept the messages.
        """
        if isinstance(prompt, str):
            return [*self.begin, *self._ids(prompt)] or self.nothing
        if self._chat_encoder is None:
            if not self._tokenizer.chat_template:
                raise InputError(
                    "chat_template: true, but the tokenizer of this model has no chat template; remove it, or ask a "
                    "model that has one"
                )
            self._chat_encoder = ChatEncoder(self._tokenizer, self._chat, sequence_length=0)
        try:
            return self._chat_encoder.prompt(list(prompt))
        except Unusable as why:
            raise InputError(f"chat_template: true, but the template does not take the question: {why}") from None

    def pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        """(ids of a prompt, ids of its continuation); neither is empty.

        Raises:
            InputError: see :meth:`prompt`; or the continuation has no tokens of its own.
        """
        if not isinstance(prompt, str):
            before, after = self.prompt(prompt), self._ids(continuation)
        elif not prompt:
            before, after = self.nothing, self._ids(continuation)
        else:
            kept = prompt.rstrip()
            own = self._ids(kept)
            whole = self._ids(kept + prompt[len(kept) :] + continuation)
            before, after = [*self.begin, *own] or self.nothing, whole[len(own) :]
        if not after:
            raise InputError(f"{continuation!r} adds no tokens after {str(prompt)[-40:]!r}")
        return before, after

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids
