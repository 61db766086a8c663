"""A model folder that plain transformers loads: weights, tokenizer, generation settings and a model card.

The deliverable of choice when the receiver uses transformers, or an engine that reads its folders. A model that was
quantized stays packed, in the compressed-tensors format.

Source: https://huggingface.co/docs/hub/model-cards for the card.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.core.artifact import LINEAGE, Artifact
from distill.core.batch import model_inputs
from distill.core.errors import DistillError, InputError
from distill.exporters.base import ExporterSpec, VerifyResult, require_close

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DELIVERED = {".safetensors", ".json", ".jinja", ".txt", ".model"}


class HuggingFace(ExporterSpec):
    """A Hugging Face folder with a model card, loaded by ``from_pretrained``."""

    kind: Literal["huggingface"] = "huggingface"

    def export(
        self,
        source_folder: Path,
        folder: Path,
        *,
        title: str,
        rows: Sequence[Mapping[str, Any]] = (),
        verified: VerifyResult | None = None,
    ) -> None:
        export(source_folder, folder, title=title, rows=rows, verified=verified)

    def verify(
        self, source_model: PreTrainedModel, folder: Path, batches: Iterable[Mapping[str, Tensor]]
    ) -> VerifyResult:
        return verify(source_model, folder, batches, max_kl=self.max_kl)


def export(
    source_folder: Path,
    folder: Path,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]] = (),
    verified: VerifyResult | None = None,
) -> None:
    """Copy a model artifact and write its card.

    The lineage file stays behind, since it names folders of the machine; what matters of it is in the card.

    Args:
        source_folder: the artifact, with safetensors weights.
        folder: where to; made if it is not there, and empty if it is.
        title: what the model is called in its card.
        rows: the measured table, one mapping of column to value a row.
        verified: what :func:`verify` measured; None makes the card say that it was not verified.

    Raises:
        InputError: the artifact has no config or no safetensors, or the folder is not empty.
    """
    from distill.exporters.model_card import write_card

    if not (source_folder / "config.json").is_file() or not any(source_folder.glob("*.safetensors")):
        raise InputError(f"{source_folder}: not a model folder (expected config.json and *.safetensors in it)")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty; give a new folder, so that no older file is delivered by mistake")
    for file in sorted(source_folder.iterdir()):
        if file.is_file() and file.suffix in DELIVERED and file.name != LINEAGE and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    lineage = Artifact(title, str(source_folder)).lineage()
    write_card(folder, title=title, lineage=lineage, rows=rows, verified=verified)


def verify(
    source_model: PreTrainedModel, folder: Path, batches: Iterable[Mapping[str, Tensor]], *, max_kl: float = 1e-6
) -> VerifyResult:
    """Load the folder with plain ``AutoModelForCausalLM.from_pretrained`` in fp32 and compare logits.

    Args:
        source_model: the trained model; of one that stays fake-quantized, what is not quantized must have been rounded
            to its stored type (:func:`~distill.quantization.convert.round_unquantized`).
        folder: a model folder.
        batches: ``input_ids`` int64 [batch, sequence], ``mask`` bool [batch, sequence], and ``attention_mask`` or
            ``position_ids`` if they are needed.
        max_kl: bound on the KL of any token, nats.

    Raises:
        DistillError: the folder does not load whole, or a token's KL is above the bound.
    """
    from distill.exporters.compare import compare
    from distill.models.load import without_bars

    exported = _reload(folder).to(source_model.device)  # type: ignore[arg-type]
    training = source_model.training
    source_model.eval()
    try:
        with without_bars(str(folder)):  # packed weights are unpacked at the first forward
            result = compare(
                lambda batch: _logits(source_model, batch), lambda batch: _logits(exported, batch), batches, folder
            )
    finally:
        source_model.train(training)
    return require_close(result, max_kl, folder)


def _reload(folder: Path) -> PreTrainedModel:
    """The exported model, loaded as any stranger would.

    Raises:
        DistillError: transformers cannot load it, or would fill in or leave out weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from distill.models.load import without_bars

    try:
        with without_bars(str(folder)):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:
        # a damaged folder fails in as many ways as it can be damaged; each of them is the same finding
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DistillError(f"{folder}: the exported model does not load in transformers ({first.strip()})") from error
    model, report = loaded
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, keys in wrong.items():
        if keys:
            raise DistillError(
                f"{folder}: the exported weights do not fit the config: {kind.replace('_', ' ')}: {keys[0]}"
            )
    return model.eval()


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """[batch, sequence, vocabulary], fp32."""
    return model(**model_inputs(batch, model.device), use_cache=False).logits.float()
