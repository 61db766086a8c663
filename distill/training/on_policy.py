"""On-policy distillation: some steps learn from sequences that the student writes itself.

    a step is own  <=>  u < share(step),                        u in [0, 1) of seed and step alone
    y_t ~ softmax(student(prompt, y_<t) / temperature)          no gradient flows through the sampling
    loss = sum over t of D(student, teacher)(prompt, y_<t)      up to and including the first end

Prefer it where the student will be left to write by itself, as it learns to go on from its own mistakes, and with
reverse KL or Jensen-Shannon; start from a student that writes sensibly (distil off-policy first). Perplexity on given
text gains little by it, and a step costs the time of the generation on top.

Each sequence has random numbers of its own, of the seed, the step and its place in the step. So micro-batches, ranks
and a resume change nothing, and the global random state (dropout) is left as it was. The whole step is own or not, so
that no rank waits for another one's generation.

Source: Agarwal et al. 2023, arXiv 2306.13649, algorithm 1 (there a draw for each batch too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from distill.core.errors import InputError
from distill.data.loader import seeded
from distill.losses import AnyLossSpec, LossTerm
from distill.training.spec import OnPolicySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]
Losses = Sequence[tuple[str, AnyLossSpec]]


@dataclass(frozen=True)
class Turn:
    """What a micro-batch is learned from.

    Attributes:
        batch: text, or the student's own sequences in its place.
        losses: those that apply to it.
        tokens: int64 scalar, tokens that both models read, without filling.
        figures: sums and counts for the metrics, by name.
    """

    batch: Batch
    losses: Losses
    tokens: Tensor
    figures: dict[str, LossTerm]


class OnPolicy:
    """Decides which steps learn from own sequences, and writes them.

    Args:
        spec: how often, how long.
        seed: decides which steps, and what is written.
        ends: ids that end a text, of :func:`~distill.training.ends.agreed_ends`.
        vocabulary: ids from here on are never written: rows that pad a head mean nothing, and the other model may
            not have them.
    """

    def __init__(self, spec: OnPolicySpec, *, seed: int, ends: Sequence[int], vocabulary: int):
        if not ends:
            raise InputError("on_policy: no token ends a text; give the models an eos_token_id")
        self.spec, self.seed, self.ends, self.vocabulary = spec, seed, tuple(ends), vocabulary

    def is_own(self, step: int, num_steps: int) -> bool:
        """Whether optimizer step ``step`` (from 0) of ``num_steps`` is own, on all ranks."""
        drawn = torch.rand((), generator=seeded(self.seed, f"on_policy {step}"), dtype=torch.float64)
        return bool(drawn < self.spec.share_at(step, num_steps))

    def turn(
        self, student: PreTrainedModel, batch: Batch, losses: Losses, step: int, num_steps: int, first: int
    ) -> Turn:
        """A micro-batch as it is, or own sequences at its prompts.

        Args:
            student: writes them as it is now.
            batch: blocks of text.
            losses: all of the stage's.
            step: optimizer step, from 0.
            num_steps: of the stage.
            first: place in the step, over all ranks, of the batch's first sequence.
        """
        if not self.is_own(step, num_steps):
            counted = batch["mask"].sum()
            nothing = LossTerm(_float(counted) * 0, counted)
            read = counted + batch["mask"].any(1).sum()
            return Turn(batch, losses, read, {"on_policy/generated_share": nothing})
        uniform = torch.stack([self._uniform(step, first + row) for row in range(len(batch["mask"]))])
        own, figures = self._own(student, batch, uniform)
        read = own["mask"].sum() + self.spec.prompt_tokens * own["mask"].any(1).sum()
        figures["on_policy/generated_share"] = LossTerm(_float(own["mask"].sum()), own["mask"].sum())
        return Turn(own, [(name, loss) for name, loss in losses if not loss.needs_text], read, figures)

    def _uniform(self, step: int, place: int) -> Tensor:
        """One number in [0, 1) for each token of one sequence. float64 [max_new_tokens]"""
        generator = seeded(self.seed, f"on_policy {step} {place}")
        return torch.rand(self.spec.max_new_tokens, generator=generator, dtype=torch.float64)

    def _own(self, student: PreTrainedModel, batch: Batch, uniform: Tensor) -> tuple[Batch, dict[str, LossTerm]]:
        """Own sequences [rows, prompt + new] with the mask of what was written, and what there is to say of them."""
        start, limit = self.spec.prompt_tokens, self.spec.num_tokens()
        lacking = (0, max(0, limit - batch["mask"].shape[1]))  # blocks of short documents may be shorter
        ids = functional.pad(batch["input_ids"], lacking, value=self.ends[0])
        places = functional.pad(batch["position_ids"], lacking)[:, :start] if "position_ids" in batch else None
        sequences, entropy = sample(student, ids[:, :start], places, uniform, self.spec, self.ends, self.vocabulary)
        # a block that ends within its prompt has nothing to go on from
        prompted = functional.pad(batch["mask"], lacking)[:, start - 2] if start > 1 else batch["mask"].any(1)
        if places is not None:  # nor has a document that ends with it
            prompted = prompted & until_end(ids[:, start - 1 : start], self.ends)[1].logical_not()
        new = sequences[:, start:]
        wrote = until_end(new, self.ends)[0] & prompted.unsqueeze(1)
        own = {"input_ids": sequences, "mask": torch.zeros_like(sequences, dtype=torch.bool)}
        own["mask"][:, start - 1 : -1] = wrote  # the prediction at a position is of the next token
        if places is not None:
            after = torch.arange(1, new.shape[1] + 1, device=places.device)
            own["position_ids"] = torch.cat([places, places[:, -1:] + after], 1)
        figures = {"on_policy/entropy": LossTerm((entropy * wrote).sum(), wrote.sum())}
        figures["on_policy/length"] = LossTerm(_float(wrote.sum()), prompted.sum())
        return own, figures | self._shape(new, prompted, "") | self._shape(ids[:, start:limit], prompted, "text_")

    def _shape(self, passages: Tensor, prompted: Tensor, prefix: str) -> dict[str, LossTerm]:
        """How many of the passages [rows, new] after a prompt have no end, and how they repeat themselves."""
        inside, ended = until_end(passages, self.ends)
        endless = LossTerm(_float((prompted & ~ended).sum()), prompted.sum())
        repeated = repetition(passages, inside & prompted.unsqueeze(1))
        return {f"on_policy/{prefix}at_limit": endless, f"on_policy/{prefix}repetition": repeated}


def sample(
    student: PreTrainedModel,
    prompts: Tensor,
    places: Tensor | None,
    uniform: Tensor,
    spec: OnPolicySpec,
    ends: tuple[int, ...],
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Let the student go on from prompts, without gradient, dropout or its own generation settings.

    Args:
        student: left as it was.
        prompts: int64 [rows, prompt].
        places: position ids of the prompts where documents are kept apart, int64 [rows, prompt]: each row goes on from
            the document that its prompt ends in. None goes on from all of it.
        uniform: the numbers that decide, float64 [rows, max_new_tokens].
        spec: length and temperature.
        ends: ids after which a sequence stops.
        vocabulary: ids below it may be written.

    Returns:
        sequences with their prompts, filled up with an end after the end, int64 [rows, prompt + new]; and the entropy
        of the student's distribution (at temperature 1) at each new token, fp32 [rows, new], nats.
    """
    draw = _Draw(uniform.to(prompts.device), spec.temperature, vocabulary)
    settings = GenerationConfig(
        max_new_tokens=spec.max_new_tokens, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    from_end = torch.arange(prompts.shape[1], device=prompts.device).flip(0)
    attended = torch.ones_like(prompts) if places is None else (from_end <= places[:, -1:]).long()
    # a model's own settings (repetition_penalty, ...) fill what is unset, so they are put aside
    training, student_settings = student.training, student.generation_config
    student.generation_config = settings
    student.eval()  # which also lets go of gradient checkpointing, so that the cache of keys and values works
    try:
        # a compiled body would be compiled again and again, as the cache grows
        with torch.compiler.set_stance("force_eager"):
            sequences = cast(Any, student).generate(
                prompts,
                attention_mask=attended,
                generation_config=settings,
                logits_processor=LogitsProcessorList([draw]),
            )
    finally:
        student.generation_config = student_settings
        student.train(training)
    return sequences, torch.stack(draw.entropies, 1)


class _Draw(LogitsProcessor):
    """Leaves one token of each row: the one whose share of the cumulative distribution holds the row's number.

    So each row's randomness is its own, where ``generate`` would draw for the whole batch from the global state.
    """

    def __init__(self, uniform: Tensor, temperature: float, vocabulary: int):
        self.uniform, self.temperature, self.vocabulary = uniform, temperature, vocabulary
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, vocabulary] -> the same, -inf but for the drawn token."""
        logits = scores[:, : self.vocabulary].float()
        number = self.uniform[:, len(self.entropies), None]
        self.entropies.append(torch.special.entr(logits.softmax(-1)).sum(-1))
        # fp64, because a sum over a large vocabulary in fp32 would pass its tail over
        up_to = (logits / self.temperature).softmax(-1).double().cumsum(-1)
        drawn = torch.searchsorted(up_to, number * up_to[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def until_end(tokens: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What of each row is written: all up to and including its first end.

    Args:
        tokens: int64 [rows, tokens].
        ends: ids that end a text.

    Returns:
        bool [rows, tokens], and whether there is an end, bool [rows].
    """
    end = torch.stack([tokens == one for one in ends]).any(0)
    return end.cumsum(1) - end.long() == 0, end.any(1)


def repetition(tokens: Tensor, counted: Tensor, n: int = 4) -> LossTerm:
    """n-grams that stood in the same row before, of all n-grams.

    Source: Welleck et al. 2019, arXiv 1908.04319 (there "seq-rep-n").

    Args:
        tokens: int64 [rows, tokens].
        counted: bool, likewise; an n-gram counts when all of its tokens do.
        n: tokens of an n-gram.
    """
    if tokens.shape[1] < n:
        zero = counted.sum() * 0
        return LossTerm(_float(zero), zero)
    whole = counted.unfold(1, n, 1).all(-1)
    key = torch.zeros_like(tokens[:, n - 1 :])
    for part in tokens.unfold(1, n, 1).unbind(-1):
        key = key * 6364136223846793005 + part  # wraps around: a hash of 64 bits
    nothing = torch.iinfo(torch.int64).max
    ordered = key.masked_fill(~whole, nothing).sort(1).values
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != nothing)
    return LossTerm(_float(again.sum()), whole.sum())


def _float(count: Tensor) -> Tensor:
    return count.to(torch.float32)
