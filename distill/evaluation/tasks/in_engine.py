"""A model in its engine that is asked questions, as :class:`~distill.evaluation.tasks.in_memory.ModelInMemory` is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from distill.core import stop
from distill.core.errors import InputError
from distill.data.chat_spec import ChatSpec
from distill.evaluation.engine_process import EngineProcess
from distill.evaluation.tasks.base import LogLikelihood, Prompt
from distill.evaluation.tasks.prompts import PromptEncoder


class ModelInEngine:
    """Asks an engine, one text after the other.

    Args:
        process: of the engine.
        tokenizer: of the model.
        chat: of the recipe.
        positions: tokens that the model can read.
        ends: ids that end an answer.
    """

    model: Any = None
    batch_tokens = 0

    def __init__(
        self,
        process: EngineProcess,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat: ChatSpec,
        positions: int,
        ends: Sequence[int],
    ):
        self._process, self.tokenizer, self.positions = process, tokenizer, positions
        self._encoder, self._ends = PromptEncoder(tokenizer, chat), set(ends)

    def log_likelihoods(self, asked: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """Of each continuation after its prompt; what reads the same tokens is read once.

        Raises:
            InputError: a continuation has no tokens, or more than the model can read.
        """
        pairs = [self._encoder.pair(prompt, continuation) for prompt, continuation in asked]
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (before, after) in enumerate(pairs):
            if len(after) > self.positions:
                raise InputError(
                    f"a choice of {len(after)} tokens is longer than the model's {self.positions} positions"
                )
            rows.setdefault(tuple((before + after)[-(self.positions + 1) : -1]), []).append(number)
        found: dict[int, LogLikelihood] = {}
        for row, numbers in rows.items():
            stop.check()
            longest = max(len(pairs[number][1]) for number in numbers)
            logits = torch.cat(list(self._process.logits(row, len(row) - longest)))  # [longest, vocabulary]
            for number in numbers:
                before, after = pairs[number]
                targets = torch.tensor(after)
                own = logits[-len(after) :].double().log_softmax(-1)  # [tokens of after, vocabulary]
                nats = own.gather(-1, targets[:, None]).sum().item()
                is_greedy = bool((own.argmax(-1) == targets).all())
                found[number] = LogLikelihood(nats, is_greedy, len(before) + len(after) > self.positions + 1)
        return [found[number] for number in range(len(pairs))]

    def written(self, prompts: Sequence[Prompt], *, new_tokens: int, stops: Sequence[str]) -> list[tuple[str, bool]]:
        """What the model writes greedily after each prompt, and whether the prompt's beginning was cut.

        Raises:
            InputError: the model has no room for a prompt beside so many new tokens.
        """
        if new_tokens >= self.positions:
            raise InputError(f"max_new_tokens ({new_tokens}) leaves no room in the model's {self.positions} positions")
        room = self.positions - new_tokens
        found = []
        for prompt in prompts:
            stop.check()
            ids = self._encoder.prompt(prompt)
            found.append((self._answer(ids[-room:], new_tokens, stops), len(ids) > room))
        return found

    def _answer(self, ids: list[int], new_tokens: int, stops: Sequence[str]) -> str:
        def is_over(written: list[int]) -> bool:
            return written[-1] in self._ends or any(one in self._text(written) for one in stops)

        written = self._process.write(ids, new_tokens, is_over)
        text = self._text(written[:-1] if written[-1] in self._ends else written)
        return text[: min((at for one in stops if (at := text.find(one)) >= 0), default=len(text))]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
