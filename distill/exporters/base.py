"""The interface of an exporter: write a model for an engine, then load it in that engine and compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from distill.core.errors import DistillError, InputError
from distill.core.installed import install_command
from distill.core.spec import Spec
from distill.models.load import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from distill.quantization.base import QuantizerSpec
    from distill.quantization.inputs import ActivationSpec


@dataclass(frozen=True)
class VerifyResult:
    """The difference between an exported model and the trained model.

    Attributes:
        tokens: number of tokens compared.
        max_abs_logit: largest absolute difference of two logits.
        mean_abs_logit: mean absolute difference of the logits.
        kl: mean KL(trained || exported), in nats per token.
        worst_kl: the largest KL of any token, in nats; ``max_kl`` is the bound on this value.
        top1_agreement: fraction of tokens for which both models predict the same token, 0 to 1.
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
    """The part of a model card that depends on the format.

    Attributes:
        library: the Hub's name of the library that loads the export.
        tags: the Hub's tags for the format.
        how_to_load: Markdown with example code.
        quantized: whether the weights have fewer bits than those of the base model.
        task: the Hub's pipeline tag.
    """

    library: str
    tags: tuple[str, ...]
    how_to_load: str
    quantized: bool = False
    task: str = "text-generation"


class EngineMissing(DistillError):
    """The engine is not installed, so the export cannot be verified."""


class ExporterSpec(Spec):
    """Base class of the exporters."""

    engine: ClassVar[str]
    """Name of the engine that runs the export."""
    engine_module: ClassVar[str | None] = None
    """Python module of the engine, if distill does not depend on it."""
    tasks: ClassVar[tuple[Task, ...]] = ("causal_lm",)
    """Tasks of the models that it can export."""
    extra: ClassVar[str | None] = None
    """The extra of distill that installs the packages to write and run the export."""
    runs_in: ClassVar[str] = "distill.evaluation.transformers_engine"
    """The module whose ``open_engine`` opens an export in its engine for measurements."""
    environment: ClassVar[str] = ""
    """Variables in front of the command that installs the extra."""

    kind: str
    max_kl: float = Field(1e-6, ge=0)
    """Bound on the KL divergence of any token between the trained and the exported model, in nats; 0 requires equal
    probabilities."""

    def bytes_per_weight(self) -> float:
        """About how much a weight of the model takes on disk, for the forecast of disk; low-bit weights take less."""
        return 2.0

    def writers(self) -> tuple[str, ...]:
        """Optional modules that are needed to write the export."""
        return ()

    def missing(self) -> str | None:
        """One line that names a missing module for writing and how to install it; None if all are installed."""
        missing = [module for module in self.writers() if find_spec(module) is None]
        return f"target {self.kind} needs {missing[0]}, {self._not_installed()}" if missing else None

    def install_command(self) -> str | None:
        """The command that installs the engine; None if it is installed."""
        is_there = self.engine_module is None or find_spec(self.engine_module) is not None
        return None if is_there else self._pip_command()

    def missing_engine(self) -> str | None:
        """One line that says that the engine is not installed, and how to install it; None if it is installed."""
        if self.engine_module is None or find_spec(self.engine_module) is not None:
            return None
        return f"not verified in {self.engine.rstrip(',')}, {self._not_installed()}, then run the same command again"

    def _not_installed(self) -> str:
        return f"which is not installed: {self._pip_command()}"

    def _pip_command(self) -> str:
        return f"{self.environment}{install_command(str(self.extra))}"

    def check_grids(
        self,
        grids: Sequence[QuantizerSpec],
        activations: ActivationSpec | None,
        embeddings: QuantizerSpec | None = None,
    ) -> None:
        """Check before training that the format can store the quantizers of a model.

        Args:
            grids: the quantizers of its layers; empty for a model that is not quantized.
            activations: the quantizer of the layers' inputs, if there is one.
            embeddings: the quantizer of its embeddings and head, if there is one.

        Raises:
            InputError: :meth:`export` would raise one.
        """

    def check_model(self, location: str, config: PretrainedConfig | None, tokenizer: PreTrainedTokenizerFast) -> None:
        """Check before training that the format supports the architecture and the tokenizer of a model.

        Args:
            location: of the model, or of the model from which it will be made.
            config: of that model; None if it is not known yet.
            tokenizer: of that model.

        Raises:
            InputError: :meth:`export` would raise one.
        """

    def check_files(self, folder: Path) -> None:
        """Check before training that the files of a model that no stage makes can be copied.

        Raises:
            InputError: :meth:`export` would raise one.
        """

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        """Write the export, without a model card.

        Args:
            source_folder: the folder of the model to export.
            folder: the target folder; it must be empty, or is created.
            title: name of the model.

        Returns:
            Lines of text that say how the weights were converted.

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
        """Load the export in its engine and compare its logits with those of the trained model.

        Args:
            source_model: the trained model.
            folder: the folder that :meth:`export` wrote.
            batches: ``input_ids`` int64 [batch, sequence] and ``mask`` bool [batch, sequence], True where to compare.
            tokenizer: of the trained model; an engine with its own tokenizer must produce the same ids.

        Raises:
            EngineMissing: the engine is not installed.
            DistillError: the export does not load completely, or a token's KL is above ``max_kl``.
        """
        raise NotImplementedError

    def label(self, folder: Path) -> str:
        """Format and precision of the weights that :meth:`export` wrote, such as "GGUF Q4_0"."""
        raise NotImplementedError

    def num_bytes(self, folder: Path) -> int:
        """Size of the weight files that :meth:`export` wrote."""
        from distill.models.size import weight_bytes

        return weight_bytes(folder)

    def post_training(self, folder: Path) -> ExporterSpec | None:
        """The exporter that rounds a full-precision model to the precision of an export, without training.

        Args:
            folder: of the export.

        Returns:
            An exporter of this kind, or None if none of this kind rounds to that precision.
        """
        return self

    def card(self, folder: Path) -> CardFacts:
        """The part of the model card that depends on the format, for the folder that :meth:`export` wrote."""
        raise NotImplementedError


def cache_notes(source_folder: Path, engine: str) -> list[str]:
    """A line on the low-bit KV cache that the model was trained for, followed by ``engine``; [] without a cache."""
    from distill.models.kv_cache import cache_type
    from distill.models.load import load_config

    kind = cache_type(load_config(str(source_folder)))
    return [f"keys and values: trained for llama.cpp's KV cache in {kind}, {engine}"] if kind else []


def new_folder(source_folder: Path, folder: Path) -> None:
    """Create the folder of an export.

    Raises:
        InputError: the source is not a model folder, or the new folder is not empty.
    """
    if not (source_folder / "config.json").is_file() or not any(source_folder.glob("*.safetensors")):
        raise InputError(f"{source_folder}: not a model folder (expected config.json and *.safetensors in it)")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; give a new folder, so that the export contains no older files")


def require_writers(spec: ExporterSpec) -> None:
    """Raise an InputError that says what to install if a module for writing the export is missing."""
    if missing := spec.missing():
        raise InputError(missing)


def require_engine(spec: ExporterSpec) -> None:
    """Raise EngineMissing if the module of the engine is not installed."""
    if missing := spec.missing_engine():
        raise EngineMissing(missing)


def require_close(result: VerifyResult, max_kl: float, folder: Path) -> VerifyResult:
    """Return the result if it is within the bound.

    Raises:
        DistillError: the KL of a token is above ``max_kl``, or NaN.
    """
    if not result.worst_kl <= max_kl:
        raise DistillError(
            f"{folder}: the exported model differs from the trained model: the largest KL of {result.tokens} tokens is "
            f"{result.worst_kl:.3g} nats (expected at most {max_kl:.3g}; mean {result.kl:.3g}, largest logit "
            "difference "
            f"{result.max_abs_logit:.3g}, same top token for {result.top1_agreement:.1%}); export it again, or raise "
            "max_kl if you accept this difference"
        )
    return result
