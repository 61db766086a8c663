"""What a writer is asked, and what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from distill.core.artifact import hash_of
from distill.data.base import Message

STOP = "stop"
"""Finish of a reply that the writer ended itself."""
LENGTH, TOO_LONG, REFUSED = "length", "prompt too long", "refused by the server"
FINAL = (STOP, LENGTH, TOO_LONG, REFUSED)
"""How replies end that are kept; one that ends otherwise, such as by "abort", is asked for again."""


@dataclass(frozen=True)
class Request:
    """One thing that a writer shall write.

    Attributes:
        messages: the conversation so far; the last is the user's.
        max_new_tokens: largest number of tokens of the reply.
        temperature: of the sampling; 0 is greedy.
        copy: tells requests apart that ask for several replies to the same messages.
    """

    messages: tuple[Message, ...]
    max_new_tokens: int
    temperature: float = 0.0
    copy: int = 0

    @cached_property
    def id(self) -> str:
        """Stands for all that decides the reply of a given writer."""
        return hash_of(self.messages, self.max_new_tokens, self.temperature, self.copy)


@dataclass(frozen=True)
class Reply:
    """What was written.

    Attributes:
        text: without special tokens and surrounding whitespace.
        finish: :data:`STOP`, or why it ends otherwise, such as one of :data:`FINAL`.
        prompt_tokens: tokens of the prompt as the writer counts them; None if unknown.
        new_tokens: tokens of the reply; None if unknown.
    """

    text: str
    finish: str
    prompt_tokens: int | None = None
    new_tokens: int | None = None


@dataclass(frozen=True)
class Likelihood:
    """How likely a writer finds an answer.

    Attributes:
        mean: log-probability per token, in nats.
        is_cut: whether the beginning of its messages was left out, as all was longer than the writer's context.
    """

    mean: float
    is_cut: bool = False


@dataclass(frozen=True)
class LikelihoodRequest:
    """An answer whose likelihood is asked for.

    Attributes:
        messages: what is said before it.
        answer: its text.
    """

    messages: tuple[Message, ...]
    answer: str

    @cached_property
    def id(self) -> str:
        """Stands for both."""
        return hash_of(self.messages, self.answer)


class Writer(Protocol):
    """A model of the run, or a server."""

    def identity(self) -> str:
        """Stands for the model, so that replies of two models are never mixed."""

    def write(self, requests: Sequence[Request], needed: set[str]) -> Iterator[list[tuple[str, Reply]]]:
        """Replies as they are finished, each with the id of its request.

        Args:
            requests: all requests of this phase, each once. They decide the batches, so that a resume computes the same
                numbers.
            needed: ids of the requests without a reply.
        """

    def likelihoods(self, given: Sequence[LikelihoodRequest], needed: set[str]) -> Iterator[dict[str, Likelihood]]:
        """How likely each answer is after its messages, by id, as they are computed.

        Args:
            given: all that are asked for, each once. They decide the batches.
            needed: ids of those that were not computed before.

        Raises:
            InputError: the writer does not tell.
        """


def asked(said: str, max_new_tokens: int, temperature: float = 0.0, copy: int = 0) -> Request:
    """A request that is one message of the user."""
    return Request(({"role": "user", "content": said},), max_new_tokens, temperature, copy)
