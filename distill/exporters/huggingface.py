"""A model folder that plain transformers loads: weights, tokenizer, generation settings and a model card.

The deliverable of choice when the receiver uses transformers, or an engine that reads its folders. A model that was
quantized stays packed, in the compressed-tensors format.

Source: https://huggingface.co/docs/hub/model-cards for the card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.core.artifact import LINEAGE
from distill.core.batch import model_inputs
from distill.core.errors import DistillError
from distill.exporters.base import CardFacts, ExporterSpec, VerifyResult, cache_notes, new_folder, require_close

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DELIVERED = {".safetensors", ".json", ".jinja", ".txt", ".model"}


class HuggingFace(ExporterSpec):
    """A Hugging Face folder with a model card, loaded by ``from_pretrained``."""

    engine: ClassVar[str] = "plain transformers, in fp32,"

    kind: Literal["huggingface"] = "huggingface"

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        """Copy the artifact. The lineage file stays behind, since it names folders of the machine."""
        new_folder(source_folder, folder)
        for file in sorted(source_folder.iterdir()):
            if file.is_file() and file.suffix in DELIVERED and file.name != LINEAGE and not file.name.startswith("."):
                shutil.copyfile(file, folder / file.name)
        return cache_notes(source_folder, "which plain transformers does not have: it was verified with it put in")

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        return verify(source_model, folder, batches, max_kl=self.max_kl)

    def card(self, folder: Path) -> CardFacts:
        scheme = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        return CardFacts(
            library="transformers",
            tags=("compressed-tensors",) if scheme else (),
            how_to_load=_how_to_load(scheme),
            quantized=scheme is not None,
        )


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


def _how_to_load(scheme: Mapping[str, Any] | None) -> str:
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its Hub id\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )
    if scheme is None:
        return code
    return (
        f"{code}\n\nThe weights are in the compressed-tensors {scheme.get('format', '')} format: "
        "`pip install compressed-tensors` first. Transformers unpacks them at the first forward pass, so it saves disk "
        "and transfer, not memory; an engine with kernels for the format saves both."
    )


def _reload(folder: Path) -> PreTrainedModel:
    """The exported model, loaded as any stranger would.

    Raises:
        DistillError: transformers cannot load it, or would fill in or leave out weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from distill.models.kv_cache import cache_type, round_cache
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
    if (cache := cache_type(model.config)) is not None:
        round_cache(model, cache)
    return model.eval()


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """[batch, sequence, vocabulary], fp32."""
    return model(**model_inputs(batch, model.device), use_cache=False).logits.float()
