"""A model in memory that answers questions: by log-likelihoods, and by greedy generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from distill.core import stop
from distill.core.errors import GivenUp, InputError
from distill.data.chat_spec import ChatSpec
from distill.evaluation.greedy import greedy
from distill.evaluation.tasks.base import LogLikelihood, Prompt
from distill.evaluation.tasks.likelihood import batches, log_likelihoods
from distill.evaluation.tasks.prompts import PromptEncoder


class ModelInMemory:
    """Asks a causal language model. The model's mode is unchanged afterwards, and no random numbers are drawn.

    Args:
        model: model with its weights, on its device.
        tokenizer: tokenizer of the model.
        chat: chat settings of the recipe.
        batch_tokens: number of tokens per batch, including padding.
        gives_up: whether to raise ``GivenUp`` between two batches after a stop signal, for a caller that must save its
            own work first.

    Attributes:
        positions: number of tokens that the model can read (its context length).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat: ChatSpec,
        batch_tokens: int,
        gives_up: bool = False,
    ):
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.positions: int = known if isinstance(known, int) else 2048
        self._encoder, self._gives_up = PromptEncoder(tokenizer, chat), gives_up

    def log_likelihoods(self, asked: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """The log-likelihood of each continuation; see :func:`~distill.evaluation.tasks.likelihood.log_likelihoods`.

        Raises:
            InputError: a continuation has no tokens, or more than the context length.
        """
        pairs = [self._encoder.pair(prompt, continuation) for prompt, continuation in asked]
        with self._evaluating():
            return log_likelihoods(
                self.model,
                pairs,
                positions=self.positions,
                batch_tokens=self.batch_tokens,
                before_batch=self._before_batch,
            )

    def written(self, prompts: Sequence[Prompt], *, new_tokens: int, stops: Sequence[str]) -> list[tuple[str, bool]]:
        """The text that the model generates greedily for each prompt.

        Args:
            prompts: prompts in any order; they are batched by length.
            new_tokens: largest number of new tokens.
            stops: stop strings, at which an answer ends.

        Returns:
            For each prompt, the text and whether the prompt's beginning was cut off.

        Raises:
            InputError: ``new_tokens`` leaves no room for a prompt in the context length.
        """
        if new_tokens >= self.positions:
            raise InputError(f"max_new_tokens ({new_tokens}) leaves no room in the model's {self.positions} positions")
        room = self.positions - new_tokens
        whole = [self._encoder.prompt(prompt) for prompt in prompts]
        rows: dict[tuple[int, ...], str] = dict.fromkeys((tuple(ids[-room:]) for ids in whole), "")
        order = sorted(rows, key=len, reverse=True)
        with self._evaluating():
            for batch in batches(order, max(1, self.batch_tokens // 2)):
                self._before_batch()
                rows |= dict(zip(batch, self._generate(batch, new_tokens, stops), strict=True))
        return [(rows[tuple(ids[-room:])], len(ids) > room) for ids in whole]

    @torch.no_grad()
    def _generate(self, batch: list[tuple[int, ...]], new_tokens: int, stops: Sequence[str]) -> list[str]:
        longest, device = len(batch[0]), self.model.device
        end = getattr(self.model.generation_config, "eos_token_id", None)
        ends = end if isinstance(end, list) else [self.tokenizer.eos_token_id if end is None else end]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ends[0]
        ids = torch.tensor([[pad] * (longest - len(row)) + [*row] for row in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device)
        settings = greedy(new_tokens, ends, pad, list(stops) or None)
        made = self.model.generate(ids, attention_mask=mask, generation_config=settings, tokenizer=self.tokenizer)
        return [self._text(row[longest:].tolist(), ends, stops) for row in made]

    def _text(self, ids: list[int], ends: list[int], stops: Sequence[str]) -> str:
        """The text up to the first end-of-text token or stop string."""
        own = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text = str(self.tokenizer.decode(ids[:own], skip_special_tokens=True))
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]

    def _before_batch(self) -> None:
        if self._gives_up and stop.asked():
            raise GivenUp
        stop.check()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
