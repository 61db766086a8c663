"""The contract of an exporter: write a deliverable, then load it in its real engine and compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from distill.core.errors import DistillError, InputError
from distill.core.spec import Spec
from distill.models.load import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from distill.quantization.base import QuantizerSpec
    from distill.quantization.inputs import ActivationSpec


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


@dataclass(frozen=True)
class CardFacts:
    """What the card of a deliverable says of its format.

    Attributes:
        library: the Hub's name of the library that loads it.
        tags: the Hub's tags of the format.
        how_to_load: Markdown, with code that loads it.
        quantized: whether its weights have fewer bits than the base model's.
        task: what the model is for, in the Hub's words.
    """

    library: str
    tags: tuple[str, ...]
    how_to_load: str
    quantized: bool = False
    task: str = "text-generation"


class EngineMissing(DistillError):
    """The engine that would run a deliverable is not installed, so it cannot be verified in it."""


class ExporterSpec(Spec):
    """What every exporter has: a kind and how exact the deliverable must be."""

    engine: ClassVar[str]
    """What runs the deliverable, in words."""
    engine_module: ClassVar[str | None] = None
    """The engine's module, where it does not come with distill."""
    tasks: ClassVar[tuple[Task, ...]] = ("causal_lm",)
    """What the models that it writes predict."""
    extra: ClassVar[str | None] = None
    """Extra of distill that installs what writes and runs the deliverable."""

    kind: str
    max_kl: float = Field(1e-6, ge=0)
    """Largest KL, in nats, of any token between the trained and the exported model; 0 demands equal probabilities."""

    def writers(self) -> tuple[str, ...]:
        """Modules that write it and do not come with distill."""
        return ()

    def missing(self) -> str | None:
        """What is not installed and must be to write it, in one line with the mend; None when all is there."""
        missing = [module for module in self.writers() if find_spec(module) is None]
        return f"target {self.kind} needs {missing[0]}, {self._not_installed()}" if missing else None

    def missing_engine(self) -> str | None:
        """What is not installed and must be to run and verify it, in one line; None when all is there."""
        if self.engine_module is None or find_spec(self.engine_module) is not None:
            return None
        return f"not verified in {self.engine.rstrip(',')}, {self._not_installed()} and run again"

    def _not_installed(self) -> str:
        return f"which is not installed: pip install 'distill[{self.extra}]'"

    def check_grids(self, grids: Sequence[QuantizerSpec], activations: ActivationSpec | None) -> None:
        """Refuse, before it is trained, a model that cannot be written in this format.

        Args:
            grids: those that its layers are trained on; none where the weights stay plain.
            activations: that of the layers' inputs, if they have one.

        Raises:
            InputError: :meth:`export` would refuse it.
        """

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        """Write the deliverable, without a card.

        Args:
            source_folder: the model artifact to be delivered.
            folder: where to; made if it is not there, and empty if it is.
            title: what the model is called.

        Returns:
            What was done to the weights, a line each, for people.

        Raises:
            InputError: the model cannot be written in this format, or a package that writes it is not installed.
        """
        raise NotImplementedError

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        """Load the deliverable in its engine and hold its logits against the trained model's.

        Args:
            source_model: the trained model.
            folder: what :meth:`export` wrote.
            batches: ``input_ids`` int64 [batch, sequence] and ``mask`` bool [batch, sequence], True where to compare.
            tokenizer: the trained model's; an engine that brings its own must cut the batches' text alike.

        Raises:
            EngineMissing: the engine is not installed.
            DistillError: it does not load whole, or is further away than ``max_kl``.
        """
        raise NotImplementedError

    def card(self, folder: Path) -> CardFacts:
        """What the card says of the format of what :meth:`export` wrote."""
        raise NotImplementedError


def cache_notes(source_folder: Path, engine: str) -> list[str]:
    """A line on the cache that the model was trained for, and what becomes of it in the engine; [] without one."""
    from distill.models.kv_cache import cache_type
    from distill.models.load import load_config

    kind = cache_type(load_config(str(source_folder)))
    return [f"keys and values: for llama.cpp's cache in {kind}, {engine}"] if kind else []


def new_folder(source_folder: Path, folder: Path) -> None:
    """Make the deliverable's folder.

    Raises:
        InputError: the source is no model folder, or the new one is not empty.
    """
    if not (source_folder / "config.json").is_file() or not any(source_folder.glob("*.safetensors")):
        raise InputError(f"{source_folder}: not a model folder (expected config.json and *.safetensors in it)")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty; give a new folder, so that no older file is delivered by mistake")


def require_writers(spec: ExporterSpec) -> None:
    """Raise an InputError that says what to install when a module that writes the deliverable is not there."""
    if missing := spec.missing():
        raise InputError(missing)


def require_engine(spec: ExporterSpec) -> None:
    """Raise EngineMissing when the module of the engine is not there."""
    if missing := spec.missing_engine():
        raise EngineMissing(missing)


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
