"""A model folder for plain transformers: weights, tokenizer, generation settings and a model card.

Use it for transformers and for engines that read its folders, such as vLLM. The weights of a quantized model are in the
compressed-tensors format.

Source: https://huggingface.co/docs/hub/model-cards for the card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.core.markdown import escaped
from distill.exporters.base import CardFacts, ExporterSpec, VerifyResult, cache_notes, new_folder
from distill.exporters.deliver import copy_files, files_to_copy
from distill.models.head_names import HUB_TASKS, auto_class, task_of
from distill.models.load import Task, load_config
from distill.models.sentence_files import copy_sentence_files, is_sentence_encoder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class HuggingFace(ExporterSpec):
    """A Hugging Face folder with a model card, loaded by ``from_pretrained``."""

    engine: ClassVar[str] = "plain transformers, in fp32,"
    tasks: ClassVar[tuple[Task, ...]] = (
        "causal_lm",
        "masked_lm",
        "classification",
        "token_classification",
        "embedding",
    )

    kind: Literal["huggingface"] = "huggingface"

    def check_files(self, folder: Path) -> None:
        files_to_copy(folder, weights=True)

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        """Copy the model and its tokenizer, but not the lineage, which contains paths of this machine."""
        new_folder(source_folder, folder)
        copy_files(source_folder, folder, weights=True)
        copy_sentence_files(source_folder, folder)
        return cache_notes(
            source_folder, "which plain transformers does not have; it was verified with this cache added"
        )

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        from distill.exporters.plain_transformers import verify

        return verify(source_model, folder, batches, max_kl=self.max_kl)

    def label(self, folder: Path) -> str:
        return "compressed-tensors" if _scheme(folder) else "safetensors"

    def post_training(self, folder: Path) -> ExporterSpec | None:
        return None if _scheme(folder) else self

    def card(self, folder: Path) -> CardFacts:
        scheme, task = _scheme(folder), task_of(load_config(str(folder)))
        return CardFacts(
            library="sentence-transformers" if is_sentence_encoder(folder) else "transformers",
            tags=("compressed-tensors",) if scheme else (),
            how_to_load=_how_to_load(scheme, task, is_pooled=is_sentence_encoder(folder)),
            quantized=scheme is not None,
            task=HUB_TASKS[task],
        )


def _scheme(folder: Path) -> Mapping[str, Any] | None:
    """Of the low-bit weights of a folder; None if it has none."""
    scheme: Mapping[str, Any] | None = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    return scheme


def _how_to_load(scheme: Mapping[str, Any] | None, task: Task, *, is_pooled: bool) -> str:
    loader = auto_class(task)
    code = (
        f"```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its Hub id\n'
        f"model = {loader}.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )
    if is_pooled:
        code = (
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer(".")  # this folder, or its Hub id\n'
            'vectors = model.encode(["a text", "another text"])\n```'
        )
    if scheme is None:
        return code
    return (
        f"{code}\n\nThe weights are in the compressed-tensors {escaped(scheme.get('format', ''))} format: "
        "run `pip install compressed-tensors` first. Transformers unpacks them at the first forward pass, so they save "
        "disk space and transfer, but no memory; an engine with kernels for the format saves both."
    )
