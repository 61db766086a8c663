"""Answers to prompts by the writer: sequence-level distillation.

    answer = argmax over n samples of  1/|a| sum_t log p(a_t | prompt, a_<t)        (best of n by the writer)

Prefer it if prompts have no answers, if the writer is much better than the answers in the data, or if its tokenizer is
not the student's. If the data has good answers, it is not better than training on them (MiniLLM, table 1).

Source: Kim & Rush 2016, arXiv 1606.07947.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill.data.base import Conversation, Item, Message, Rejected
from distill.stages.synthesize.candidate import Candidate
from distill.stages.synthesize.makers.base import MakerResult, MakerSpec
from distill.stages.synthesize.requests import STOP, LikelihoodRequest, Request

if TYPE_CHECKING:
    from distill.stages.synthesize.asker import Asker


class Answers(MakerSpec):
    """The writer's answers to the prompts of the recipe's text: what is said before the assistant's first turn."""

    kind: Literal["answers"] = "answers"
    num_samples: int = Field(1, ge=1, le=64)
    """Number of answers to each prompt; the most likely one per token is kept."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    num_prompts: int | None = Field(None, ge=1)
    """Number of prompts to answer, from the start of the text; unset: all."""

    def why_no_server(self) -> str | None:
        """Best of n needs probabilities."""
        return "num_samples above 1 needs the probability of each answer" if self.num_samples > 1 else None

    def check(self) -> list[str]:
        """Several greedy answers are one."""
        if self.num_samples > 1 and self.temperature == 0:
            return ["make.temperature is 0, so all num_samples answers are the same; raise it"]
        return []

    def make(self, asker: Asker, texts: Iterable[Item], seed: int) -> MakerResult:
        """See :meth:`MakerSpec.make`."""
        prompts = list(islice(_prompts(texts), self.num_prompts))
        copies = range(self.num_samples)
        requests = [
            Request(prompt, self.max_new_tokens, self.temperature, copy) for prompt, _ in prompts for copy in copies
        ]
        replies = asker.ask("answers", requests)
        likely = [0.0] * len(replies)
        if self.num_samples > 1:
            given = [
                LikelihoodRequest(request.messages, reply.text or " ")
                for request, reply in zip(requests, replies, strict=True)
            ]
            likely = [one.mean for one in asker.likelihoods(given)]
        rows = []
        for number, (prompt, place) in enumerate(prompts):
            some = [number * self.num_samples + copy for copy in copies]
            finished = [one for one in some if replies[one].finish == STOP and replies[one].text] or some
            best = max(finished, key=lambda one: likely[one])
            more = {"log_probability": round(likely[best], 4)} if self.num_samples > 1 else {}
            rows.append(Candidate(prompt, replies[best].text, "", place, finish=replies[best].finish, more=more))
        return MakerResult(rows, raw=[reply.text for reply in replies[:5]])


def _prompts(texts: Iterable[Item]) -> Iterator[tuple[tuple[Message, ...], str]]:
    """Messages of each prompt, and where it stands; equal prompts once."""
    seen = set()
    for item in texts:
        if isinstance(item, Rejected):
            continue
        if isinstance(item, Conversation):
            first = next(number for number, one in enumerate(item.messages) if one["role"] == "assistant")
            messages = item.messages[:first]
        else:
            messages = ({"role": "user", "content": item.text},)
        key = str(messages)
        if messages and key not in seen:
            seen.add(key)
            yield messages, item.id
