"""The contract of an exporter: write a deliverable, then load it in its real engine and compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distill.core.errors import DistillError
from distill.core.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class VerifyResult:
    """How far an exported model is from the trained one, over the tokens that were compared.

    Attributes:
        tokens: positions compared.
        max_abs_logit: largest absolute difference of two logits.
        mean_abs_logit: mean absolute difference of the logits.
        kl: mean KL(trained || exported) of a token, nats.
        worst_kl: the largest KL of any token, nats; this is what is bounded.
        top1_agreement: share of tokens for which both rank the same token first, 0 to 1.
        weight_bytes: size of the weight files.
    """

    tokens: int
    max_abs_logit: float
    mean_abs_logit: float
    kl: float
    worst_kl: float
    top1_agreement: float
    weight_bytes: int


class ExporterSpec(Spec):
    """What every exporter has: a kind and how exact the deliverable must be."""

    kind: str
    max_kl: float = Field(1e-6, ge=0)
    """Largest KL, in nats, of any token between the trained and the exported model; 0 demands equal probabilities."""

    def export(
        self,
        source_folder: Path,
        folder: Path,
        *,
        title: str,
        rows: Sequence[Mapping[str, Any]] = (),
        verified: VerifyResult | None = None,
    ) -> None:
        """Write the deliverable.

        Args:
            source_folder: the model artifact to be delivered.
            folder: where to; made if it is not there, and empty if it is.
            title: what the model is called in its card.
            rows: the measured table of the card, one mapping of column to value a row.
            verified: what :meth:`verify` measured; None makes the card say that it was not verified.
        """
        raise NotImplementedError

    def verify(
        self, source_model: PreTrainedModel, folder: Path, batches: Iterable[Mapping[str, Tensor]]
    ) -> VerifyResult:
        """Load the deliverable in its engine and hold its logits against the trained model's.

        Args:
            source_model: the trained model.
            folder: what :meth:`export` wrote.
            batches: ``input_ids`` int64 [batch, sequence] and ``mask`` bool [batch, sequence], True where to compare.

        Raises:
            DistillError: it does not load whole, or is further away than ``max_kl``.
        """
        raise NotImplementedError


def require_close(result: VerifyResult, max_kl: float, folder: Path) -> VerifyResult:
    """The result, when it is within the bound.

    Raises:
        DistillError: it is not, or it is not a number.
    """
    if not result.worst_kl <= max_kl:
        raise DistillError(
            f"{folder}: the exported model is not the trained one: KL {result.worst_kl:.3g} nats at the worst of "
            f"{result.tokens} tokens (expected at most {max_kl:.3g}; mean {result.kl:.3g}, largest logit difference "
            f"{result.max_abs_logit:.3g}, same first token {result.top1_agreement:.1%}); export it again, or "
            "raise max_kl if this loss is meant"
        )
    return result
