"""What a stage says of itself before it runs: what it reads, makes, trains, needs and refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.core.errors import InputError
from distill.losses import AnyLossSpec
from distill.models.lora import LoraSpec
from distill.pruning.layout import Config
from distill.quantization import ActivationSpec
from distill.quantization.base import QuantizerSpec
from distill.quantization.embeddings import EmbeddingsKind, embeddings_grid
from distill.quantization.kv_cache import CacheType
from distill.training.spec import BudgetSpec


@dataclass(frozen=True)
class FakeQuant:
    """What a student is trained through (:func:`distill.training.assemble.assemble` takes the same).

    Attributes:
        quantizer: grid of the weights.
        layers: (pattern, grid) of the layers that have their own, as far as that is known.
        activations: grid of the layers' inputs, or None.
        kv_cache: type of keys and values, or None.
        embeddings: kind of grid of embeddings and head; None: by the grid of the layers.
    """

    quantizer: QuantizerSpec
    layers: Sequence[tuple[str, QuantizerSpec]] = ()
    activations: ActivationSpec | None = None
    kv_cache: CacheType | None = None
    embeddings: EmbeddingsKind | None = None

    def embeddings_grid(self, width: int | None = None) -> QuantizerSpec | None:
        """The grid of embeddings and head; see :func:`distill.quantization.embeddings.embeddings_grid`."""
        return embeddings_grid(self.embeddings, self.quantizer, width)


@dataclass(frozen=True)
class Training:
    """A training that a stage will do, as far as its memory and its checkpoints depend on it.

    Attributes:
        budget: how long, and with what batch.
        losses: of the training.
        teacher: reference of the model that the student learns from; None without one, or where it learns from itself.
        lora: adapters that are trained in place of the weights, or None.
        fake_quant: how the student's weights are quantized while they train, or None.
        is_trial: whether it is one of several short trainings that one process does alone, to compare models.
    """

    budget: BudgetSpec
    losses: Sequence[AnyLossSpec]
    teacher: str | None = None
    lora: LoraSpec | None = None
    fake_quant: FakeQuant | None = None
    is_trial: bool = False


@dataclass(frozen=True)
class Signal:
    """What a teacher said about the text, on disk, in place of the teacher.

    Attributes:
        teacher: reference of the model that said it.
        needs_head: whether a student's process computes the logits with the teacher's output head.
        bytes_per_token: on disk, about; None when the teacher's config is not known.
        max_tokens: that are written down at most; None: those of the text that later stages train on.
    """

    teacher: str
    needs_head: bool
    bytes_per_token: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Need:
    """Memory that a stage needs for something else than a training.

    Attributes:
        num_bytes: at its peak.
        why: what for, and when, in words.
    """

    num_bytes: float
    why: str


@dataclass(frozen=True)
class Forecast:
    """What one stage will do, by the configs that are known before the run.

    Attributes:
        reads: what it reads, in words; empty when it reads no model.
        does: what it does with it, in words.
        makes: every config that its model may have; empty when it makes none, or when nothing is known of it.
        is_open: whether the size of its model shows only when it runs.
        grids: grids that the weights of its model are on, none where they are plain; None when that is not known.
        activations: the grid of the inputs of its model's layers, or None.
        embeddings: the grid of its model's embeddings and head, or None where they are kept.
        signal: what it writes down for students, or None.
        training: what it trains, or None.
        disk_bytes: what else it leaves on disk, beside the model and the signal; 0 if it is little.
        need: memory that it needs besides, or None when there is none or it is not known.
        notes: what people should know of it beforehand, one line each.
        refused: why it cannot work with a model that may come; one error per model, in the order of the models.
        is_refused: whether it can work with none of them.
    """

    reads: str = ""
    does: Sequence[str] = ()
    makes: Sequence[Config] = ()
    is_open: bool = False
    grids: Sequence[QuantizerSpec] | None = None
    activations: ActivationSpec | None = None
    embeddings: QuantizerSpec | None = None
    signal: Signal | None = None
    training: Training | None = None
    disk_bytes: float = 0.0
    need: Need | None = None
    notes: Sequence[str] = ()
    refused: Sequence[InputError] = ()
    is_refused: bool = False
