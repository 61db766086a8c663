"""On-policy distillation: in some steps, the student learns from sequences that were sampled from it.

    a step is on-policy  <=>  u < share(step),                  u in [0, 1) depends only on the seed and the step
    y_t ~ softmax(student(prompt, y_<t) / temperature)          no gradient flows through the sampling
    loss = sum over t of D(student, teacher)(prompt, y_<t)      up to and including the first end-of-text token

Prefer it for a student that generates text, because it learns to recover from its own mistakes; use it with reverse KL
or Jensen-Shannon. Distil off-policy first, so that the samples are sensible text. The perplexity on given text improves
little, and a step also takes the time of the generation.

Each sequence has its own random numbers, which depend on the seed, the step and the index of the sequence in the step.
So the result does not depend on micro-batches, ranks or a resume, and the global random state (dropout) is not used.
All micro-batches of a step, on all ranks, are either on-policy or not, so that no rank waits for the generation of
another. In conversations, the prompt is everything before one turn of the assistant. The turn is drawn with such a
random number too.

Source: Agarwal et al. 2023, arXiv 2306.13649, algorithm 1 (which also draws per batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from distill.core.batch import SAMPLED, causal_batch
from distill.core.errors import InputError
from distill.data.order import seeded
from distill.losses import AnyLossSpec, LossTerm
from distill.training.sampling_prompts import Batch, Prompts, of_conversations, of_text
from distill.training.spec import OnPolicySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Losses = Sequence[tuple[str, AnyLossSpec]]


@dataclass(frozen=True)
class StepSource:
    """A micro-batch to learn from: text, or on-policy samples.

    Attributes:
        batch: the batch.
        losses: losses that are computed on this batch.
        tokens: number of tokens that both models read, without padding, int64 scalar.
        figures: additional metrics, by name.
    """

    batch: Batch
    losses: Losses
    tokens: Tensor
    figures: dict[str, LossTerm]


class OnPolicy:
    """Decides which steps are on-policy, and samples their sequences.

    Args:
        spec: settings.
        seed: seed for the choice of steps and for the sampling.
        ends: ids of the end-of-text tokens, from :func:`~distill.training.ends.agreed_ends`.
        vocabulary: number of ids that may be sampled. Higher ids are padding of the head, which the other model may not
            have.
        row_of_conversations: number of tokens per row if the text consists of conversations; else None.
    """

    def __init__(
        self,
        spec: OnPolicySpec,
        *,
        seed: int,
        ends: Sequence[int],
        vocabulary: int,
        row_of_conversations: int | None = None,
    ):
        if not ends:
            raise InputError("on_policy: no token ends a text; give the models an eos_token_id")
        self.spec, self.seed, self.ends, self.vocabulary = spec, seed, tuple(ends), vocabulary
        self.row_of_conversations = row_of_conversations

    def is_on_policy(self, step: int, num_steps: int) -> bool:
        """Whether optimizer step ``step`` (from 0) of ``num_steps`` is on-policy; the same on all ranks."""
        drawn = torch.rand((), generator=seeded(self.seed, f"on_policy {step}"), dtype=torch.float64)
        return bool(drawn < self.spec.share_at(step, num_steps))

    def source(
        self, student: PreTrainedModel, batch: Batch, losses: Losses, step: int, num_steps: int, first: int
    ) -> StepSource:
        """The micro-batch itself, or samples that continue its prompts.

        Args:
            student: the student, from which the samples are drawn.
            batch: rows of text.
            losses: all losses of the stage.
            step: optimizer step, counted from 0.
            num_steps: number of optimizer steps of the stage.
            first: index of the batch's first sequence within the step, over all ranks.
        """
        if not self.is_on_policy(step, num_steps):
            counted = batch["mask"].sum()
            nothing = LossTerm(_float(counted) * 0, counted)
            # up to the last counted token; all tokens after it are padding
            to_last = batch["mask"] * torch.arange(2, batch["mask"].shape[1] + 2, device=counted.device)
            return StepSource(batch, losses, to_last.amax(1).sum(), {"on_policy/generated_share": nothing})
        numbers = range(first, first + len(batch["mask"]))
        prompts = self._prompts(batch, step, numbers)
        uniform = torch.stack([self._uniform(step, number) for number in numbers])  # [rows, new]
        samples, figures = self._samples(student, prompts, uniform)
        mask = samples["mask"]  # [rows, prompt + new]
        read = mask.sum() + (mask.any(1) * mask.int().argmax(1).add(1)).sum()  # new tokens and their prompts
        figures["on_policy/generated_share"] = LossTerm(_float(mask.sum()), mask.sum())
        return StepSource(samples, [(name, loss) for name, loss in losses if not loss.needs_text], read, figures)

    def _uniform(self, step: int, number: int) -> Tensor:
        """Random numbers in [0, 1) for the tokens of one sequence of the step, float64 [max_new_tokens]."""
        generator = seeded(self.seed, f"on_policy {step} {number}")
        return torch.rand(self.spec.max_new_tokens, generator=generator, dtype=torch.float64)

    def _prompts(self, batch: Batch, step: int, numbers: Sequence[int]) -> Prompts:
        """The prompts of a batch, whose sequences have the indices ``numbers`` in the step."""
        new = self.spec.max_new_tokens
        if self.row_of_conversations is None:
            return of_text(batch, self.spec.of_text, new, self.ends[0])
        generators = [seeded(self.seed, f"on_policy turn {step} {number}") for number in numbers]
        drawn = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        return of_conversations(batch, drawn, self.row_of_conversations - new, new, self.ends[0])

    def _samples(
        self, student: PreTrainedModel, prompts: Prompts, uniform: Tensor
    ) -> tuple[Batch, dict[str, LossTerm]]:
        """Samples as a batch [rows, prompt + new], whose mask is True for the new tokens, and their metrics."""
        sequences, entropy = sample(
            student, prompts.ids, prompts.lengths, prompts.places, uniform, self.spec, self.ends, self.vocabulary
        )
        steps = torch.arange(entropy.shape[1], device=sequences.device)
        written = prompts.lengths.unsqueeze(1) + steps  # columns of the new tokens, [rows, new]
        new = sequences.gather(1, written)
        wrote = until_end(new, self.ends)[0] & prompts.are_there.unsqueeze(1)
        # the mask of a token is at the position that predicts it
        mask = torch.zeros_like(sequences, dtype=torch.bool).scatter(1, written - 1, wrote)
        samples = causal_batch(sequences, mask)
        samples[SAMPLED] = torch.ones((), dtype=torch.bool)
        if prompts.places is not None:
            samples["position_ids"] = torch.cat([prompts.places, prompts.places[:, -1:] + steps + 1], 1)
        figures = {"on_policy/entropy": LossTerm((entropy * wrote).sum(), wrote.sum())}
        figures["on_policy/length"] = LossTerm(_float(wrote.sum()), prompts.are_there.sum())
        ours, texts = self._shape(new, prompts.are_there, ""), self._shape(prompts.passages, prompts.are_there, "text_")
        return samples, figures | ours | texts

    def _shape(self, passages: Tensor, prompted: Tensor, prefix: str) -> dict[str, LossTerm]:
        """Fraction of the passages [rows, new] without an end-of-text token, and their repetition."""
        inside, ended = until_end(passages, self.ends)
        endless = LossTerm(_float((prompted & ~ended).sum()), prompted.sum())
        repeated = repetition(passages, inside & prompted.unsqueeze(1))
        return {f"on_policy/{prefix}at_limit": endless, f"on_policy/{prefix}repetition": repeated}


def sample(
    student: PreTrainedModel,
    prompts: Tensor,
    lengths: Tensor,
    places: Tensor | None,
    uniform: Tensor,
    spec: OnPolicySpec,
    ends: tuple[int, ...],
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Sample continuations of prompts from the student, without gradients or dropout.

    The student's own generation settings are not used.

    Args:
        student: the student; it is unchanged afterwards.
        prompts: prompts, int64 [rows, prompt]. Values after the length of a prompt are ignored.
        lengths: number of tokens of each prompt, at least 1, int64 [rows].
        places: position ids of the prompts if documents are separated, int64 [rows, prompt]. Then all prompts have the
            same length, and each sample attends only to the last document of its prompt. None to attend to the whole
            prompt.
        uniform: random numbers that determine the samples, float64 [rows, max_new_tokens].
        spec: length and temperature.
        ends: ids of the end-of-text tokens.
        vocabulary: number of ids that may be sampled.

    Returns:
        Sequences that begin with their prompts and are padded with ``ends[0]``, int64 [rows, prompt + new]; and the
        entropy of the student's distribution (at temperature 1) at each new token, in nats, fp32 [rows, new].
    """
    draw = _Draw(uniform.to(prompts.device), spec.temperature, vocabulary)
    settings = GenerationConfig(
        max_new_tokens=spec.max_new_tokens, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    # left-padded, so that all prompts end in the last column: column c holds token c - lacking of the prompt
    column, lacking = torch.arange(prompts.shape[1], device=prompts.device), prompts.shape[1] - lengths.unsqueeze(1)
    prompts = prompts.gather(1, (column - lacking).clamp(min=0))
    from_end = column.flip(0)
    attended = (column >= lacking) if places is None else (from_end <= places[:, -1:])  # [rows, prompt]
    # generate would use the model's own settings (repetition_penalty, ...) for unset values, so they are replaced
    training, student_settings = student.training, student.generation_config
    student.generation_config = settings
    student.eval()  # this also disables gradient checkpointing, so that the KV cache can be used
    try:
        # a compiled body would be recompiled whenever the cache grows
        with torch.compiler.set_stance("force_eager"):
            sequences = cast(Any, student).generate(
                prompts,
                attention_mask=attended.long(),
                generation_config=settings,
                logits_processor=LogitsProcessorList([draw]),
            )
    finally:
        student.generation_config = student_settings
        student.train(training)
    column = torch.arange(sequences.shape[1], device=prompts.device)
    whole = functional.pad(sequences, (0, prompts.shape[1]), value=ends[0])
    return whole.gather(1, column + lacking), torch.stack(draw.entropies, 1)


class _Draw(LogitsProcessor):
    """Keeps one token per row: the first at which the cumulative distribution exceeds the row's random number.

    So each row has its own random numbers, whereas ``generate`` would draw for the whole batch from the global state.
    """

    def __init__(self, uniform: Tensor, temperature: float, vocabulary: int):
        self.uniform, self.temperature, self.vocabulary = uniform, temperature, vocabulary
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of all tokens except the drawn one to -inf, [rows, vocabulary]."""
        logits = scores[:, : self.vocabulary].float()
        number = self.uniform[:, len(self.entropies), None]  # [rows, 1]
        self.entropies.append(torch.special.entr(logits.softmax(-1)).sum(-1))
        # fp64, because a cumulative sum over a large vocabulary in fp32 would lose the tail
        up_to = (logits / self.temperature).softmax(-1).double().cumsum(-1)
        drawn = torch.searchsorted(up_to, number * up_to[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def until_end(tokens: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A mask of the tokens of each row up to and including its first end-of-text token.

    Args:
        tokens: int64 [rows, tokens].
        ends: ids of the end-of-text tokens.

    Returns:
        The mask, bool [rows, tokens], and whether each row has an end-of-text token, bool [rows].
    """
    end = torch.stack([tokens == one for one in ends]).any(0)
    return end.cumsum(1) - end.long() == 0, end.any(1)


def repetition(tokens: Tensor, counted: Tensor, n: int = 4) -> LossTerm:
    """Fraction of n-grams that already occurred earlier in the same row, as a sum and a count.

    Source: Welleck et al. 2019, arXiv 1908.04319 ("seq-rep-n").

    Args:
        tokens: int64 [rows, tokens].
        counted: bool [rows, tokens]; an n-gram is counted if all of its tokens are.
        n: length of the n-grams in tokens.
    """
    if tokens.shape[1] < n:
        zero = counted.sum() * 0
        return LossTerm(_float(zero), zero)
    whole = counted.unfold(1, n, 1).all(-1)  # [rows, n-grams]
    key = torch.zeros_like(tokens[:, n - 1 :])  # [rows, n-grams]
    for part in tokens.unfold(1, n, 1).unbind(-1):
        key = key * 6364136223846793005 + part  # a 64-bit hash; the overflow is intended
    nothing = torch.iinfo(torch.int64).max
    ordered = key.masked_fill(~whole, nothing).sort(1).values
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != nothing)
    return LossTerm(_float(again.sum()), whole.sum())


def _float(count: Tensor) -> Tensor:
    return count.to(torch.float32)
