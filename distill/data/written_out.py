"""Finds texts that contain special tokens as plain text, or look like a chat that a template has rendered.

The encoder reads both as plain text: ``<|im_end|>`` in a text ends nothing. That is right for a page about chat
templates, and wrong for a file of conversations that were rendered before they were written: a model trained on it
never sees the tokens that it will see when it is used. Therefore such texts are counted and reported, with advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RENDERED = "documents that look like chats rendered by a template, read as plain text; if they are, use kind: chat"
SPECIAL = "documents with special tokens of the tokenizer written out, read as plain text: they end and mark nothing"

_MARKED = re.compile(r"<[^<>\s][^<>\n]{0,60}>|\[/?[A-Z_]{2,30}\]")
"""Matches the form of most special tokens, because a search for thousands of them one by one would take far longer."""
_TURNS = frozenset(
    (
        *("<|im_start|>", "<start_of_turn>", "<|turn>", "[INST]", "<|start_header_id|>", "<|START_OF_TURN_TOKEN|>"),
        *("<|user|>", "<|assistant|>", "<|system|>", "<|User|>", "<|Assistant|>", "<\uff5cUser\uff5c>"),
        *("<\uff5cAssistant\uff5c>", "<|role_start|>", "<|start_of_role|>", "<|header_start|>", "<|message|>"),
    )
)
"""Tokens that begin a turn in the templates of ChatML, Gemma, Llama, Mistral, Cohere, Phi, DeepSeek, Granite and
others."""
_PAIRS = (("### Instruction:", "### Response:"), ("Human: ", "Assistant: "), ("USER: ", "ASSISTANT: "))
"""Texts at the beginning of lines in templates without special tokens: Alpaca, the first Claude models, Vicuna."""


@dataclass(frozen=True)
class WrittenOut:
    """Finds special tokens and rendered chats in texts.

    Attributes:
        special: special tokens of the usual form.
        odd: pattern of the other special tokens; None if there are none.
    """

    special: frozenset[str]
    odd: re.Pattern[str] | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> WrittenOut:
        """Make it from a loaded tokenizer."""
        return cls.among(added.content for added in tokenizer.added_tokens_decoder.values() if added.special)

    @classmethod
    def written(cls, backend: Mapping[str, Any]) -> WrittenOut:
        """Make it from the content of a ``tokenizer.json``."""
        return cls.among(added["content"] for added in backend.get("added_tokens", ()) if added.get("special"))

    @classmethod
    def among(cls, tokens: Iterable[str]) -> WrittenOut:
        """Make it from special tokens."""
        tokens = {token for token in tokens if len(token) > 1}
        odd = sorted(token for token in tokens if not _MARKED.fullmatch(token))
        pattern = re.compile("|".join(map(re.escape, odd))) if odd else None
        return cls(frozenset(tokens - {*odd}), pattern)

    def noted(self, text: str) -> dict[str, int]:
        """Notes for the user about a text (note -> 1); see :class:`~distill.data.encoder.Encoded`."""
        found = {match[0] for match in _MARKED.finditer(text)} if "<" in text or "[" in text else set()
        noted = {}
        if not found.isdisjoint(_TURNS) or any(_begins_lines(text, *pair) for pair in _PAIRS):
            noted[RENDERED] = 1
        if not found.isdisjoint(self.special) or (self.odd is not None and self.odd.search(text)):
            noted[SPECIAL] = 1
        return noted


def _begins_lines(text: str, *words: str) -> bool:
    """Whether each of ``words`` is at the beginning of a line."""
    return all(text.startswith(word) or f"\n{word}" in text for word in words)
