"""Measures the size and the error of a codec on a sample of the text, before a cache is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distill.core.stop import stoppable
from distill.data.teacher_cache.base import ENTROPY, HIDDEN, IDS, PROBS, TAIL, CodecSpec
from distill.losses.forward_kl import forward_kl
from distill.losses.head_losses import Head, Signal
from distill.losses.sparse import SparseSignal, sparse_forward_kl
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 512


@dataclass(frozen=True)
class Fidelity:
    """Difference between the teacher's distribution and what a codec stores of it.

    Attributes:
        bytes_per_token: bytes per token on disk.
        kl: mean KL(teacher || decoded) in nats per token, with the rest of the probability spread evenly over the other
            tokens; None if it is infinite, because an unbiased estimate contains zeros.
        gradient_cosine: mean over tokens of the cosine between the gradients of forward KL in the student's logits,
            with the whole and with the decoded distribution. The student is the teacher at temperature 2.
        summed_cosine: the same for the gradients summed over the sample, as in an optimizer step. Noise averages out in
            it, bias does not.
        tokens: number of tokens in the sample.
    """

    bytes_per_token: float
    kl: float | None
    gradient_cosine: float
    summed_cosine: float
    tokens: int

    def line(self) -> str:
        """One line for the user."""
        kl = "KL to the teacher infinite per token, unbiased" if self.kl is None else f"KL to the teacher {self.kl:.2g}"
        return (
            f"{self.bytes_per_token:.1f} bytes per token, {kl}, gradient cosine {self.gradient_cosine:.4f} per token "
            f"and {self.summed_cosine:.4f} over {self.tokens:,}"
        )


def signal_of(decoded: dict[str, Tensor], vocabulary: int, head: Head | None) -> Signal | SparseSignal:
    """The teacher's side of a batch from a codec's keys.

    Args:
        decoded: a batch, or what a codec's ``decode`` returned.
        vocabulary: rows of the teacher's head.
        head: the teacher's head, for hidden states.
    """
    if HIDDEN in decoded:
        assert head is not None
        return Signal(decoded[HIDDEN], head)
    return SparseSignal(decoded[IDS], decoded[PROBS], vocabulary, decoded.get(TAIL), decoded.get(ENTROPY))


def measure(
    pairs: Sequence[tuple[Tensor, Tensor]],
    codec: CodecSpec,
    width: int,
    vocabulary: int,
    logits: Callable[[Tensor], Tensor],
) -> Fidelity:
    """Compare a sample with its decoded version.

    Args:
        pairs: per row, the teacher's hidden states [positions, hidden] and its bytes, uint8.
        codec: the codec that made the bytes.
        width: see :meth:`CodecSpec.decode`.
        vocabulary: rows of the teacher's head.
        logits: the teacher's head.
    """
    kl = LossTerm(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64))
    cosine, tokens = 0.0, sum(len(hidden) for hidden, _ in pairs)
    sums = torch.zeros(2, vocabulary, dtype=torch.float64)
    for hidden, data in stoppable(pairs):
        decoded = codec.decode(data, len(hidden), width)
        for start in range(0, len(hidden), _CHUNK):
            rows = slice(start, start + _CHUNK)
            with torch.inference_mode():
                exact = logits(hidden[rows])
            # a copy, because autograd does not accept inference tensors
            exact = exact.float().clone()
            part = {key: values[rows].to(exact.device) for key, values in decoded.items()}
            if HIDDEN in part:
                part[HIDDEN] = part[HIDDEN].to(hidden.dtype)
            signal = signal_of(part, vocabulary, Head(logits))
            again = _logits_of(signal)
            if again is not None:
                kl += _kl(exact, again)
            whole, coded = _gradient(exact, exact), _gradient(exact, signal, again)
            cosine += float(torch.cosine_similarity(whole, coded, dim=-1).sum())
            sums += torch.stack([whole.double().sum(0).cpu(), coded.double().sum(0).cpu()])
    return Fidelity(
        bytes_per_token=sum(len(data) for _, data in pairs) / tokens,
        kl=None if codec.kind == "sampled" else kl.per_token().item(),
        gradient_cosine=cosine / tokens,
        summed_cosine=float(torch.cosine_similarity(sums[0], sums[1], dim=0)),
        tokens=tokens,
    )


def _logits_of(signal: Signal | SparseSignal) -> Tensor | None:
    """Log-probabilities [tokens, vocabulary] up to a constant; None for an estimate, which has none."""
    if isinstance(signal, Signal):
        with torch.inference_mode():
            return signal.head.logits(signal.hidden).float().clone()
    if signal.tail is None:
        return None
    others = max(1, signal.vocabulary - signal.ids.shape[-1])
    # a probability that underflows in fp32 is not 0, and 0 * -inf would be NaN
    tail, probs = (values.clamp(min=torch.finfo(torch.float32).tiny) for values in (signal.tail / others, signal.probs))
    return tail.log().unsqueeze(-1).expand(-1, signal.vocabulary).scatter(-1, signal.ids, probs.log())


def _kl(teacher: Tensor, decoded: Tensor) -> LossTerm:
    """Forward KL of logits [tokens, vocabulary], on the CPU."""
    term = forward_kl(decoded, teacher, torch.ones(len(teacher), dtype=torch.bool, device=teacher.device))
    return LossTerm(term.sum.double().cpu(), term.count.cpu())


def _gradient(teacher: Tensor, signal: Tensor | Signal | SparseSignal, logits: Tensor | None = None) -> Tensor:
    """Gradient of forward KL at T = 1 in the logits of a student that is the teacher at temperature 2.

    Args:
        teacher: its logits, [tokens, vocabulary].
        signal: the target of the student.
        logits: logits of ``signal``, if it is a whole distribution.
    """
    student = (teacher / 2).requires_grad_()
    on = torch.ones(len(teacher), dtype=torch.bool, device=teacher.device)
    if isinstance(signal, SparseSignal):
        term = sparse_forward_kl(student, signal, on)
    else:
        term = forward_kl(student, teacher if logits is None else logits, on)
    return torch.autograd.grad(term.sum, student)[0]
