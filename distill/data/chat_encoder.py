"""Encodes conversations as token ids with a mask of the trained tokens. Documents are encoded as plain text."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distill.core.errors import InputError
from distill.data.base import Conversation, Document, Message, Rejected
from distill.data.chat_probe import probe
from distill.data.chat_rows import MARK, Rendering, TextRow
from distill.data.chat_spec import ChatSpec, Text
from distill.data.chat_template import ChatTemplate
from distill.data.encoder import Encoded, Row, TextEncoder, backend_of, bytes_of
from distill.data.message import Unusable
from distill.data.tally import TOO_LONG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STRADDLED = "turns whose first token begins in their prompt, and is not learned"
TURNS_CUT = "turns left out, as they end beyond sequence_length"


class EncodedText(NamedTuple):
    """A text and its tokens.

    Attributes:
        text: the text with every :data:`MARK` removed.
        ids: its token ids.
        offsets: (first character, character after the last) of each token.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


class ChatEncoder(TextEncoder):
    """Encodes conversations as rows, with the chat template of the tokenizer.

    A row is tokenized as a whole, as in inference: the template writes the begin-of-text token, if there is one. A
    special token that is written out in a message is plain text.

    Args:
        tokenizer: a tokenizer with a chat template.
        chat: the recipe's ``data.chat``.
        sequence_length: maximum number of tokens in a row.

    Attributes:
        rendering: renders conversations with the template and its probed properties.
        stops: ids of the tokens that end a turn of the assistant.

    Raises:
        InputError: the tokenizer has no template, or one that refuses a simple conversation or writes no stop token.
    """

    marks_learned = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat: ChatSpec, sequence_length: int):
        super().__init__(tokenizer)
        self.chat, self.sequence_length, self.learn_from = chat, sequence_length, chat.learn_from
        added = tokenizer.added_tokens_decoder  # id -> token
        special = [token.content for token in added.values() if token.special]
        template = ChatTemplate.of(tokenizer, chat)
        probed = probe(template, [token.content for token in added.values()], special)
        self.rendering = Rendering(template, probed)
        vocabulary = tokenizer.get_vocab()
        self.stops: tuple[int, ...] = tuple(vocabulary[stop] for stop in probed.stops)
        self._added = sorted(added)
        self._chat_backend = backend_of(tokenizer)
        self._newline = self._chat_backend.encode("\n", add_special_tokens=False).ids

    def identity(self) -> list[Any]:
        """Settings other than the tokenizer that affect the tokens."""
        template, chat = self.rendering.template, self.chat
        told = {name: str(value) for name, value in template.given.items()}
        learned = f"{chat.learn_from}, validated on the assistant"
        how = [template.text, told, str(template.today), learned, chat.too_long, self.sequence_length]
        return [*super().identity(), *how]

    def for_validation(self) -> ChatEncoder:
        """The encoder for validation text, in which everything that the assistant writes counts."""
        other = copy(self)
        other.learn_from = "assistant"
        return other

    def rows(self, items: Sequence[Document | Conversation], *, with_bytes: bool) -> list[Encoded | Rejected]:
        """See :meth:`TextEncoder.rows`; conversations may have several rows each."""
        plain = iter(super().rows([item for item in items if isinstance(item, Document)], with_bytes=with_bytes))
        rendered = [self._rendered(item) for item in items]
        tokenized = iter(self._tokenize([row.text for one in rendered if isinstance(one, tuple) for row in one[0]]))
        made: list[Encoded | Rejected] = []
        for item, one in zip(items, rendered, strict=True):
            if isinstance(one, tuple):
                texts, noted = one
                made.append(self._fitted(item.id, [(row, next(tokenized)) for row in texts], noted, with_bytes))
            else:
                made.append(next(plain) if one is None else one)
        return made

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt, from which the assistant continues.

        Raises:
            Unusable: the template refuses the messages.
        """
        return self._tokenize([self.rendering.prompt(messages)])[0].ids

    def _rendered(self, item: Document | Conversation) -> tuple[list[TextRow], Counter[str]] | Rejected | None:
        if isinstance(item, Document):
            return None
        try:
            return self.rendering.rows(item, self.learn_from)
        except Unusable as why:
            return Rejected(item.id, why.reason, why.detail)

    def _fitted(
        self, id: str, rows: list[tuple[TextRow, EncodedText]], noted: Counter[str], with_bytes: bool
    ) -> Encoded | Rejected:
        """Encode the rows of a conversation. If one exceeds ``sequence_length``, drop the conversation or truncate the
        row, per ``too_long``."""
        longest, limit = max(len(tokens.ids) for _, tokens in rows), self.sequence_length
        if longest > limit and self.chat.too_long == "drop":
            return Rejected(id, TOO_LONG, f"{longest:,} tokens, data.sequence_length is {limit:,}")
        made = [row for pair in rows if (row := self._row(*pair, noted, with_bytes)) is not None]
        if not made:
            why = f"no turn ends within data.sequence_length ({limit:,} of {longest:,} tokens)"
            return Rejected(id, TOO_LONG, why)
        return Encoded(made, noted)

    def _row(self, row: TextRow, tokens: EncodedText, noted: Counter[str], with_bytes: bool) -> Row | None:
        """A row of ids up to the last turn that fits; None if no turn fits."""
        starts = np.array([start for start, _ in tokens.offsets])  # [tokens]
        marks = [at for at, letter in enumerate(row.text) if letter == MARK] if MARK in row.text else []

        def first_from(place: int) -> int:
            """Index of the first token that begins at or after a position of the marked text."""
            return int(np.searchsorted(starts, place - bisect_left(marks, place)))

        ends = [first_from(end) for _, end in row.spans]
        fitting = [end for end in ends if end <= self.sequence_length]
        noted[TURNS_CUT] += len(ends) - len(fitting)
        length = len(tokens.ids) if len(tokens.ids) <= self.sequence_length else max(fitting, default=0)
        learned = np.zeros(length, bool)
        for start, end in row.learned:
            first = first_from(start)
            learned[first : first_from(end)] = True
            noted[STRADDLED] += int(
                0 < first < length and tokens.offsets[first - 1][1] > start - bisect_left(marks, start)
            )
        if not learned.any():
            return None
        return Row(tokens.ids[:length], learned, self._sizes(tokens)[:length] if with_bytes else None)

    def _sizes(self, tokens: EncodedText) -> np.ndarray:
        """UTF-8 bytes of text per token; tokens that only the template writes count 0 bytes. uint32 [tokens]"""
        sizes = bytes_of(tokens.text, tokens.offsets)
        sizes[np.isin(tokens.ids, self._added)] = 0
        return sizes

    def _tokenize(self, texts: list[str]) -> list[EncodedText]:
        """Tokenize texts. A :data:`MARK` inside a special token makes the tokenizer read it as plain text."""
        encodings = self._chat_backend.encode_batch(texts, add_special_tokens=False)
        return [
            self._in_pieces(text.split(MARK)) if MARK in text else EncodedText(text, encoding.ids, encoding.offsets)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _in_pieces(self, pieces: list[str]) -> EncodedText:
        """Tokenize the pieces of a text separately, so that no token spans two pieces."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        done = 0
        for number, piece in enumerate(pieces):
            # prefix a newline, because some tokenizers add a space at the start of a text
            encoding = self._chat_backend.encode("\n" * bool(number) + piece, add_special_tokens=False)
            skipped, shift = (len(self._newline), 1) if number else (0, 0)
            if encoding.ids[:skipped] != self._newline[:skipped]:  # the newline was merged with what follows
                encoding, skipped, shift = self._chat_backend.encode(piece, add_special_tokens=False), 0, 0
            ids += encoding.ids[skipped:]
            offsets += [(done + start - shift, done + end - shift) for start, end in encoding.offsets[skipped:]]
            done += len(piece)
        return EncodedText("".join(pieces), ids, offsets)


@dataclass(frozen=True)
class ChatPrompts:
    """Encodes prompts with the chat template of a run.

    Attributes:
        template: the chat template of the run.
        chat: the recipe's ``data.chat``.
    """

    template: Text
    chat: ChatSpec

    def __call__(self, tokenizer: PreTrainedTokenizerFast, said: str | Sequence[Message]) -> list[int]:
        """Ids of the prompt, from which the assistant continues.

        Args:
            tokenizer: the tokenizer of a model of the run.
            said: the user's text, or whole messages.

        Raises:
            InputError: the template refuses the messages.
        """
        tokenizer.chat_template = self.template
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        try:
            return ChatEncoder(tokenizer, self.chat, sequence_length=0).prompt(messages)
        except Unusable as why:
            raise InputError(f"prompts: {said!r}: {why}") from None
