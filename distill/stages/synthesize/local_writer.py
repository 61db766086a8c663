"""A model of the run that writes in batches.

The tokens of a reply depend on random numbers of its own request, so on neither the order of the requests nor the other
rows. The rounding of a batch depends on its shape; therefore a resumed run makes the same batches of all requests of a
phase, and writes a batch of which some replies are missing again as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.core import stop
from distill.core.artifact import fingerprint
from distill.core.errors import InputError
from distill.data.base import Message
from distill.data.chat_encoder import ChatEncoder
from distill.data.chat_spec import ChatSpec
from distill.data.message import Unusable
from distill.data.order import seeded
from distill.evaluation.tasks.likelihood import log_likelihoods
from distill.models.load import load_model, move
from distill.stages.synthesize.requests import LENGTH, STOP, TOO_LONG, Likelihood, LikelihoodRequest, Reply, Request
from distill.stages.synthesize.writer_tokenizer import writer_tokenizer
from distill.training.ends import ends_of
from distill.training.on_policy import sample, until_end
from distill.training.spec import OnPolicySpec
from distill.training.trainer import dtype_on, resolve_device

if TYPE_CHECKING:
    from distill.stages.session import StageContext

BATCHES_AT_ONCE, MOST_TOKENS = 8, 8192
"""Batches of likelihoods that are stored at once, and tokens of a batch at most."""
COLDEST = 1e-6
"""Temperature in place of 0: the softmax has one token, the most likely one."""


class LocalWriter:
    """Writes with a model in memory.

    Args:
        context: of the stage.
        reference: of the model.
        batch_size: requests at once.

    Raises:
        InputError: the model cannot be loaded, or has no chat template.
    """

    def __init__(self, context: StageContext, reference: str, batch_size: int):
        self._location, self._seed, self._batch_size = (
            context.session.artifact(reference).location,
            context.session.seed,
            batch_size,
        )
        self._tokenizer = writer_tokenizer(context.session, reference)
        self._encoder = ChatEncoder(self._tokenizer, context.session.data.chat or ChatSpec(), sequence_length=0)
        device = resolve_device(context.session.compute)
        self.model = move(load_model(self._location, dtype=dtype_on(device)), device).eval()
        known = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._positions: int = known if isinstance(known, int) else 2048
        self._ends = tuple(sorted({*ends_of(self.model.generation_config.eos_token_id), *self._encoder.stops}))

    def identity(self) -> str:
        """The hash of the model's files, and the size of batches, which the rounding depends on."""
        return f"model {fingerprint(self._location)}, batches of {self._batch_size}"

    def write(self, requests: Sequence[Request], needed: set[str]) -> Iterator[list[tuple[str, Reply]]]:
        """See :class:`~distill.stages.synthesize.requests.Writer`."""
        prompts = {request.id: self.prompt(request.messages) for request in requests}
        room = {request.id: self._positions - request.max_new_tokens for request in requests}
        long = {id for id in prompts if len(prompts[id]) > room[id]}
        if missing := [id for id in prompts if id in long & needed]:
            yield [(id, Reply("", TOO_LONG, len(prompts[id]), 0)) for id in missing]
        kinds: dict[tuple[int, float], list[Request]] = {}  # a batch is sampled at one temperature, up to one length
        for request in requests:
            if request.id not in long:
                kinds.setdefault((request.max_new_tokens, request.temperature), []).append(request)
        for some in kinds.values():
            rows = sorted(some, key=lambda one: -len(prompts[one.id]))
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                if needed & {one.id for one in batch}:
                    stop.check()
                    yield self._write(batch, [prompts[one.id] for one in batch])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that the model continues.

        Raises:
            InputError: the template does not take it.
        """
        try:
            return self._encoder.prompt(list(messages))
        except Unusable as why:
            raise InputError(f"writer: the chat template of {self._location} refuses a prompt: {why}") from None

    def likelihoods(self, given: Sequence[LikelihoodRequest], needed: set[str]) -> Iterator[dict[str, Likelihood]]:
        """See :class:`~distill.stages.synthesize.requests.Writer`."""
        ids = {one.id: self._ids(one) for one in given}
        order = sorted(ids, key=lambda id: -sum(map(len, ids[id])))
        at_once = self._batch_size * BATCHES_AT_ONCE
        for start in range(0, len(order), at_once):
            some = order[start : start + at_once]
            if not needed & set(some):
                continue
            batch_tokens = min(self._batch_size * sum(map(len, ids[some[0]])), MOST_TOKENS)
            found = log_likelihoods(
                self.model, [ids[id] for id in some], positions=self._positions, batch_tokens=batch_tokens
            )
            yield {id: Likelihood(one.nats / len(ids[id][1]), one.cut) for id, one in zip(some, found, strict=True)}

    def _ids(self, given: LikelihoodRequest) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer, which is the end of the turn where it is empty."""
        answer = self._encoder.encode([given.answer])[0][:-1].tolist()
        return self.prompt(given.messages), answer[len(self._encoder.start) :] or [self._ends[0]]

    def _write(self, batch: Sequence[Request], prompts: Sequence[list[int]]) -> list[tuple[str, Reply]]:
        """Replies to requests of one temperature and length."""
        new, temperature = batch[0].max_new_tokens, batch[0].temperature
        spec = OnPolicySpec(max_new_tokens=new, temperature=temperature or COLDEST)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)  # [rows, prompt]
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        uniform = torch.stack([self._uniform(request) for request in batch])  # [rows, new]
        device = self.model.device
        vocabulary = len(self._tokenizer)
        sequences, _ = sample(
            self.model, ids.to(device), lengths.to(device), None, uniform.to(device), spec, self._ends, vocabulary
        )
        sequences = sequences.cpu()
        width = sequences.shape[1] - ids.shape[1]
        written = sequences.gather(1, lengths.unsqueeze(1) + torch.arange(width))  # [rows, new]
        inside, ended = until_end(written, self._ends)
        made = []
        for request, length, row, kept, is_ended in zip(batch, lengths, written, inside, ended, strict=True):
            tokens = row[kept].tolist()
            text = self._tokenizer.decode(tokens[: len(tokens) - int(is_ended)], skip_special_tokens=True)
            reply = Reply(str(text).strip(), STOP if is_ended else LENGTH, int(length), len(tokens))
            made.append((request.id, reply))
        return made

    def _uniform(self, request: Request) -> Tensor:
        """Random numbers of one request, float64 [new]."""
        generator = seeded(self._seed, f"synthesize {request.id}")
        return torch.rand(request.max_new_tokens, generator=generator, dtype=torch.float64)
